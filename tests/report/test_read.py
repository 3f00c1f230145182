"""Reading run directories: whole, unfinished, resumed and damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.errors import RunError
from holdfast.report.read import read_run


def train(step: int, objective: str = "sft", loss: Any = 1.0, **fields: Any) -> dict[str, Any]:
    terms = {"weight": 1.0, "loss": loss, "count": 8, "metrics": {"rewards/accuracies": 0.5}}
    return {
        "kind": "train",
        "step": step,
        "objectives": {objective: terms},
        "gaps": {},
        "learning_rate": 0.001,
        "grad_norm": 1.3,
        "clipped_grad_norm": 1.0,
        "seconds": float(step),
    } | fields


def evaluation(step: int, **losses: float) -> dict[str, Any]:
    terms = {name: {"loss": loss, "count": 9, "metrics": {}} for name, loss in losses.items()}
    return {"kind": "eval", "step": step, "objectives": terms, "seconds": float(step)}


def test_every_field_of_the_format_is_read(write_run: Callable[..., Path]) -> None:
    mixed = train(2, gaps={"sft": 0.4, "dpo": 0.3})
    mixed["objectives"] = {
        "sft": {"weight": 0.3, "loss": 2.0, "count": 8, "metrics": {}},
        "dpo": {"weight": 0.7, "loss": 0.6, "count": 4, "metrics": {"rewards/margins": 0.1}},
    }
    event = {"kind": "event", "step": 2, "event": "stage", "detail": "dpo"}
    path = write_run(
        [evaluation(0, sft=3.0, dpo=0.7), train(1), event, mixed, evaluation(2, sft=1.9, dpo=0.5)],
        optima={"sft": 1.5, "dpo": None},
    )
    run = read_run(path)
    assert run.objectives == ("sft", "dpo")
    assert run.steps == 2
    assert run.training["sft"].values.tolist() == [1.0, 2.0]
    assert run.weights["dpo"].values.tolist() == [0.7]
    assert run.held_out["sft"].steps.tolist() == [0, 2]
    assert run.held_out["dpo"].values.tolist() == [0.7, 0.5]
    assert run.gaps["sft"].steps.tolist() == [2]
    assert run.training_metrics["rewards/margins"]["dpo"].values.tolist() == [0.1]
    assert run.learning_rate.values.tolist() == [0.001, 0.001]
    assert run.grad_norm.values.tolist() == [1.3, 1.3]
    assert run.clipped_grad_norm.values.tolist() == [1.0, 1.0]
    assert run.seconds.values.tolist() == [1.0, 2.0]
    assert [(e.step, e.kind, e.detail) for e in run.events] == [(2, "stage", "dpo")]
    assert run.optimum("sft") == 1.5
    assert run.optimum("dpo") is None
    assert run.recipe == "steps: 4\n"
    assert run.unreadable == 0


def test_a_partial_last_line_is_left_out_silently(write_run: Callable[..., Path]) -> None:
    run = read_run(write_run([train(1)], tail='{"kind":"train","step":2,"obj'))
    assert (run.steps, run.unreadable) == (1, 0)


def test_damaged_lines_are_counted(write_run: Callable[..., Path]) -> None:
    tail = '{"kind":"tr\n[1]\n{"kind":"train"}\n{"kind":"other","step":1}\n\n'
    assert read_run(write_run([train(1)], tail=tail)).unreadable == 4


def test_later_records_replace_those_that_a_resume_repeats(write_run: Callable[..., Path]) -> None:
    run = read_run(
        write_run(
            [
                train(1, "sft", 5.0),
                train(2, "dpo", 5.0),
                evaluation(2, sft=5.0),
                train(3, "dpo", 5.0),
                {"kind": "event", "step": 1, "event": "resumed", "detail": ""},
                train(2, "sft", 4.0),
                evaluation(2, sft=4.0),
            ]
        )
    )
    assert run.steps == 2
    assert run.training["sft"].values.tolist() == [5.0, 4.0]
    assert len(run.training["dpo"]) == 0
    assert run.held_out["sft"].values.tolist() == [4.0]
    assert run.turns.steps.tolist() == [1, 2]


@pytest.mark.parametrize("loss", [None, "nan", float("nan")])
def test_a_loss_that_is_not_a_number_becomes_nan(write_run: Callable[..., Path], loss: Any) -> None:
    run = read_run(write_run([train(1, loss=loss)]))
    assert np.isnan(run.training["sft"].values).all()
    assert run.updates("sft") == 1


def test_a_run_that_has_just_started_is_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "running"}')
    run = read_run(tmp_path)
    assert (run.objectives, run.steps, run.recipe) == ((), 0, "")


def test_an_objective_known_only_by_its_optimum_is_listed(write_run: Callable[..., Path]) -> None:
    assert read_run(write_run([train(1)], optima={"dpo": 0.1})).objectives == ("dpo", "sft")


def test_a_directory_that_is_not_a_run_is_named_with_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"run\.json, recipe\.yaml and metrics\.jsonl") as error:
        read_run(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_directory_of_runs_points_to_the_runs(write_run: Callable[..., Path]) -> None:
    path = write_run(folder="seed-1")
    with pytest.raises(RunError, match="seed-1"):
        read_run(path.parent)


def test_a_missing_directory_and_a_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such directory"):
        read_run(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="a file"):
        read_run(tmp_path / "file")


@pytest.mark.parametrize("content", [b'{"status": ', b"[1]", b"\xff\xfe"])
def test_a_damaged_run_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(RunError, match=r"run\.json: expected one JSON object"):
        read_run(tmp_path)
