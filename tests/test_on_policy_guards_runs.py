"""Guards of on-policy objectives through whole runs: recorded, off, resumed, refused."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.prompts import on_policy_values, write_on_policy
from helpers.stopping import stopped_after
from safetensors.torch import load_file

from holdfast import run as runs
from holdfast.assemble import assemble
from holdfast.errors import DataError, ModelError, RecipeError
from holdfast.recipe import load_recipe


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))


def values_of(steps: int = 4, **changes) -> dict:
    values = on_policy_values(**changes)
    values["schedule"]["stages"][0]["steps"] = steps
    values["training"] |= {"max_steps": steps, "eval_steps": steps, "save_steps": steps}
    return values


def trained(folder: Path, steps: int = 4, **changes) -> Path:
    values = values_of(steps, **changes)
    return runs.train(load_recipe(str(write_on_policy(folder, values))))


def lines(run: Path, kind: str = "train") -> list[dict]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def metrics(run: Path) -> list[dict]:
    return [line["objectives"]["rl"]["metrics"] for line in lines(run)]


def weights(run: Path, steps: int = 4) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{steps:08d}/policy.safetensors")


EVERYWHERE = {
    "advantage_filter": 1e6,
    "kl_control": {"kind": "safe", "base": 0.6},
    "use_adaptive_entropy": True,
    "entropy_coef": 0.1,
    "entropy_target": 1e-6,
    "stop_on_rise": False,
}
WIDE = {"objective_limit": 1e9, "policy_limit": 1e9}
RATIOS = {"log_ratio_limit": 1e6, "off_policy_mask_threshold": 1e6}
NEVER = {"kind": "solve_rate_gate", "action": "imitate", "solved_above": -1.0}


@pytest.mark.parametrize(
    ("kind", "off"),
    [
        ("grpo", {"curvature_mask": WIDE, "delta": 1e6, "imitation": NEVER, **RATIOS}),
        ("grpo", {"covariance": {"kind": "clip", "lowest": 1e6, "highest": 1e7}}),
        ("grpo", {"smooth_advantages": True, "scale_floor": 1e-9}),  # no prompt comes twice
        ("ppo", {"curvature_mask": {**WIDE, "optimizer": "adam"}, **RATIOS}),
        ("lco_kl", {"curvature_mask": WIDE, "imitation": NEVER}),
        ("gspo", {"curvature_mask": WIDE}),
    ],
)
def test_guards_whose_conditions_never_hold_change_no_bit(tmp_path, kind, off):
    common = {"kind": kind, "num_iterations": 2}
    plain = trained(tmp_path / "plain", **common)
    guarded = trained(tmp_path / "guarded", **common, **EVERYWHERE, **off)
    one, other = weights(plain), weights(guarded)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for before, after in zip(metrics(plain), metrics(guarded), strict=True):
        assert all(after[name] == value for name, value in before.items())
        assert after["kl_coef"] == after["entropy_coef"] == 0.0
        if "curvature_mask" in off:
            assert after["curvature/masked"] == 0.0
        assert after["guard/advantage_filter"] == 0.0


ON = [
    ("grpo", {"curvature_mask": {"policy_limit": 1e-9}}, "curvature/masked"),
    ("ppo", {"curvature_mask": {"policy_limit": 1e-9, "optimizer": "adam"}}, "curvature/masked"),
    ("lco_kl", {"curvature_mask": {"policy_limit": 1e-9, "random": True}}, "curvature/masked"),
    ("grpo", {"kl_control": {"kind": "adaptive", "target": 0.01}}, "kl_coef"),
    ("lco_mse", {"kl_control": {"kind": "adaptive", "target": 0.01}}, "kl_coef"),
    ("lco_log_cosh", {"kl_control": {"kind": "fixed", "coefficient": 0.5}}, None),
    ("cispo", {"entropy_coef": 0.05}, None),
    (
        "reinforce",
        {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_target": 9.0},
        "entropy_coef",
    ),
    ("dapo", {"covariance": {"kind": "clip", "share": 0.2, "lowest": -9}}, "guard/clip_cov"),
    ("dr_grpo", {"covariance": {"kind": "kl", "share": 0.2}}, "guard/kl_cov"),
    ("pmd", {"advantage_filter": 0.5}, "guard/advantage_filter"),
    ("grpo", {"smooth_advantages": True, "scale_floor": 0.1}, None),
    ("grpo", {"dynamic_clip": True, "delta": 1.5}, None),
    ("ppo", {"off_policy_mask_threshold": 1e-9}, "off_policy_masked"),
    ("ppo", {"soft_minimum": 0.3}, None),
    ("grpo", {"stop_on_rise": True}, None),
    ("grpo", {"imitation": {"kind": "members"}}, "demonstrations"),
    (
        "grpo",
        {"imitation": {"kind": "members", "shaping": None, "entropy_weights": True}},
        "demonstrations",
    ),
    ("gspo", {"imitation": {"kind": "solve_rate_gate", "threshold": 3}}, "demonstrations"),
    (
        "lco_kl",
        {"imitation": {"kind": "solve_rate_gate", "threshold": 3, "action": "replace"}},
        "demonstrations",
    ),
    ("grpo", {"imitation": {"kind": "hints", "steps": 100}}, "hint_length"),
    ("lco_log_cosh", {"imitation": {"kind": "hints", "coefficient": 0}}, None),
]


@pytest.mark.parametrize(("kind", "on", "shown"), ON)
def test_every_guard_changes_what_is_learnt_and_says_so(tmp_path, kind, on, shown):
    common = {"kind": kind, "num_iterations": 2, "mask_truncated_completions": False}
    if "imitation" in on and kind == "dapo":
        common["dynamic_sampling"] = False
    run = trained(tmp_path / "guarded", **common, **on)
    if shown is not None:
        assert any(step[shown] > 0 for step in metrics(run))
    if "stop_on_rise" in on or "smooth_advantages" in on or "dynamic_clip" in on:
        return  # They act where policies have moved far, or prompts come again.
    plain = weights(trained(tmp_path / "plain", **common))
    guarded = weights(run)
    assert any(not torch.equal(plain[name], guarded[name]) for name in plain)


def test_a_fixed_coefficient_is_beta_by_another_name(tmp_path):
    control = {"kind": "fixed", "coefficient": 0.5}
    one = trained(tmp_path / "beta", num_iterations=2, beta=0.5)
    other = trained(tmp_path / "control", num_iterations=2, kl_control=control)
    assert all(torch.equal(weights(other)[name], value) for name, value in weights(one).items())


def test_a_step_whose_tokens_are_all_masked_teaches_nothing_and_says_why(tmp_path):
    mask = {"policy_limit": 1e-30, "objective_limit": 1e-30, "objective_floor": 0.0}
    run = trained(tmp_path, curvature_mask=mask)
    assert all(line["objectives"]["rl"]["count"] == 0 for line in lines(run))
    assert all(step["curvature/masked"] == 1.0 for step in metrics(run))


def test_prompts_put_by_are_learnt_from_in_a_step_of_their_own(tmp_path):
    gate = {"kind": "solve_rate_gate", "action": "buffer", "threshold": 3}
    run = trained(tmp_path, 9, imitation=gate, batch_size=8, num_generations=4)
    shares = [step["demonstrations"] for step in metrics(run)]
    # Two prompts a step: after four steps there are eight of them.
    assert shares == [0.0] * 4 + [1.0] + [0.0] * 4
    assert metrics(run)[4]["demonstration_logps"] < 0


def test_rollouts_are_drawn_anew_once_their_loss_rises(tmp_path):
    # At this rate no second pass is any good.
    values = values_of(8, num_iterations=8, stop_on_rise=True, kind="lco_mse", beta=0.05)
    values["training"]["learning_rate"] = 0.3
    run = runs.train(load_recipe(str(write_on_policy(tmp_path, values))))
    drawn = [step["samples"] for step in metrics(run)]
    assert max(drawn) > 8 and drawn == sorted(drawn)
    assert any(step["surrogate_increase"] > 0 for step in metrics(run))


SMALL = {"base": 1e-6, "lowest": 1e-7, "highest": 1e-6}


def test_a_run_with_every_memory_resumes_bit_for_bit(tmp_path):
    changes = {
        "kind": "grpo",
        "num_iterations": 3,
        "stop_on_rise": True,
        "smooth_advantages": True,
        "advantage_filter": 1.2,
        "covariance": {"kind": "clip", "share": 0.1, "lowest": -9.0},
        "kl_control": {"kind": "safe", **SMALL, "warmup": 2, "window": 2},
        "use_adaptive_entropy": True,
        "entropy_coef": 0.01,
        "entropy_target": 5.55,
        "curvature_mask": {"objective_limit": 0.088, "policy_limit": 10.0, "optimizer": "adam"},
        "imitation": {"kind": "solve_rate_gate", "action": "buffer", "threshold": 2},
        "data": {"path": "prompts.jsonl", "held_out": 6, "probe": 4, "max_rows": 16},
    }
    values = values_of(8, **changes)
    values["training"] |= {"save_steps": 1, "save_total_limit": 20}
    run = runs.train(load_recipe(str(write_on_policy(tmp_path, values))))
    expected, recorded = weights(run, 8), metrics(run)
    assert any(step["kl_coef"] > 0 for step in recorded)
    for stopped in (2, 5):
        stopped_after(run, stopped)
        runs.resume(run)
        assert metrics(run) == recorded
        assert any(0 < step["curvature/masked"] < 1 for step in recorded[3:])
        assert all(torch.equal(weights(run, 8)[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["fade", "noise_aware"])
def test_imitation_fades_into_reinforcement(tmp_path, kind):
    values = values_of(6)
    values["objectives"]["sft"] = {
        "kind": "nll",
        "loss_type": "chord",
        "data": {"path": "prompts.jsonl", "held_out": 6},
        "batch_size": 8,
    }
    values["schedule"] = {"kind": kind, "first": "sft", "second": "rl", "steps": 6, "start": 0.8}
    run = runs.train(load_recipe(str(write_on_policy(tmp_path, values))))
    shares = [line["objectives"]["sft"]["weight"] for line in lines(run)]
    assert shares[0] == 0.8 and shares == sorted(shares, reverse=True) and shares[-1] < 0.8
    assert ("variance/rl" in lines(run)[-1].get("estimates", {})) == (kind == "noise_aware")


def test_options_at_their_defaults_are_no_part_of_a_fingerprint(tmp_path):
    def fingerprint(**changes):
        return load_recipe(str(write_on_policy(tmp_path, **changes))).fingerprint()

    plain = fingerprint()
    assert fingerprint(entropy_coef=0.0, scale_floor=0.0, imitation=None) == plain
    assert fingerprint(scale_floor=0.1) != plain


# What is refused ----------------------------------------------------------------------------------

PREFERENCE = {"reward_model": "nowhere"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference": PREFERENCE, "scale_rewards": "batch"}, "scale_rewards does nothing"),
        ({"preference": PREFERENCE, "kind": "reinforce", "baseline": "none"}, "baseline does noth"),
        ({"preference": PREFERENCE, "smooth_advantages": True}, "smooth_advantages does nothing"),
        ({"preference": PREFERENCE, "kind": "lco_kl", "advantage_filter": 3}, "advantage_filter"),
        ({"scale_rewards": "none", "scale_floor": 0.1}, "scale_floor does nothing"),
        ({"kl_control": {"kind": "safe"}, "beta": 0.1}, "name only one"),
        ({"kl_control": {"kind": "safe", "base": 0.7}}, "base is 0.7"),
        ({"kl_control": {"kind": "adaptive"}}, "target"),
        ({"entropy_target": 1.0}, "entropy_target does nothing"),
        ({"use_adaptive_entropy": True, "entropy_coef": 2.0}, "entropy_coef is 2.0"),
        ({"stop_on_rise": True}, "stop_on_rise does nothing"),
        ({"dynamic_clip": True}, "dynamic_clip does nothing"),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold does nothing"),
        ({"covariance": {"kind": "kl"}}, "covariance kl does nothing"),
        ({"covariance": {"kind": "clip", "lowest": 6}}, "below highest"),
        ({"kind": "lco_mse", "curvature_mask": {}}, "curvature_mask does nothing"),
        ({"curvature_mask": {"objective_floor": 1.0}}, "objective_floor is 1.0"),
        ({"kind": "lco_kl", "covariance": {"kind": "clip"}}, "unknown entry"),
        ({"kind": "pmd", "delta": 3.0}, "unknown entry"),
        ({"kind": "dapo", "imitation": {"kind": "solve_rate_gate"}}, "dynamic_sampling replaces"),
        ({"imitation": {"kind": "solve_rate_gate", "threshold": 4}}, "threshold is 4 of 4"),
        ({"imitation": {"kind": "members", "count": 4}}, "count is 4 of 4"),
        ({"kind": "lco_kl", "imitation": {"kind": "members"}}, "set shaping: null"),
        ({"kind": "lco_kl", "imitation": {"kind": "hints"}}, "set it to 0"),
        ({"kind": "reinforce", "imitation": {"kind": "hints"}}, "unknown entry"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(write_on_policy(tmp_path, **changes)))


def test_imitation_needs_a_completion_of_every_prompt(tmp_path):
    file = write_on_policy(tmp_path, imitation={"kind": "members"})
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({"prompt": row["prompt"], "answer": "1"}) + "\n" for row in rows)
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(DataError, match="imitation needs the data's own completions"):
        runs.train(load_recipe(str(file)))


def test_a_step_of_adam_cannot_be_modelled_where_the_output_layer_is_not_trained(tmp_path):
    values = values_of(curvature_mask={"optimizer": "adam"})
    values["policy"]["lora"] = {"r": 2}
    with pytest.raises(ModelError, match="use sgd"):
        runs.train(load_recipe(str(write_on_policy(tmp_path, values))))


def test_a_modelled_step_of_adam_is_that_of_training(tmp_path):
    values = values_of(curvature_mask={"optimizer": "adam"})
    values["training"] |= {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5}
    recipe = load_recipe(str(write_on_policy(tmp_path, values)))
    guard = assemble(recipe, Accelerator(cpu=True)).objectives["rl"].loss.loss.curvature
    assert guard.learning_rate == 0.003
    assert (guard.rows.betas, guard.rows.epsilon) == ((0.8, 0.95), 1e-5)


def test_critics_of_one_recipe_have_as_many_heads(tmp_path):
    values = values_of(kind="ppo", soft_minimum=0.3)
    values["objectives"]["other"] = {**values["objectives"]["rl"], "soft_minimum": None}
    with pytest.raises(RecipeError, match="soft_minimum is set for some"):
        runs.train(load_recipe(str(write_on_policy(tmp_path, values))))
