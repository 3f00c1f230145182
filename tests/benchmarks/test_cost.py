"""How times become ratios, and rows that every trainer cuts in the same place."""

import numpy as np
import pytest

from benchmarks.cost.material import _made_up_rows, recipe_values
from benchmarks.cost.run import at_even_mix, median_ratio, read_pipeline, read_race
from holdfast.schema import Recipe


def test_ratio_of_paired_times_does_not_see_the_drift_of_the_machine():
    draw = np.random.default_rng(0)
    drift = np.exp(draw.normal(0, 1, 60))
    pairs = np.stack([0.8 * drift, drift], axis=1)
    found = median_ratio(pairs)
    assert found["ratio"] == pytest.approx(0.8)
    assert found["interval"] == pytest.approx([0.8, 0.8])


def test_even_mix_charges_what_a_step_costs_beyond_its_update_to_the_mean_update():
    # Blocks of ten updates of 20 ms, each block with 14 ms on top; the mean update takes 35 ms.
    blocks = np.tile([0.214, 0.2], (8, 1))
    assert at_even_mix(blocks, 0.035)["ratio"] == pytest.approx(1 + 0.0014 / 0.035)


def side(step: float, peak: float, losses: list[float], norm: float = 1.0) -> dict:
    # The steps that warm up are slow, and must not count.
    wall = [9.0, 9.0, 9.0, *[step] * 7]
    times = {"wall": wall, "cpu": wall, "set_up": 1.0, "ready": peak / 2}
    return {**times, "peak": peak, "imported": peak / 4, "losses": losses, "grad_norm": norm}


def test_race_leaves_out_warm_up_and_reports_the_largest_difference_of_losses():
    cell = {
        "holdfast": side(0.1, 300e6, [2.0, 1.5, 1.0]),
        "trl": side(0.4, 400e6, [2.0, 1.5, 1.25], norm=2.0),
    }
    found = read_race(cell)["trl"]
    assert found["wall"]["ratio"] == pytest.approx(0.25)
    assert found["milliseconds"] == pytest.approx(400)
    assert found["peak memory"] == pytest.approx(0.75)
    assert found["first loss"] == 0
    assert found["largest difference of losses"] == pytest.approx(0.25)
    assert found["first gradient norm"] == pytest.approx(0.5)


def test_pipeline_adds_the_steps_of_both_stages_and_takes_the_larger_memory():
    sft = {"holdfast": side(0.1, 1e8, [1.0]), "trl": side(0.2, 4e8, [1.0])}
    dpo = {"holdfast": side(0.2, 1e8, [1.0])}
    dpo |= {name: side(0.4, 2e8, [1.0]) for name in ("trl", "trl, precomputed")}
    found = read_pipeline(sft, dpo, whole={"peak": 1e8})["trl"]
    assert found["wall"]["ratio"] == pytest.approx(0.5)
    assert found["peak memory"] == pytest.approx(0.25)


def test_completions_begin_with_one_space_and_prompts_end_without():
    demonstrations, preferences, _ = _made_up_rows()
    for row in (*demonstrations, *preferences):
        for name, text in row.items():
            if name == "prompt":
                assert text == text.rstrip()
            else:
                assert text[0] == " " and text[1] != " "


@pytest.mark.parametrize("stages", [{"sft": 3}, {"dpo": 4}, {"sft": 3, "dpo": 4}])
def test_recipe_is_valid_and_takes_the_steps_of_its_stages(stages, tmp_path):
    recipe = Recipe.model_validate(recipe_values(tmp_path, "tiny", stages, race=True))
    assert list(recipe.objectives) == list(stages)
    assert recipe.training.max_steps == sum(stages.values())
