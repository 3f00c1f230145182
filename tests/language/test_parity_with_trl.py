"""The same rows, losses, metrics and updates as TRL, from the same weights."""

import json
import logging
from pathlib import Path

import pytest
import torch
from helpers.tiny import WORDS, demonstrations, preferences, write_recipe, write_rows
from safetensors.torch import load_file

from holdfast.language.data import RawRow, load_demonstrations, load_preferences
from holdfast.language.model import LanguagePolicy, load_policy
from holdfast.language.tokenizers import CHAT_TEMPLATE, build_tokenizer, train_bpe
from holdfast.recipe import load_recipe
from holdfast.run import train

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

SMALL = {"hidden_size": 32, "intermediate_size": 48}
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    """Progress bars and advice of trainers that are only compared with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        datasets.disable_progress_bars()
        logging.disable(logging.WARNING)
        yield
        logging.disable(logging.NOTSET)
        datasets.enable_progress_bars()


def perturbed(policy: LanguagePolicy, seed: int, size: float = 0.02) -> LanguagePolicy:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return policy


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A policy and, some way off, its reference: tiny Qwen2 models in local directories."""
    folders = {}
    for seed, name in enumerate(("policy", "reference")):
        folders[name] = tmp_path_factory.mktemp(name)
        policy = load_policy("tiny-qwen2", tokenizer=build_tokenizer(), config=SMALL)
        perturbed(policy, seed).save_pretrained(folders[name])
    return folders


def options(tmp_path: Path, **more) -> dict:
    return {
        "output_dir": str(tmp_path / "trl"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "disable_tqdm": True,
        **more,
    }


def tokenizers():
    text = [f"{row['prompt']}{row['completion']}" for row in demonstrations(48)]
    text += [f"{row['prompt']}{row['chosen']}" for row in preferences(48)]
    return {"bytes": build_tokenizer(), "bpe": train_bpe(text, 400)}


def trl_model(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def losses_of(history: list[dict], key: str = "loss") -> list[float]:
    return [entry[key] for entry in history if key in entry]


def recorded(run: Path, name: str) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train" and name in line["objectives"]]


def ours(tmp_path: Path, name: str, models: dict[str, Path], rows: list[dict], **more) -> Path:
    """A run on one objective alone, in which every batch holds all rows."""
    entry = {
        "kind": {"sft": "nll", "dpo": "dpo"}[name],
        "data": {"path": f"{name}.jsonl", "held_out": 0, "probe": 0, "max_length": 96},
        "batch_size": len(rows),
        "micro_batch_size": 3,  # however the batch is cut
        **more,
    }
    path = write_recipe(
        tmp_path,
        policy={"model_name_or_path": str(models["policy"])},
        objectives={name: entry},
        schedule={"kind": "mix", "weights": {name: 1}},
        training={"max_steps": STEPS, "learning_rate": 0.003, "max_grad_norm": 1.0},
    )
    write_rows(tmp_path / f"{name}.jsonl", rows)
    return train(load_recipe(str(path)))


def assert_same_weights(run: Path, model: torch.nn.Module, atol: float) -> None:
    saved = load_file(run / "model" / "model.safetensors")
    theirs = dict(model.named_parameters())
    assert saved.keys() == theirs.keys()
    for name, weight in saved.items():
        torch.testing.assert_close(weight, theirs[name].detach(), rtol=0, atol=atol, msg=name)


# Losses and updates -------------------------------------------------------------------------------


def test_fine_tuning_has_the_losses_and_updates_of_trl(models, tmp_path):
    rows = demonstrations(8)
    rows[3]["completion"] = " a completion that is much longer than all of the others"
    trainer = trl.SFTTrainer(
        trl_model(models["policy"]),
        args=trl.SFTConfig(**options(tmp_path, per_device_train_batch_size=len(rows))),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=build_tokenizer(),
    )
    trainer.train()
    theirs = losses_of(trainer.state.log_history)
    run = ours(tmp_path, "sft", models, rows)
    lines = recorded(run, "sft")
    mine = [line["objectives"]["sft"]["loss"] for line in lines]
    assert len(theirs) == STEPS and theirs[0] - theirs[-1] > 0.1
    assert mine[0] == pytest.approx(theirs[0], abs=1e-4)
    assert mine == pytest.approx(theirs, abs=1e-4)
    norms = losses_of(trainer.state.log_history, "grad_norm")
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-3)
    assert max(norms) > 1, "clipping takes part in the comparison"
    assert_same_weights(run, trainer.model, atol=2e-4)


def test_accumulation_divides_by_the_tokens_of_the_whole_batch_as_in_trl(models, tmp_path):
    rows = demonstrations(8)
    rows[3]["completion"] = " a completion that is much longer than all of the others"
    config = options(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer = trl.SFTTrainer(
        trl_model(models["policy"]),
        args=trl.SFTConfig(**config),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=build_tokenizer(),
    )
    trainer.train()
    run = ours(tmp_path, "sft", models, rows)
    mine = [line["objectives"]["sft"]["loss"] for line in recorded(run, "sft")]
    assert mine == pytest.approx(losses_of(trainer.state.log_history), abs=1e-4)
    assert_same_weights(run, trainer.model, atol=2e-4)


@pytest.mark.parametrize("variant", ["sigmoid", "ipo", "hinge"])
def test_preference_tuning_has_the_losses_metrics_and_updates_of_trl(variant, models, tmp_path):
    rows = preferences(8)
    config = options(
        tmp_path,
        per_device_train_batch_size=len(rows),
        loss_type=[variant],
        beta=0.2,
        max_length=96,
    )
    trainer = trl.DPOTrainer(
        trl_model(models["policy"]),
        ref_model=trl_model(models["reference"]),
        args=trl.DPOConfig(**config),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=build_tokenizer(),
    )
    trainer.train()
    theirs = losses_of(trainer.state.log_history)
    reference = {"reference": str(models["reference"])}
    run = ours(tmp_path, "dpo", models, rows, loss_type=variant, beta=0.2, **reference)
    lines = [line["objectives"]["dpo"] for line in recorded(run, "dpo")]
    mine = [line["loss"] for line in lines]
    start = {"sigmoid": 0.6931, "ipo": 6.25, "hinge": 1.0}[variant]
    assert abs(theirs[0] - start) > 1e-3, "policy and reference differ from the first step on"
    assert mine[0] == pytest.approx(theirs[0], abs=1e-4)
    assert mine == pytest.approx(theirs, rel=1e-4, abs=2e-4)
    assert lines[0]["count"] == len(rows)
    for name, value in lines[0]["metrics"].items():
        (first, *_) = losses_of(trainer.state.log_history, name)
        assert value == pytest.approx(first, rel=1e-4, abs=1e-4), name
    compared = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    assert compared < set(lines[0]["metrics"])
    assert_same_weights(run, trainer.model, atol=2e-4)


def test_the_reference_starts_as_the_policy_as_in_trl(models, tmp_path):
    """Without a reference of its own the loss is log 2 first, and TRL's after the first update."""
    rows = preferences(8)
    config = options(tmp_path, per_device_train_batch_size=len(rows), beta=0.2, max_length=96)
    trainer = trl.DPOTrainer(
        str(models["policy"]),
        args=trl.DPOConfig(**config),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=build_tokenizer(),
    )
    trainer.train()
    theirs = losses_of(trainer.state.log_history)
    run = ours(tmp_path, "dpo", models, rows, beta=0.2)
    mine = [line["objectives"]["dpo"]["loss"] for line in recorded(run, "dpo")]
    assert theirs[0] == pytest.approx(0.6931, abs=1e-4) and theirs[1] < 0.69
    assert mine == pytest.approx(theirs, abs=2e-4)


# Rows ---------------------------------------------------------------------------------------------

# The same markup, with the words of the assistant marked for TRL's ``assistant_only_loss``.
MARKED = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>\\n' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"]
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


STANDARD = [
    *demonstrations(3),
    {"prompt": "Q: no space?\nA:", "completion": "glued 🙂 é"},
    {"prompt": "quick", "completion": "ly done"},  # a token may span the boundary
    {"prompt": "Long?", "completion": " word" * 40},
    {"prompt": "Ended", "completion": " already<|end|>"},
]
CONVERSATIONS = [
    {"prompt": turns(f"Is {word} warm?"), "completion": [{"role": "assistant", "content": word}]}
    for word in WORDS[:3]
]
CONVERSATIONS.append(
    {
        "prompt": turns("One?", "one", "Two?"),
        "completion": [{"role": "assistant", "content": "two  \n words"}],
    }
)
DEMONSTRATIONS = {
    "prompt and completion": STANDARD,
    "text": [{"text": row["prompt"] + row["completion"]} for row in STANDARD],
    "conversation": CONVERSATIONS,
    "messages": [
        {"messages": turns("One?", "one", "Two?", "two")},
        {"messages": [{"role": "system", "content": "Terse."}, *turns("A?", " b ")]},
    ],
}


def sft_rows(rows: list[dict], tokenizer, tmp_path: Path, **more) -> list[tuple[list, list]]:
    """Tokens and the mask of those that count, as TRL prepares them."""
    trainer = trl.SFTTrainer(
        load_policy("tiny-qwen2", tokenizer=tokenizer, config=SMALL).base,
        args=trl.SFTConfig(**options(tmp_path, max_length=96, **more)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return [
        (list(row["input_ids"]), [label != -100 for label in row["labels"]])
        for row in trainer.train_dataset
    ]


def raw(rows: list[dict]) -> list[RawRow]:
    return [RawRow(row, f"rows:{number}") for number, row in enumerate(rows, 1)]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("shape", DEMONSTRATIONS)
def test_demonstrations_have_the_tokens_and_masks_of_trl(shape, kind, tmp_path):
    tokenizer = tokenizers()[kind]
    rows = DEMONSTRATIONS[shape]
    marks = {}
    if shape == "messages":
        tokenizer.chat_template = MARKED
        marks = {"assistant_only_loss": True}
    theirs = sft_rows(rows, tokenizer, tmp_path, **marks)
    tokenizer.chat_template = CHAT_TEMPLATE
    mine, _ = load_demonstrations(raw(rows), tokenizer, max_length=96)
    assert len(mine) == len(theirs) == len(rows)
    for row, (ids, mask) in zip(mine, theirs, strict=True):
        assert row.tokens.input_ids.tolist() == ids
        # Whether the first token counts makes no difference: nothing predicts it.
        assert row.tokens.counted.tolist()[1:] == mask[1:]
    if shape in ("prompt and completion", "text"):
        assert any(len(ids) == 96 for ids, _ in theirs), "one row is cut at the limit"


PREFERENCES = {
    "standard": [
        *preferences(3),
        {"prompt": "quick", "chosen": "ly done", "rejected": " not"},
        {"prompt": "Long?", "chosen": " word" * 40, "rejected": " short"},
    ],
    "conversation": [
        {
            "prompt": turns("One?", "one", "Two?"),
            "chosen": [{"role": "assistant", "content": word}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for word in WORDS[:3]
    ],
    "implicit prompt": [
        {"chosen": turns("Hot?", "one", "So?", word), "rejected": turns("Hot?", "one", "So?", "no")}
        for word in WORDS[:3]
    ],
}


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("shape", PREFERENCES)
def test_preferences_have_the_tokens_and_boundaries_of_trl(shape, kind, tmp_path):
    tokenizer = tokenizers()[kind]
    rows = PREFERENCES[shape]
    policy = load_policy("tiny-qwen2", tokenizer=tokenizer, config=SMALL)
    trainer = trl.DPOTrainer(
        policy.base,
        ref_model=load_policy("tiny-qwen2", tokenizer=tokenizer, config=SMALL).base,
        args=trl.DPOConfig(**options(tmp_path, max_length=96)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    mine, _ = load_preferences(raw(rows), tokenizer, max_length=96)
    assert len(mine) == len(trainer.train_dataset) == len(rows)
    # The trainer cuts to max_length when it builds a batch, so batches are what is compared.
    for row, prepared in zip(mine, trainer.train_dataset, strict=True):
        batch = trainer.data_collator([prepared])
        for index, side in enumerate((row.chosen, row.rejected)):
            real = batch["attention_mask"][index].bool()
            assert side.input_ids.tolist() == batch["input_ids"][index][real].tolist()
            assert side.counted.tolist() == batch["completion_mask"][index][real].bool().tolist()
