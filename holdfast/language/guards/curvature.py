"""Which tokens would move the objective or the policy too far: a mask from their curvature.

Source: "Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM Reasoning"
(CAPO), with a step on the output layer alone as its model of an update. Of one token with
``v = e_a - pi``, hidden state ``h`` and advantage ``A`` the gradient of ``A log pi(a)`` is
``A v h^T``. It has rank one, so what a step along it does has a closed form in a few moments of
``pi``: no ``(tokens, vocab, width)`` tensor is needed, and no product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.language.head import Head, TokenStatistics, dense_statistics
from holdfast.language.head.tiles import Activation, operand_dtypes, project, tiles

_ELEMENTS = 2**22
"""Of a tile of logits where a step needs all of them."""


@dataclass(frozen=True)
class Shifts:
    """What a step is predicted to do, token by token.

    Attributes
    ----------
    objective : Tensor
        ``(...)``: change of ``A pi_new(a) / pi(a)``, to second order.
    policy : Tensor
        ``(...)``: ``1/2 (d log pi(a))^2``, whose mean over actions is the KL divergence between the
        policies to second order. Never negative.
    """

    objective: Tensor
    policy: Tensor


def predicted_shifts(
    statistics: TokenStatistics, advantages: Tensor, hidden_norms: Tensor, *, learning_rate: float
) -> Shifts:
    """What a step of gradient ascent along one token's gradient does to that token.

    With ``d = |v|^2``, ``q`` the variance of ``v`` under ``pi`` and ``n = |h|``, the change of the
    objective is ``lr A^2 n^2 d + 1/2 lr^2 A^3 n^4 (d^2 - q)`` and that of the policy
    ``1/2 lr^2 A^2 n^4 d^2``.

    Parameters
    ----------
    statistics : TokenStatistics
        Of the actions, with ``moments``.
    advantages, hidden_norms : Tensor
        ``(...)``: ``A`` and ``n``.
    learning_rate : float
        Of the step. Not negative.
    """
    if statistics.squares is None or statistics.cubes is None:
        raise ValueError("statistics has no squares and cubes: ask for moments")
    probability = statistics.logps.detach().exp()
    squares, cubes = statistics.squares, statistics.cubes
    rest = 1.0 - 2.0 * probability
    d = (rest + squares).clamp(min=0.0)
    q = (probability * rest + cubes - (probability - squares).square()).clamp(min=0.0)
    return _shifts(d, q, advantages, hidden_norms, learning_rate)


def _shifts(
    d: Tensor, q: Tensor, advantages: Tensor, hidden_norms: Tensor, learning_rate: float
) -> Shifts:
    """``d = v^T diag(s) v``, ``q`` the variance of ``s v``; of a step ``lr diag(s) A v h^T``."""
    gains = advantages.detach().to(d.dtype)
    step = learning_rate * hidden_norms.detach().to(d.dtype).square()
    first, half = step * gains.square(), 0.5 * (step * gains).square()
    return Shifts(first * d + half * gains * (d.square() - q), half * d.square())


def within(
    shifts: Shifts,
    objective_limit: float,
    policy_limit: float,
    objective_floor: float | None = None,
) -> Tensor:
    """Where ``|objective| < objective_limit`` and ``policy < policy_limit``, as bool.

    With a floor also ``objective > objective_floor``, the bound that the paper's theorem 5.1 asks
    for. A shift that is not a number is within nothing.
    """
    accepted = (shifts.objective.abs() < objective_limit) & (shifts.policy < policy_limit)
    if objective_floor is not None:
        accepted &= shifts.objective > objective_floor
    return accepted


def curvature_mask(
    logits: Tensor,
    actions: Tensor,
    advantages: Tensor,
    hidden_norms: Tensor,
    *,
    learning_rate: float,
    objective_limit: float,
    policy_limit: float,
    objective_floor: float | None = None,
    rows: RowMoments | None = None,
) -> Tensor:
    """The tokens whose predicted shifts of objective and policy stay within limits.

    What is predicted is the effect of a step on the output layer along the gradient of that token
    alone (:func:`predicted_shifts`). The limits are of shifts at ``learning_rate``: they do not
    carry over to another one. The released code of the paper has the limits on both sides that
    are used here, and no floor.

    Parameters
    ----------
    logits : Tensor
        ``(..., vocab)``: as the policy samples from them, over the temperature.
    actions : Tensor
        ``(...)``, integer: the sampled tokens.
    advantages : Tensor
        ``(...)``.
    hidden_norms : Tensor
        ``(...)``: Euclidean norms of the last hidden states (not squared). With a bias, of the
        states with a 1 appended; with a factor on the logits (such as 1 / temperature), times it.
    learning_rate : float
        Step size, in [0, inf).
    objective_limit : float
        Largest change of ``A pi_new(a) / pi(a)``, up or down. Positive.
    policy_limit : float
        Largest predicted divergence, in nats. Positive.
    objective_floor : float, optional
        Smallest predicted improvement. By default there is none.
    rows : RowMoments, optional
        Moments of Adam, whose step is then modelled. By default one of gradient ascent.

    Returns
    -------
    Tensor
        ``(...)``, bool: True where a token may be learnt from.

    Raises
    ------
    ValueError
        For a bad shape or number.
    """
    check_limits(learning_rate, objective_limit, policy_limit, objective_floor)
    for name, value in (("advantages", advantages), ("hidden_norms", hidden_norms)):
        if value.shape != actions.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: it must be that of actions "
                f"{tuple(actions.shape)}"
            )
    if logits.ndim == 0:
        raise ValueError("logits is a scalar: it must be (..., vocab)")
    if rows is not None:
        shifts = rows.shifts(
            logits.detach(), actions, advantages, hidden_norms, learning_rate=learning_rate
        )
    else:
        statistics = dense_statistics(logits.detach(), actions, moments=True)
        shifts = predicted_shifts(statistics, advantages, hidden_norms, learning_rate=learning_rate)
    return within(shifts, objective_limit, policy_limit, objective_floor)


def check_limits(
    learning_rate: float,
    objective_limit: float,
    policy_limit: float,
    objective_floor: float | None,
) -> None:
    """Refuse limits that no token, or every token, would pass.

    Raises
    ------
    ValueError
    """
    if not (math.isfinite(learning_rate) and learning_rate >= 0):
        raise ValueError(f"learning_rate is {learning_rate}: it must be finite and not negative")
    for name, limit in (("objective_limit", objective_limit), ("policy_limit", policy_limit)):
        if not limit > 0:
            raise ValueError(f"{name} is {limit}: it must be positive")
    if objective_floor is not None and not objective_floor < objective_limit:
        raise ValueError(
            f"objective_floor is {objective_floor}: it must be below objective_limit "
            f"{objective_limit}"
        )


class RowMoments:
    """Moments of the output layer's gradient by row, as Adam has them by element.

    A token's step is the one that Adam would take if that token alone came next: its gradient goes
    into the second moments before the step is divided by their root, so that a row that was never
    moved is not moved without bound. A row's moment is the mean over its elements. First moments
    are left out: what other tokens have left there moves the policy whether this one is masked or
    not.

    Parameters
    ----------
    vocab_size, width : int
        Of the output layer.
    betas : tuple of float
        Adam's, in [0, 1).
    epsilon : float
        Adam's. Positive.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas are {betas}: they must lie in [0, 1)")
        if not epsilon > 0:
            raise ValueError(f"epsilon is {epsilon}: it must be positive")
        self.width, self.betas, self.epsilon = width, betas, epsilon
        self.average = torch.zeros(vocab_size)
        """Of squares, not corrected for how few they are."""
        self.steps = 0

    def update(self, gradient: Tensor) -> None:
        """Take in the mean gradient ``(vocab, width)`` of a step."""
        squares = gradient.detach().float().square().mean(-1)
        self.average = self.average.to(squares.device).lerp(squares, 1.0 - self.betas[1])
        self.steps += 1

    def scales(self, squares: Tensor) -> Tensor:
        """What Adam multiplies a gradient by, in rows whose squares ``(..., vocab)`` it has."""
        first, second = self.betas
        average = self.average.to(squares)
        corrected = (second * average + (1.0 - second) * squares) / (
            1.0 - second ** (self.steps + 1)
        )
        share = (1.0 - first) / (1.0 - first ** (self.steps + 1))
        return share / (corrected.sqrt() + self.epsilon)

    def shifts(
        self,
        logits: Tensor,
        actions: Tensor,
        advantages: Tensor,
        hidden_norms: Tensor,
        *,
        learning_rate: float,
    ) -> Shifts:
        """As :func:`predicted_shifts`, of Adam's step, from logits ``(..., vocab)``."""
        kind = torch.promote_types(logits.dtype, torch.float32)
        policy = logits.to(kind).softmax(-1)
        v = -policy
        v.scatter_add_(-1, actions.unsqueeze(-1), torch.ones_like(v[..., :1]))
        sizes = (advantages.detach() * hidden_norms.detach()).to(kind).square() / self.width
        scaled = self.scales(sizes.unsqueeze(-1) * v.square()) * v
        mean = (policy * scaled).sum(-1)
        q = ((policy * scaled.square()).sum(-1) - mean.square()).clamp(min=0.0)
        return _shifts((scaled * v).sum(-1), q, advantages, hidden_norms, learning_rate)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.average, self.steps = state["average"].clone(), int(state["steps"])


@dataclass
class CurvatureGuard:
    """:func:`curvature_mask` within a loss on rollouts, in tiles.

    Attributes
    ----------
    learning_rate, objective_limit, policy_limit, objective_floor
        As in :func:`curvature_mask`.
    rows : RowMoments, optional
        Models a step of Adam in the place of one of plain gradient descent.
    gradient : callable, optional
        The mean gradient of the output layer's weight in the latest step, for ``rows``.
    random : bool
        Mask as many tokens, but others: what a study compares the guard with.
    """

    learning_rate: float
    objective_limit: float
    policy_limit: float
    objective_floor: float | None = None
    rows: RowMoments | None = None
    gradient: Callable[[], Tensor | None] = lambda: None
    random: bool = False

    def __post_init__(self) -> None:
        check_limits(
            self.learning_rate, self.objective_limit, self.policy_limit, self.objective_floor
        )

    def __call__(
        self,
        statistics: TokenStatistics,
        advantages: Tensor,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        temperature: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The counted tokens that may be learnt from, and metrics.

        Parameters
        ----------
        statistics : TokenStatistics
            ``(...)``, with ``moments``. A step of Adam needs the logits again, in tiles.
        advantages, labels : Tensor
            ``(...)``.
        hidden : Tensor
            ``(..., width)``.
        head : Head
        temperature : float
            Of sampling.

        Returns
        -------
        mask : Tensor
            ``(...)``, bool.
        metrics : dict of str to Tensor
            Over counted tokens, each ``(2,)``, a sum and its count: ``curvature/masked`` (a share),
            ``curvature/objective_shift`` (its size) and ``curvature/policy_shift``. Over masked
            tokens, for which ones they are: ``curvature/masked_probability`` and
            ``curvature/masked_advantage``.
        """
        mask = statistics.mask
        with torch.no_grad():
            squares = hidden.detach().float().square().sum(-1) + (head.bias is not None)
            norms = squares.sqrt() * (abs(head.scale) / temperature)
            shifts = predicted_shifts(
                statistics, advantages, norms, learning_rate=self.learning_rate
            )
            if self.rows is not None:
                ids = labels[mask]
                of_rows = self._adam(
                    self.rows, hidden[mask], head, ids, advantages[mask], norms[mask], temperature
                )
                shifts = Shifts(
                    shifts.objective.masked_scatter(mask, of_rows.objective),
                    shifts.policy.masked_scatter(mask, of_rows.policy),
                )
            kept = within(shifts, self.objective_limit, self.policy_limit, self.objective_floor)
            dropped = mask & ~kept
            if self.random:
                dropped = _shuffled(dropped, mask, labels)
            count = mask.sum().double()
            found = {
                "curvature/masked": dropped,
                "curvature/objective_shift": shifts.objective.abs(),
                "curvature/policy_shift": shifts.policy,
            }
            metrics = {
                name: torch.stack([values.double().masked_fill(~mask, 0.0).sum(), count])
                for name, values in found.items()
            }
            of_masked = {
                "curvature/masked_probability": statistics.logps.exp(),
                "curvature/masked_advantage": advantages,
            }
            many = dropped.sum().double()
            for name, values in of_masked.items():
                metrics[name] = torch.stack([values[dropped].double().sum(), many])
        return mask & ~dropped, metrics

    def _adam(
        self,
        rows: RowMoments,
        hidden: Tensor,
        head: Head,
        ids: Tensor,
        advantages: Tensor,
        norms: Tensor,
        temperature: float,
    ) -> Shifts:
        """Of counted tokens ``(tokens, ...)``."""
        operands, sums = operand_dtypes(hidden, head.weight)
        activation = Activation.of(head.scale, None, temperature)
        weight = head.weight.to(operands)
        bias = None if head.bias is None else head.bias.to(sums)
        size = max(_ELEMENTS // len(weight), 1)
        scratch = hidden.new_empty(size * len(weight), dtype=sums)
        found = [
            rows.shifts(
                activation.apply_(project(hidden[tokens].to(operands), weight, bias, scratch)),
                ids[tokens],
                advantages[tokens],
                norms[tokens],
                learning_rate=self.learning_rate,
            )
            for tokens in tiles(len(hidden), size)
        ]
        nothing = hidden.new_zeros(0, dtype=sums)
        return Shifts(
            torch.cat([nothing, *(part.objective for part in found)]),
            torch.cat([nothing, *(part.policy for part in found)]),
        )

    @property
    def record(self) -> dict[str, float]:
        return {}

    def observe(self, metrics: Mapping[str, float]) -> None:
        gradient = self.gradient()
        # Moments that decay while every token is masked would mask ever more.
        if self.rows is not None and gradient is not None and bool(gradient.any()):
            self.rows.update(gradient)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.rows is None else self.rows.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.rows is not None:
            self.rows.load_state_dict(state)


def _shuffled(dropped: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """As many of the counted tokens, drawn with a seed that is theirs."""
    places = mask.flatten().nonzero().squeeze(-1)
    ids = labels.flatten()[places].cpu()
    seed = int((ids * torch.arange(1, len(ids) + 1)).sum())
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
    chosen[places[order[: int(dropped.sum())].to(places.device)]] = True
    return chosen.view(mask.shape)
