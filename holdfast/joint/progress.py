r"""What a cycle of interleaved updates gains: when m of them pay for one of another objective.

Source: Gao et al., "IN-RIL: Interleaved Reinforcement and Imitation Learning for Policy
Fine-Tuning". The first objective is imitation (IL), the second reinforcement (RL). Progress is what
an update takes off the RL loss.

One cycle is an imitation update and m RL updates, ``1 + m`` in all. RL alone would gain ``(1 + m)
P`` from as many, with ``P`` the progress of an RL update; the cycle gains ``m P + Δ``, with ``Δ``
the **regularisation benefit**, what the imitation update takes off the RL loss (negative where it
harms it). The quotient of the two is the **efficiency ratio**

.. math:: \frac{m P + Δ}{(1 + m) P} = \frac{m}{1 + m} · \frac{1}{1 - β},
          \quad β = \frac{Δ}{m P + Δ},

above 1 exactly where ``Δ > P``: where an update by imitation serves RL better than one by RL. The
wording of the paper's theorem was not within reach; that ``β`` is this share is our reading, and
the one with which its formula is an identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from holdfast.joint.geometry import Gradient, PairEstimates, inner_products, shared

if TYPE_CHECKING:  # torch is slow to import and recipes are checked without it
    from torch import Tensor

Form = Literal["root", "balance"]


def optimal_ratio(
    norm_rl: float,
    norm_il: float,
    rho: float,
    *,
    variance_term: float,
    form: Form = "root",
    maximum: float,
    c_il: float = 1.0,
    c_rl: float = 1.0,
    smoothness_il: float = 1.0,
    smoothness_rl: float = 1.0,
) -> float:
    r"""How many RL updates should follow one imitation update.

    ``root``, the practical form as printed, takes no constants of its own:

    .. math:: m = \max\{1, \sqrt{g_{RL}^2 / (ρ g_{IL} g_{RL} - v)}\},
              \quad v = \frac{c_{IL} L_{RL} σ_{IL}^2}{2 L_{IL}^2 N_{IL}}

    ``balance``, from the derivation above it:

    .. math:: m = \frac{c_{IL}/L_{IL} · ρ g_{IL} g_{RL} + v}
                       {c_{RL}(1 - c_{RL}/2)/L_{RL} · g_{RL}^2},
              \quad v = \frac{L_{RL} c_{IL}^2 σ_{IL}^2}{2 L_{IL}^2 N_{IL}}

    With ρ > 0, as the gradients come to oppose each other more, ``root`` falls and ``balance``
    rises; the paper's text says that m rises.

    Parameters
    ----------
    norm_rl, norm_il : float
        Norms ``g`` of the two mean gradients, finite and at least 0.
    rho : float
        Minus their cosine, in [-1, 1]: positive where they oppose each other.
    variance_term : float
        ``v`` of the chosen form, at least 0; may be infinite. The two differ in the power of
        ``c_il``.
    form : "root" or "balance"
    maximum : float
        Upper bound of the result, at least 1.
    c_il, c_rl : float
        Step sizes in units of ``1 / L``: above 0, and ``c_rl`` below 2. Only in ``balance``.
    smoothness_il, smoothness_rl : float
        Smoothness constants ``L``, above 0. Only in ``balance``.

    Returns
    -------
    float
        In [1, maximum]; ``maximum`` where the denominator is not positive or not finite.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """
    for name, value in (("norm_rl", norm_rl), ("norm_il", norm_il)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}: it must be finite and not negative")
    if not -1.0 - 1e-6 <= rho <= 1.0 + 1e-6:
        raise ValueError(f"rho is {rho}: it must lie in [-1, 1]")
    if not variance_term >= 0:
        raise ValueError(f"variance_term is {variance_term}: it must not be negative")
    if not maximum >= 1:
        raise ValueError(f"maximum is {maximum}: it must be at least 1")
    for name, value in (
        ("c_il", c_il),
        ("c_rl", c_rl),
        ("smoothness_il", smoothness_il),
        ("smoothness_rl", smoothness_rl),
    ):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}: it must be finite and positive")
    if not c_rl < 2:
        raise ValueError(f"c_rl is {c_rl}: it must be below 2")
    if form == "root":
        above, below = norm_rl * norm_rl, rho * norm_il * norm_rl - variance_term
    elif form == "balance":
        above = -promised_benefit(
            norm_rl,
            norm_il,
            rho,
            variance_term=variance_term,
            c_il=c_il,
            smoothness_il=smoothness_il,
        )
        below = promised_progress(norm_rl, c_rl=c_rl, smoothness_rl=smoothness_rl)
    else:
        raise ValueError(f"form is {form!r}: it must be root or balance")
    if not (below > 0 and math.isfinite(below)):
        return float(maximum)
    ratio = above / below
    if form == "root":
        ratio = math.sqrt(ratio)
    return float(min(maximum, max(1.0, ratio)))


def promised_progress(norm_rl: float, *, c_rl: float = 1.0, smoothness_rl: float = 1.0) -> float:
    """``P``: what smoothness promises that an RL update takes off its loss.

    ``c_RL (1 - c_RL / 2) / L_RL g_RL^2``, of a gradient step of size ``c_RL / L_RL``. Parameters as
    in :func:`optimal_ratio`.
    """
    return c_rl * (1.0 - c_rl / 2.0) / smoothness_rl * norm_rl * norm_rl


def promised_benefit(
    norm_rl: float,
    norm_il: float,
    rho: float,
    *,
    variance_term: float,
    c_il: float = 1.0,
    smoothness_il: float = 1.0,
) -> float:
    """``Δ``: what smoothness promises that an imitation update takes off the RL loss.

    ``-(c_IL / L_IL ρ g_IL g_RL + v)`` with the ``v`` of the balance: the balance is the m at which
    the RL updates of a cycle pay for its imitation update, ``m P = -Δ``. Parameters as in
    :func:`optimal_ratio`.
    """
    return -(c_il / smoothness_il * rho * norm_il * norm_rl + variance_term)


def efficiency_ratio(ratio: float, progress: float, benefit: float) -> float:
    """What a cycle gains over as many RL updates: ``(m P + Δ) / ((1 + m) P)``.

    Equal to ``m / (1 + m) / (1 - β)`` with ``β`` the share of the cycle's gain that is imitation's.

    Parameters
    ----------
    ratio : float
        m, above 0; ``inf`` gives 1.
    progress, benefit : float
        ``P`` and ``Δ``, in the same units.

    Returns
    -------
    float
        NaN unless ``progress`` is positive: over an RL that gains nothing there is no ratio.

    Raises
    ------
    ValueError
        If ``ratio`` is not positive.
    """
    if not ratio > 0:
        raise ValueError(f"ratio is {ratio}: it must be positive")
    if not progress > 0:
        return math.nan
    if ratio == math.inf:
        return 1.0
    return (ratio + benefit / progress) / (1.0 + ratio)


class CycleEstimates(PairEstimates):
    """Running averages of what the updates of a cycle gain, promised and observed.

    Over the parameters that both objectives train, as all estimates: what a critic of RL gains is
    not part of it.

    Observed is the change of the RL loss by the steps that were truly taken, whatever the
    optimiser: ``-½ (g + g')·Δθ`` with the RL gradients before and after, exact on a quadratic. (An
    update by imitation alone and the RL update before it lie between the same two gradients; their
    sum is exact, each to first order.) A batch agrees with the step that was taken on it, so ``P``
    is too large rather than too small where gradients are noisy; ``Δ`` is of a step on other data.
    Where the cycle begins with an update of both objectives, ``Δ`` is of both parts of it.

    Parameters
    ----------
    names : tuple of two str
        Imitation, and what it is interleaved into.
    smoothing : float
        As in :class:`~holdfast.joint.geometry.PairEstimates`.
    c_il, c_rl : float
        Step sizes that the promises are for, as in :func:`optimal_ratio`.
    combine : bool
        Whether the cycle begins with an update of both.
    """

    def __init__(
        self,
        names: tuple[str, str],
        smoothing: float,
        *,
        c_il: float = 1.0,
        c_rl: float = 1.0,
        combine: bool = False,
    ) -> None:
        super().__init__(names, smoothing)
        self.c_il, self.c_rl = c_il, c_rl
        self.combine = combine
        self._before: list[str] = []

    def update(self, gradients: Mapping[str, Gradient], parameters: Sequence[Tensor]) -> bool:
        if self.names[1] in gradients and self.names[1] in self._latest:
            self._look_back(self._shared(gradients)[self.names[1]], parameters)
        taken = super().update(gradients, parameters)
        if taken:
            self._before = [name for name in self.names if name in gradients]
        return taken

    def _look_back(self, gradient: Gradient, parameters: Sequence[Tensor]) -> None:
        first, second = self.names
        sample = self._on(second, gradient)
        if not any(shared([gradient, sample.gradient])):
            return
        ends = [sample.parameters, parameters]
        keys = ["benefit" if first in self._before else "progress"]
        if self._before == [first]:
            ends.insert(1, self._on(first, gradient).parameters)
            keys.insert(0, "progress")
        pairs: list[tuple[Gradient, Gradient]] = []
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            step = [
                None if part is None else after.detach() - before
                for before, after, part in zip(start, end, gradient, strict=True)
            ]
            pairs += [(sample.gradient, step), (gradient, step)]
        products = inner_products(pairs)
        for i, key in enumerate(keys):
            self._average(f"{key}/observed", -(products[2 * i] + products[2 * i + 1]) / 2.0)

    def variance_term(self, power: int) -> float:
        """``c_IL^power L_RL σ²_IL / (2 L²_IL N_IL)`` of the averages: NaN before it is known."""
        first, second = self.names
        known = self.averages
        l_il = known.get(f"smoothness/{first}", 0.0)
        l_rl = known.get(f"smoothness/{second}", 0.0)
        if "cosine" not in known or not (l_il > 0 and l_rl > 0):
            return math.nan
        return self.c_il**power * l_rl * known[f"variance/{first}"] / (2.0 * l_il**2)

    def ratio(self, form: Form, maximum: float) -> float:
        """m of the averages; 1 until two gradients of each objective have been seen."""
        first, second = self.names
        variance_term = self.variance_term(1 if form == "root" else 2)
        if math.isnan(variance_term):
            return 1.0
        known = self.averages
        return optimal_ratio(
            known[f"norm/{second}"],
            known[f"norm/{first}"],
            -known["cosine"],
            variance_term=variance_term,
            form=form,
            maximum=maximum,
            c_il=self.c_il,
            c_rl=self.c_rl,
            smoothness_il=known[f"smoothness/{first}"],
            smoothness_rl=known[f"smoothness/{second}"],
        )

    def record(self, turns: float) -> dict[str, float]:
        """The averages, and what they promise and show of a cycle with so many RL updates.

        ``progress``, ``benefit`` and ``efficiency``, each ``/promised`` and ``/observed``, as far
        as they are known.
        """
        found = dict(self.averages)
        first, second = self.names
        variance_term = self.variance_term(2)
        if not math.isnan(variance_term):
            progress = promised_progress(
                found[f"norm/{second}"],
                c_rl=self.c_rl,
                smoothness_rl=found[f"smoothness/{second}"],
            )
            benefit = promised_benefit(
                found[f"norm/{second}"],
                found[f"norm/{first}"],
                -found["cosine"],
                variance_term=variance_term,
                c_il=self.c_il,
                smoothness_il=found[f"smoothness/{first}"],
            )
            found["progress/promised"] = progress
            found["benefit/promised"] = benefit + (progress if self.combine else 0.0)
        for kind in ("promised", "observed"):
            if f"progress/{kind}" in found and f"benefit/{kind}" in found:
                value = efficiency_ratio(turns, found[f"progress/{kind}"], found[f"benefit/{kind}"])
                if math.isfinite(value):
                    found[f"efficiency/{kind}"] = value
        return found

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "before": list(self._before)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._before = list(state.get("before", ()))
