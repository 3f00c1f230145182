"""What every study keeps: finished cells, and the conditions under which they were computed."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import holdfast


def machine() -> dict[str, Any]:
    """Processor model and number of cores; nothing that names the machine."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), model)
    return {"cpu": model, "cores": os.cpu_count()}


def bootstrap_interval(
    samples: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], Any],
    resamples: int = 2000,
) -> list[float]:
    """95 % percentile interval of ``statistic`` over resampled rows of ``samples``.

    Parameters
    ----------
    samples : array, (seeds, ...)
        One row per seed; whole rows are drawn with replacement.
    statistic : callable
        From such an array to a number.
    """
    generator = np.random.default_rng(0)
    draws = generator.integers(len(samples), size=(resamples, len(samples)))
    values = [float(statistic(samples[draw])) for draw in draws]
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]


class Results:
    """``results.json``: cells that are computed once and kept.

    Parameters
    ----------
    path : Path
        The file. Written anew after every cell, so that a study goes on where it stopped.
    settings : mapping
        JSON values. Cells computed under other settings are dropped.
    about : mapping
        What a reader needs to repeat the study: command, seeds, budget.
    fresh : bool
        Forget every finished cell.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        about: Mapping[str, Any],
        fresh: bool = False,
    ) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            **about,
            "machine": machine(),
            "versions": {
                "holdfast": holdfast.__version__,
                "python": platform.python_version(),
                "numpy": version("numpy"),
            },
            "settings": json.loads(json.dumps(settings)),
            "seconds": 0.0,
            "summary": {},
            "cells": {},
        }
        if path.exists() and not fresh:
            old = json.loads(path.read_text(encoding="utf-8"))
            if old["settings"] == self.content["settings"]:
                # The machine and versions that computed the cells, not those that read them.
                kept = ("machine", "versions", "seconds", "cells")
                self.content.update({key: old[key] for key in kept})

    def cell(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value of one cell, as JSON values; computed and written if it is not there yet."""
        if key not in self.content["cells"]:
            started = time.perf_counter()
            self.content["cells"][key] = json.loads(json.dumps(compute()))
            spent = self.content["seconds"] + time.perf_counter() - started
            self.content["seconds"] = round(spent, 2)
            self._write()
        return self.content["cells"][key]

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary drawn from the cells."""
        self.content["summary"] = summary
        self._write()

    def _write(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(self._text(), encoding="utf-8")
        part.replace(self.path)

    def _text(self) -> str:
        # Indented, but for the cells: one line each, so that a changed cell is one changed line.
        head = {key: value for key, value in self.content.items() if key != "cells"}
        cells = self.content["cells"].items()
        dumps = json.JSONEncoder(ensure_ascii=False).encode
        lines = ",\n".join(f"  {dumps(key)}: {dumps(cell)}" for key, cell in cells)
        start = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
        return f'{start},\n "cells": {{\n{lines}\n }}\n}}\n'
