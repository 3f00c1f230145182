"""Logged decisions from recipe to values, against exact solutions; and what is refused."""

import csv
import json

import numpy as np
import pytest
import yaml

from holdfast import run as runs
from holdfast.assemble_bellman import pose, step_ratio
from holdfast.bellman import TabularMDP, rank_influence
from holdfast.bellman.problem import Batch
from holdfast.bellman.sgda import descend_ascend
from holdfast.bellman.soft_q import SoftQ
from holdfast.errors import DataError, RecipeError, TrainingError
from holdfast.recipe import load_recipe
from holdfast.schema import Recipe, SoftQSpec

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
            recipe = Recipe.model_validate(values)
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
        ({"kind": "bellman_saddle", "discount": 1.0}, RecipeError, r"yaml:\d+: .*discount"),
        ({"kind": "bellman_saddle", "discount": -0.1}, RecipeError, r"yaml:\d+: .*discount"),
        ({"kind": "td_error", "discount": float("nan")}, RecipeError, r"yaml:\d+: .*discount"),
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


def test_the_dual_moves_faster_unless_told(tmp_path):
    logged(tmp_path, TabularMDP.random(4, 3, DISCOUNT, seed=0), 300)
    objective = {"kind": "bellman_saddle", "discount": DISCOUNT}
    recipe = write(tmp_path, {"values": objective}, states=4, step_ratio=5)
    assert step_ratio(recipe) == pytest.approx(3.0), "learning_rates.zeta wins"
    values = recipe.dump()
    values["training"].update(learning_rates={}, max_steps=2, eval_steps=2, save_steps=2)
    recipe = Recipe.model_validate(values)
    assert step_ratio(recipe) == 5.0
    folder = runs.train(recipe)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (first, *_) = [line for line in lines if line["kind"] == "train"]
    rates = first["learning_rate"], first["learning_rates"]["zeta"]
    assert rates[1] == pytest.approx(5 * rates[0])


def test_a_common_rate_that_leaves_the_saddle_is_refused_before_training(tmp_path):
    model = TabularMDP.random(4, 3, 0.97, seed=0)
    logged(tmp_path, model, 600)
    objective = {"kind": "bellman_saddle", "discount": 0.97}
    recipe = write(tmp_path, {"values": objective}, states=4)
    values = recipe.dump()
    values["training"]["learning_rates"] = {"zeta": values["training"]["learning_rate"]}
    recipe = Recipe.model_validate(values)
    with pytest.raises(TrainingError, match="leaves the saddle.*set step_ratio to"):
        runs.train(recipe)
    with pytest.raises(TrainingError, match="leaves the saddle.*set step_ratio to"):
        runs.measure_stability(recipe)


def test_evaluations_say_how_far_the_saddle_is(tmp_path):
    """Distances to the exact solution of the rows that are trained on, held-out rows left out."""
    model = TabularMDP.random(3, 3, 0.5, seed=0)
    found = logged(tmp_path, model, 1000)
    objective = {"kind": "bellman_saddle", "discount": 0.5}
    values = write(tmp_path, {"values": objective}, states=3, steps=200).dump()
    values["training"]["eval_steps"] = 200
    recipe = Recipe.model_validate(values)
    posed = pose(recipe)
    assert len(posed.problem.transitions) == 950
    np.testing.assert_allclose(posed.problem.transitions.reward, found.reward[posed.rows])
    folder = runs.train(recipe)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if line["kind"] == "eval"][-1]["objectives"]["values"]["metrics"]
    q = SoftQ.from_pretrained(folder / "model").q.weight.detach().numpy()
    wanted = np.abs(q - posed.problem.exact()[0]).max()
    assert told["bellman/q_error"] == pytest.approx(wanted)
    training = [line for line in lines if line["kind"] == "train"][-1]["objectives"]["values"]
    assert "bellman/q_error" not in training["metrics"]


def test_shipped_recipes_pose_problems_whose_answers_are_known():
    """The exact estimate of the shipped log is the reward that the buses were driven by."""
    posed = pose(load_recipe("bellman-bus"))
    q, zeta = posed.problem.exact()
    truth = TabularMDP.bus(6, 0.9, cost=0.4, replacement=2.0).rewards
    np.testing.assert_allclose((q - 0.9 * zeta)[:, 1], -2.0, atol=1e-9)
    assert np.abs(q - 0.9 * zeta - truth)[:4].max() < 0.5
    values = pose(load_recipe("bellman-offline")).problem
    grid = TabularMDP.gridworld(4, 4, 0.9, slip=0.2, goal=20.0).soft_policy_iteration().q
    assert np.abs(values.exact()[0] - grid)[:15].max() < 0.05 * 20
    cart = pose(load_recipe("bellman-irl-gym")).problem
    assert cart.anchor_action == 0 and np.nanmax(cart.transitions.reward) == 1.0


def test_stability_of_a_recipe_is_that_of_its_training_rows(tmp_path):
    model = TabularMDP.random(3, 3, 0.5, seed=0)
    logged(tmp_path, model, 400)
    objective = {"kind": "bellman_saddle", "discount": 0.5}
    recipe = write(tmp_path, {"values": objective}, states=3, steps=20)
    folder = runs.measure_stability(recipe, rows=5, draws=2, sizes=0, seed=1)
    record = json.loads((folder / "stability.json").read_text())
    problem = pose(recipe).problem
    exact = rank_influence(problem, rows=5, draws=2, seed=1)
    assert [entry["shift"] for entry in record["entries"]] == exact.shift.ravel().tolist()
    assert record["influence"][0]["row"] == pose(recipe).rows[exact.ranking[0]]
    assert record["recipe"] == recipe.fingerprint() and "trained_error" not in record
    runs.train(recipe)  # what was measured is no run, and does not stand in its way
    again = json.loads(
        (runs.measure_stability(recipe, rows=5, sizes=0) / "stability.json").read_text()
    )
    q = SoftQ.from_pretrained(folder / "model").q.weight.detach().numpy()
    assert again["trained_error"] == pytest.approx(np.abs(q - problem.exact()[0]).max())


def test_stability_of_networks_is_measured_by_runs_of_the_recipe(tmp_path):
    """Descent-ascent in a batch of replicas is the training of the recipe, step by step."""
    model = TabularMDP.random(4, 3, DISCOUNT, seed=0)
    found = logged(tmp_path, model, 300)
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
        "data": {"path": "rows.npz"},
        "batch_size": 300,  # all of them: the order of rows does not matter
    }
    recipe = write(tmp_path, {"values": objective}, steps=25, hidden=[5])
    folder = runs.measure_stability(recipe, rows=2)
    record = json.loads((folder / "stability.json").read_text())
    assert record["method"] == "coupled" and record["control"] == 0.0 and record["tried"] == 2
    assert len(record["entries"][0]["state"]) == 4 and record["margin"] is None
    assert all(entry["shift"] > 0 for entry in record["entries"])
    posed = pose(recipe)
    ends = descend_ascend(posed.problem, Batch.stack([posed.problem.transitions]), posed.settings)
    trained = SoftQ.from_pretrained(runs.train(recipe) / "model")
    flat = np.concatenate([each.detach().numpy().ravel() for each in trained.q.parameters()])
    np.testing.assert_allclose(ends.primal[0].numpy(), flat, atol=1e-6)


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"values": {"kind": "td_error", "discount": 0.5}}, "td_error pose no saddle problem"),
        ({"choices": {"kind": "choice_likelihood"}}, "choice_likelihood pose no saddle problem"),
        (
            {
                "choices": {"kind": "choice_likelihood", "data": {"path": "rows.csv"}},
                "anchor": {"kind": "anchor_bellman", "discount": 0.5, "anchor_action": 0},
            },
            "train on different rows",
        ),
    ],
)
def test_what_has_no_stability_to_measure_is_told(tmp_path, objectives, message):
    logged(tmp_path, TabularMDP.random(4, 3, 0.5, seed=0), 300)
    with pytest.raises(RecipeError, match=message):
        runs.measure_stability(write(tmp_path, objectives, states=4))


def test_data_that_leave_a_pair_free_have_no_exact_answer_to_measure(tmp_path):
    (tmp_path / "rows.csv").write_text(
        "state,action,reward,next_state\n" + "0,1,1,1\n1,0,0,0\n" * 60
    )
    objective = {"kind": "bellman_saddle", "discount": 0.5}
    with pytest.raises(DataError, match="rows.csv: state 0 with action 0 does not occur"):
        runs.measure_stability(write(tmp_path, {"values": objective}, states=2))


def test_stability_is_of_logged_decisions():
    with pytest.raises(RecipeError, match="policy.kind is language"):
        runs.measure_stability(load_recipe("quickstart"))


SCHEDULES = {
    "alternated": {"kind": "interleave", "first": "choices", "second": "anchor", "ratio": 2},
    "drawn": {"kind": "alright", "weights": {"choices": 0.5, "anchor": 0.5}},
    "by gap": {"kind": "maxright", "weights": {"choices": 0.5, "anchor": 0.5}},
    "surgery": {"kind": "mix", "weights": {"choices": 0.5, "anchor": 0.5}},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_likelihood_and_bellman_terms_combine_like_any_others(tmp_path, name):
    model = TabularMDP.random(3, 3, 0.5, seed=3)
    policy = model.soft_value_iteration(1e-10).policy
    logged(tmp_path, model, 3000, law=policy / 3)
    entropy = float(-(policy * np.log(policy)).sum(1).mean())
    data = {"path": "rows.csv", "held_out": 200, "probe": 200}
    objectives = {
        "choices": {"kind": "choice_likelihood", "data": data, "optimum": entropy},
        "anchor": {
            "kind": "anchor_bellman",
            "discount": 0.5,
            "anchor_action": 0,
            "data": data,
            "optimum": 0.0,
        },
    }
    recipe = write(tmp_path, objectives, SCHEDULES[name], steps=600, states=3)
    values = recipe.dump()
    values["training"].update(learning_rate=0.1, learning_rates={}, eval_steps=125)
    if name == "surgery":
        values["combiner"] = {"method": "pcgrad"}
    folder = runs.train(Recipe.model_validate(values))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    errors = [
        line["objectives"]["anchor"]["metrics"]["bellman/reward_error"]
        for line in lines
        if line["kind"] == "eval"
    ]
    assert errors[-1] < 0.8 * errors[0]


def uncovered(tmp_path):
    """State 1 never chooses action 2; state 3 is nowhere."""
    found = TabularMDP.random(3, 3, 0.5, seed=0).sample(400, seed=0)
    kept = found[(found.state != 1) | (found.action != 2)]
    rows = zip(kept.state, kept.action, kept.reward, kept.next_state, strict=True)
    lines = ["state,action,reward,next_state", *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("kind", ["bellman_saddle", "td_error"])
def test_a_pair_that_bellman_terms_leave_free_is_refused(tmp_path, kind):
    uncovered(tmp_path)
    objective = {"kind": kind, "discount": 0.5}
    with pytest.raises(DataError, match="values.data: .*rows.csv: state 1 with action 2"):
        runs.train(write(tmp_path, {"values": objective}, states=4))


def test_choices_may_leave_pairs_out_but_not_the_anchor(tmp_path):
    uncovered(tmp_path)
    anchor = {"kind": "anchor_bellman", "discount": 0.5, "anchor_action": 2}
    objectives = {"choices": {"kind": "choice_likelihood"}, "anchor": anchor}
    with pytest.raises(DataError, match=r"objectives.anchor.data: .*state 1 with action 2"):
        runs.train(write(tmp_path, objectives, states=4))
    anchor["anchor_action"] = 0
    recipe = write(tmp_path, objectives, states=4, steps=2).dump()
    recipe["training"].update(eval_steps=2, save_steps=2)
    runs.train(Recipe.model_validate(recipe))


def test_the_dual_is_at_least_twice_as_fast_by_default():
    rates = SoftQSpec(actions=2).learning_rates(0.01, {})
    assert rates["zeta"] >= 0.02


def test_trajectories_that_end_in_a_table_have_an_exact_answer(tmp_path):
    """Without a column next_state, the last row of an episode leads to its own state, and ends."""
    found = TabularMDP.gridworld(2, 2, 0.5, slip=0.3).sample_trajectories(120, 40, seed=0)
    assert found.terminal.any()
    time = np.arange(len(found)) - np.searchsorted(found.trajectory, found.trajectory)
    columns = (found.trajectory, time, found.state, found.action, found.reward, found.terminal)
    lines = ["trajectory,time,state,action,reward,terminal"]
    lines += [",".join(map(str, row)) for row in zip(*columns, strict=True)]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    objective = {"kind": "bellman_saddle", "discount": 0.5, "data": {"path": "rows.csv"}}
    values = write(tmp_path, {"values": objective}, states=4).dump()
    values["policy"]["actions"] = 4
    posed = pose(Recipe.model_validate(values))
    wanted = TabularMDP.empirical(found, 4, 4, 0.5).soft_policy_iteration(1e-12).q
    assert len(posed.problem.transitions) == len(found), "every trajectory ended"
    np.testing.assert_allclose(posed.problem.exact()[0][:3], wanted[:3], atol=1e-9)
