"""Reads a run directory, finished or not."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.errors import RunError
from holdfast.report.runs import Event, Run, Series


def read_run(path: Path) -> Run:
    """The run in ``path``.

    A run may still be going on: ``metrics.jsonl`` may be absent, and its last line may be cut
    short. Where a resumed run wrote steps a second time, the later records count.

    Raises
    ------
    RunError
        If ``path`` is not a run directory or its ``run.json`` cannot be read.
    """
    facts = _read_facts(path)
    metrics = _Metrics()
    unreadable = 0
    for record in _records(path / "metrics.jsonl"):
        if record is None or not metrics.add(record):
            unreadable += 1
    optima = _mapping(facts.get("optima"))
    objectives = dict.fromkeys([*metrics.held_out, *optima, *metrics.training, *metrics.gaps])
    recipe = path / "recipe.yaml"
    return Run(
        path=path,
        facts=facts,
        recipe=recipe.read_text("utf-8", "replace") if recipe.is_file() else "",
        objectives=tuple(objectives),
        turns=metrics.turns.series(),
        training=_by_name(metrics.training),
        weights=_by_name(metrics.weights),
        held_out=_by_name(metrics.held_out),
        gaps=_by_name(metrics.gaps),
        held_out_counts=_by_name(metrics.held_out_counts),
        geometry=_by_name(metrics.geometry),
        estimates=_by_name(metrics.estimates),
        training_metrics={k: _by_name(v) for k, v in metrics.training_metrics.items()},
        held_out_metrics={k: _by_name(v) for k, v in metrics.held_out_metrics.items()},
        learning_rate=metrics.learning_rate.series(),
        grad_norm=metrics.grad_norm.series(),
        clipped_grad_norm=metrics.clipped_grad_norm.series(),
        seconds=metrics.seconds.series(),
        events=tuple(metrics.events),
        unreadable=unreadable,
    )


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """At least one run, in order.

    Raises
    ------
    RunError
        If there is no path, or for one as in :func:`read_run`.
    """
    if not paths:
        raise RunError("no run was named: name at least one run directory")
    return [read_run(Path(path)) for path in paths]


def _read_facts(path: Path) -> dict[str, Any]:
    expected = (
        "expected a directory that 'holdfast train' wrote, "
        "with run.json, recipe.yaml and metrics.jsonl in it"
    )
    if not path.exists():
        raise RunError(f"{path}: there is no such directory; {expected}")
    if not path.is_dir():
        raise RunError(f"{path}: this is a file, not a run directory; {expected}")
    file = path / "run.json"
    if not file.is_file():
        within = sorted(found.parent.name for found in path.glob("*/run.json"))
        hint = f". It holds the runs {', '.join(within[:8])}: name those" if within else ""
        raise RunError(f"{path}: not a run directory: it has no run.json; {expected}{hint}")
    try:
        facts = json.loads(file.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{file}: expected one JSON object: {error}") from None
    if not isinstance(facts, dict):
        raise RunError(f"{file}: expected one JSON object, found {type(facts).__name__}")
    return facts


def _records(file: Path) -> Iterator[dict[str, Any] | None]:
    """One record a line; ``None`` for a line that cannot be read, except an unfinished last one."""
    if not file.is_file():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                if line.endswith("\n"):
                    yield None
                continue
            yield record if isinstance(record, dict) else None


class _Column:
    """A series under construction."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []

    def add(self, step: int, value: Any) -> None:
        self.steps.append(step)
        self.values.append(_number(value))

    def cut(self, step: int) -> None:
        """Forget ``step`` and everything after it."""
        length = bisect_left(self.steps, step)
        del self.steps[length:], self.values[length:]

    def series(self) -> Series:
        return Series(np.array(self.steps, np.int64), np.array(self.values, np.float64))


_Columns = defaultdict[str, _Column]


class _Metrics:
    """The columns of ``metrics.jsonl``."""

    def __init__(self) -> None:
        self.turns, self.seconds = _Column(), _Column()
        self.learning_rate, self.grad_norm = _Column(), _Column()
        self.clipped_grad_norm = _Column()
        self.training, self.weights, self.gaps = _columns(), _columns(), _columns()
        self.held_out, self.held_out_counts = _columns(), _columns()
        self.geometry, self.estimates = _columns(), _columns()
        self.training_metrics: defaultdict[str, _Columns] = defaultdict(_columns)
        self.held_out_metrics: defaultdict[str, _Columns] = defaultdict(_columns)
        self.events: list[Event] = []
        self.last = {"train": -1, "eval": -1}

    def add(self, record: Mapping[str, Any]) -> bool:
        """Take a record in; ``False`` if it is not one."""
        kind, step = record.get("kind"), record.get("step")
        if not isinstance(step, int):
            return False
        if kind == "event":
            detail = str(record.get("detail") or "")
            self.events.append(Event(step, str(record.get("event", "event")), detail))
            return True
        if kind not in ("train", "eval"):
            return False
        if step <= self.last[kind]:
            self._cut(kind, step)
        self.last[kind] = step
        objectives = _mapping(record.get("objectives"))
        if kind == "train":
            self._add_training(step, record, objectives)
        for name, terms in objectives.items():
            losses, metrics = (
                (self.training, self.training_metrics)
                if kind == "train"
                else (self.held_out, self.held_out_metrics)
            )
            losses[name].add(step, _mapping(terms).get("loss"))
            if kind == "eval":
                self.held_out_counts[name].add(step, _mapping(terms).get("count"))
            for metric, value in _mapping(_mapping(terms).get("metrics")).items():
                metrics[metric][name].add(step, value)
        return True

    def _add_training(
        self, step: int, record: Mapping[str, Any], objectives: Mapping[str, Any]
    ) -> None:
        self.turns.add(step, len(objectives))
        self.seconds.add(step, record.get("seconds"))
        self.learning_rate.add(step, record.get("learning_rate"))
        self.grad_norm.add(step, record.get("grad_norm"))
        if "clipped_grad_norm" in record:
            self.clipped_grad_norm.add(step, record["clipped_grad_norm"])
        for name, terms in objectives.items():
            self.weights[name].add(step, _mapping(terms).get("weight", 1.0))
        for name, gap in _mapping(record.get("gaps")).items():
            self.gaps[name].add(step, gap)
        geometry = _mapping(record.get("geometry"))
        for kind, prefix in (("norms", "norm"), ("cosines", "cosine")):
            for name, value in _mapping(geometry.get(kind)).items():
                self.geometry[f"{prefix}/{name}"].add(step, value)
        for name, value in _mapping(record.get("estimates")).items():
            self.estimates[name].add(step, value)

    def _cut(self, kind: str, step: int) -> None:
        groups: list[_Columns] = [self.held_out, self.held_out_counts]
        groups += self.held_out_metrics.values()
        single: list[_Column] = []
        if kind == "train":
            groups = [self.training, self.weights, self.gaps, self.geometry, self.estimates]
            groups += self.training_metrics.values()
            single = [self.turns, self.seconds, self.learning_rate, self.grad_norm]
            single.append(self.clipped_grad_norm)
        for column in [*single, *(column for group in groups for column in group.values())]:
            column.cut(step)


def _columns() -> _Columns:
    return defaultdict(_Column)


def _by_name(columns: _Columns) -> dict[str, Series]:
    return {name: column.series() for name, column in columns.items()}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
