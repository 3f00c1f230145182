"""Logged decisions from recipe to values, against exact solutions; and what is refused."""

import csv
import json

import numpy as np
import pytest
import yaml

from holdfast import run as runs
from holdfast.bellman import TabularMDP
from holdfast.bellman.soft_q import SoftQ
from holdfast.errors import DataError, RecipeError
from holdfast.recipe import load_recipe

DISCOUNT = 0.7


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))


def logged(tmp_path, model, rows=6000, *, law=None):
    found = model.sample(rows, seed=1, law=law)
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["state", "action", "reward", "next_state"])
        writer.writerows(
            zip(found.state, found.action, found.reward, found.next_state, strict=True)
        )
    return found


def write(tmp_path, objectives, schedule=None, *, steps=3000, **policy):
    weights = {name: 1.0 / len(objectives) for name in objectives}
    values = {
        "name": "run",
        "policy": {"kind": "soft_q", "actions": 3, **policy},
        "objectives": {
            name: {"data": {"path": "rows.csv", "held_out": 50}, "batch_size": 500, **values}
            for name, values in objectives.items()
        },
        "schedule": schedule or {"kind": "mix", "weights": weights},
        "training": {
            "max_steps": steps,
            "learning_rate": 0.02,
            "learning_rates": {"zeta": 0.06},
            "lr_scheduler_type": "linear",
            "max_grad_norm": None,
            "eval_steps": 1500,
            "save_steps": 1500,
        },
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_recipe(str(path))


def test_the_saddle_finds_soft_values_where_the_td_error_is_biased(tmp_path):
    model = TabularMDP.random(4, 3, DISCOUNT, seed=0)
    empirical = model.empirical(logged(tmp_path, model), states=4, actions=3, discount=DISCOUNT)
    exact = empirical.soft_value_iteration(1e-10).q
    errors = {}
    for kind in ("bellman_saddle", "td_error"):
        objective = {"kind": kind, "discount": DISCOUNT, "data": {"path": "rows.csv"}}
        recipe = write(tmp_path, {"values": objective}, states=4)
        if kind == "td_error":
            values = recipe.dump()
            values["training"]["learning_rates"] = {}
            recipe = type(recipe).model_validate(values)
        folder = runs.train(recipe, overwrite=True)
        found = SoftQ.from_pretrained(folder / "model")
        errors[kind] = np.abs(found.q.weight.detach().numpy() - exact).max()
    assert errors["bellman_saddle"] < 0.02
    assert errors["td_error"] > 2 * errors["bellman_saddle"]


def test_rewards_are_recovered_from_choices_and_one_known_action(tmp_path):
    model = TabularMDP.random(4, 3, DISCOUNT, seed=3)
    solution = model.soft_value_iteration(1e-10)
    law = np.full(4, 0.25)[:, None] * solution.policy
    logged(tmp_path, model, 20_000, law=law)
    objectives = {
        "choices": {"kind": "choice_likelihood", "batch_size": 1000},
        "anchor": {
            "kind": "anchor_bellman",
            "discount": DISCOUNT,
            "anchor_action": 0,
            "batch_size": 1000,
        },
    }
    folder = runs.train(write(tmp_path, objectives, states=4))
    found = SoftQ.from_pretrained(folder / "model").rewards(DISCOUNT).numpy()
    assert np.abs(found - model.rewards).max() < 0.15
    assert np.abs(model.rewards).max() > 0.6
    written = list(csv.DictReader((folder / "model" / "q.csv").open()))
    assert len(written) == 12 and {"state", "action", "q", "zeta"} == written[0].keys()


def test_networks_train_on_observations(tmp_path):
    model = TabularMDP.random(4, 3, DISCOUNT, seed=0)
    found = logged(tmp_path, model, 2000)
    np.savez(
        tmp_path / "rows.npz",
        state=np.eye(4)[found.state],
        action=found.action,
        reward=found.reward,
        next_state=np.eye(4)[found.next_state],
    )
    objective = {
        "kind": "bellman_saddle",
        "discount": DISCOUNT,
        "data": {"path": "rows.npz", "held_out": 100},
    }
    folder = runs.train(write(tmp_path, {"values": objective}, steps=1500, hidden=[16]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    errors = [
        line["objectives"]["values"]["metrics"]["bellman/td_squared"]
        for line in lines
        if line["kind"] == "eval"
    ]
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("objective", "error", "message"),
    [
        ({"kind": "bellman_saddle", "discount": 1.0}, RecipeError, "discount"),
        (
            {"kind": "anchor_bellman", "discount": 0.5, "anchor_action": 3},
            RecipeError,
            "anchor_action is 3, but policy.actions is 3",
        ),
        (
            {"kind": "choice_likelihood", "data": {"path": "rows.csv", "held_out": 100}},
            DataError,
            "has 100 rows, of which held_out 100",
        ),
        (
            {"kind": "choice_likelihood", "data": {"path": "no.csv"}},
            DataError,
            "no.csv",
        ),
        ({"kind": "nll"}, RecipeError, "does not train a policy of kind soft_q"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_training(tmp_path, objective, error, message):
    logged(tmp_path, TabularMDP.random(4, 3, DISCOUNT, seed=0), 100)
    with pytest.raises(error, match=message):
        runs.train(write(tmp_path, {"values": objective}, states=4))


def test_a_reward_that_was_not_seen_is_named(tmp_path):
    (tmp_path / "rows.csv").write_text("state,action,next_state\n0,1,1\n1,0,0\n")
    objective = {"kind": "td_error", "discount": 0.5, "data": {"path": "rows.csv"}}
    with pytest.raises(DataError, match="reward"):
        runs.train(write(tmp_path, {"values": objective}, states=4))
