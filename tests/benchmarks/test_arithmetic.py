"""The arithmetic study: its cells are valid recipes, and its measures are what they say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.arithmetic import analysis, study
from benchmarks.arithmetic.prepare import slip
from benchmarks.forgetting_rl import run as forgetting
from holdfast.recipe import parse_recipe

STRENGTHS = {name: values[0] for name, values in study.STRENGTHS.items()}


@pytest.mark.parametrize("inner", study.INNER)
def test_every_cell_is_a_valid_recipe_with_a_key_of_its_own(inner):
    cells = [*study.tuning(inner), *study.screening(inner, STRENGTHS)]
    assert len({cell.key for cell in cells}) == len(set(cells))
    for cell in study.groups(inner, STRENGTHS):
        recipe = parse_recipe(cell.recipe(), file=Path("cell.yaml"))
        objective = recipe.objectives["rl"]
        drawn = recipe.training.max_steps * objective.batch_size / objective.num_iterations
        assert drawn == study.SAMPLES and objective.kind == cell.method
        assert (objective.kind in ("gkd", "minillm")) == hasattr(
            objective, "teacher_model_name_or_path"
        )
        if cell.advantage == "dense" and objective.kind not in ("gkd", "minillm"):
            assert objective.preference is not None


@pytest.mark.parametrize("method", [*forgetting.METHODS, *forgetting.ALONE])
def test_every_cell_of_the_forgetting_study_is_a_valid_recipe(method):
    values = forgetting.Cell(method, 1e-3, 0).recipe({"sft": 0.1, "rl": -0.5})
    parse_recipe(values, file=Path("cell.yaml"))


def test_a_slip_is_wrong():
    import random

    for seed in range(200):
        draw = random.Random(seed)
        a, b = draw.randrange(50), draw.randrange(50)
        assert slip(f"{a}+{b}=", str(a + b), draw) != str(a + b)


def test_a_collapse_is_an_end_below_half_of_the_best():
    assert analysis.collapsed([0.2, 0.4, 0.19])
    assert not analysis.collapsed([0.2, 0.4, 0.1, 0.2])


def test_samples_to_a_level_lie_between_evaluations():
    curves = np.array([[0.1, 0.2, 0.4], [0.1, 0.2, 0.2]])
    assert analysis._samples_to(curves, 0.15) == pytest.approx(0.5 * study.EVERY)
    assert analysis._samples_to(curves, 0.25) == pytest.approx(1.5 * study.EVERY)
    assert analysis._samples_to(curves, 0.05) == 0.0
    assert analysis._samples_to(curves, 0.5) is None


def made(level: float, end: float | None = None) -> dict:
    curve = [0.2] + [level] * 9 + [level if end is None else end]
    return {"validation": curve, "held_out": curve}


def test_the_best_rate_and_both_edges_of_the_envelope_get_all_seeds():
    cell = next(study.groups(1, STRENGTHS))
    levels = {3e-5: 0.2, 1e-4: 0.38, 3e-4: 0.4, 1e-3: 0.37, 3e-3: 0.1}
    cells = {
        replace(cell, learning_rate=rate, seed=seed).key: made(level)
        for rate, level in levels.items()
        for seed in study.SCREENED
    }
    found = {c.learning_rate for c in analysis.finalists(cells, 1, STRENGTHS)}
    assert found == {1e-4, 3e-4, 1e-3}
    # One collapse in one seed, and a rate is no longer stable.
    cells[replace(cell, learning_rate=1e-3, seed=1).key] = made(0.4, 0.05)
    found = {c.learning_rate for c in analysis.finalists(cells, 1, STRENGTHS)}
    assert found == {1e-4, 3e-4}


def test_a_methods_own_option_is_the_one_with_the_best_end():
    cells = {}
    for cell in study.tuning(1):
        cells[cell.key] = made(0.3 if cell.strength == study.STRENGTHS["sparse/pmd"][2] else 0.2)
    assert analysis.chosen_strengths(cells)["sparse/pmd"] == study.STRENGTHS["sparse/pmd"][2]
