"""Geometry of gradients: inner products in one turn, and running estimates over many.

Source of what is estimated: Gao et al., "IN-RIL: Interleaved Reinforcement and Imitation Learning
for Policy Fine-Tuning", the quantities behind the ratio m(t).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # torch is slow to import and recipes are checked without it
    from torch import Tensor

Gradient: TypeAlias = "Sequence[Tensor | None]"
"""One tensor per trainable parameter, in the optimiser's order; ``None`` where there is none."""


def inner_products(pairs: Sequence[tuple[Gradient, Gradient]]) -> list[float]:
    """Euclidean inner product of each pair; ``None`` counts as zeros.

    Nothing is flattened into one vector, and all products leave the device in one transfer.
    """
    import torch

    parts: list[Tensor] = []
    sizes: list[int] = []
    for one, other in pairs:
        both = [(x, y) for x, y in zip(one, other, strict=True) if x is not None and y is not None]
        parts += [torch.dot(_vector(x), _vector(y)) for x, y in both]
        sizes.append(len(both))
    values = iter(torch.stack(parts).tolist() if parts else [])
    return [sum(islice(values, size)) for size in sizes]


def shared(gradients: Sequence[Gradient]) -> list[bool]:
    """Which parameters every one of the gradients is of.

    A critic that only one objective trains takes no part in how two objectives agree.
    """
    return [all(part is not None for part in column) for column in zip(*gradients, strict=True)]


def restricted(gradient: Gradient, mask: Sequence[bool]) -> list[Tensor | None]:
    """The gradient on some of the parameters alone."""
    return [part if kept else None for part, kept in zip(gradient, mask, strict=True)]


def cosine(product: float, norm: float, other: float) -> float:
    """Cosine of two vectors from their inner product and norms; NaN where one is zero."""
    if not (norm > 0 and other > 0):
        return math.nan
    return max(-1.0, min(1.0, product / norm / other))


@dataclass(frozen=True)
class Geometry:
    """Inner products of the mean gradients of one turn, before they are combined.

    Over the parameters that all of them are of.

    Attributes
    ----------
    names : tuple of str
        The objectives of the turn, in its order.
    gram : tuple of tuple of float, ``(objectives, objectives)``
        ``gram[i][j]`` is the inner product of gradients ``i`` and ``j``.
    overlaps : bool
        Whether there is any parameter that all of them are of. If not, ``gram`` is 0.
    """

    names: tuple[str, ...]
    gram: tuple[tuple[float, ...], ...]
    overlaps: bool = True

    @classmethod
    def of(cls, gradients: Mapping[str, Gradient]) -> Geometry:
        """Measure the gradients of a turn."""
        names = tuple(gradients)
        mask = shared(list(gradients.values()))
        parts = [restricted(gradient, mask) for gradient in gradients.values()]
        upper = [(i, j) for i in range(len(names)) for j in range(i, len(names))]
        products = inner_products([(parts[i], parts[j]) for i, j in upper])
        known = dict(zip(upper, products, strict=True))
        size = range(len(names))
        gram = tuple(tuple(known[min(i, j), max(i, j)] for j in size) for i in size)
        return cls(names, gram, any(mask))

    @property
    def norms(self) -> dict[str, float]:
        """Euclidean norm of each gradient."""
        return {name: math.sqrt(self.gram[i][i]) for i, name in enumerate(self.names)}

    @property
    def cosines(self) -> dict[str, float]:
        """Cosine of each pair ``"first/second"``; NaN where a gradient is zero."""
        norms = self.norms
        return {
            f"{one}/{other}": cosine(self.gram[i][j], norms[one], norms[other])
            for i, one in enumerate(self.names)
            for j, other in enumerate(self.names)
            if i < j
        }

    def as_record(self) -> dict[str, Any]:
        """What a record holds; nothing where gradients have no parameter in common."""
        return {"norms": self.norms, "cosines": self.cosines} if self.overlaps else {}


def smoothed(old: float | None, new: float, smoothing: float) -> float:
    """Exponential average that keeps the share ``smoothing`` of the old value, if there is one."""
    return new if old is None else smoothing * old + (1.0 - smoothing) * new


@dataclass(frozen=True)
class _Sample:
    """An objective's latest gradient and where it was taken. Its tensors are never written to."""

    gradient: list[Tensor | None]
    parameters: list[Tensor]


class PairEstimates:
    """Running averages of the geometry of two objectives' gradients.

    All over the parameters that both objectives have a gradient of, the other's latest if it is not
    in the turn; nothing is averaged where there are none.

    Each gradient of an objective is compared with the one of the same objective before it,
    ``Δg = g - g'`` taken ``Δθ`` apart:

    - ``norm``: ``‖g‖``;
    - ``smoothness``: the secant ``‖Δg‖ / ‖Δθ‖``, over parameters that have a gradient. Noise is
      part of ``Δg``, so this is too large rather than too small;
    - ``variance``: ``½ ‖Δg‖²``, the successive-difference estimate of ``σ²/N``, the variance of the
      gradient of a whole batch. What the gradient truly changed by is part of it, so this too errs
      on the large side. It needs no gradient of single micro-batches;
    - ``cosine`` of the two objectives' gradients: at the same parameters in a turn that holds both,
      otherwise of the new gradient and the other's latest.

    Costs two copies of the trainable parameters per objective.

    Parameters
    ----------
    names : tuple of two str
        The objectives. Others are ignored.
    smoothing : float
        Share of the previous value that the exponential averages keep, in [0, 1).

    Raises
    ------
    ValueError
        If ``smoothing`` is out of range.
    """

    def __init__(self, names: tuple[str, str], smoothing: float) -> None:
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(f"smoothing is {smoothing}: it must lie in [0, 1)")
        self.names = names
        self.smoothing = smoothing
        self.averages: dict[str, float] = {}
        """``"cosine"``, and ``"norm/NAME"``, ``"smoothness/NAME"``, ``"variance/NAME"``."""
        self._latest: dict[str, _Sample] = {}

    def update(self, gradients: Mapping[str, Gradient], parameters: Sequence[Tensor]) -> bool:
        """Take in the mean gradients of a turn at ``parameters``.

        ``False``: the turn is ignored, because a gradient is not finite and must not decide the
        turns that follow, or because it is of neither objective.
        """
        present = {name: gradients[name] for name in self.names if name in gradients}
        squares = inner_products([(gradient, gradient) for gradient in present.values()])
        if not present or not all(map(math.isfinite, squares)):
            return False
        parts = self._shared(gradients)
        self._compare_objectives(parts)
        for name in present:
            if any(part is not None for part in parts[name]):
                (square,) = inner_products([(parts[name], parts[name])])
                self._average(f"norm/{name}", math.sqrt(square))
                self._compare_with_before(name, parts[name], parameters)
        for name, gradient in present.items():
            self._latest[name] = _sample(gradient, parameters)
        return True

    def _shared(self, gradients: Mapping[str, Gradient]) -> dict[str, Gradient]:
        """Both objectives' gradients, as far as they are known, where both have one."""
        like = next(gradients[name] for name in self.names if name in gradients)
        known: dict[str, Gradient] = {
            name: gradients[name] if name in gradients else self._on(name, like).gradient
            for name in self.names
            if name in gradients or name in self._latest
        }
        mask = shared(list(known.values()))
        return {name: restricted(gradient, mask) for name, gradient in known.items()}

    def _compare_objectives(self, parts: Mapping[str, Gradient]) -> None:
        if len(parts) < 2:
            return
        one, other = parts.values()
        product, square, other_square = inner_products([(one, other), (one, one), (other, other)])
        value = cosine(product, math.sqrt(square), math.sqrt(other_square))
        if not math.isnan(value):
            self._average("cosine", value)

    def _compare_with_before(
        self, name: str, gradient: Gradient, parameters: Sequence[Tensor]
    ) -> None:
        if name not in self._latest:
            return
        before = self._on(name, gradient)
        change = _difference(gradient, before.gradient, gradient)
        if all(part is None for part in change):
            return
        moved = _difference(parameters, before.parameters, change)
        change_square, moved_square = inner_products([(change, change), (moved, moved)])
        self._average(f"variance/{name}", change_square / 2)
        if moved_square > 0:
            self._average(f"smoothness/{name}", math.sqrt(change_square / moved_square))

    def _on(self, name: str, like: Gradient) -> _Sample:
        """The latest sample of an objective, on the device of ``like``.

        A checkpoint is read on the CPU.
        """
        device = next((part.device for part in like if part is not None), None)
        sample = self._latest[name]
        if device is not None and sample.parameters[0].device != device:
            sample = _Sample(
                [None if part is None else part.to(device) for part in sample.gradient],
                [part.to(device) for part in sample.parameters],
            )
            self._latest[name] = sample
        return sample

    def _average(self, key: str, value: float) -> None:
        if math.isfinite(value):
            self.averages[key] = smoothed(self.averages.get(key), value, self.smoothing)

    def state_dict(self) -> dict[str, Any]:
        latest = {name: vars(sample) for name, sample in self._latest.items()}
        return {"averages": dict(self.averages), "latest": latest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.averages = {key: float(value) for key, value in state["averages"].items()}
        self._latest = {
            name: _Sample(list(sample["gradient"]), list(sample["parameters"]))
            for name, sample in state["latest"].items()
        }


def _vector(tensor: Tensor) -> Tensor:
    import torch

    # A product in half precision would be rounded to three digits.
    wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    return wide.detach().reshape(-1)


def _sample(gradient: Gradient, parameters: Sequence[Tensor]) -> _Sample:
    return _Sample(
        [None if part is None else part.detach().clone() for part in gradient],
        [parameter.detach().clone() for parameter in parameters],
    )


def _difference(one: Gradient, other: Gradient, mask: Gradient) -> list[Tensor | None]:
    """``one - other`` where ``mask`` has a gradient."""
    return [
        None if part is None or x is None or y is None else x.detach() - y
        for x, y, part in zip(one, other, mask, strict=True)
    ]
