"""Recipes for what cannot run here: they are valid, name what exists, and say so."""

from pathlib import Path

import pytest

from holdfast.control.environments import robosuite
from holdfast.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "docs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_configuration_is_valid_and_says_that_it_was_not_measured(path):
    recipe = load_recipe(str(path))
    assert recipe.name == path.stem and "Not measured" in recipe.description
    simulator, task = recipe.objectives["rl"].environment.name.split("/")
    assert simulator == "furniture" or task in robosuite.TASKS


def test_there_is_one_for_every_task_that_was_not_measured():
    assert {path.stem for path in RECIPES} == {
        "furniture-one-leg",
        "robosuite-square",
        "robosuite-transport",
    }
