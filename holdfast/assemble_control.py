"""From the recipe of a control policy to policy, critic, sources, losses and evaluations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from holdfast import schema
from holdfast.assemble_control_rl import (
    EVALUATION_SEED,
    acting_objective,
    actor_critic,
    check_kinds,
    clone_loss,
    follow_average,
)
from holdfast.control.acting import acting
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
    demonstrated,
)
from holdfast.control.policies import (
    DiffusionPolicy,
    GaussianPolicy,
    ImplicitPolicy,
    Normalizer,
    Policy,
    ResidualPolicy,
    load_policy,
)
from holdfast.control.watching import film, save_films
from holdfast.errors import DataError, RecipeError
from holdfast.joint import Objective
from holdfast.joint.objective import Summary

Say = Callable[[str], None]


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
    for name, objective in recipe.objectives.items():
        assert isinstance(objective, schema.CloningSpec | schema.ControlRlSpec)
        if objective.batch_size < accelerator.num_processes:
            raise RecipeError(
                f"objectives.{name}.batch_size is {objective.batch_size}, but there are "
                f"{accelerator.num_processes} processes: each needs at least one row of a batch"
            )
    seed = recipe.training.seed
    acting = {n: s for n, s in recipe.objectives.items() if isinstance(s, schema.ControlRlSpec)}
    data = {name: getattr(spec, "data", None) for name, spec in recipe.objectives.items()}
    given = {n: found for n, found in data.items() if isinstance(found, schema.DemonstrationSpec)}
    # Imitation first: its demonstrations are the ones that the normalisation is fitted on.
    first = sorted(given, key=lambda name: name in acting)
    read = {name: _demonstrations(name, given[name], say) for name in first}
    history = _history(recipe.policy)
    environments = {n: _environments(n, s, history, seed, say) for n, s in acting.items()}
    _check_sizes(read, environments)
    for name in read:
        for worlds in environments.values():
            read[name] = _clipped(name, read[name], worlds, say)
    train = {
        name: replace(found, episodes=found.episodes[given[name].held_out + given[name].probe :])
        for name, found in read.items()
    }
    actor = _policy(recipe.policy, train, environments, seed)
    _check_fits(recipe.policy, actor, read, environments)
    check_kinds(acting, actor)
    if any(isinstance(spec, schema.DppoSpec) for spec in acting.values()):
        assert isinstance(actor.cloned, DiffusionPolicy)
        actor.cloned.begin_fine_tuning()
    policy = actor_critic(actor, acting, recipe.policy.critic, seed).to(accelerator.device)
    objectives = {}
    start = policy.fingerprint()
    digests = dict.fromkeys(recipe.objectives, start)
    for name, objective in recipe.objectives.items():
        if isinstance(objective, schema.CloningSpec):
            objectives[name] = _cloning(name, objective, policy, read[name], seed)
            digests[name] = _digest(start, read[name])
        elif isinstance(objective, schema.ControlRlSpec):
            own = train.get(name)
            if own is not None:
                digests[name] = _digest(start, own)
            objectives[name] = acting_objective(
                name, objective, policy, environments[name], own, seed
            )
    return policy, objectives, digests


def film_rollouts(recipe: schema.Recipe, policy: nn.Module, folder: Path) -> None:
    """Picture the first episodes of each evaluation, for the report; nothing without any.

    Parameters
    ----------
    recipe : Recipe
        Whose environments the policy acts in.
    policy : ActorCritic
        As it stands.
    folder : Path
        Made if there is something to write.
    """
    assert isinstance(policy, ActorCritic)
    policy.eval()
    films = []
    for spec in recipe.objectives.values():
        if isinstance(spec, schema.ControlRlSpec) and spec.films:
            # The noise is drawn from the start, and so is not that of the evaluation.
            films += film(
                acting(policy.behaviour, seed=EVALUATION_SEED),
                spec.environment.name,
                spec.films,
                seed=EVALUATION_SEED,
                options=_options(spec.environment, policy.actor.history),
            )
    if films:
        save_films(films, folder)


# Demonstrations and environments ------------------------------------------------------------------


def _demonstrations(name: str, data: schema.DemonstrationSpec, say: Say) -> Demonstrations:
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


def _clipped(
    name: str, given: Demonstrations, worlds: VectorEnvironment, say: Say
) -> Demonstrations:
    """Actions as the environment would have clipped them, which is said where it changes any."""
    fitted = validate(given, worlds, clip=True, allow_cut=True)
    beyond = ~np.isclose(fitted.actions, given.actions, rtol=1e-4, atol=1e-4)
    if beyond.any():
        share = beyond.any(axis=1).mean()
        say(
            f"{name}: {share:.1%} of the demonstrated actions are clipped to {worlds.name}'s bounds"
        )
    return fitted


def _environments(
    name: str, spec: schema.ControlRlSpec, history: int, seed: int, say: Say
) -> VectorEnvironment:
    world = spec.environment
    say(f"{name}: {world.count} environments of {world.name}")
    options = _options(world, history)
    return make_environments(world.name, world.count, seed=seed, options=options)


def _options(world: schema.EnvironmentSpec, history: int) -> EnvironmentOptions:
    return EnvironmentOptions(
        history=history,
        time_limit=world.time_limit,
        sparse=world.sparse,
        keywords=world.keywords,
    )


def _check_sizes(
    read: Mapping[str, Demonstrations], environments: Mapping[str, VectorEnvironment]
) -> None:
    sizes = _sizes(read, environments)
    if len(set(sizes.values())) > 1:
        told = "; ".join(f"{n}: {o} and {a}" for n, (o, a) in sizes.items())
        raise DataError(
            "objectives: numbers in an observation and in an action must be the same for all of "
            f"them, but they are {told}. Were the demonstrations recorded in this environment?"
        )


def _check_fits(
    spec: schema.ControlSpec,
    actor: Policy,
    read: Mapping[str, Demonstrations],
    environments: Mapping[str, VectorEnvironment],
) -> None:
    """Refuse a saved policy of other sizes than what it is to be trained on."""
    own = (actor.observation_size, actor.action_size)
    for name, here in _sizes(read, environments).items():
        if own != here:
            base = spec.base if isinstance(spec, schema.ResidualSpec) else spec
            where = getattr(base, "model_name_or_path", "the policy")
            raise RecipeError(
                f"policy: {where} sees {own[0]} numbers in an observation and makes {own[1]} in an "
                f"action, but objectives.{name} has {here[0]} and {here[1]}. Name a policy that "
                "was trained in this environment, or the environment that it was trained in."
            )


def _sizes(
    read: Mapping[str, Demonstrations], environments: Mapping[str, VectorEnvironment]
) -> dict[str, tuple[int, int]]:
    """Of an observation and an action, by objective."""
    sizes = {n: (d.observation_size, d.action_size) for n, d in read.items()}
    return sizes | {n: (e.observation_size, e.action_size) for n, e in environments.items()}


def _history(spec: Any) -> int:
    """Observations that a policy sees; a saved one brings its own."""
    if isinstance(spec, schema.ResidualSpec):
        return _history(spec.base)
    if isinstance(spec, schema.SavedSpec):
        return load_policy(spec.model_name_or_path).history
    return int(spec.history)


# The policy ---------------------------------------------------------------------------------------


def _policy(
    spec: Any,
    train: Mapping[str, Demonstrations],
    environments: Mapping[str, VectorEnvironment],
    seed: int,
) -> Policy:
    options = spec.model_dump(exclude={"kind", "critic", "base"})
    if isinstance(spec, schema.SavedSpec):
        saved = load_policy(spec.model_name_or_path)
        # What chose among its chunks was of the run that wrote it.
        return saved.base if isinstance(saved, ImplicitPolicy) else saved
    try:
        if isinstance(spec, schema.ResidualSpec):
            base = _policy(spec.base, train, environments, seed)
            return ResidualPolicy(base, seed=seed, **options)
        observations, actions = _normalizers(train, environments)
        build = GaussianPolicy if isinstance(spec, schema.GaussianSpec) else DiffusionPolicy
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
    train: Mapping[str, Demonstrations], environments: Mapping[str, VectorEnvironment]
) -> tuple[Normalizer, Normalizer]:
    """Of observations and actions: fitted on the first demonstrations, or else from the bounds."""
    if train:
        episodes = next(iter(train.values())).episodes
        return tuple(  # type: ignore[return-value]
            Normalizer.fit(torch.from_numpy(np.concatenate(parts)))
            for parts in (
                [episode.observations for episode in episodes],
                [episode.actions for episode in episodes],
            )
        )
    name, world = next(iter(environments.items()))
    low, high = (torch.from_numpy(bound) for bound in (world.action_low, world.action_high))
    if not bool((low.isfinite() & high.isfinite() & (low < high)).all()):
        raise RecipeError(
            f"objectives.{name}.environment: actions of {world.name} lie in {low.tolist()} to "
            f"{high.tolist()}, which cannot be scaled to [-1, 1]. Give demonstrations (an "
            "objective of kind cloning), whose range is taken instead, or a saved policy."
        )
    return Normalizer.identity(world.observation_size), Normalizer(low, high)


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
    kind = clone_loss(f"objectives.{name}.loss", spec.loss, actor)

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
        follow_average(actor)
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


def _digest(start: str, demonstrations: Demonstrations) -> str:
    digest = hashlib.sha256(start.encode())
    for episode in demonstrations:
        digest.update(np.ascontiguousarray(episode.observations).data)
        digest.update(np.ascontiguousarray(episode.actions).data)
    return digest.hexdigest()
