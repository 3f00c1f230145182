"""Values and rewards on the page of a run on logged decisions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from holdfast.report import write_report
from holdfast.report.decisions import values_of
from holdfast.report.read import read_run

RECIPE = """
objectives:
  choices: {kind: choice_likelihood}
  anchor: {kind: anchor_bellman, discount: 0.5}
"""


@pytest.fixture
def decided(write_run: Callable[..., Path]) -> Path:
    """A run of two evaluations, with a table of three states and two actions."""
    metrics = {"bellman/reward_error": 0.25, "bellman/dual_error": 0.5}
    records = [
        {
            "kind": "eval",
            "step": step,
            "objectives": {
                "choices": {"loss": 0.6, "count": 5, "metrics": {"nll": 0.6, "accuracy": 0.7}},
                "anchor": {"loss": 0.1, "count": 5, "metrics": metrics},
            },
        }
        for step in (0, 10)
    ]
    run = write_run(records, recipe=RECIPE)
    (run / "model").mkdir()
    lines = [f"{s},{a},{s + 2.0 * a},{1.0 - s}" for s in range(3) for a in range(2)]
    (run / "model" / "q.csv").write_text("state,action,q,zeta\n" + "\n".join(lines) + "\n")
    return run


def test_the_reward_is_read_off_the_table(decided: Path) -> None:
    found = values_of(read_run(decided))
    assert found is not None and found.recovered
    state, action = np.indices((3, 2))
    np.testing.assert_allclose(found.reward, state + 2 * action - 0.5 * (1 - state))
    np.testing.assert_allclose(found.policy[:, 1], 1 / (1 + np.exp(-2.0)))


def test_the_page_shows_metrics_by_what_they_mean_and_the_table(decided: Path) -> None:
    page = write_report([decided]).read_text("utf-8")
    assert "<h2>Values and rewards</h2>" in page and "Recovered reward by state" in page
    assert "Distance of the reward to the exact one" in page
    assert "Negative log-likelihood of choices" in page
    assert "<h2>Metrics</h2>" not in page, "nothing is drawn twice"
    assert "    2       1         4.5           4      0.8808" in page


@pytest.mark.parametrize("damage", ["no table", "no recipe", "words"])
def test_without_a_readable_table_the_rest_is_shown(decided: Path, damage: str) -> None:
    if damage == "no recipe":
        (decided / "recipe.yaml").write_text("steps: 4\n")
    elif damage == "no table":
        (decided / "model" / "q.csv").unlink()
    else:
        (decided / "model" / "q.csv").write_text("state,action,q,zeta\n0,0,x,1\n")
    page = write_report([decided]).read_text("utf-8")
    assert "Values and rewards" in page and "Recovered reward" not in page


def test_a_run_of_a_language_model_has_no_such_part(make_run: Callable[..., Path]) -> None:
    assert "Values and rewards" not in write_report([make_run()]).read_text("utf-8")
