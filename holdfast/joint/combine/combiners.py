"""Combiners: how the mean gradients of the objectives of one turn become one gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from holdfast.joint.combine.methods import canonical, check_installed, pcd, weights_of
from holdfast.joint.geometry import Geometry, Gradient, restricted, shared, smoothed

if TYPE_CHECKING:  # torch is slow to import and recipes are checked without it
    from torch import Tensor

_PCD_SMOOTHING = 0.999
"""Of the squared norms by which PCD normalises; the paper's β."""


class Combiner(Protocol):
    """Combines one *mean* gradient per objective into the gradient of the step.

    The buffers of the gradients belong to the step alone, and may be written to.
    """

    @property
    def used(self) -> dict[str, Any]:
        """What the record should say of the latest combination, beside its geometry."""
        ...

    def __call__(
        self,
        gradients: Mapping[str, Gradient],
        weights: Mapping[str, float],
        geometry: Geometry | None = None,
    ) -> list[Tensor | None]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class WeightedSum:
    """``sum_i w_i g_i``: the gradient of the weighted sum of the losses."""

    used: dict[str, Any] = {}

    def __call__(
        self,
        gradients: Mapping[str, Gradient],
        weights: Mapping[str, float],
        geometry: Geometry | None = None,
    ) -> list[Tensor | None]:
        return _weighted(gradients, weights)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Surgery:
    """Gradient surgery: the gradients are projected or balanced before they are summed.

    Works on the gradients times their weights in the turn, from their inner products, in the
    buffers where they lie, on the parameters that all of them are of. A turn with one objective,
    and a critic that only one objective trains, are left as :class:`WeightedSum` leaves them.

    For two gradients UPGrad is half of PCGrad. As long as they do not conflict both only take their
    mean or sum, and the relative scale of the two matters more than the projection.

    Parameters
    ----------
    method : str
        One of ``combine.METHODS``: ``sum``, ``mean``, ``upgrad``, ``dualproj``, ``pcgrad``,
        ``mgda``, ``pcd``, ``alignedmtl``, ``cagrad`` (c = 0.5), ``fairgrad`` (α = 1), ``imtlg``,
        ``nashmtl``.
    scale : "none", "match" or float
        By what the first gradient of the turn is multiplied beforehand: 1; the ratio of norms that
        makes it as long as the second (1 where either is zero); or this positive number.
    priority : str, optional
        The objective that ``pcd`` puts first, in turns that hold it. By default the turn's first.

    Raises
    ------
    ValueError
        If the method is not known, ``scale`` is neither of the words nor positive and finite, or a
        priority is given to a method that has none.
    RecipeError
        If the method needs torchjd, which is not installed.
    """

    def __init__(
        self,
        method: str = "upgrad",
        scale: Literal["none", "match"] | float = "none",
        priority: str | None = None,
    ) -> None:
        self.method = canonical(method)
        check_installed(self.method)
        self.scale = check_scale(scale)
        if priority is not None and self.method != "pcd":
            raise ValueError(f"priority is {priority!r}, but only method pcd has one")
        self.priority = priority
        self.used: dict[str, Any] = {}
        self._squares: dict[str, float] = {}
        self._updates = 0

    def __call__(
        self,
        gradients: Mapping[str, Gradient],
        weights: Mapping[str, float],
        geometry: Geometry | None = None,
    ) -> list[Tensor | None]:
        self.used = {}
        if len(gradients) < 2:
            return _weighted(gradients, weights)
        geometry = geometry or Geometry.of(gradients)
        names = geometry.names
        scale = self._scale(geometry)
        before = [weights[name] * (scale if i == 0 else 1.0) for i, name in enumerate(names)]
        gram = [
            [x * value * y for y, value in zip(before, row, strict=True)]
            for x, row in zip(before, geometry.gram, strict=True)
        ]
        chosen = self._pcd(names, gram) if self.method == "pcd" else weights_of(self.method, gram)
        final = {n: b * c for n, b, c in zip(names, before, chosen, strict=True)}
        self.used = {"scale": scale, "coefficients": final}
        mask = shared(list(gradients.values()))
        together = _weighted({n: restricted(g, mask) for n, g in gradients.items()}, final)
        alone = [not kept for kept in mask]
        rest = _weighted({n: restricted(g, alone) for n, g in gradients.items()}, weights)
        return [
            one if kept else other for one, other, kept in zip(together, rest, mask, strict=True)
        ]

    def _scale(self, geometry: Geometry) -> float:
        if isinstance(self.scale, float):
            return self.scale
        first, second = (math.sqrt(geometry.gram[i][i]) for i in (0, 1))
        matched = second / first if self.scale == "match" and first > 0 else 1.0
        return matched if matched > 0 and math.isfinite(matched) else 1.0

    def _pcd(self, names: tuple[str, ...], gram: list[list[float]]) -> list[float]:
        """With running averages of the squared norms."""
        squares = [gram[i][i] for i in range(len(gram))]
        if not all(math.isfinite(value) for row in gram for value in row):
            return [1.0] * len(gram)
        self._updates += 1
        for name, square in zip(names, squares, strict=True):
            old = self._squares.get(name, 0.0)
            self._squares[name] = smoothed(old, square, _PCD_SMOOTHING)
        bias = 1.0 - _PCD_SMOOTHING**self._updates
        first = names.index(self.priority) if self.priority in names else 0
        order = [first, *(i for i in range(len(names)) if i != first)]
        found = pcd(
            [[gram[i][j] for j in order] for i in order],
            [self._squares[names[i]] / bias for i in order],
        )
        return [weight for _, weight in sorted(zip(order, found, strict=True))]

    def state_dict(self) -> dict[str, Any]:
        return {"squares": dict(self._squares), "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._squares = {name: float(square) for name, square in state["squares"].items()}
        self._updates = int(state["updates"])


def combine(gradients: Tensor, method: str) -> Tensor:
    """Combine gradients that are the rows of a matrix.

    Parameters
    ----------
    gradients : Tensor, ``(objectives, parameters)``
        One mean gradient per objective.
    method : str
        As in :class:`Surgery`. Without a state, ``pcd`` normalises by the norms at hand.

    Returns
    -------
    Tensor, ``(parameters,)``

    Raises
    ------
    ValueError
        If ``gradients`` is not a matrix with at least one row, or the method is not known.
    RecipeError
        If the method needs torchjd, which is not installed.
    """
    import torch

    name = canonical(method)
    if gradients.ndim != 2 or not len(gradients):
        raise ValueError(
            f"gradients has shape {tuple(gradients.shape)}: (objectives, parameters) is needed"
        )
    wide = gradients.double()
    weights = weights_of(name, (wide @ wide.T).tolist())
    combined = torch.tensor(weights, dtype=torch.float64, device=gradients.device) @ wide
    return combined.to(gradients.dtype)


def check_scale(scale: Any) -> Literal["none", "match"] | float:
    """A relative scale as :class:`Surgery` takes it.

    Raises
    ------
    ValueError
        If it is neither ``none`` nor ``match`` nor a positive finite number.
    """
    if scale == "none" or scale == "match":
        return scale
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if number and 0 < scale < math.inf:
        return float(scale)
    raise ValueError(f"scale is {scale!r}: it must be none, match or a positive number")


def _weighted(
    gradients: Mapping[str, Gradient], weights: Mapping[str, float]
) -> list[Tensor | None]:
    """``sum_i w_i g_i``, in the buffers of the gradients."""
    import torch

    columns = [list(gradient) for gradient in gradients.values()]
    factors = [weights[name] for name in gradients]
    total: list[Tensor | None] = list(columns[0])
    _scale_in_place(total, factors[0])
    for column, factor in zip(columns[1:], factors[1:], strict=True):
        both = [
            (x, y) for x, y in zip(total, column, strict=True) if x is not None and y is not None
        ]
        if both:
            mine, theirs = (list(side) for side in zip(*both, strict=True))
            torch._foreach_add_(mine, theirs, alpha=factor)
        only = [y if x is None else None for x, y in zip(total, column, strict=True)]
        _scale_in_place(only, factor)
        total = [y if x is None else x for x, y in zip(total, only, strict=True)]
    return total


def _scale_in_place(gradient: Gradient, factor: float) -> None:
    import torch

    present = [part for part in gradient if part is not None]
    if present and factor != 1.0:
        torch._foreach_mul_(present, factor)
