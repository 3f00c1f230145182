"""Every loss: its gradient does not depend on how a batch is cut, padded or sharded.

A small policy (an embedding and a head) scores sequences of unequal length. The gradient of a
step is that of the summed totals over the summed counts, as the trainer computes it.
"""

import inspect
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast.joint import LossTerms
from holdfast.language import losses
from holdfast.language.head import Head, TokenStatistics, token_statistics
from holdfast.language.losses import (
    cispo,
    dpo,
    dro,
    gkd,
    gspo,
    lco_kl,
    lco_log_cosh,
    lco_mse,
    nll,
    nll_from_statistics,
    pmd,
    ppo_clip,
    reinforce,
    sequence_logps,
    value_loss,
)

VOCAB, WIDTH, IGNORED = 13, 4, -100

Row = list[tuple[list[int], int]]
"""One or two sequences (a pair): token ids, and how many of them are prompt."""


class Policy:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        size = {"generator": generator, "dtype": torch.float64}
        self.embedding = torch.randn(VOCAB, WIDTH, **size).requires_grad_()
        self.weight = torch.randn(VOCAB, WIDTH, **size).requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        return [self.embedding, self.weight]

    def batch(self, sequences: Sequence[tuple[list[int], int]], padding: int):
        """Hidden states and the labels that they score, shifted and padded on the right."""
        time = max(len(ids) for ids, _ in sequences) + padding
        inputs = torch.zeros(len(sequences), time, dtype=torch.long)
        labels = torch.full_like(inputs, IGNORED)
        for place, (ids, prompt) in enumerate(sequences):
            inputs[place, : len(ids)] = torch.tensor(ids)
            labels[place, prompt : len(ids)] = torch.tensor(ids[prompt:])
        return self.embedding[inputs[:, :-1]], labels[:, 1:]

    def score(self, sequences: Sequence[tuple[list[int], int]], padding: int) -> TokenStatistics:
        hidden, labels = self.batch(sequences, padding)
        return token_statistics(
            hidden, Head(self.weight), labels, statistics=True, tile_tokens=7, tile_vocab=5
        )


Loss = Callable[[Policy, Sequence[Row], int], LossTerms]


def likelihood(aggregation: str, length: int | None = None) -> Loss:
    def loss(policy: Policy, rows: Sequence[Row], padding: int) -> LossTerms:
        statistics = policy.score([row[0] for row in rows], padding)
        return nll_from_statistics(statistics, aggregation=aggregation, length=length)

    return loss


def dense_likelihood(aggregation: str, length: int | None = None) -> Loss:
    def loss(policy: Policy, rows: Sequence[Row], padding: int) -> LossTerms:
        hidden, labels = policy.batch([row[0] for row in rows], padding)
        return nll(hidden @ policy.weight.T, labels, aggregation=aggregation, length=length)

    return loss


def preference(variant: str, label_smoothing: float = 0.0, *, mean: bool = False) -> Loss:
    def loss(policy: Policy, rows: Sequence[Row], padding: int) -> LossTerms:
        sequences = [row[0] for row in rows] + [row[1] for row in rows]
        logps = sequence_logps(policy.score(sequences, padding), mean=mean)
        with torch.no_grad():  # a reference that is some other function of the same sequences
            reference = 0.8 * logps.detach() + 0.1
        return dpo(
            *logps.chunk(2), *reference.chunk(2), variant=variant, label_smoothing=label_smoothing
        )

    return loss


def matching(match: Callable[[Tensor, Tensor, Tensor], LossTerms]) -> Loss:
    def loss(policy: Policy, rows: Sequence[Row], padding: int) -> LossTerms:
        hidden, labels = policy.batch([row[0] for row in rows], padding)
        target = hidden.detach().sin() @ policy.weight.detach().flip(0).T
        return match(hidden @ policy.weight.T, target, labels != IGNORED)

    return loss


def policy_gradient(improve: Callable[..., LossTerms], *, behaviour: bool = True) -> Loss:
    def loss(policy: Policy, rows: Sequence[Row], padding: int) -> LossTerms:
        statistics = policy.score([row[0] for row in rows], padding)
        logps = statistics.logps
        # A behaviour policy and advantages that are some other functions of the same sequences.
        known = [0.9 * logps.detach()] if behaviour else []
        advantages = logps.detach().sum(-1).sin()
        return improve(logps, *known, advantages, statistics.mask)

    return loss


def values(policy: Policy, rows: Sequence[Row], padding: int) -> LossTerms:
    statistics = policy.score([row[0] for row in rows], padding)
    found = statistics.logps
    return value_loss(found, found.detach().sin(), 0.9 * found.detach(), statistics.mask)


LOSSES: dict[str, Loss] = {
    **{
        f"{name}, {aggregation}": make(aggregation, length)
        for name, make in (("nll", dense_likelihood), ("nll_from_statistics", likelihood))
        for aggregation, length in (
            ("token-mean", None),
            ("sequence-mean", None),
            ("sequence-sum", None),
            ("fixed-length", 8),
        )
    },
    "dpo, sigmoid": preference("sigmoid"),
    "dpo, sigmoid with smoothing": preference("sigmoid", 0.2),
    "dpo, ipo": preference("ipo", mean=True),
    "dpo, hinge": preference("hinge"),
    "reinforce": policy_gradient(reinforce, behaviour=False),
    "ppo_clip": policy_gradient(ppo_clip),
    "ppo_clip, sequence-mean": policy_gradient(partial(ppo_clip, aggregation="sequence-mean")),
    "ppo_clip, fixed-length": policy_gradient(
        partial(ppo_clip, aggregation="fixed-length", length=8)
    ),
    "gspo": policy_gradient(partial(gspo, epsilon=0.2, epsilon_high=0.3)),
    "cispo": policy_gradient(partial(cispo, epsilon_high=1.2)),
    "pmd": policy_gradient(partial(pmd, tau=0.3)),
    "dro": policy_gradient(partial(dro, beta=0.3)),
    "value_loss": values,
    "lco_kl": matching(lco_kl),
    "lco_log_cosh": matching(lco_log_cosh),
    "lco_mse": matching(lco_mse),
    **{f"gkd, {beta}": matching(partial(gkd, beta=beta)) for beta in (0.0, 0.5, 1.0)},
}


def rows_of(seed: int, count: int) -> list[Row]:
    draw = random.Random(seed)

    def sequence() -> tuple[list[int], int]:
        length = draw.randint(2, 9)
        # A prompt as long as the sequence leaves nothing to count.
        return [draw.randrange(VOCAB) for _ in range(length)], draw.randint(1, length)

    return [[sequence(), sequence()] for _ in range(count)]


def step(policy: Policy, loss: Loss, parts: Sequence[Sequence[Row]], padding: Sequence[int]):
    """Gradient, mean loss and mean metrics over the parts of a batch."""
    terms = [loss(policy, part, pad) for part, pad in zip(parts, padding, strict=True)]
    count = sum(part.count for part in terms)
    gradient: list[Tensor] = [torch.zeros_like(part) for part in policy.parameters]
    for part in terms:
        grads = torch.autograd.grad(part.total, policy.parameters)
        gradient = [total + grad / count for total, grad in zip(gradient, grads, strict=True)]
    means = {name: sum(part.metrics[name] for part in terms) / count for name in terms[0].metrics}
    return gradient, sum(part.total.detach() for part in terms) / count, means


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(2, 7),
    st.lists(st.integers(0, 4), min_size=7, max_size=7),
    st.data(),
)
def test_gradient_does_not_depend_on_cutting_padding_or_sharding(name, seed, count, padding, data):
    policy, loss, rows = Policy(), LOSSES[name], rows_of(seed, count)
    rows[0] = [([1, 2, 3], 1), ([4, 5], 1)]  # something counts
    whole = step(policy, loss, [rows], [0])

    size = data.draw(st.integers(1, count), label="micro-batch")
    cut = [rows[start : start + size] for start in range(0, count, size)]
    ranks = data.draw(st.integers(1, count), label="ranks")
    sharded = [rows[rank::ranks] for rank in range(ranks)]
    reversed_rows = [rows[::-1]]
    for parts in (cut, sharded, reversed_rows):
        torch.testing.assert_close(step(policy, loss, parts, padding[: len(parts)]), whole)


def test_every_loss_is_put_through_this():
    def returns_terms(name: str) -> bool:
        member = getattr(losses, name)
        return inspect.isfunction(member) and get_type_hints(member).get("return") is LossTerms

    expected = {name for name in losses.__all__ if returns_terms(name)}
    assert expected and expected == {name.split(",")[0] for name in LOSSES}
