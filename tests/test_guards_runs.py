"""Guards of the engine through whole runs of a language model: recorded, off, resumed, refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.prompts import on_policy_values, write_on_policy
from helpers.stopping import stopped_after
from safetensors.torch import load_file

from holdfast import run as runs
from holdfast.errors import RecipeError, TrainingError
from holdfast.recipe import load_recipe
from holdfast.report import write_report


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))


def values_of(*guards, steps=4, **training) -> dict:
    values = on_policy_values()
    values["objectives"]["sft"] = {
        "kind": "nll",
        "data": {"path": "prompts.jsonl", "held_out": 6, "probe": 4},
        "batch_size": 8,
    }
    values["schedule"] = {"kind": "mix", "weights": {"sft": 0.5, "rl": 0.5}}
    values["training"] |= {"max_steps": steps, "eval_steps": steps, "save_steps": steps}
    values["training"] |= {"guards": list(guards), **training}
    return values


def trained(folder: Path, *guards, **options) -> Path:
    file = write_on_policy(folder, values_of(*guards, **options))
    return runs.train(load_recipe(str(file)))


def lines(run: Path, kind: str = "train") -> list[dict]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def weights(run: Path, steps: int = 4) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{steps:08d}/policy.safetensors")


def same(one: Path, other: Path) -> bool:
    left, right = weights(one), weights(other)
    return all(torch.equal(left[name], right[name]) for name in left)


BUDGET = {"kind": "log_ratio_budget", "limit": 0.01}
CAP = {"kind": "update_norm_cap", "limit": 1e-3}


def test_guards_that_never_intervene_change_no_bit(tmp_path):
    plain = trained(tmp_path / "plain")
    never = [
        BUDGET | {"limit": 1e6},
        CAP | {"limit": 1e6},
        {"kind": "tripwires", "kl": 1e6, "entropy": -1.0, "gradient_norm": 1e9, "reward": 1e6},
    ]
    guarded = trained(tmp_path / "guarded", *never)
    assert same(plain, guarded)
    for before, after in zip(lines(plain), lines(guarded), strict=True):
        assert after["objectives"] == before["objectives"]
        factors = {name: after["guards"][name]["factor"] for name in (BUDGET["kind"], CAP["kind"])}
        assert set(factors.values()) == {1.0}


def test_a_budget_on_two_objectives_is_kept_and_recorded_whatever_the_derivative(tmp_path):
    jvp = trained(tmp_path / "jvp", BUDGET, CAP)
    quotient = trained(tmp_path / "fd", BUDGET | {"derivative": "finite_difference"}, CAP)
    for one, other in zip(lines(jvp), lines(quotient), strict=True):
        budget = one["guards"]["log_ratio_budget"]
        assert 0 < budget["factor"] < 1 and budget["change"] > budget["change_after"]
        assert budget["change_after"] == pytest.approx(0.01) and budget["objective"] in (
            "sft",
            "rl",
        )
        assert 0 < budget["over"] <= 1 and budget["token"] >= 0
        # The second guard sees what the first one left.
        cap, norm = one["guards"]["update_norm_cap"]["factor"], one["guards"]["update_norm"]
        assert norm * budget["factor"] * cap == pytest.approx(
            min(norm * budget["factor"], 1e-3), rel=1e-6
        )
        theirs = other["guards"]["log_ratio_budget"]
        assert theirs["change"] == pytest.approx(budget["change"], rel=0.05)


@pytest.mark.parametrize(
    "variant", [{"quantile": 0.5}, {"probability_floor": 0.004}, {"probability_floor": 0.5}]
)
def test_variants_let_the_step_go_further(tmp_path, variant):
    strict = trained(tmp_path / "strict", BUDGET, steps=1)
    loose = trained(tmp_path / "loose", BUDGET | variant, steps=1)
    one, other = (lines(run)[0]["guards"]["log_ratio_budget"] for run in (strict, loose))
    assert one["factor"] < other["factor"] <= 1


def test_a_trip_is_an_event_that_the_report_shows_and_saves_its_batch(tmp_path):
    wires = {"kind": "tripwires", "then": "reduce", "entropy": 99.0, "patience": 2}
    run = trained(tmp_path, wires)
    (event,) = [line for line in lines(run, "event") if line["event"] == "tripwire"]
    assert event["step"] == 2 and "entropy of rl" in event["detail"]
    rates = [line["learning_rate"] for line in lines(run)]
    assert rates == pytest.approx([0.003, 0.003, 0.0015, 0.0015])
    saved = sorted(path.name for path in (run / "refused").iterdir())
    assert len(saved) == 2 and all("2" in name for name in saved)
    page = write_report([run]).read_text(encoding="utf-8")
    assert "tripwire" in page and "learning rates are multiplied by 0.5" in page


def test_a_run_that_a_wire_stops_names_it(tmp_path):
    wires = {"kind": "tripwires", "then": "stop", "entropy": 99.0, "patience": 1}
    with pytest.raises(TrainingError, match="entropy of rl"):
        trained(tmp_path, wires)


def test_a_run_with_all_guards_resumes_bit_for_bit(tmp_path):
    wires = {"kind": "tripwires", "then": "reduce", "entropy": 99.0, "patience": 2, "reward": 9.0}
    guards = [BUDGET, CAP, wires]
    run = trained(tmp_path, *guards, save_steps=1, save_total_limit=9)
    expected, recorded = weights(run), lines(run)
    for stopped in (1, 3):
        stopped_after(run, stopped)
        runs.resume(run)
        seen = [(line["objectives"], line["guards"], line["learning_rate"]) for line in lines(run)]
        assert seen == [(x["objectives"], x["guards"], x["learning_rate"]) for x in recorded]
        assert all(torch.equal(weights(run)[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("guards", "training", "message"),
    [
        ([{"kind": "gradient_clip", "limit": 1.0}], {}, "training.max_grad_norm"),
        ([CAP, CAP], {}, "two are of one kind"),
        ([BUDGET | {"limit": 0.0}], {}, "greater than 0"),
        ([BUDGET | {"derivative": "finite_difference"}], {"bf16": True}, "needs float32"),
        ([{"kind": "tripwires", "ratio": 2.0}], {}, "no objective of the schedule records it"),
        ([{"kind": "tripwires", "non_finite": False}], {}, "no wire is on anything"),
        ([{"kind": "tripwires", "kl": 1.0, "patience": 4}], {}, "max_refusals is 3, which ends"),
        ([{"kind": "norm_cap", "limit": 1.0}], {}, "norm_cap"),
    ],
)
def test_guards_that_make_no_sense_are_refused_by_name(tmp_path, guards, training, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(write_on_policy(tmp_path, values_of(*guards, **training))))


def test_a_budget_of_a_policy_without_softmaxes_names_the_plain_control(tmp_path):
    values = {
        "name": "robot",
        "policy": {"kind": "gaussian"},
        "objectives": {
            "imitation": {"kind": "cloning", "data": {"path": "demos.npz"}, "batch_size": 4}
        },
        "schedule": {"kind": "mix", "weights": {"imitation": 1.0}},
        "training": {"max_steps": 2, "guards": [BUDGET]},
    }
    with pytest.raises(RecipeError, match="use update_norm_cap"):
        load_recipe(str(write_on_policy(tmp_path, values)))
    values["training"]["guards"] = [CAP]
    assert math.isclose(
        load_recipe(str(write_on_policy(tmp_path, values))).training.guards[0].limit, 1e-3
    )
