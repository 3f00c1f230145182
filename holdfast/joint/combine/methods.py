"""From the Gram matrix of several gradients to the weight of each in their combination.

All methods here see inner products alone: the gradients themselves are never gathered in a matrix.
Methods with a closed form need nothing; the others run in torchjd, on a square root of the matrix.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import combinations

from holdfast.errors import RecipeError

Gram = Sequence[Sequence[float]]

CLOSED = ("sum", "mean", "upgrad", "dualproj", "pcgrad", "mgda", "pcd")
"""Methods without torchjd: the first three and ``pcgrad`` and ``pcd`` for any number of gradients,
``upgrad``, ``dualproj`` and ``mgda`` for two."""

TORCHJD = ("alignedmtl", "cagrad", "fairgrad", "imtlg", "nashmtl")
"""Methods that always need torchjd."""

METHODS = (*CLOSED, *TORCHJD)

_ABSENT = (
    "combiner method {method} with these objectives needs torchjd and its solvers: "
    "pip install holdfast[surgery] ({error})"
)


def canonical(method: str) -> str:
    """The name of a method as listed in :data:`METHODS`; case, ``-`` and ``_`` do not matter.

    Raises
    ------
    ValueError
        If there is no such method.
    """
    name = method.lower().replace("-", "").replace("_", "")
    if name not in METHODS:
        raise ValueError(f"method is {method!r}: it must be one of {', '.join(METHODS)}")
    return name


def check_installed(method: str) -> None:
    """Refuse a method that needs torchjd where it is absent, before anything is loaded.

    Raises
    ------
    RecipeError
    """
    if method in TORCHJD and find_spec("torchjd") is None:
        raise RecipeError(_ABSENT.format(method=method, error="it was not found"))


def weights_of(method: str, gram: Gram) -> list[float]:
    """The weight of each gradient.

    Parameters
    ----------
    method : str
        One of :data:`METHODS`.
    gram : sequence of sequences of float, ``(objectives, objectives)``
        Inner products of the gradients. Where one is not finite all weights are 1, so that the
        combination is not finite either.

    Returns
    -------
    list of float, ``(objectives,)``

    Raises
    ------
    RecipeError
        If the method needs torchjd, which is not installed.
    """
    size = len(gram)
    if not all(math.isfinite(value) for row in gram for value in row):
        return [1.0] * size
    if method == "sum" or size == 1 or not any(gram[i][i] > 0 for i in range(size)):
        return [1.0] * size  # of one gradient, or of zeros, there is nothing to choose
    if method == "mean":
        return [1.0 / size] * size
    if method == "pcgrad":
        return _pcgrad(gram)
    if method == "pcd":
        return pcd(gram, [gram[i][i] for i in range(size)])
    if size == 2 and method in _OF_TWO:
        return _OF_TWO[method](gram)
    return _torchjd(method, gram)


def _upgrad(gram: Gram) -> list[float]:
    (a, d), (_, b) = gram
    # Each is projected onto the plane normal to the other, if they conflict; then the mean. The
    # square of a tiny gradient may be 0 though its product with a larger one is not.
    return [0.5 * (1 - d / square) if d < 0 < square else 0.5 for square in (a, b)]


def _dualproj(gram: Gram) -> list[float]:
    (a, d), (_, b) = gram
    # The mean conflicts with at most one of the two: the smaller, if the other dominates.
    if a + d < 0:
        return [-0.5 * d / a if a > 0 else 0.0, 0.5]
    if b + d < 0:
        return [0.5, -0.5 * d / b if b > 0 else 0.0]
    return [0.5, 0.5]


def _mgda(gram: Gram) -> list[float]:
    (a, d), (_, b) = gram
    apart = a + b - 2 * d
    share = min(1.0, max(0.0, (b - d) / apart)) if apart > 0 else 0.5
    return [share, 1.0 - share]


_OF_TWO: dict[str, Callable[[Gram], list[float]]] = {
    "upgrad": _upgrad,
    "dualproj": _dualproj,
    "mgda": _mgda,
}


def _pcgrad(gram: Gram) -> list[float]:
    """The others are taken in cyclic order, where the paper draws one: no random state."""
    size = len(gram)
    total = [0.0] * size
    for i in range(size):
        weights = [float(i == j) for j in range(size)]
        for j in [*range(i + 1, size), *range(i)]:
            product = sum(weights[k] * gram[k][j] for k in range(size))
            if product < 0 < gram[j][j]:
                weights[j] -= product / gram[j][j]
        total = [t + w for t, w in zip(total, weights, strict=True)]
    return total


def pcd(
    gram: Gram, squares: Sequence[float], *, progress: float = 0.02, eps: float = 1e-8
) -> list[float]:
    """Priority-constrained descent: the first gradient, as far as the others allow.

    Minimises ``‖d - g̃_1‖²`` subject to ``g̃_j·d ≥ τ ‖g̃_j‖²`` for all other objectives, where
    ``g̃_i = g_i / √(v_i + eps)``, and scales the solution to the norm of ``g_1``. The first gradient
    alone where the constraints contradict each other; nothing where it is zero.

    Parameters
    ----------
    gram : sequence of sequences of float, ``(objectives, objectives)``
    squares : sequence of float, ``(objectives,)``
        ``v``: typical squared norms of the gradients, such as running averages.
    progress : float
        ``τ`` in [0, 1].
    eps : float
        Added to ``v``.

    Returns
    -------
    list of float, ``(objectives,)``

    Source: "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical
    Multi-Objective Optimization", arXiv 2606.29521.
    """
    import torch

    size = len(gram)
    if not gram[0][0] > 0:
        return [0.0] * size
    scales = torch.tensor(squares, dtype=torch.float64).add(eps).rsqrt()
    scaled = torch.tensor(gram, dtype=torch.float64) * torch.outer(scales, scales)
    wanted = progress * scaled.diagonal() - scaled[0]
    slack = 1e-9 * float(scaled.diagonal().max())
    solution = torch.zeros(size, dtype=torch.float64)
    solution[0] = 1.0
    # As in the paper's appendix the sets of binding constraints are tried one by one, smallest
    # first; there are few objectives.
    others = [j for j in range(1, size) if gram[j][j] > 0]
    for binding in (s for k in range(len(others) + 1) for s in combinations(others, k)):
        index = torch.tensor(binding, dtype=torch.long)
        block = scaled[index][:, index]
        multipliers = torch.linalg.lstsq(block, wanted[index, None], driver="gelsd").solution[:, 0]
        candidate = solution.clone()
        candidate[index] = multipliers
        reached = scaled @ candidate - progress * scaled.diagonal()
        if bool((multipliers >= -1e-12).all()) and bool((reached[others] >= -slack).all()):
            solution = candidate
            break
    length = float(solution @ scaled @ solution)
    magnitude = float(solution.abs() @ scaled.diagonal().sqrt()) ** 2
    if length <= 1e-12 * magnitude:  # the two pull in exactly opposite directions
        return [0.0] * size
    return (solution * scales * math.sqrt(gram[0][0] / length)).tolist()


def _torchjd(method: str, gram: Gram) -> list[float]:
    import torch

    try:
        from torchjd import aggregation

        make: dict[str, Callable[[], aggregation.WeightedAggregator]] = {
            "upgrad": aggregation.UPGrad,
            "dualproj": aggregation.DualProj,
            "mgda": aggregation.MGDA,
            "alignedmtl": aggregation.AlignedMTL,
            "cagrad": lambda: aggregation.CAGrad(c=0.5),
            "fairgrad": lambda: aggregation.FairGrad(alpha=1.0),
            "imtlg": aggregation.IMTLG,
            # Its limit on the norm is a guard's affair.
            "nashmtl": lambda: aggregation.NashMTL(n_tasks=len(gram), max_norm=0.0),
        }
        # A new one each time: what NashMTL remembers is only where its solver starts.
        aggregator = make[method]()
    except ImportError as error:
        raise RecipeError(_ABSENT.format(method=method, error=error)) from error
    # These methods depend on the gradients through their inner products alone, so that a square
    # root of the Gram matrix, one short row for each objective, stands for them.
    values, vectors = torch.linalg.eigh(torch.tensor(gram, dtype=torch.float64))
    root = vectors * values.clamp(min=0.0).sqrt()
    with warnings.catch_warnings():
        # NashMTL's solver says how it solves, and that a gradient is zero.
        warnings.simplefilter("ignore")
        return aggregator.weighting(root).tolist()
