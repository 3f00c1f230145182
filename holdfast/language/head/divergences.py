"""Losses between two rows of logits, as sums that can be taken in over parts of the vocabulary.

Each is a small object that belongs to a set of rows. It is shown ``z``, logits of the policy, and
``t``, logits of the target, both ``(rows, part of the vocabulary)``: once a stage, all parts in
each. After the last stage it knows the loss of every row, and what the derivative with respect to
any part of ``z`` is. Tiled and dense evaluation both go through here.

A stage overwrites nothing that it is shown; ``residual_`` puts the derivative where ``z`` was.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Divergence(Protocol):
    """A loss per row; see the module."""

    stages: int
    """How often all logits must be shown before the derivative is known; 0: none is needed."""

    def fold(self, stage: int, rows: slice, z: Tensor, t: Tensor) -> None:
        """Take in a part of the vocabulary for some of the rows."""
        ...

    def residual_(self, rows: slice, z: Tensor, t: Tensor, factors: Tensor) -> None:
        """Overwrite ``z`` with the derivative of the rows' losses with respect to it, times a
        factor of each row, ``(rows, 1)``."""
        ...

    def losses(self) -> Tensor:
        """``(rows,)``, once every part was folded in at every stage (once, where stages is 0)."""
        ...


class _Expectation:
    """Log-sum-exp of logits ``a``, and the mean of a value under their softmax, part by part."""

    def __init__(self, like: Tensor) -> None:
        self.lse = torch.full_like(like, -math.inf)
        self.mean = torch.zeros_like(like)

    def fold(self, rows: slice, a: Tensor, value: Tensor | None = None) -> None:
        largest = a.amax(1, keepdim=True)
        exponentials = (a - largest).exp_()
        mass = exponentials.sum(1)
        here = mass.log().add_(largest.squeeze(1))
        before = self.lse[rows]
        merged = torch.logaddexp(before, here)
        if value is not None:
            mean = exponentials.mul_(value).sum(1).div_(mass)
            old, new = (before - merged).exp_(), (here - merged).exp_()
            self.mean[rows] = self.mean[rows] * old + mean * new
        self.lse[rows] = merged


class ForwardKl:
    """``KL(softmax(t) || softmax(z))``, in nats. Derivative: ``softmax(z) - softmax(t)``."""

    stages = 1

    def __init__(self, like: Tensor, vocab: int) -> None:
        self.policy, self.target = _Expectation(like), _Expectation(like)

    def fold(self, stage: int, rows: slice, z: Tensor, t: Tensor) -> None:
        self.policy.fold(rows, z)
        self.target.fold(rows, t, t - z)

    def residual_(self, rows: slice, z: Tensor, t: Tensor, factors: Tensor) -> None:
        target = (t - _column(self.target.lse, rows)).exp_()
        z.sub_(_column(self.policy.lse, rows)).exp_().sub_(target).mul_(factors)

    def losses(self) -> Tensor:
        return self.target.mean - self.target.lse + self.policy.lse


class ReverseKl:
    """``KL(softmax(z) || softmax(t))``, in nats."""

    stages = 1

    def __init__(self, like: Tensor, vocab: int) -> None:
        self.policy, self.target = _Expectation(like), _Expectation(like)

    def fold(self, stage: int, rows: slice, z: Tensor, t: Tensor) -> None:
        self.policy.fold(rows, z, z - t)
        self.target.fold(rows, t)

    def residual_(self, rows: slice, z: Tensor, t: Tensor, factors: Tensor) -> None:
        above = (z - t).sub_(_column(self.policy.mean, rows))
        z.sub_(_column(self.policy.lse, rows)).exp_().mul_(above).mul_(factors)

    def losses(self) -> Tensor:
        return self.policy.mean - self.policy.lse + self.target.lse


class JensenShannon:
    """``beta KL(T || M) + (1 - beta) KL(S || M)``, ``M = (1 - beta) S + beta T``, 0 < beta < 1.

    ``S`` is the softmax of ``z`` and ``T`` that of ``t``. Agarwal et al., "On-Policy Distillation
    of Language Models", equation 1.
    """

    stages = 2

    def __init__(self, like: Tensor, vocab: int, beta: float) -> None:
        self.beta = beta
        self.policy, self.target = _Expectation(like), _Expectation(like)
        self.policy_kl, self.target_kl = torch.zeros_like(like), torch.zeros_like(like)

    def fold(self, stage: int, rows: slice, z: Tensor, t: Tensor) -> None:
        if stage == 0:
            self.policy.fold(rows, z)
            self.target.fold(rows, t)
            return
        log_s, log_t, log_m = self._logs(rows, z, t)
        self.policy_kl[rows] += log_s.exp().mul_(log_s - log_m).sum(1)
        self.target_kl[rows] += log_t.exp().mul_(log_t - log_m).sum(1)

    def _logs(self, rows: slice, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_s = z - _column(self.policy.lse, rows)
        log_t = t - _column(self.target.lse, rows)
        mixed = torch.logaddexp(log_s + math.log1p(-self.beta), log_t + math.log(self.beta))
        return log_s, log_t, mixed

    def residual_(self, rows: slice, z: Tensor, t: Tensor, factors: Tensor) -> None:
        log_s, _, log_m = self._logs(rows, z, t)
        above = log_m.neg_().add_(log_s).sub_(_column(self.policy_kl, rows))
        torch.mul(log_s.exp_().mul_(above), factors * (1.0 - self.beta), out=z)

    def losses(self) -> Tensor:
        return self.beta * self.target_kl + (1.0 - self.beta) * self.policy_kl


class SquaredError:
    """``(1 / vocab) sum (z - t)^2``."""

    stages = 0

    def __init__(self, like: Tensor, vocab: int) -> None:
        self.vocab = vocab
        self.sums = torch.zeros_like(like)

    def fold(self, stage: int, rows: slice, z: Tensor, t: Tensor) -> None:
        self.sums[rows] += (z - t).square_().sum(1)

    def residual_(self, rows: slice, z: Tensor, t: Tensor, factors: Tensor) -> None:
        z.sub_(t).mul_(factors * (2.0 / self.vocab))

    def losses(self) -> Tensor:
        return self.sums / self.vocab


class LogCosh:
    """``(1 / vocab) sum log cosh(z - t)``, as ``|d| + log1p(exp(-2 |d|)) - log 2``."""

    stages = 0

    def __init__(self, like: Tensor, vocab: int) -> None:
        self.vocab = vocab
        self.sums = torch.zeros_like(like)

    def fold(self, stage: int, rows: slice, z: Tensor, t: Tensor) -> None:
        far = (z - t).abs_()
        # softplus(-2 |d|) is log1p(exp(-2 |d|)).
        self.sums[rows] += F.softplus(-2.0 * far).add_(far).sub_(math.log(2.0)).sum(1)

    def residual_(self, rows: slice, z: Tensor, t: Tensor, factors: Tensor) -> None:
        z.sub_(t).tanh_().mul_(factors * (1.0 / self.vocab))

    def losses(self) -> Tensor:
        return self.sums / self.vocab


def generalised_jsd(beta: float, like: Tensor, vocab: int) -> Divergence:
    """TRL's family: ``beta`` 0 is the forward KL, 1 the reverse KL, between them Jensen-Shannon."""
    if beta == 0.0:
        return ForwardKl(like, vocab)
    if beta == 1.0:
        return ReverseKl(like, vocab)
    return JensenShannon(like, vocab, beta)


class Watched:
    """A divergence that also finds what a record of training shows of its rows.

    It is shown the same logits, so that nothing is projected for the record. Whoever made it finds
    in ``found``, set of rows by set of rows, each ``(rows,)``: the deviation of ``z - t`` over the
    vocabulary (no constant counts), the log-sum-exp of ``z``, and the entropy of its softmax.
    """

    def __init__(
        self,
        inner: Divergence,
        like: Tensor,
        vocab: int,
        found: list[tuple[Tensor, Tensor, Tensor]],
    ) -> None:
        self.inner = inner
        self.stages = inner.stages
        self.vocab = vocab
        self.found = found
        self.policy = _Expectation(like)
        self.seen, self.mean, self.squares = (torch.zeros_like(like) for _ in range(3))

    def fold(self, stage: int, rows: slice, z: Tensor, t: Tensor) -> None:
        self.inner.fold(stage, rows, z, t)
        if stage == 0:
            self.policy.fold(rows, z, z)
            # Means and squares about them are merged (Chan et al.), for a difference of two large
            # sums would leave nothing of a small deviation.
            gap = z - t
            mean, new, seen = gap.mean(1), gap.shape[1], self.seen[rows]
            squares = gap.sub_(mean.unsqueeze(1)).square_().sum(1)
            above, share = mean - self.mean[rows], new / (seen + new)
            self.squares[rows] += squares + above.square() * seen * share
            self.mean[rows] += above * share
            self.seen[rows] += new

    def residual_(self, rows: slice, z: Tensor, t: Tensor, factors: Tensor) -> None:
        self.inner.residual_(rows, z, t, factors)

    def losses(self) -> Tensor:
        gap, lse = (self.squares / self.vocab).sqrt_(), self.policy.lse
        self.found.append((gap, lse, (lse - self.policy.mean).clamp_(min=0.0)))
        return self.inner.losses()


def _column(values: Tensor, rows: slice) -> Tensor:
    return values[rows].unsqueeze(1)
