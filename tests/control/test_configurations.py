"""Recipes in the documentation: they are valid, and those that cannot run here say so."""

import re
from pathlib import Path

import pytest

from holdfast.control.environments import robosuite
from holdfast.recipe import load_recipe

DOCS = Path(__file__).parents[2] / "docs"
RECIPES = sorted((DOCS / "recipes").glob("*.yaml"))


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


def test_the_recipes_of_the_guide_are_whole_and_follow_on_each_other(tmp_path):
    guide = (DOCS / "guide.md").read_text("utf-8")
    found = {}
    for name in ("clone", "fine_tune"):
        (text,) = re.findall(rf"```yaml\n# {name}\.yaml\n(.*?)```", guide, re.DOTALL)
        path = tmp_path / f"{name}.yaml"
        path.write_text(text, "utf-8")
        found[name] = load_recipe(str(path))
        assert found[name].name == name
    assert found["fine_tune"].policy.model_name_or_path.endswith("runs/clone/model")
