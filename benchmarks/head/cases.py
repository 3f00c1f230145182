"""What is measured: sizes, pairs of rivals, and what each pair is held to."""

from __future__ import annotations

from dataclasses import dataclass

VOCAB, WIDTH, TOKENS = 151_936, 896, 1024
"""A common vocabulary, and the width of the smallest models that have it."""


@dataclass(frozen=True)
class Case:
    """One loss, evaluated by Holdfast and by a rival, forward and backward.

    Attributes
    ----------
    rival : str
        ``dense`` (plain PyTorch on all logits) or ``trl``.
    heads : int
        Different vocabulary matrices: 4 (policy, old, reward, reference), 2 (student and teacher)
        or 1 (the four models share one).
    trained : bool
        Whether the policy's vocabulary matrix gets a gradient.
    time, memory : float, optional
        What the ratios, ours over the rival's, must not exceed.
    """

    rival: str
    heads: int
    trained: bool
    time: float | None = None
    memory: float | None = None


CASES = {
    "four heads, frozen": Case("dense", 4, False, time=1.15, memory=0.10),
    "four heads, trained": Case("dense", 4, True, time=1.15, memory=0.10),
    "one head, frozen": Case("dense", 1, False, time=0.6, memory=0.10),
    "student and teacher, frozen": Case("trl", 2, False, time=1.1, memory=1.0),
    "student and teacher, trained": Case("trl", 2, True, time=1.1, memory=1.0),
}
