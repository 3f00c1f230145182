"""Control from recipe to policy: cloning, then fine-tuning; resuming; and what is refused."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from holdfast import assemble_control as assemble_control_module
from holdfast import assemble_control_rl
from holdfast import run as runs
from holdfast.assemble import accelerator_for, assemble, build_trainer
from holdfast.assemble_control import assemble_control
from holdfast.control.demonstrations import (
    read_demonstrations,
    record,
    write_demonstrations,
)
from holdfast.control.environments import (
    EnvironmentOptions,
    make_environments,
    scripted_expert,
)
from holdfast.control.policies import (
    DiffusionPolicy,
    GaussianPolicy,
    Normalizer,
    ResidualPolicy,
    load_policy,
)
from holdfast.errors import DataError, HoldfastError, RecipeError
from holdfast.recipe import load_recipe

NAME = "holdfast/point-mass"
IMITATION = {"kind": "cloning", "data": {"path": "demos.npz", "held_out": 1}, "batch_size": 32}
GAUSSIAN = {"kind": "gaussian", "horizon": 4, "hidden": [16], "critic": {"hidden": [16]}}
DIFFUSION = {
    "kind": "diffusion",
    "horizon": 4,
    "hidden": [16],
    "steps": 5,
    "fine_tuned_steps": 3,
    "critic": {"hidden": [16]},
}
SAVED = {"kind": "saved", "model_name_or_path": "diffusion", "critic": {"hidden": [16]}}
DPPO_NEW = {**DIFFUSION, "fine_tuned_steps": 5}
RL = {
    "kind": "control_ppo",
    "environment": {"name": NAME, "count": 4, "sparse": True},
    "steps": 8,
    "batch_size": 16,
    "epochs": 2,
    "critic_warmup": 1,
    "episodes": 4,
}


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demos") / "demos.npz"
    worlds = make_environments(NAME, 4, options=EnvironmentOptions(sparse=True))
    write_demonstrations(record(scripted_expert(NAME), worlds, 4, seed=1), path)
    found = record(scripted_expert(NAME), worlds, 2, seed=1)
    dense = tuple(replace(each, rewards=each.rewards - 0.5) for each in found)
    write_demonstrations(replace(found, episodes=dense), path.with_name("dense.npz"))
    for name, rewards in (("silent", None), ("unpaid", np.zeros(1000, dtype=np.float32))):
        other = tuple(
            replace(each, rewards=None if rewards is None else rewards[: len(each)])
            for each in found
        )
        write_demonstrations(replace(found, episodes=other), path.with_name(f"{name}.npz"))
    options = {k: v for k, v in DIFFUSION.items() if k not in ("kind", "critic")}
    sizes = worlds.observation_size, worlds.action_size
    DiffusionPolicy(*sizes, seed=1, **options).save_pretrained(path.with_name("diffusion"))
    GaussianPolicy(3, 2, hidden=(8,)).save_pretrained(path.with_name("other"))
    return path


@pytest.fixture
def write(tmp_path, demos, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    shutil.copy(demos, tmp_path / "demos.npz")
    for name in ("dense", "silent", "unpaid"):
        shutil.copy(demos.with_name(f"{name}.npz"), tmp_path / f"{name}.npz")
    for policy in ("diffusion", "other"):
        shutil.copytree(demos.with_name(policy), tmp_path / policy)

    def write_recipe(policy, schedule, objectives, *, name="run", steps=12, **more):
        values = {
            "name": name,
            "policy": policy,
            "objectives": objectives,
            "schedule": schedule,
            "training": {"max_steps": steps, "eval_steps": 6, "save_steps": 4},
            "output": str(tmp_path / name),
            **more,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return load_recipe(str(path))

    return write_recipe


def lines(run, kind):
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


INTERLEAVE = {"kind": "interleave", "first": "il", "second": "rl", "ratio": 2}
WORLD = {"name": NAME, "count": 4, "sparse": True}
REPLAY = {
    "environment": WORLD,
    "steps": 4,
    "updates": 3,
    "batch_size": 16,
    "capacity": 40,
    "critic_warmup": 1,
    "episodes": 4,
}
IDQL = {**REPLAY, "kind": "idql", "candidates": 3}
AWR = {
    "kind": "awr",
    **{name: RL[name] for name in ("environment", "steps", "batch_size", "epochs", "episodes")},
    "critic_warmup": 1,
}
DEMOS = {"path": "demos.npz", "held_out": 1}
POLICIES = {
    "gaussian": (GAUSSIAN, RL),
    "residual": ({"kind": "residual", "base": GAUSSIAN, "critic": {"hidden": [16]}}, RL),
    "diffusion": (SAVED, {**RL, "kind": "dppo"}),
}
CLONING = {
    "idql": (GAUSSIAN, IDQL),
    "idql and demonstrations": (DIFFUSION, {**IDQL, "data": DEMOS}),
    "awr": (DIFFUSION, AWR),
    "awc": (DIFFUSION, {**REPLAY, "kind": "awc"}),
    "dipo": (GAUSSIAN, {**REPLAY, "kind": "dipo", "action_rate": 0.01, "data": DEMOS}),
    "ppo and demonstrations": (GAUSSIAN, {**RL, "cloning": {"weight": 0.5}, "data": DEMOS}),
    "dppo and teacher": (
        SAVED,
        {
            **RL,
            "kind": "dppo",
            "critic_warmup": 0,
            "cloning": {"weight": 0.5, "of": "teacher"},
        },
    ),
}


@pytest.mark.parametrize("combine", [False, True])
@pytest.mark.parametrize("kind", POLICIES)
def test_imitation_is_interleaved_into_reinforcement_learning(write, kind, combine):
    policy, rl = POLICIES[kind]
    more = {"combiner": {"method": "upgrad", "scale": "match"}} if combine else {}
    schedule = {**INTERLEAVE, "combine": combine}
    run = runs.train(write(policy, schedule, {"il": IMITATION, "rl": rl}, **more))
    turns = [set(line["objectives"]) for line in lines(run, "train")]
    first = {"il", "rl"} if combine else {"il"}
    assert turns[:6] == [first, {"rl"}, {"rl"}] * 2
    for line in lines(run, "train"):
        assert all(math.isfinite(seen["loss"]) for seen in line["objectives"].values())
        assert ("geometry" in line) == (len(line["objectives"]) == 2)
    gains = lines(run, "train")[-1]["estimates"]
    assert gains["ratio"] == 2
    shared = ("cosine", "norm/il", "norm/rl", "efficiency/promised", "efficiency/observed")
    if kind == "gaussian":
        assert all(math.isfinite(gains[entry]) for entry in shared)
    else:
        # Of the diffusion policy the critic alone is trained so far.
        assert not gains.keys() & {"cosine", "norm/rl", "efficiency/observed"}, "nothing is shared"
    films = json.loads((run / "rollouts" / "rollouts.json").read_text())
    assert len(films) == 3 and all((run / "rollouts" / film["file"]).is_file() for film in films)
    evaluated = lines(run, "eval")[-1]["objectives"]
    assert evaluated["rl"]["count"] == 4 and "success" in evaluated["rl"]["metrics"]
    assert evaluated["il"]["count"] > 0
    saved = load_policy(run / "model")
    assert saved.kind == kind
    if kind == "residual":
        assert isinstance(saved, ResidualPolicy)


@pytest.mark.parametrize("kind", ["gaussian", "diffusion", "idql", "ppo and demonstrations"])
def test_an_interleave_may_count_iterations(write, demos, kind):
    """The shared update of two is the first of an iteration, and the ratio counts whole ones."""
    policy, rl = {**POLICIES, **CLONING}[kind]
    schedule = {**INTERLEAVE, "every": "iteration", "combine": True}
    recipe = write(policy, schedule, {"il": IMITATION, "rl": rl})
    accelerator = accelerator_for(recipe, demos.parent)
    assembly = assemble(recipe, accelerator)
    trainer = build_trainer(recipe, assembly, {}, accelerator, folder=demos.parent, recorder=None)
    rounds = []
    source = assembly.objectives["rl"].source
    collected = getattr(source, "rollouts", source)
    for _ in range(4 * source.updates + 1):
        turn = trainer.schedule.next(lambda name: 0.0)
        source.next()
        if "il" in turn.weights:
            rounds.append((collected.round, collected.used))
    assert rounds == [(1, 1), (3, 1), (5, 1)]


@pytest.mark.parametrize("kind", CLONING)
def test_what_clones_its_own_data_is_trained_and_evaluated(write, kind):
    policy, rl = CLONING[kind]
    run = runs.train(write(policy, {"kind": "mix", "weights": {"rl": 1.0}}, {"rl": rl}))
    trained = [line["objectives"]["rl"] for line in lines(run, "train")]
    assert len(trained) == 12 and all(math.isfinite(seen["loss"]) for seen in trained)
    metrics = trained[-1]["metrics"]
    assert metrics["critic_only"] == 0.0 and metrics["environment_steps"] > 100
    wanted = {"idql": "value_loss", "dipo": "q_loss", "awr": "weight", "awc": "weight"}.get(
        kind.split()[0]
    )
    assert (wanted or f"cloning/{kind.split()[-1]}") in metrics
    assert lines(run, "eval")[-1]["objectives"]["rl"]["count"] == 4
    wanted = {"saved": "diffusion"}.get(policy["kind"], policy["kind"])
    assert load_policy(run / "model").kind == ("implicit" if "idql" in kind else wanted)


def test_a_policy_that_chooses_is_trained_further_without_its_choice(write, tmp_path):
    alone = {"kind": "mix", "weights": {"rl": 1.0}}
    first = runs.train(write(GAUSSIAN, alone, {"rl": IDQL}, name="first"))
    saved = {"kind": "saved", "model_name_or_path": str(first / "model"), "critic": {"hidden": [8]}}
    run = runs.train(write(saved, alone, {"rl": RL}, name="second", steps=1))
    assert load_policy(run / "model").kind == "gaussian"


def test_an_average_of_weights_is_resumed(write):
    """Imitation alone of a diffusion policy, whose average is not trained but moves."""
    _resumes(write, DIFFUSION, {"kind": "mix", "weights": {"il": 1.0}}, {"il": IMITATION})


def test_a_cloned_policy_is_fine_tuned_from_where_it_was_saved(write, tmp_path):
    alone = {"kind": "mix", "weights": {"il": 1.0}}
    bc = runs.train(write(GAUSSIAN, alone, {"il": IMITATION}, name="bc", steps=40))
    cloned = lines(bc, "eval")[-1]["objectives"]["il"]["loss"]
    assert cloned < lines(bc, "eval")[0]["objectives"]["il"]["loss"]
    saved = {
        "kind": "saved",
        "model_name_or_path": str(bc / "model"),
        "critic": {"hidden": [16]},
    }
    run = runs.train(write(saved, INTERLEAVE, {"il": IMITATION, "rl": RL}, name="rl"))
    assert lines(run, "eval")[0]["objectives"]["il"]["loss"] == pytest.approx(cloned, abs=1e-6)
    before, after = load_policy(bc / "model"), load_policy(run / "model")
    assert torch.equal(before.observations.low, after.observations.low)
    moved = dict(after.named_parameters())
    assert any(not torch.equal(p, moved[name]) for name, p in before.named_parameters())


@pytest.mark.parametrize("kind", [*POLICIES, *CLONING])
def test_a_run_on_half_used_rollouts_resumes_bit_for_bit(write, kind):
    policy, rl = {**POLICIES, **CLONING}[kind]
    _resumes(write, policy, INTERLEAVE, {"il": IMITATION, "rl": rl})


def _resumes(write, policy, schedule, objectives):
    whole = runs.train(write(policy, schedule, objectives, name="whole"))
    cut = runs.train(write(policy, schedule, objectives, name="cut"))
    # As if it had been killed after the checkpoint of step 8, in the midst of a batch of rollouts.
    shutil.rmtree(cut / "model")
    for checkpoint in (cut / "checkpoints").iterdir():
        if "12" in checkpoint.name:
            shutil.rmtree(checkpoint)
    described = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps({**described, "status": "stopped"}))
    resumed = runs.resume(cut)
    known = [[line.get("estimates") for line in lines(run, "train")] for run in (whole, resumed)]
    assert known[0] == known[1]
    one, two = (load_file(next((run / "model").glob("*.safetensors"))) for run in (whole, resumed))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    final = [
        load_file(run / "checkpoints" / "step-00000012" / "policy.safetensors")
        for run in (whole, resumed)
    ]
    assert final[0].keys() == final[1].keys()
    for name in final[0]:
        assert torch.equal(final[0][name], final[1][name]), name


@pytest.mark.parametrize(
    ("policy", "objectives", "error", "message"),
    [
        (GAUSSIAN, {"rl": {**RL, "kind": "dppo"}}, RecipeError, "dppo does not train a gaussian"),
        (DIFFUSION, {"rl": RL}, RecipeError, "control_ppo does not train a diffusion"),
        (GAUSSIAN, {"rl": {**RL, "batch_size": 99}}, RecipeError, "more than the 32 rows"),
        (
            GAUSSIAN,
            {"rl": RL, "il": {**IMITATION, "loss": "denoising"}},
            RecipeError,
            "denoising is not for a gaussian",
        ),
        (
            GAUSSIAN,
            {"rl": RL, "il": {**IMITATION, "data": {"path": "demos.npz", "held_out": 4}}},
            DataError,
            "has 4 episodes to use, of which held_out 4",
        ),
        (
            GAUSSIAN,
            {"rl": {**RL, "environment": {"name": "holdfast/point-mas"}}},
            HoldfastError,
            "point-mas",
        ),
        (
            {"kind": "residual", "base": GAUSSIAN},
            {"rl": IDQL},
            RecipeError,
            "idql does not train a residual policy. It is for gaussian and diffusion policies; "
            "control_ppo would",
        ),
        (GAUSSIAN, {"rl": IDQL, "more": RL}, RecipeError, "which more would train on another"),
        (GAUSSIAN, {"rl": {**AWR, "batch_size": 99}}, RecipeError, "more than the 32 rows"),
        (
            GAUSSIAN,
            {"rl": {**AWR, "loss": "denoising"}},
            RecipeError,
            "rl.loss: denoising is not for a gaussian",
        ),
        (
            SAVED,
            {
                "rl": {
                    **RL,
                    "kind": "dppo",
                    "cloning": {"weight": 1, "of": "teacher", "loss": "mse"},
                }
            },
            RecipeError,
            "rl.cloning.loss: mse is not for a diffusion",
        ),
        (
            {"kind": "residual", "base": GAUSSIAN},
            {"rl": {**RL, "cloning": {"weight": 1, "of": "teacher"}}},
            RecipeError,
            "rl.cloning: reinforcement learning trains the residual",
        ),
        (
            GAUSSIAN,
            {"rl": {**IDQL, "data": DEMOS, "demonstration_share": 0.01}},
            RecipeError,
            "0 rows: both parts",
        ),
        (GAUSSIAN, {"rl": {**IDQL, "folder": "./nowhere"}}, RecipeError, "rl.folder: no files"),
        (
            GAUSSIAN,
            {"rl": {**IDQL, "data": {"path": "dense.npz"}}},
            DataError,
            "episode 0 has rewards other than 0 and 1",
        ),
        (
            GAUSSIAN,
            {"rl": {**IDQL, "data": {"path": "silent.npz"}}},
            DataError,
            "silent.npz, episode 0 has no rewards",
        ),
        (
            GAUSSIAN,
            {"rl": {**IDQL, "data": {"path": "unpaid.npz"}}},
            DataError,
            "episode 0 has a success, but no reward",
        ),
        (
            {**DIFFUSION, "fine_tuned_steps": 9},
            {"il": IMITATION},
            RecipeError,
            "fine_tuned_steps is 9",
        ),
        (
            {"kind": "residual", "base": GAUSSIAN, "std_range": [0.5, 0.1], "learn_std": True},
            {"rl": RL},
            RecipeError,
            "policy: std is 0.37 and std_range",
        ),
        (
            {**SAVED, "model_name_or_path": "other"},
            {"rl": RL},
            RecipeError,
            "other sees 3 numbers in an observation and makes 2 in an action, but objectives.rl",
        ),
        (
            {"kind": "residual", "base": {"kind": "saved", "model_name_or_path": "other"}},
            {"il": IMITATION},
            RecipeError,
            "other sees 3 numbers .* but objectives.il has",
        ),
        (
            GAUSSIAN,
            {"rl": {**RL, "environment": {"name": "holdfast/unbounded"}}},
            RecipeError,
            "objectives.rl.environment: actions of holdfast/unbounded lie in .*an objective of",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_training(
    write, policy, objectives, error, message, monkeypatch
):
    real = assemble_control_module.make_environments

    def make(name, *given, **options):
        worlds = real(name.replace("unbounded", "point-mass"), *given, **options)
        if "unbounded" in name:
            worlds.name, worlds.action_high = name, worlds.action_high + math.inf
        return worlds

    monkeypatch.setattr(assemble_control_module, "make_environments", make)
    weights = {name: 1.0 / len(objectives) for name in objectives}
    with pytest.raises(error, match=message):
        runs.train(write(policy, {"kind": "mix", "weights": weights}, objectives))


def test_a_batch_that_processes_cannot_share_is_refused_before_training(write):
    recipe = write(GAUSSIAN, INTERLEAVE, {"il": IMITATION, "rl": RL})
    many = SimpleNamespace(num_processes=17, device=torch.device("cpu"))
    with pytest.raises(RecipeError, match="rl.batch_size is 16, but there are 17 processes"):
        assemble_control(recipe, many, lambda text: None)


def test_objectives_of_another_kind_of_policy_are_refused(write):
    with pytest.raises(RecipeError, match=r"objectives.rl.kind: is control_ppo, .*kind language"):
        write(
            {"model_name_or_path": "tiny-qwen2"},
            {"kind": "mix", "weights": {"rl": 1.0}},
            {"rl": RL},
        )


@pytest.mark.parametrize(
    ("rl", "message"),
    [
        ({**IDQL, "capacity": 15}, "capacity is 15, less than the 16 chunks"),
        ({**IDQL, "demonstration_share": 1.0}, "demonstration_share"),
        ({**IDQL, "trace": 0.9}, "trace"),
        ({**RL, "cloning": {"weight": 1.0}}, "data is missing"),
        ({**RL, "data": DEMOS}, "data is only used with"),
        ({**RL, "cloning": {"weight": 1.0, "of": "teacher"}, "data": DEMOS}, "data is only used"),
        ({**AWR, "temperature": 0.0}, "temperature"),
    ],
)
def test_what_cannot_be_is_refused_with_the_recipe(write, rl, message):
    with pytest.raises(RecipeError, match=message):
        write(GAUSSIAN, {"kind": "mix", "weights": {"rl": 1.0}}, {"rl": rl})


@pytest.mark.parametrize(
    ("policy", "training", "message"),
    [
        (DIFFUSION, {}, "policy.fine_tuned_steps: is 3, but dppo freezes the other 2 of 5"),
        (DPPO_NEW, {"bf16": True}, "training.bf16: is true, but a control policy"),
        (DPPO_NEW, {"gradient_checkpointing": True}, "training.gradient_checkpointing: is true"),
        (SAVED, {"bf16": True}, "training.bf16"),
    ],
)
def test_what_control_policies_cannot_be_trained_with_is_refused_with_the_recipe(
    write, policy, training, message
):
    training = {"max_steps": 1, **training}
    alone = {"kind": "mix", "weights": {"rl": 1.0}}
    with pytest.raises(RecipeError, match=message):
        write(policy, alone, {"rl": {**RL, "kind": "dppo"}}, training=training)


@pytest.mark.parametrize(
    ("policy", "entry"),
    [
        ({**GAUSSIAN, "hidden": []}, "policy.hidden"),
        ({**GAUSSIAN, "critic": {"hidden": []}}, "policy.critic.hidden"),
    ],
)
def test_networks_without_a_hidden_layer_are_refused_with_the_recipe(write, policy, entry):
    with pytest.raises(RecipeError, match=entry):
        write(policy, {"kind": "mix", "weights": {"rl": 1.0}}, {"rl": RL})


def test_a_new_diffusion_policy_is_trained_in_all_of_its_steps(write):
    alone = {"kind": "mix", "weights": {"rl": 1.0}}
    run = runs.train(write(DPPO_NEW, alone, {"rl": {**RL, "kind": "dppo"}}, steps=1))
    assert load_policy(run / "model").fine_tuned_steps == 5


def test_scales_are_fitted_on_what_is_trained_on_alone(write, demos):
    """Neither held-out nor probe episodes say anything of the range."""
    episodes = read_demonstrations(demos).episodes
    data = {**DEMOS, "probe": 1}
    recipe = write(
        GAUSSIAN, {"kind": "mix", "weights": {"il": 1.0}}, {"il": {**IMITATION, "data": data}}
    )
    policy = assemble(recipe, accelerator_for(recipe, demos.parent)).policy
    for kept, equal in ((episodes[2:], True), (episodes, False)):
        seen = torch.cat([torch.from_numpy(episode.observations) for episode in kept])
        fitted = Normalizer.fit(seen)
        assert torch.equal(policy.actor.observations.low, fitted.low) == equal


def test_episodes_that_were_cut_are_learnt_from_where_that_is_allowed(write, tmp_path, demos):
    found = read_demonstrations(demos)
    cut = [replace(each, terminated=False, truncated=False) for each in found.episodes]
    write_demonstrations(replace(found, episodes=tuple(cut)), tmp_path / "cut.npz")
    alone = {"kind": "mix", "weights": {"rl": 1.0}}
    for allowed in (False, True):
        data = {"path": "cut.npz", "allow_cut": allowed}
        recipe = write(GAUSSIAN, alone, {"rl": {**IDQL, "data": data}}, steps=1)
        if allowed:
            assert runs.train(recipe).is_dir()
            continue
        with pytest.raises(DataError, match="cut short"):
            runs.train(recipe)


def test_actions_out_of_bounds_are_clipped_and_it_is_said(write, tmp_path, demos):
    found = read_demonstrations(demos)
    first, *others = found.episodes
    loud = replace(found, episodes=(*others, replace(first, actions=3 * first.actions)))
    write_demonstrations(loud, tmp_path / "loud.npz")
    beyond = (abs(loud.actions) > 1.001).any(axis=1).mean()
    for file, expected in (("demos.npz", False), ("loud.npz", True)):
        imitation = {**IMITATION, "data": {"path": file}}
        recipe = write(GAUSSIAN, INTERLEAVE, {"il": imitation, "rl": RL})
        said = []
        policy, _, _ = assemble_control(recipe, accelerator_for(recipe, tmp_path), said.append)
        told = [line for line in said if "clipped" in line]
        assert bool(told) == expected
        assert policy.actor.actions.high.max() <= 1.001
    assert told == [f"il: {beyond:.1%} of the demonstrated actions are clipped to {NAME}'s bounds"]


def test_environments_are_made_when_they_are_used(write, demos, monkeypatch):
    """One set to train in; one more for all evaluations, once there is one."""
    made = []
    for module in (assemble_control_module, assemble_control_rl):
        real = module.make_environments

        def make(name, count, *, _real=real, **options):
            made.append(count)
            return _real(name, count, **options)

        monkeypatch.setattr(module, "make_environments", make)
    alone = {"kind": "mix", "weights": {"rl": 1.0}}
    recipe = write(GAUSSIAN, alone, {"rl": {**RL, "probe_episodes": 2}})
    assembly = assemble(recipe, accelerator_for(recipe, demos.parent))
    assert made == [4]
    objective = assembly.objectives["rl"]
    for rows in (objective.held_out, objective.probe, objective.held_out):
        objective.evaluate(assembly.policy, rows)
    assert made == [4, 4]


def test_every_evaluation_episode_is_run_once_however_rows_are_cut(write, demos):
    alone = {"kind": "mix", "weights": {"rl": 1.0}}
    found = {}
    for size in (None, 1, 3):
        world = {"name": "Pendulum-v1", "count": 4, "time_limit": 12}
        rl = {**RL, "episodes": 8, "micro_batch_size": size, "environment": world}
        recipe = write(GAUSSIAN, alone, {"rl": rl})
        accelerator = accelerator_for(recipe, demos.parent)
        assembly = assemble(recipe, accelerator)
        trainer = build_trainer(
            recipe, assembly, {}, accelerator, folder=demos.parent, recorder=None
        )
        objective = assembly.objectives["rl"]
        found[size] = trainer.evaluate(objective, objective.held_out).metrics
    assert found[1]["reward"] == pytest.approx(found[None]["reward"], rel=1e-5)
    assert found[3]["reward"] == pytest.approx(found[None]["reward"], rel=1e-5)
    # The same episode eight times would have no spread.
    assert found[1]["reward_squared"] > found[1]["reward"] ** 2 + 1e-3


def test_success_is_no_score_of_a_task_that_does_not_say_what_it_is(write):
    world = {"name": "Pendulum-v1", "count": 2, "time_limit": 3}
    alone = {"kind": "mix", "weights": {"rl": 1.0}}
    recipe = write(GAUSSIAN, alone, {"rl": {**RL, "environment": world, "score": "success"}})
    with pytest.raises(HoldfastError, match="Pendulum-v1 does not say what success is.*return"):
        runs.train(recipe)


def test_parts_of_an_evaluation_start_from_other_noise(write, demos):
    alone = {"kind": "mix", "weights": {"rl": 1.0}}
    recipe = write(SAVED, alone, {"rl": {**RL, "kind": "dppo", "episodes": 6}})
    assembly = assemble(recipe, accelerator_for(recipe, demos.parent))
    seen = []
    policy = assembly.policy
    act = policy.actor.act

    def spy(observations, generator, **options):
        seen.append(generator.initial_seed())
        return act(observations, generator, **options)

    policy.actor.act = spy
    objective = assembly.objectives["rl"]
    for part in (objective.held_out[:3], objective.held_out[3:], objective.held_out[:3]):
        seen.append(None)
        objective.evaluate(policy, part)
    parts = [set(), set(), set()]
    place = -1
    for entry in seen:
        if entry is None:
            place += 1
        else:
            parts[place].add(entry)
    assert [len(part) for part in parts] == [1, 1, 1]
    assert parts[0] == parts[2] != parts[1]
