"""Reference log-probabilities: the right numbers, taken once."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from holdfast.language.data import Encoded, Preference
from holdfast.language.model import LanguagePolicy, load_policy
from holdfast.language.reference import with_reference
from holdfast.language.tokenizers import build_tokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 48}
LORA = {"r": 2, "lora_alpha": 4.0, "target_modules": "all-linear"}


def build(**options):
    return load_policy("tiny-qwen2", tokenizer=build_tokenizer(), config=SMALL, **options)


def perturb(policy) -> None:
    """Move every trainable weight, as an update would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def preferences(count: int = 6, seed: int = 0) -> list[Preference]:
    draw = np.random.default_rng(seed)

    def side(prompt: np.ndarray) -> Encoded:
        completion = draw.integers(0, 256, draw.integers(1, 20))
        ids = np.concatenate([prompt, completion]).astype(np.int32)
        return Encoded(ids, np.arange(len(ids)) >= len(prompt))

    prompts = [draw.integers(0, 256, draw.integers(1, 9)) for _ in range(count)]
    return [Preference(side(p), side(p), f"rows:{n}") for n, p in enumerate(prompts)]


def dense(model, row: Encoded) -> float:
    """Log-probability of the counted tokens from transformers' logits, one row at a time."""
    ids = torch.tensor(row.input_ids, dtype=torch.int64)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
    logps = logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    return float(logps[torch.tensor(row.counted[1:])].sum())


def values(rows: list[Preference]) -> list[tuple[float, float]]:
    return [(row.reference_chosen_logps, row.reference_rejected_logps) for row in rows]


@pytest.fixture
def counted(monkeypatch):
    """Counts the forward passes of every policy."""
    calls = []
    forward = LanguagePolicy.forward

    def noted(self, input_ids, *rest, **options):
        calls.append(tuple(input_ids.shape))
        return forward(self, input_ids, *rest, **options)

    monkeypatch.setattr(LanguagePolicy, "forward", noted)
    return calls


def test_values_are_those_of_a_direct_computation(tmp_path):
    policy, rows = build(), preferences()
    scored = with_reference(rows, policy, tmp_path)
    for row, done in zip(rows, scored, strict=True):
        assert done.chosen is row.chosen and done.rejected is row.rejected
        assert done.origin == row.origin and done.group == row.group
        assert done.reference_chosen_logps == pytest.approx(
            dense(policy.base, row.chosen), abs=1e-4
        )
        assert done.reference_rejected_logps == pytest.approx(
            dense(policy.base, row.rejected), abs=1e-4
        )


def test_the_reference_of_an_adapted_policy_is_the_base_it_was_given(tmp_path):
    adapted, base = build(lora=LORA), build()
    perturb(adapted)
    rows = preferences()
    found = with_reference(rows, adapted.train(), tmp_path)
    expected = with_reference(rows, base, tmp_path / "other")
    assert np.allclose(values(found), values(expected), rtol=0, atol=1e-5)
    assert adapted.training


def test_a_second_call_does_not_run_the_model(tmp_path, counted):
    policy, rows = build(), preferences()
    counted.clear()
    first = with_reference(rows, policy, tmp_path)
    assert counted
    counted.clear()
    assert values(with_reference(rows, build(), tmp_path)) == values(first)
    assert len(counted) == 1, "only the check of the head that building another policy makes"


def test_another_adapter_on_the_same_base_uses_the_same_values(tmp_path, counted):
    rows = preferences()
    first = build(lora=LORA)
    expected = values(with_reference(rows, first, tmp_path))
    perturb(first)
    counted.clear()
    assert values(with_reference(rows, first, tmp_path)) == expected
    assert not counted


@pytest.mark.parametrize("change", ["weights", "rows", "order", "mask"])
def test_other_weights_or_rows_are_not_served_from_the_cache(change, tmp_path, counted):
    policy, rows = build(), preferences()
    first = with_reference(rows, policy, tmp_path)
    if change == "weights":
        perturb(policy)
    elif change == "rows":
        rows = [*rows[:-1], preferences(1, seed=9)[0]]
    elif change == "order":
        rows = rows[::-1]
    else:
        whole = Encoded(rows[0].chosen.input_ids, np.ones(rows[0].chosen.length, dtype=bool))
        rows = [Preference(whole, rows[0].rejected, "rows:0"), *rows[1:]]
    counted.clear()
    second = with_reference(rows, policy, tmp_path)
    assert counted and values(second) != values(first)
    for row in second:
        assert row.reference_chosen_logps == pytest.approx(dense(policy.base, row.chosen), abs=1e-4)


DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "not safetensors": lambda path: path.write_bytes(b"\xff" * 64),
    "of other rows": lambda path: save_file({"logps": torch.zeros(2, 1)}, path),
    "without values": lambda path: save_file({"other": torch.zeros(2, 6)}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_computed_again_and_mended(damage, tmp_path, counted):
    policy, rows = build(), preferences()
    expected = values(with_reference(rows, policy, tmp_path))
    (entry,) = (tmp_path / "reference").iterdir()
    DAMAGES[damage](entry)
    counted.clear()
    assert values(with_reference(rows, policy, tmp_path)) == expected
    assert counted
    counted.clear()
    assert values(with_reference(rows, policy, tmp_path)) == expected
    assert not counted
    assert list((tmp_path / "reference").iterdir()) == [entry], "no partial file is left"


@pytest.mark.parametrize("tokens_at_once", [1, 40, 200, 100_000])
def test_values_do_not_depend_on_how_many_rows_share_a_pass(tokens_at_once, tmp_path, counted):
    policy, rows = build(), preferences(9)
    reference = values(with_reference(rows, policy, tmp_path / "reference"))
    counted.clear()
    found = with_reference(rows, policy, tmp_path / "found", tokens_at_once=tokens_at_once)
    assert np.allclose(values(found), reference, rtol=0, atol=1e-4)
    for batch, time in counted:  # Two sequences a row; one row must always fit.
        assert batch * time <= tokens_at_once or batch <= 2
    assert sum(batch for batch, _ in counted) == 2 * len(rows)


def test_no_rows_need_no_reference(tmp_path, counted):
    policy = build()
    counted.clear()
    assert with_reference([], policy, tmp_path) == []
    assert not counted and not list(tmp_path.iterdir())
