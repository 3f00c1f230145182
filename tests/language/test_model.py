"""Policies: their log-probabilities are those of transformers, and what cannot be used is named."""

import json
import random
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from holdfast.errors import ModelError
from holdfast.language.model import PRESETS, LanguagePolicy, load_policy, load_tokenizer
from holdfast.language.tokenizers import build_tokenizer, train_bpe

SMALL = {"hidden_size": 32, "intermediate_size": 48}
TEXT = "Héllo  wörld, it's 2 o'clock — ok\n"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def build(tokenizer):
    """A small policy from a preset, with options replaced."""

    def make(name="tiny-qwen2", **options):
        options = {"tokenizer": tokenizer, "config": SMALL, **options}
        return load_policy(name, **options)

    return make


@pytest.fixture
def saved(build, tmp_path):
    """A folder with a small model, as ``save_pretrained`` writes it."""
    folder = tmp_path / "model"
    build().save_pretrained(folder)
    return folder


def some_ids(rows: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def dense_logps(model, ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of every token but the first, from transformers' own logits."""
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def sharpen(module: torch.nn.Module, factor: float = 8.0) -> None:
    """Larger weights: logits then differ so much that a wrong scale or cap would show."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)


# Log-probabilities --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_score_like_transformers(name, tokenizer):
    policy = load_policy(name, tokenizer=tokenizer).eval()
    sharpen(policy)
    ids = some_ids()
    assert_close(policy(ids, ids).logps, dense_logps(policy.base, ids), rtol=0, atol=1e-5)
    assert all(parameter.requires_grad for parameter in policy.parameters())


FAMILIES = {
    # The output layer is scaled, divided or capped, each under the family's own name.
    "Gemma2Config": {"head_dim": 8, "final_logit_softcapping": 1.5},
    "Gemma3TextConfig": {"head_dim": 8, "final_logit_softcapping": 1.5},
    "CohereConfig": {"logit_scale": 0.3},
    "GraniteConfig": {"logits_scaling": 4.0},
    "HyperCLOVAXConfig": {"logits_scaling": 4.0},
    "FalconH1Config": {
        "lm_head_multiplier": 0.3,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    # A bias on the output layer; decoders under other names; recurrence instead of attention.
    "PhiConfig": {},
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "MambaConfig": {"state_size": 4},
}


def of_family(name: str, **options) -> torch.nn.Module:
    config = {
        **SMALL,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "vocab_size": 260,
        "pad_token_id": 256,
        "bos_token_id": None,
        "eos_token_id": 257,
        **options,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**config)).eval()
    sharpen(model)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_does_to_its_logits_is_followed(name, tokenizer):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = of_family(name, **FAMILIES[name])
    policy = LanguagePolicy(model, tokenizer).eval()
    ids = some_ids()
    expected = dense_logps(model, ids)
    assert_close(policy(ids, ids).logps, expected, rtol=0, atol=1e-5)
    for option in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if option in FAMILIES[name]:  # The test could not fail if the option did nothing.
            setattr(model.config, option, 1.0 if option != "final_logit_softcapping" else None)
            assert (policy(ids, ids).logps - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        # It caps its logits under a name that nothing else uses.
        ("RecurrentGemmaConfig", {"lru_width": 32, "logits_soft_cap": 1.0}, "changes the logits"),
        ("BertConfig", {}, "not causal"),
        # Keys of 2 heads cannot be shared by 3.
        ("Qwen2Config", {"num_attention_heads": 3, "hidden_size": 33}, "cannot be evaluated"),
    ],
)
def test_a_family_that_cannot_be_followed_is_refused_by_name(name, options, reason, tokenizer):
    model = of_family(name, **options)
    with pytest.raises(ModelError) as caught:
        LanguagePolicy(model, tokenizer)
    message = str(caught.value)
    assert reason in message and type(model).__name__ in message
    assert repr(model.config.model_type) in message and "model family" in message


def test_a_model_that_looks_ahead_is_refused_since_padding_would_reach_its_tokens(tokenizer):
    model = of_family("Qwen2Config")

    def looks_ahead(module, arguments, output):
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, True)
        return output

    LanguagePolicy(model, tokenizer)
    model.get_decoder().register_forward_hook(looks_ahead)
    with pytest.raises(ModelError, match="not causal"):
        LanguagePolicy(model, tokenizer)


@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-gemma2"])
def test_padding_on_the_right_without_a_mask_changes_no_token(name, build):
    policy = build(name).eval()
    sharpen(policy)
    rows = [some_ids(1, length, seed=length) for length in (3, 9, 14)]
    ids = torch.full((3, 14), policy.pad_id)
    labels = torch.full((3, 14), -100)
    for index, row in enumerate(rows):
        ids[index, : row.shape[1]] = row
        labels[index, : row.shape[1]] = row
    together = policy(ids, labels)
    for index, row in enumerate(rows):
        count = row.shape[1] - 1
        alone = policy(row, row).logps[0]
        assert_close(together.logps[index, :count], alone, rtol=0, atol=1e-5)
        assert not together.mask[index, count:].any()
        assert not together.logps[index, count:].any()


def test_only_labelled_tokens_are_scored(build):
    policy = build().eval()
    ids = some_ids(1, 8)
    labels = torch.where(torch.arange(8) < 5, -100, ids)
    scored = policy(ids, labels, statistics=True)
    expected = dense_logps(policy.base, ids)
    assert scored.mask.tolist() == [[False] * 4 + [True] * 3]
    assert_close(scored.logps[scored.mask], expected[scored.mask], rtol=0, atol=1e-5)
    with torch.no_grad():
        logits = policy.base(input_ids=ids).logits[:, :-1]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert_close(scored.entropy[scored.mask], entropy[scored.mask], rtol=0, atol=1e-5)
    correct = logits.argmax(-1) == ids[:, 1:]
    assert torch.equal(scored.correct[scored.mask], correct[scored.mask])


def test_the_gradient_is_that_of_the_dense_loss(build):
    ids = some_ids()
    ours, theirs = build(), build()
    (-ours(ids, ids).logps.sum()).backward()
    logits = theirs.base(input_ids=ids).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("lora", [None, {"r": 2, "lora_alpha": 4}])
def test_gradient_checkpointing_gives_the_same_gradients(lora, build):
    ids = some_ids()
    gradients = []
    for checkpointing in (False, True):
        policy = build(lora=lora).train()
        if checkpointing:
            policy.enable_gradient_checkpointing()
            layers = policy.base.get_decoder().layers
            assert all(layer.gradient_checkpointing for layer in layers)
        (-policy(ids, ids).logps.sum()).backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.requires_grad})
    assert gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_the_padding_token_falls_back_on_the_end_token(tokenizer):
    bare = build_tokenizer()
    assert LanguagePolicy(of_family("Qwen2Config"), bare).pad_id == tokenizer.pad_token_id
    bare.pad_token = None
    assert LanguagePolicy(of_family("Qwen2Config"), bare).pad_id == tokenizer.eos_token_id


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_weights_still_give_log_probabilities_in_float32(dtype, build):
    policy = build(dtype=dtype).eval()
    assert {p.dtype for p in policy.parameters()} == {getattr(torch, dtype)}
    ids = some_ids()
    logps = policy(ids, ids).logps
    assert logps.dtype == torch.float32
    assert_close(logps, dense_logps(policy.base, ids), rtol=0, atol=0.05)


# LoRA and the reference ---------------------------------------------------------------------------

LORA = {"r": 2, "lora_alpha": 4.0, "lora_dropout": 0.5, "target_modules": "all-linear"}


def perturb(policy: LanguagePolicy, seed: int = 1) -> None:
    """Move every trainable weight, as an update would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_with_lora_only_the_adapter_is_trained(more, build):
    policy = build(lora={**LORA, **more})
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    ids = some_ids()
    (-policy.train()(ids, ids).logps.sum()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in policy.parameters())


def test_the_reference_of_an_adapted_policy_is_its_base(build):
    base, policy = build().eval(), build(lora=LORA).train()
    perturb(policy)
    ids = some_ids()
    expected = base(ids, ids).logps
    with policy.reference() as reference:
        logps = reference(ids, ids).logps
        assert not reference.training and not logps.requires_grad
    assert torch.equal(logps, expected), "without adapter and dropout, bit for bit"
    assert policy.training, "the mode is as before"
    assert (policy.eval()(ids, ids).logps - expected).abs().max() > 0.01, "the adapter is on again"


def test_the_reference_without_adapter_is_the_policy_itself(build):
    policy = build().eval()
    ids = some_ids()
    with policy.reference() as reference:
        assert torch.equal(reference(ids, ids).logps, policy(ids, ids).logps)
    assert not policy.training


def test_an_error_inside_the_reference_leaves_the_policy_as_it_was(build):
    policy = build(lora=LORA).train()
    perturb(policy)
    ids = some_ids()
    before = policy.eval()(ids, ids).logps
    with pytest.raises(ZeroDivisionError), policy.train().reference():
        1 / 0  # noqa: B018
    assert policy.training
    assert torch.equal(policy.eval()(ids, ids).logps, before)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["typo"], "'typo' matches nothing"),
        (["q_proj", "v_prj"], "'v_prj' matches nothing"),
        ("layers.*typo", "'layers.*typo' matches nothing"),
        ("(q_proj", "'(q_proj' matches nothing"),
        ([], "[] matches nothing"),
        (["input_layernorm"], "['input_layernorm'] matches nothing that can be adapted"),
    ],
)
def test_a_lora_target_that_matches_nothing_is_answered_with_the_linear_layers(
    targets, message, build
):
    with pytest.raises(ModelError) as caught:
        build(lora={**LORA, "target_modules": targets})
    found = str(caught.value)
    assert found.startswith("policy.lora.target_modules") and message in found
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in found
    assert ("Did you mean 'v_proj'?" in found) == ("v_prj" in targets)


def test_an_adapter_on_the_output_layer_is_refused_since_it_would_not_be_trained(build):
    with pytest.raises(ModelError, match="adapts the output layer"):
        build("tiny-llama", lora={**LORA, "target_modules": ["q_proj", "lm_head"]})


# Seeds and fingerprints ---------------------------------------------------------------------------


def test_building_is_decided_by_the_seed_and_leaves_every_global_generator_alone(build):
    torch.manual_seed(123)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    first, again, other = (build(lora=LORA, seed=seed) for seed in (1, 1, 2))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()
    assert torch.equal(before[0], after[0]) and before[1] == after[1]
    assert all(np.array_equal(x, y) for x, y in zip(before[2], after[2], strict=True))
    states = [policy.state_dict() for policy in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for part in ("embed_tokens", "lora_A"):
        names = [name for name in states[0] if part in name]
        assert names and not any(torch.equal(states[0][n], states[2][n]) for n in names)


def test_the_adapter_does_not_change_the_weights_under_it(build):
    plain, adapted = build(seed=5), build(seed=5, lora=LORA)
    for mine, theirs in zip(
        plain.base.get_decoder().norm.parameters(),
        adapted.base.get_decoder().norm.parameters(),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    ids = some_ids()
    assert torch.equal(plain.eval()(ids, ids).logps, adapted.eval()(ids, ids).logps)


def test_the_fingerprint_is_that_of_the_policy_and_not_of_its_origin(build, saved):
    assert build().fingerprint() == build().fingerprint()
    assert load_policy(str(saved)).fingerprint() == build().fingerprint()


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"lora": LORA},
        # Equal weights, read differently.
        {"config": {**SMALL, "num_attention_heads": 2, "num_key_value_heads": 1}},
        {"config": {**SMALL, "rms_norm_eps": 0.1}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_another_policy_has_another_fingerprint(options, build):
    assert build().fingerprint() != build(**options).fingerprint()


def test_one_changed_weight_changes_the_fingerprint(build):
    policy = build()
    before = policy.fingerprint()
    with torch.no_grad():
        next(policy.parameters()).view(-1)[0].add_(1e-6)
    assert policy.fingerprint() != before


def test_a_state_that_is_one_number_has_a_fingerprint_too(build):
    policy = build()
    policy.register_buffer("count", torch.tensor(1.0))
    before = policy.fingerprint()
    policy.count += 1
    assert policy.fingerprint() != before


# Saving and loading -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-llama", "tiny-gemma2"])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_saved_policy_is_read_back_as_the_same(name, kind, build, tmp_path):
    """With its tokenizer, which transformers would replace by the family's own for some."""
    tokenizer = build_tokenizer() if kind == "bytes" else train_bpe([TEXT] * 3, 300)
    policy = build(name, tokenizer=tokenizer)
    policy.save_pretrained(tmp_path)
    again = load_policy(str(tmp_path))
    assert again.fingerprint() == policy.fingerprint()
    assert len(again.tokenizer) == len(tokenizer)
    assert again.tokenizer(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = [
        t.apply_chat_template(messages, tokenize=False) for t in (again.tokenizer, tokenizer)
    ]
    assert rendered[0] == rendered[1]
    ids = some_ids()
    assert torch.equal(again.eval()(ids, ids).logps, policy.eval()(ids, ids).logps)


def test_a_saved_adapter_is_read_by_peft(build, tmp_path):
    policy = build(lora=LORA)
    perturb(policy)
    policy.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build().base, tmp_path)
    ids = some_ids()
    again = LanguagePolicy(again, policy.tokenizer).eval()
    assert_close(again(ids, ids).logps, policy.eval()(ids, ids).logps, rtol=0, atol=1e-6)


def test_a_preset_needs_a_tokenizer():
    with pytest.raises(ModelError, match="preset 'tiny-qwen2' needs a tokenizer"):
        load_policy("tiny-qwen2")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"hiden_size": 32},
            "policy.config.hiden_size: Qwen2Config has no such entry; did you mean",
        ),
        ({"vocab_size": 10}, "policy.config.vocab_size: this entry follows from the tokenizer"),
        ({"rms_norm_eps": "1e-6"}, "expected float, got str"),
        ({"hidden_size": 0}, "cannot build Qwen2Config"),
        ({"hidden_act": "nonesuch"}, "'nonesuch'"),
        ({"num_attention_heads": 5}, "cannot be evaluated"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(config, message, build):
    with pytest.raises(ModelError) as caught:
        build(config={**SMALL, **config})
    assert message in str(caught.value)


def test_only_presets_have_a_configuration_to_change(saved):
    with pytest.raises(ModelError, match="policy.config changes the configuration of a preset"):
        load_policy(str(saved), config={"hidden_size": 64})


def test_the_attention_that_was_asked_for_is_used_or_refused(build, saved):
    assert build(attn_implementation="eager").base.config._attn_implementation == "eager"
    for make in (build, lambda **options: load_policy(str(saved), **options)):
        with pytest.raises(ModelError, match="nonesuch"):
            make(attn_implementation="nonesuch")


def test_a_model_directory_that_is_missing_is_named(tmp_path):
    with pytest.raises(ModelError, match="model directory .*/absent does not exist"):
        load_policy(str(tmp_path / "absent"))
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="model directory .*/file is a file"):
        load_policy(str(tmp_path / "file"))


def test_a_misspelt_preset_is_answered_with_the_nearest(tokenizer):
    with pytest.raises(ModelError, match="Did you mean the preset 'tiny-qwen2'"):
        load_policy("tiny-qwen", tokenizer=tokenizer)


@pytest.mark.parametrize("family", ["Qwen2Config", "LlamaConfig", "GPT2Config"])
def test_a_model_directory_without_tokenizer_is_refused(family, tmp_path):
    of_family(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_policy(str(tmp_path))
    message = str(caught.value)
    assert "has no tokenizer that can be loaded" in message and "policy.tokenizer" in message
    assert load_policy(str(tmp_path), tokenizer=build_tokenizer()).pad_id == 256


def test_a_tokenizer_that_does_not_belong_to_the_model_is_refused(saved):
    larger = train_bpe([TEXT] * 3, 300)
    with pytest.raises(ModelError, match="embeddings for 260: they do not belong together"):
        load_policy(str(saved), tokenizer=larger)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_a_weight(folder, name="model.norm.weight"):
    weights = load_file(folder / "model.safetensors")
    weights.pop(name)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def reconfigure(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


DAMAGES = {
    "no config": (lambda d: (d / "config.json").unlink(), "cannot load model"),
    "config cut short": (lambda d: cut(d / "config.json"), "not a valid JSON file"),
    "unknown family": (lambda d: reconfigure(d, model_type="nonesuch"), "nonesuch"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no file named model.safetensors"),
    "weights cut short": (lambda d: cut(d / "model.safetensors"), "cannot load model"),
    "a weight missing": (without_a_weight, "model.norm.weight is missing"),
    "another shape": (
        lambda d: reconfigure(d, intermediate_size=64),
        "mlp.down_proj.weight has shape (32, 48) instead of (32, 64)",
    ),
    "tokenizer cut short": (lambda d: cut(d / "tokenizer.json"), "no tokenizer that can be loaded"),
    "tokenizer not UTF-8": (
        lambda d: (d / "tokenizer_config.json").write_bytes(b'{"a": "\xff"}'),
        "no tokenizer that can be loaded",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_directory_is_refused(damage, saved):
    load_policy(str(saved))
    spoil, message = DAMAGES[damage]
    spoil(saved)
    with pytest.raises(ModelError) as caught:
        load_policy(str(saved))
    assert message in str(caught.value) and str(saved) in str(caught.value)


def test_a_tokenizer_of_a_family_is_loaded_by_its_own_class(saved, tmp_path):
    """Only a tokenizer that was saved as generic is taken as it is."""
    own = transformers.Qwen2Tokenizer(vocab={chr(65 + n): n for n in range(26)}, merges=[])
    folder = tmp_path / "own"
    shutil.copytree(saved, folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    own.save_pretrained(folder)
    assert type(load_tokenizer(str(folder))) is transformers.Qwen2Tokenizer
