"""From the recipe of a control policy to policy, critic, sources, losses and evaluations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from holdfast import schema
from holdfast.control.actor_critic import ActorCritic
from holdfast.control.demonstrations import (
    Chunks,
    Demonstrations,
    read_demonstrations,
    validate,
)
from holdfast.control.environments import (
    EnvironmentOptions,
    VectorEnvironment,
    make_environments,
)
from holdfast.control.objectives import (
    Cloning,
    DemonstrationBatches,
    EpisodeEvaluation,
    PolicyOptimisation,
    demonstrated,
)
from holdfast.control.policies import (
    Critic,
    DiffusionPolicy,
    GaussianPolicy,
    Normalizer,
    Policy,
    ResidualPolicy,
    load_policy,
)
from holdfast.control.rollouts import EnvironmentRollouts, RolloutOptions
from holdfast.errors import DataError, RecipeError
from holdfast.joint import Objective
from holdfast.joint.objective import Summary

Say = Callable[[str], None]
EVALUATION_SEED = 0
"""Of held-out episodes: the same for every run, whatever its own seed."""
PROBE_SEED = 1


def assemble_control(
    recipe: schema.Recipe, accelerator: Accelerator, say: Say
) -> tuple[ActorCritic, dict[str, Objective], dict[str, str]]:
    """Load demonstrations, make environments and build the policy.

    Returns
    -------
    tuple
        Policy and critic, objectives, and per objective a digest of policy and data.

    Raises
    ------
    HoldfastError
        For demonstrations, environments or a saved policy that cannot be used, or an objective
        that does not train this kind of policy.
    """
    assert isinstance(recipe.policy, schema.ControlSpec)
    seed = recipe.training.seed
    cloning = {n: s for n, s in recipe.objectives.items() if isinstance(s, schema.CloningSpec)}
    acting = {n: s for n, s in recipe.objectives.items() if isinstance(s, schema.ControlRlSpec)}
    read = {name: _demonstrations(name, spec, say) for name, spec in cloning.items()}
    history = _history(recipe.policy)
    environments = {n: _environments(n, s, history, seed, say) for n, s in acting.items()}
    _check_sizes(read, environments)
    for demonstrations in read.values():
        for worlds in environments.values():
            validate(demonstrations, worlds, clip=True, allow_cut=True)
    actor = _policy(recipe.policy, read, environments, seed)
    for name, spec in acting.items():
        _check_kind(name, spec, actor)
        if actor.history != environments[name].options.history:
            # A saved policy brings its own.
            environments[name] = _environments(name, spec, actor.history, seed, say)
    if any(isinstance(spec, schema.DppoSpec) for spec in acting.values()):
        assert isinstance(actor.cloned, DiffusionPolicy)
        actor.cloned.begin_fine_tuning()
    critic = None
    if acting:
        options = recipe.policy.critic.model_dump()
        critic = Critic(
            actor.observation_size,
            actor.history,
            observations=actor.observations,
            seed=seed,
            **options,
        )
    policy = ActorCritic(actor, critic).to(accelerator.device)
    objectives = {}
    start = policy.fingerprint()
    digests = dict.fromkeys(recipe.objectives, start)
    for name, objective in recipe.objectives.items():
        if isinstance(objective, schema.CloningSpec):
            objectives[name] = _cloning(name, objective, policy, read[name], seed)
            digests[name] = _digest(start, read[name])
        elif isinstance(objective, schema.ControlRlSpec):
            objectives[name] = _acting(name, objective, policy, environments[name], seed)
    return policy, objectives, digests


# Demonstrations and environments ------------------------------------------------------------------


def _demonstrations(name: str, spec: schema.CloningSpec, say: Say) -> Demonstrations:
    data = spec.data
    found = read_demonstrations(data.path, observation_keys=data.observation_keys)
    episodes = found.episodes[: data.max_episodes]
    kept = data.held_out + data.probe
    if kept >= len(episodes):
        raise DataError(
            f"objectives.{name}.data: {data.path} has {len(episodes)} episodes to use, of which "
            f"held_out {data.held_out} and probe {data.probe} leave none to train on"
        )
    say(f"{name}: {len(episodes) - kept} demonstrations of {data.path} to train on")
    used = Demonstrations(episodes, found.source, found.environment, found.details)
    return validate(used, allow_cut=data.allow_cut)


def _environments(
    name: str, spec: schema.ControlRlSpec, history: int, seed: int, say: Say
) -> VectorEnvironment:
    world = spec.environment
    say(f"{name}: {world.count} environments of {world.name}")
    options = EnvironmentOptions(
        history=history,
        time_limit=world.time_limit,
        sparse=world.sparse,
        keywords=world.keywords,
    )
    return make_environments(world.name, world.count, seed=seed, options=options)


def _check_sizes(
    read: Mapping[str, Demonstrations], environments: Mapping[str, VectorEnvironment]
) -> None:
    sizes = {n: (d.observation_size, d.action_size) for n, d in read.items()}
    sizes |= {n: (e.observation_size, e.action_size) for n, e in environments.items()}
    if len(set(sizes.values())) > 1:
        told = "; ".join(f"{n}: {o} and {a}" for n, (o, a) in sizes.items())
        raise DataError(
            "objectives: numbers in an observation and in an action must be the same for all of "
            f"them, but they are {told}. Were the demonstrations recorded in this environment?"
        )


def _history(spec: Any) -> int:
    if isinstance(spec, schema.ResidualSpec):
        return _history(spec.base)
    return int(getattr(spec, "history", 1))


# The policy ---------------------------------------------------------------------------------------


def _policy(
    spec: Any,
    read: Mapping[str, Demonstrations],
    environments: Mapping[str, VectorEnvironment],
    seed: int,
) -> Policy:
    options = spec.model_dump(exclude={"kind", "critic", "base"})
    if isinstance(spec, schema.SavedSpec):
        return load_policy(spec.model_name_or_path)
    if isinstance(spec, schema.ResidualSpec):
        return ResidualPolicy(_policy(spec.base, read, environments, seed), seed=seed, **options)
    observations, actions = _normalizers(read, environments)
    build = GaussianPolicy if isinstance(spec, schema.GaussianSpec) else DiffusionPolicy
    try:
        return build(
            observations.size,
            actions.size,
            observations=observations,
            actions=actions,
            seed=seed,
            **options,
        )
    except ValueError as error:
        raise RecipeError(f"policy: {error}") from error


def _normalizers(
    read: Mapping[str, Demonstrations], environments: Mapping[str, VectorEnvironment]
) -> tuple[Normalizer, Normalizer]:
    """Of observations and actions: fitted on the first demonstrations, or else from the bounds."""
    if read:
        episodes = next(iter(read.values())).episodes
        return tuple(  # type: ignore[return-value]
            Normalizer.fit(torch.from_numpy(np.concatenate(parts)))
            for parts in (
                [episode.observations for episode in episodes],
                [episode.actions for episode in episodes],
            )
        )
    world = next(iter(environments.values()))
    low, high = (torch.from_numpy(bound) for bound in (world.action_low, world.action_high))
    return Normalizer.identity(world.observation_size), Normalizer(low, high)


def _check_kind(name: str, spec: schema.ControlRlSpec, actor: Policy) -> None:
    wanted = (
        isinstance(actor, DiffusionPolicy)
        if isinstance(spec, schema.DppoSpec)
        else isinstance(actor, GaussianPolicy | ResidualPolicy)
    )
    if not wanted:
        raise RecipeError(
            f"objectives.{name}.kind: {spec.kind} does not train a {actor.kind} policy. dppo is "
            "for diffusion policies, control_ppo for gaussian and residual ones."
        )


# Objectives ---------------------------------------------------------------------------------------


def _cloning(
    name: str,
    spec: schema.CloningSpec,
    policy: ActorCritic,
    demonstrations: Demonstrations,
    seed: int,
) -> Objective:
    actor = policy.actor.cloned
    diffusion = actor if isinstance(actor, DiffusionPolicy) else None
    kind = spec.loss or ("denoising" if diffusion else "mse")
    if (kind == "denoising") != (diffusion is not None):
        raise RecipeError(
            f"objectives.{name}.loss: {kind} is not for a {actor.kind} policy. denoising is for "
            "diffusion policies, nll and mse for gaussian ones."
        )

    def chunks(episodes: tuple[Any, ...]) -> Chunks:
        part = Demonstrations(episodes, demonstrations.source)
        return Chunks(part, history=actor.history, horizon=actor.horizon)

    def kept(episodes: tuple[Any, ...]) -> Any:
        if not episodes:
            return ()
        # The same noise at every evaluation.
        generator, rows = torch.Generator().manual_seed(EVALUATION_SEED), chunks(episodes)
        return demonstrated(rows, torch.arange(len(rows)), diffusion, generator)

    episodes = demonstrations.episodes
    held_out, probe = spec.data.held_out, spec.data.probe
    train = episodes[held_out + probe :]

    def observed(summary: Summary) -> float:
        if diffusion is not None and not diffusion.fine_tuning:
            diffusion.update_average()
        return summary.loss

    return Objective(
        name=name,
        loss=Cloning(kind),
        source=DemonstrationBatches(chunks(train), spec.batch_size, diffusion, seed=seed),
        observed=observed,
        held_out=kept(episodes[:held_out]),
        probe=kept(episodes[held_out : held_out + probe]),
        optimum=spec.optimum if isinstance(spec.optimum, float) else None,
        micro_batch_size=spec.micro_batch_size,
    )


def _acting(
    name: str,
    spec: schema.ControlRlSpec,
    policy: ActorCritic,
    environments: VectorEnvironment,
    seed: int,
) -> Objective:
    denoising = isinstance(spec, schema.DppoSpec)
    options = RolloutOptions(
        rows="denoising" if denoising else "decisions",
        **spec.model_dump(include=set(RolloutOptions.__annotations__)),
    )
    source = EnvironmentRollouts(policy, environments, options, seed=seed)
    if spec.batch_size > source.rows:
        raise RecipeError(
            f"objectives.{name}.batch_size is {spec.batch_size}, more than the {source.rows} rows "
            f"of a batch of rollouts (steps {spec.steps} times {environments.count} environments"
            f"{' times the denoising steps' if denoising else ''})"
        )
    loss = PolicyOptimisation(spec.epsilon, spec.vf_coef, spec.value_clip)
    if isinstance(spec, schema.DppoSpec):
        actor = policy.actor
        assert isinstance(actor, DiffusionPolicy)
        loss.fine_tuned_steps = actor.fine_tuned_steps
        loss.epsilon_base, loss.rate = spec.epsilon_base, spec.rate
        loss.denoising_discount = spec.denoising_discount
        if spec.log_ratio == "mean":
            loss.dimensions = actor.horizon * actor.action_size
    score = spec.score or ("success" if spec.environment.sparse else "return")

    def episodes(evaluation_seed: int) -> EpisodeEvaluation:
        worlds = make_environments(
            spec.environment.name, environments.count, seed=seed, options=environments.options
        )
        return EpisodeEvaluation(worlds, score, evaluation_seed)

    evaluations = {EVALUATION_SEED: episodes(EVALUATION_SEED), PROBE_SEED: episodes(PROBE_SEED)}

    def evaluate(module: Any, rows: Any) -> Any:
        # Rows are (set of episodes, number): those of the gap are not those of the evaluation.
        return evaluations[rows[0][0]](module, [number for _, number in rows])

    def observed(summary: Summary) -> float | None:
        source.observe(summary.metrics["approx_kl"])
        seen = summary.metrics.get("success" if score == "success" else "reward")
        return None if seen is None else -seen

    return Objective(
        name=name,
        loss=loss,
        source=source,
        evaluate=evaluate,
        observed=observed,
        held_out=[(EVALUATION_SEED, number) for number in range(spec.episodes)],
        probe=[(PROBE_SEED, number) for number in range(spec.probe_episodes)],
        optimum=spec.optimum if isinstance(spec.optimum, float) else None,
        micro_batch_size=spec.micro_batch_size,
    )


def _digest(start: str, demonstrations: Demonstrations) -> str:
    digest = hashlib.sha256(start.encode())
    for episode in demonstrations:
        digest.update(np.ascontiguousarray(episode.observations).data)
        digest.update(np.ascontiguousarray(episode.actions).data)
    return digest.hexdigest()
