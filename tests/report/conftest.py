"""Run directories as ``holdfast train`` writes them, made up from a formula."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

WriteRun = Callable[..., Path]
MakeRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Write a run directory from its records; further arguments are facts of ``run.json``."""

    def write(
        records: Sequence[Mapping[str, Any]] = (),
        *,
        folder: str = "run",
        recipe: str = "steps: 4\n",
        tail: str = "",
        **facts: Any,
    ) -> Path:
        run = tmp_path / folder
        run.mkdir()
        (run / "run.json").write_text(json.dumps({"status": "finished"} | facts), "utf-8")
        (run / "recipe.yaml").write_text(recipe, "utf-8")
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (run / "metrics.jsonl").write_text(lines + tail, "utf-8")
        return run

    return write


@pytest.fixture
def make_run(write_run: WriteRun) -> MakeRun:
    """A whole run: losses fall exponentially with the updates of their objective."""

    def make(
        name: str = "quickstart",
        objectives: Sequence[str] = ("sft", "dpo"),
        *,
        steps: int = 40,
        evaluate_every: int | None = 10,
        optima: bool = True,
        gaps: bool = False,
        status: str = "finished",
        tail: str = "",
        events: Sequence[tuple[int, str, str]] = (),
    ) -> Path:
        done = dict.fromkeys(objectives, 0)
        best = {name: 1.0 + index for index, name in enumerate(objectives)}

        def loss(objective: str) -> float:
            return best[objective] + 0.1 + math.exp(-4.0 * done[objective] / max(steps, 1))

        def evaluation(step: int) -> dict[str, Any]:
            terms = {
                o: {"loss": loss(o), "count": 812, "metrics": {"rewards/accuracies": 0.5}}
                for o in objectives
            }
            return {"kind": "eval", "step": step, "objectives": terms, "seconds": 0.1 * step}

        records: list[dict[str, Any]] = [evaluation(0)] if evaluate_every else []
        for step in range(1, steps + 1):
            records += [
                {"kind": "event", "step": step, "event": kind, "detail": detail}
                for at, kind, detail in events
                if at == step
            ]
            chosen = objectives[(step * step // 3) % len(objectives)]
            done[chosen] += 1
            metrics = {"rewards/accuracies": 0.5 + 0.3 * math.sin(step)}
            terms = {"weight": 1.0, "loss": loss(chosen), "count": 8, "metrics": metrics}
            records.append(
                {
                    "kind": "train",
                    "step": step,
                    "objectives": {chosen: terms},
                    "gaps": {o: 0.5 * (loss(o) - best[o]) for o in objectives} if gaps else {},
                    "learning_rate": 1e-3 * (1 - step / steps),
                    "grad_norm": 1.0 + 0.2 * math.cos(step),
                    "clipped_grad_norm": min(1.0, 1.0 + 0.2 * math.cos(step)),
                    "seconds": 0.1 * step,
                }
            )
            if evaluate_every and (step % evaluate_every == 0 or step == steps):
                records.append(evaluation(step))
        return write_run(
            records,
            folder=name.replace("/", "-"),
            recipe=f"name: {json.dumps(name)}\nsteps: {steps}\n",
            tail=tail,
            name=name,
            status=status,
            reason=None,
            command="holdfast train quickstart",
            started="2026-03-01T12:30:00+00:00",
            seconds=0.1 * steps + 2.0,
            peak_memory_bytes=600 * 2**20,
            parameters={"trainable": 1000, "total": 5000},
            world_size=1,
            versions={"torch": "2.13.0"},
            machine={"cpu": "a processor", "cores": 2, "device": "cpu"},
            optima=best if optima else {},
            fingerprint="0123abcd",
        )

    return make
