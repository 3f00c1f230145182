"""A reward model scores a completion as transformers does, whatever stands beside it."""

import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Qwen2Config,
)

from holdfast.errors import ModelError, TrainingError
from holdfast.language.rewards import Rewards, load_reward, sequence_classifier
from holdfast.language.tokenizers import build_tokenizer

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 260}
FAMILIES = {
    "decoder": (Qwen2Config, {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "encoder": (BertConfig, {"num_attention_heads": 2}),
}
PROMPTS = ["Hello", "A longer question, is it?", "x", "Hello"]
COMPLETIONS = [" world", " yes", " with an answer that is much longer than all the others", ""]


def save(folder, family="decoder", auto=AutoModelForSequenceClassification, **options):
    config_class, sizes = FAMILIES[family]
    values = {"num_labels": 1, "pad_token_id": None, "max_position_embeddings": 128, **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config_class(**SIZES, **sizes, **values))
        for parameter in model.parameters():  # so large that one token more or less shows
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


def alone(path, texts):
    """The score of each text by itself, so without any padding."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = build_tokenizer()
    with torch.no_grad():
        return [
            model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0].item()
            for text in texts
        ]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("pad_token_id", [None, 256])
def test_scores_are_those_of_each_text_alone(tmp_path, family, batch_size, pad_token_id):
    path = save(tmp_path, family, pad_token_id=pad_token_id)
    reward = sequence_classifier(path, batch_size=batch_size)
    scores = reward(PROMPTS, COMPLETIONS, [[]] * 4)
    expected = alone(path, [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    assert len(set(scores)) == 4 and all(type(score) is float for score in scores)
    assert_close(torch.tensor(scores), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_conversations_go_through_the_chat_template(tmp_path):
    path = save(tmp_path)
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    completions = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    scores = sequence_classifier(path)(prompts, completions, [[]] * 4)
    expected = alone(
        path,
        [
            f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"
            for prompt, text in zip(PROMPTS, COMPLETIONS, strict=True)
        ],
    )
    assert_close(torch.tensor(scores), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_special_tokens_are_added_to_texts_but_not_to_what_a_template_wrote(tmp_path):
    path = save(tmp_path)
    plain = sequence_classifier(path)
    tokenizer = build_tokenizer()
    end = ("<|end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $0 <|end|>", special_tokens=[end]
    )
    tokenizer.save_pretrained(path)
    adding = sequence_classifier(path)
    by_hand = plain(["<|end|>Hello"], [" world<|end|>"], [[]])
    assert_close(adding(["Hello"], [" world"], [[]]), by_hand, rtol=1e-5, atol=1e-5)
    messages = [[{"role": "user", "content": "a"}]], [[{"role": "assistant", "content": "b"}]]
    assert adding(*messages, [[]]) == plain(*messages, [[]])


def test_the_global_generator_is_left_alone_and_no_graph_is_made(tmp_path):
    path = save(tmp_path)
    before = torch.random.get_rng_state()
    reward = load_reward("sequence_classifier", {"model_name_or_path": path})
    first = reward(PROMPTS, COMPLETIONS, [[]] * 4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.is_grad_enabled() and first == reward(PROMPTS, COMPLETIONS, [[]] * 4)


def test_a_model_with_another_number_of_labels_is_refused(tmp_path):
    with pytest.raises(ModelError, match="has 2 labels: a reward model has one"):
        sequence_classifier(save(tmp_path, num_labels=2))


def test_a_model_without_a_trained_score_is_refused(tmp_path):
    path = save(tmp_path, auto=AutoModelForCausalLM)
    before = torch.random.get_rng_state()
    with pytest.raises(ModelError, match=r"has no weights score\.weight: they would be random"):
        sequence_classifier(path)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_missing_or_damaged_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot load reward model .*nowhere"):
        sequence_classifier(str(tmp_path / "nowhere"))
    path = save(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot load reward model"):
        sequence_classifier(path)


def test_a_model_without_tokenizer_is_refused(tmp_path):
    path = save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ModelError, match="has no tokenizer that can be loaded: save the one"):
        sequence_classifier(path)


def test_a_model_without_a_token_to_pad_with_is_refused(tmp_path):
    path = save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    del values["pad_token"]
    file.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ModelError, match="has no token to pad with: set pad_token_id"):
        sequence_classifier(path)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="batch_size is 0"):
        sequence_classifier("anything", batch_size=0)


def test_a_text_longer_than_the_model_reads_is_named(tmp_path):
    reward = sequence_classifier(save(tmp_path))
    rewards = Rewards({"model": reward}, {"model": 1.0})
    with pytest.raises(
        TrainingError, match="have 130 tokens, but reward model .* reads 128"
    ) as hit:
        rewards(["short", "long"], ["", "a" * 126], [[], []], {})
    assert "prompt: 'long'" in str(hit.value)
