"""One side of a case in a process of its own, stepped from outside.

``python -m benchmarks.head.worker SIDE CASE STEPS``. Every line on standard input lets one step
through: a forward and a backward pass. Every line on standard output is JSON: first what is
resident with all inputs in memory; then, for a step, its times, and its loss, the norm of the
gradient and the peak of memory so far.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cost.worker import Gate, resident_bytes
from benchmarks.head.cases import CASES, TOKENS, VOCAB, WIDTH, Case
from holdfast.language.head import chunked_gkd, chunked_lco_kl

COEFFICIENTS = 1.0, 1.0, -1.0
"""Of the old policy, the reward model and the reference: a KL strength of 1."""


@dataclass
class Model:
    """Hidden states ``(TOKENS, WIDTH)`` and a vocabulary matrix ``(VOCAB, WIDTH)``."""

    hidden: Tensor
    weight: Tensor


def models(case: Case) -> list[Model]:
    """The policy first. Logits have a standard deviation of 1."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, scale: float) -> Tensor:
        return torch.empty(rows, WIDTH).normal_(0.0, scale, generator=generator)

    weights = [normal(VOCAB, WIDTH**-0.5) for _ in range(case.heads)]
    number = 2 if case.rival == "trl" else 4
    made = [Model(normal(TOKENS, 1.0), weights[i % case.heads]) for i in range(number)]
    made[0].hidden.requires_grad_()
    made[0].weight.requires_grad_(case.trained)
    return made


def ours(policy: Model, *frozen: Model) -> Tensor:
    sources = [
        (model.hidden, model.weight.detach(), coefficient)
        for model, coefficient in zip(frozen, COEFFICIENTS, strict=True)
    ]
    counted = torch.ones(TOKENS, dtype=torch.bool)
    return chunked_lco_kl(policy.hidden, policy.weight, sources, counted).total


def dense(policy: Model, *frozen: Model) -> Tensor:
    logits = policy.hidden @ policy.weight.T
    with torch.no_grad():
        old, reward, reference = (model.hidden @ model.weight.T for model in frozen)
        target = old + (reward - reference)
        del old, reward, reference
        target = target.log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True)


def our_distillation(student: Model, teacher: Model) -> Tensor:
    counted = torch.ones(TOKENS, dtype=torch.bool)
    pair = teacher.hidden, teacher.weight
    return chunked_gkd(student.hidden, student.weight, pair, counted, beta=0.0).total


def trl_distillation(student: Model, teacher: Model) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        student.hidden, student.weight, None, teacher.hidden, teacher.weight, None, 0.0
    )
    return divergence.sum()


def loss_of(side: str, case: Case) -> Callable[..., Tensor]:
    if case.rival == "dense":
        return ours if side == "holdfast" else dense
    return our_distillation if side == "holdfast" else trl_distillation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["holdfast", "dense", "trl"])
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("steps", type=int)
    args = parser.parse_args()
    case = CASES[args.case]
    loss, inputs = loss_of(args.side, case), models(case)
    if args.side == "trl":
        import trl.kernels.chunked_divergence  # noqa: F401  Its imports are not to be timed.
    gate, policy = Gate(), inputs[0]
    gate.say(resident=resident_bytes())
    for _ in range(args.steps):
        gate.open()
        total = loss(*inputs)
        (total / TOKENS).backward()
        gate.close()
        assert policy.hidden.grad is not None
        # Linux counts in KiB.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        norm = policy.hidden.grad.norm().item()
        gate.say(loss=total.item() / TOKENS, norm=norm, peak=peak)
        del total
        policy.hidden.grad = policy.weight.grad = None


if __name__ == "__main__":
    main()
