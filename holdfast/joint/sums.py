"""What micro-batches and ranks add up to."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from holdfast.joint.objective import LossTerms, Summary


class Sums:
    """Totals, counts and metrics of micro-batches, added up in double precision."""

    def __init__(self) -> None:
        self._terms: list[LossTerms] = []

    def add(self, terms: LossTerms) -> None:
        self._terms.append(
            LossTerms(terms.total.detach(), terms.count.detach(), dict(terms.metrics))
        )

    def mean(self, accelerator: Accelerator) -> Summary:
        """Means over all ranks."""
        by_name = self._by_name()
        if accelerator.num_processes > 1:
            # As objects, since a rank without held-out rows does not know the metrics' names.
            ranks: list[dict[str, float]] = gather_object([by_name])
            names = max(ranks, key=len)
            by_name = {name: math.fsum(rank.get(name, 0.0) for rank in ranks) for name in names}
        total, count = by_name.pop("\0total", 0.0), by_name.pop("\0count", 0.0)
        counts = {
            name: by_name.pop(f"\0count of {name}", count)
            for name in [name for name in by_name if not name.startswith("\0")]
        }
        # Metrics with a count of their own say why there may be nothing to take a mean loss over.
        means = {name: by_name[name] / own for name, own in counts.items() if own}
        return Summary(total / count if count else math.nan, count, means)

    def _by_name(self) -> dict[str, float]:
        """The sums. One transfer from the device for all of them."""
        if not self._terms:
            return {}
        names = ["\0total", "\0count"]
        for name, metric in self._terms[0].metrics.items():
            names += [name, f"\0count of {name}"] if metric.ndim else [name]
        # What is known of a batch, such as its count, may lie elsewhere than its loss.
        device = self._terms[0].total.device
        parts = [
            part.to(device, torch.float64).reshape(-1)
            for terms in self._terms
            for part in (terms.total, terms.count, *terms.metrics.values())
        ]
        sums = torch.cat(parts).view(len(self._terms), len(names)).sum(0)
        return dict(zip(names, sums.tolist(), strict=True))
