"""The page and the tables of a measurement of stability."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from holdfast.errors import RunError
from holdfast.report import stability_tables, write_stability


def result(**changes: Any) -> dict[str, Any]:
    entries = [
        {
            "state": state,
            "action": action,
            "estimate": state - 0.5 * action,
            "shift": 0.01 * (1 + state + 3 * action),
            "interval": [-0.02, 0.03],
        }
        for state in range(3)
        for action in range(2)
    ]
    row = {"state": 1, "action": 0, "reward": -2.5, "next_state": 2, "alone": False}
    influence = [
        row | {"row": 17, "influence": None, "alone": True, "next_state": None},
        row | {"row": 4, "influence": 0.75, "reward": None},
        row | {"row": 9, "influence": 0.25},
    ]
    size = {"steps": 500, "function_distance": 0.1, "optimisation_error": 0.2, "rejected": 0}
    curve = {
        "sizes": [
            size | {"n": n, "epsilon": 8 / n, "n_epsilon": 8.0, "saddle_shift": 7 / n}
            for n in (50, 100)
        ],
        "slope": -1.0,
        "interval": [-1.2, -0.8],
        "saddle_slope": -1.0,
        "saddle_interval": [-1.1, -0.9],
        "control": 0.0,
    }
    found = {
        "name": "buses <b>",
        "method": "exact",
        "quantity": "reward",
        "discount": 0.9,
        "rows": 400,
        "tried": 3,
        "control": 0.0,
        "margin": {"step_ratio": 4.0, "margin": 0.02, "max_step": 1.0},
        "entries": entries,
        "influence": influence,
        "curve": curve,
    }
    return found | changes


def written(folder: Path, found: dict[str, Any]) -> Path:
    (folder / "stability.json").write_text(json.dumps(found), "utf-8")
    return folder


def shown(folder: Path) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        for table in stability_tables(folder):
            console.print(table)
    return captured.get()


def test_the_terminal_shows_what_moves_most_and_by_which_rows(tmp_path: Path) -> None:
    lines = shown(written(tmp_path, result())).splitlines()
    cells = [line.split() for line in lines]
    states = [cell[:2] for cell in cells if len(cell) == 7 and cell[5] == "to"]
    assert states[0] == ["2", "1"] and states[-1] == ["0", "0"], "by shift"
    assert ["17", "alone", "1", "0", "−2.500", "ended"] in cells
    assert ["4", "0.750", "1", "0", "–", "2"] in cells
    assert "3 of 400 observations replaced" in "\n".join(lines) and "−1.20 to" in "\n".join(lines)


def test_the_page_has_every_part_and_escapes_names(tmp_path: Path) -> None:
    page = write_stability(written(tmp_path, result(trained_error=0.125))).read_text("utf-8")
    for part in ("Entries", "Observations", "Size of the data"):
        assert f"<h2>{part}</h2>" in page
    assert "buses &lt;b&gt;" in page and "buses <b>" not in page
    assert "0.1250" in page and "1 that are the only ones of their pair" in page
    assert page.count("<figure>") == 4 and "<script" not in page


def test_networks_are_shown_by_rank_and_without_what_is_not_known(tmp_path: Path) -> None:
    found = result(method="coupled", margin=None, curve=None)
    for entry in found["entries"]:
        entry["state"] = [0.5, float(entry["state"])]
    page = write_stability(written(tmp_path, found)).read_text("utf-8")
    assert page.count("<figure>") == 2 and "Size of the data" not in page
    assert "(0.500, 2.00)" in page and "coupled runs" in page


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "holdfast stability RECIPE"), ("{", "one JSON object"), ("[]", "expected what")],
)
def test_what_is_no_result_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "stability.json").write_text(content)
    with pytest.raises(RunError, match=message):
        write_stability(tmp_path)
