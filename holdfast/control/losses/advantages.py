"""How much better an action was than what its state is worth."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.control.losses.rows import check_finite, check_mask, check_share, wide


def generalized_advantage(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    discount: float,
    trace: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over episodes that end, or are cut, at any time.

    ``A_t = sum_k (discount trace)^k delta_{t+k}`` with ``delta_t = r_t + discount V'_t - V_t``
    (Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    equation 16), where the sum ends with the episode. A terminal state is worth 0; an episode that
    was only cut goes on without us, so it is worth the value of its final observation.

    Parameters
    ----------
    rewards : Tensor
        ``(time, environments)``, or any shape with time first.
    values : Tensor
        Same shape: of the observations acted on.
    next_values : Tensor
        Same shape: of the observations that the actions led to. Where an episode ended that is its
        own final observation, not the first of the next episode. Ignored where it terminated.
    terminated, truncated : Tensor
        Same shape, bool (or numbers that are 0 or 1): whether the action ended the episode, or it
        was cut after it. Where both are True, it ended.
    discount, trace : float
        Gamma and lambda, in [0, 1], of one time step: with action chunks, of a chunk.

    Returns
    -------
    advantages, returns : Tensor
        Same shape, at least float32, without a graph; ``returns`` are ``advantages + values``.

    Raises
    ------
    ValueError
        For a bad shape, flag or number, or a value that is not finite.
    """
    (gained, after, worth), goes_on = _steps(
        terminated,
        truncated,
        discount,
        trace,
        rewards=rewards,
        next_values=next_values,
        values=values,
    )
    advantages = _summed(gained + discount * after - worth, discount * trace * goes_on)
    return advantages, advantages + worth


def normalize_advantages(
    advantages: Tensor, mask: Tensor | None = None, *, epsilon: float = 1e-8
) -> Tensor:
    """Advantages less their mean, over their standard deviation plus ``epsilon``.

    The deviation has Bessel's correction. Normalise a whole batch before cutting it into
    micro-batches or shards: the mean of a part is not that of the whole.

    Parameters
    ----------
    advantages : Tensor
        ``(...)``.
    mask : Tensor, optional
        ``(...)``, bool: the rows that count, by default all.
    epsilon : float
        At least 0.

    Returns
    -------
    Tensor
        ``(...)``, at least float32, without a graph, and 0 where a row does not count. Of fewer
        than two rows there is no deviation: they are returned as they are.

    Raises
    ------
    ValueError
        For a bad shape or number, or an advantage that is not finite.
    """
    if not epsilon >= 0.0:
        raise ValueError(f"epsilon is {epsilon}: it must be at least 0")
    given, rows = _of_rows("advantages", advantages, mask)
    if len(rows) < 2:
        return given
    # In float64, or the rounding of equal advantages would be blown up by a deviation of nearly 0.
    precise = rows.double()
    scaled = (precise - precise.mean()) / (precise.std() + epsilon)
    return _in_place_of(given, scaled, mask)


# Shared maths -------------------------------------------------------------------------------------


def _summed(deltas: Tensor, decay: Tensor) -> Tensor:
    """``S_t = deltas_t + decay_t S_{t+1}``, over the first dimension."""
    if not len(deltas):
        return deltas
    following = torch.zeros_like(deltas[0])
    sums: list[Tensor] = []
    decay = decay.to(deltas.dtype)
    for delta, kept in zip(reversed(deltas.unbind()), reversed(decay.unbind()), strict=True):
        following = torch.addcmul(delta, kept, following)
        sums.append(following)
    return torch.stack(sums[::-1])


def _steps(
    terminated: Tensor, truncated: Tensor, discount: float, trace: float, **numbers: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The numbers, 0 where what is next is worth nothing, and 1 where the episode goes on."""
    check_share("discount", discount)
    check_share("trace", trace)
    shape = numbers["rewards"].shape
    if not shape:
        raise ValueError("rewards has no dimension: it must be (time, environments)")
    for name, given in {"terminated": terminated, "truncated": truncated, **numbers}.items():
        if given.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}: it must be that of rewards {tuple(shape)}"
            )
    ended = _flags("terminated", terminated)
    goes_on = ~(ended | _flags("truncated", truncated))
    found = {name: wide(given.detach()) for name, given in numbers.items()}
    found["next_values"] = found["next_values"].masked_fill(ended, 0.0)
    for name, given in found.items():
        check_finite(name, given)
    return list(found.values()), goes_on.double()


def _flags(name: str, flags: Tensor) -> Tensor:
    found = flags.bool()
    if flags.dtype != torch.bool and not bool((flags == found).all()):
        raise ValueError(f"{name} has values other than 0 and 1")
    return found


def _of_rows(name: str, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values, 0 where a row does not count, and those of the rows that do, flat."""
    check_mask(mask, name, values.shape)
    given = wide(values.detach())
    rows = given.flatten() if mask is None else given[mask]
    check_finite(name, rows)
    return _in_place_of(given, rows, mask), rows


def _in_place_of(given: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
    """``rows``, flat, where they were in ``given``."""
    rows = rows.to(given.dtype)
    if mask is None:
        return rows.view(given.shape)
    return torch.zeros_like(given).masked_scatter(mask, rows)
