"""The losses of a recipe, from rows to loss terms, against dense logits in transformers."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from holdfast.language import objectives
from holdfast.language.data import Demonstration, Encoded, Preference
from holdfast.language.losses import sequence_logps
from holdfast.language.model import load_policy
from holdfast.language.objectives import Dpo, Nll, score
from holdfast.language.tokenizers import build_tokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 48}


@pytest.fixture
def policy():
    built = load_policy("tiny-qwen2", tokenizer=build_tokenizer(), config=SMALL, seed=3).eval()
    with torch.no_grad():  # Far from uniform, so that mistakes are large.
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return built


def tokens(draw: np.random.Generator, prompt: int, completion: int) -> Encoded:
    ids = draw.integers(0, 256, prompt + completion).astype(np.int32)
    return Encoded(ids, np.arange(prompt + completion) >= prompt)


def demonstrations(count: int = 5, seed: int = 0) -> list[Demonstration]:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 9, (count, 2))
    return [Demonstration(tokens(draw, p, c), f"rows:{n}") for n, (p, c) in enumerate(sizes)]


def preferences(count: int = 4, seed: int = 0, scored: bool = True) -> list[Preference]:
    draw = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        prompt, chosen, rejected = draw.integers(1, 9, 3)
        logps = -3.0 * draw.random(2) * np.array([chosen, rejected]) if scored else (None, None)
        rows.append(
            Preference(
                tokens(draw, prompt, chosen),
                tokens(draw, prompt, rejected),
                f"rows:{index}",
                *(None if value is None else float(value) for value in logps),
            )
        )
    return rows


def dense(policy, row: Encoded) -> torch.Tensor:
    """Log-probabilities of the counted tokens of one row alone, in double precision."""
    ids = torch.tensor(row.input_ids, dtype=torch.int64)[None]
    logits = policy.base(input_ids=ids, use_cache=False).logits[0, :-1].double()
    logps = logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    return logps[torch.tensor(row.counted[1:])]


def gradients(policy, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(policy.parameters())))


def assert_gradients_agree(policy, first: torch.Tensor, second: torch.Tensor) -> None:
    for ours, theirs in zip(gradients(policy, first), gradients(policy, second), strict=True):
        scale = theirs.abs().max().item()
        assert_close(ours, theirs.to(ours), rtol=1e-4, atol=1e-5 * max(scale, 1.0))


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "sequence-sum"])
def test_nll_is_the_mean_over_counted_tokens_of_dense_log_probabilities(aggregation, policy):
    rows = demonstrations()
    terms = Nll(policy.pad_id, aggregation)(policy, rows)
    each = [dense(policy, row.tokens) for row in rows]
    expected, count = {
        "token-mean": (-torch.cat(each).sum(), sum(map(len, each))),
        "sequence-mean": (-torch.stack([logps.mean() for logps in each]).sum(), len(rows)),
        "sequence-sum": (-torch.stack([logps.sum() for logps in each]).sum(), len(rows)),
    }[aggregation]
    assert int(terms.count) == count
    assert_close(terms.total.double(), expected, rtol=1e-5, atol=1e-5)
    assert_gradients_agree(policy, terms.total, expected)


def test_entropy_and_accuracy_are_evaluated_but_not_paid_for_in_training(policy):
    rows = demonstrations()
    evaluated = Nll(policy.pad_id)(policy.eval(), rows).metrics
    assert set(evaluated) == {"entropy", "mean_token_accuracy"}
    assert not Nll(policy.pad_id)(policy.train(), rows).metrics
    correct, entropy = 0, 0.0
    for row in rows:
        ids = torch.tensor(row.tokens.input_ids, dtype=torch.int64)[None]
        logits = policy.base(input_ids=ids).logits[0, :-1][torch.tensor(row.tokens.counted[1:])]
        targets = ids[0, 1:][torch.tensor(row.tokens.counted[1:])]
        correct += int((logits.argmax(-1) == targets).sum())
        entropy += torch.distributions.Categorical(logits=logits).entropy().sum().item()
    assert int(evaluated["mean_token_accuracy"]) == correct
    assert evaluated["entropy"].item() == pytest.approx(entropy, rel=1e-4)


def expected_dpo(policy, rows, beta: float, variant: str, smoothing: float):
    """Losses pair by pair, by their formulas, with each completion alone in its batch."""
    losses, rewards = [], []
    for row in rows:
        chosen, rejected = dense(policy, row.chosen), dense(policy, row.rejected)
        ratios = (
            chosen.sum() - row.reference_chosen_logps,
            rejected.sum() - row.reference_rejected_logps,
        )
        rewards.append((beta * ratios[0].item(), beta * ratios[1].item()))
        if variant == "ipo":
            ratios = ratios[0] / len(chosen), ratios[1] / len(rejected)
        delta = ratios[0] - ratios[1]
        losses.append(
            {
                "sigmoid": -(1 - smoothing) * logsigmoid(beta * delta)
                - smoothing * logsigmoid(-beta * delta),
                "ipo": (delta - 1 / (2 * beta)) ** 2,
                "hinge": (1 - beta * delta).clamp(min=0),
            }[variant]
        )
    return torch.stack(losses), rewards


@pytest.mark.parametrize(
    ("variant", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0)]
)
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_is_the_sum_over_pairs_of_its_formula_on_dense_log_probabilities(
    variant, smoothing, beta, policy
):
    rows = preferences()
    loss = Dpo(policy.pad_id, beta=beta, variant=variant, label_smoothing=smoothing)
    terms = loss(policy, rows)
    losses, rewards = expected_dpo(policy, rows, beta, variant, smoothing)
    assert int(terms.count) == len(rows)
    assert_close(terms.total.double(), losses.sum(), rtol=1e-5, atol=1e-5)
    assert_gradients_agree(policy, terms.total, losses.sum())
    metrics = {name: value.item() for name, value in terms.metrics.items()}
    assert metrics["rewards/chosen"] == pytest.approx(sum(c for c, _ in rewards), rel=1e-4)
    assert metrics["rewards/rejected"] == pytest.approx(sum(r for _, r in rewards), rel=1e-4)
    assert metrics["rewards/accuracies"] == sum(c > r for c, r in rewards)
    assert metrics["rewards/margins"] == pytest.approx(sum(c - r for c, r in rewards), rel=1e-4)


def test_dpo_starts_at_log_two_where_policy_and_reference_agree(policy):
    rows = []
    for row in preferences(scored=False):
        chosen, rejected = (dense(policy, side).sum().item() for side in (row.chosen, row.rejected))
        rows.append(replace(row, reference_chosen_logps=chosen, reference_rejected_logps=rejected))
    terms = Dpo(policy.pad_id)(policy, rows)
    assert (terms.total / terms.count).item() == pytest.approx(np.log(2), abs=1e-5)


def test_rows_without_reference_log_probabilities_are_refused_by_origin(policy):
    rows = preferences(2) + [replace(preferences(1, scored=False)[0], origin="data.jsonl:7")]
    with pytest.raises(ValueError, match="without reference log-probabilities: data.jsonl:7"):
        Dpo(policy.pad_id)(policy, rows)


@pytest.mark.parametrize("kind", ["nll", "dpo", "ipo"])
def test_a_batch_cut_in_parts_has_the_same_total_count_and_metrics(kind, policy):
    rows = demonstrations(6) if kind == "nll" else preferences(6)
    loss = {
        "nll": Nll(policy.pad_id),
        "dpo": Dpo(policy.pad_id),
        "ipo": Dpo(policy.pad_id, variant="ipo"),
    }[kind]
    whole = loss(policy, rows)
    for cuts in ([1] * 6, [4, 2], [1, 5]):
        starts = np.cumsum([0, *cuts])
        parts = [loss(policy, rows[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
        assert sum(int(part.count) for part in parts) == int(whole.count)
        assert_close(sum(part.total for part in parts), whole.total, rtol=1e-5, atol=1e-5)
        assert whole.metrics.keys() == parts[0].metrics.keys()
        for name, value in whole.metrics.items():
            together = sum(part.metrics[name].double() for part in parts)
            assert_close(together, value.double(), rtol=1e-4, atol=1e-4)


def test_rows_of_unlike_length_are_evaluated_as_they_are_trained(policy):
    """Evaluation on a CPU may cut a batch by length to save padding."""
    draw = np.random.default_rng(5)
    lengths = [3, 400, 5, 390, 150, 4, 160]
    rows = [Demonstration(tokens(draw, 2, n), f"rows:{n}") for n in lengths]
    together = Nll(policy.pad_id, "sequence-mean")(policy, rows)
    with torch.no_grad():
        apart = Nll(policy.pad_id, "sequence-mean")(policy, rows)
        scored = score(policy, [row.tokens for row in rows], policy.pad_id, True)
    assert_close(apart.total, together.total.detach(), rtol=1e-5, atol=1e-5)
    assert_close(apart.metrics, dict(together.metrics), rtol=1e-4, atol=1e-4)
    assert scored.mask.sum(-1).tolist() == lengths
    for index, row in enumerate(rows):
        alone = score(policy, [row.tokens], policy.pad_id, True)
        count = row.length - 1
        for field in ("logps", "entropy", "correct", "mask"):
            ours, theirs = getattr(scored, field)[index], getattr(alone, field)[0]
            assert_close(ours[:count].double(), theirs.double(), rtol=1e-4, atol=1e-4)
            assert not ours[count:].any()


def test_the_token_that_pads_changes_nothing(policy):
    rows = preferences()
    totals = [Dpo(pad)(policy, rows).total for pad in (policy.pad_id, 0, 65)]
    assert torch.equal(totals[0], totals[1]) and torch.equal(totals[0], totals[2])


def test_sequences_are_scored_by_the_sum_over_their_counted_tokens(policy):
    rows = [row.tokens for row in demonstrations()]
    expected = torch.stack([dense(policy, row).sum() for row in rows])
    scored = score(policy, rows, policy.pad_id, False)
    assert_close(sequence_logps(scored).double(), expected, rtol=1e-5, atol=1e-4)
    assert scored.mask.sum(-1).tolist() == [int(row.counted[1:].sum()) for row in rows]


@pytest.mark.parametrize("worth_a_pass", [0, 3, 20, 1000])
@pytest.mark.parametrize("statistics", [False, True])
def test_evaluation_does_not_depend_on_which_rows_are_evaluated_together(
    statistics, worth_a_pass, policy, monkeypatch
):
    rows = [row.tokens for row in demonstrations(9)]
    trained = score(policy, rows, policy.pad_id, statistics)
    monkeypatch.setattr(objectives, "_PADDING_WORTH_A_PASS", worth_a_pass)
    with torch.no_grad():
        evaluated = score(policy, rows, policy.pad_id, statistics)
    assert (evaluated.entropy is not None) == statistics
    for name in ("logps", "mask", *(("entropy", "correct") if statistics else ())):
        assert_close(
            getattr(evaluated, name), getattr(trained, name).detach(), rtol=1e-5, atol=1e-5
        )


@given(st.lists(st.integers(1, 2000), max_size=40))
def test_rows_evaluated_together_are_padded_by_no_more_than_a_pass_is_worth(lengths):
    groups = objectives._alike(lengths)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = max((lengths[index] for index in group), default=0)
        padding = sum(longest - lengths[index] for index in group)
        assert padding <= objectives._PADDING_WORTH_A_PASS
    for shorter, longer in pairwise(groups):
        together = sum(lengths[longer[0]] - lengths[index] for index in shorter)
        assert together > objectives._PADDING_WORTH_A_PASS
