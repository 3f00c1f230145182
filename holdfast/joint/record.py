"""The record of a run: ``run.json``, ``metrics.jsonl``, progress on the terminal, trackers."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from holdfast.joint.objective import Row


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def machine() -> dict[str, Any]:
    """What the run is measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def peak_memory_bytes() -> int:
    """Largest memory so far: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


class Recorder:
    """Writes what happens in a run.

    Parameters
    ----------
    folder : Path
        The run directory.
    console : Console, optional
        Where progress is drawn. ``None``: nowhere (other ranks, quiet runs).
    trackers : object with ``log(values, step)``, optional
        An ``accelerate.Accelerator`` whose trackers have been initialised.
    """

    def __init__(self, folder: Path, console: Console | None = None, trackers: Any = None) -> None:
        self.folder = folder
        self.console = console
        self._trackers = trackers
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._progress: Progress | None = None

    def rewind(self, step: int) -> None:
        """Forget all that was recorded after ``step``: it is about to happen again."""
        path = self.folder / "metrics.jsonl"
        kept = [line for line in path.read_text("utf-8").splitlines() if _step_of(line) <= step]
        self._metrics.close()
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(path)
        self._metrics = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line to ``metrics.jsonl`` and pass its numbers to the trackers."""
        line = {"kind": kind, "step": step, **_plain(values)}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        if self._trackers is not None and kind != "event":
            self._trackers.log(_flat(kind, values), step=step)

    def event(self, step: int, event: str, detail: str) -> None:
        """Record something that a person should see."""
        self.write("event", step, event=event, detail=detail)
        if self.console is not None:
            text = Text.assemble((f"step {step}", "bold"), f" {event}: {detail}")
            self.console.print(text, soft_wrap=True)

    def save_batch(self, step: int, name: str, rows: Sequence[Row]) -> Path:
        """Keep the batch of a step that was refused, or at which a tripwire went off."""
        path = self.folder / "refused" / f"step-{step:08d}-{name}.json"
        path.parent.mkdir(exist_ok=True)
        described = [row.to_json() if hasattr(row, "to_json") else repr(row) for row in rows]
        write_json(path, described)
        return path

    def describe(self, **values: Any) -> None:
        """Merge ``values`` into ``run.json``."""
        path = self.folder / "run.json"
        known = json.loads(path.read_text("utf-8")) if path.exists() else {}
        known.update(_plain(values))
        write_json(path, known)

    def progress(self, step: int, total: int, text: str) -> None:
        """Draw how far the run is, and how long it still takes."""
        if self.console is None or not self.console.is_terminal:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                console=self.console,
                transient=True,
            )
            self._task = self._progress.add_task(text, total=total, completed=step)
            self._progress.start()
        self._progress.update(self._task, completed=step, description=text)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._metrics.close()


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    import accelerate

    import holdfast

    return {
        "holdfast": holdfast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
    }


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by a crash


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become text that says what they were."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _flat(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """``{"objectives": {"dpo": {"loss": 1}}}`` as ``{"train/dpo/loss": 1}``."""
    flat: dict[str, float] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                visit(prefix if key in ("objectives", "metrics") else f"{prefix}/{key}", item)
        elif isinstance(value, int | float) and math.isfinite(value):
            flat[prefix] = float(value)

    visit(kind, values)
    return flat


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
