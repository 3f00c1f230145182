"""From the recipe of reinforcement learning in an environment to objectives."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from holdfast import schema
from holdfast.control.actor_critic import ActorCritic
from holdfast.control.cloning import CloningLoss, cloning_loss_of
from holdfast.control.demonstrations import Chunks, Demonstrations
from holdfast.control.environments import VectorEnvironment, make_environments
from holdfast.control.objectives import EpisodeEvaluation, PolicyOptimisation
from holdfast.control.off_policy import (
    AdvantageWeighted,
    ImplicitQ,
    ImprovedActions,
    Improvement,
)
from holdfast.control.policies import DiffusionPolicy, GaussianPolicy, Policy, ResidualPolicy
from holdfast.control.policies.implicit import critic, twin_q
from holdfast.control.regularisation import (
    Accompanied,
    Regularisation,
    of_demonstrations,
    of_teacher,
)
from holdfast.control.replay import ReplayOptions, ReplaySource
from holdfast.control.rollouts import EnvironmentRollouts, RolloutOptions
from holdfast.control.transitions import transitions
from holdfast.errors import DataError, RecipeError
from holdfast.joint import Objective
from holdfast.joint.objective import Source, Summary

EVALUATION_SEED = 0
"""Of held-out episodes: the same for every run, whatever its own seed."""
PROBE_SEED = 1

_TRAINS: dict[str, tuple[type[Policy], ...]] = {
    "control_ppo": (GaussianPolicy, ResidualPolicy),
    "dppo": (DiffusionPolicy,),
    "idql": (GaussianPolicy, DiffusionPolicy),
    "awr": (GaussianPolicy, DiffusionPolicy),
    "awc": (GaussianPolicy, DiffusionPolicy),
    "dipo": (GaussianPolicy, DiffusionPolicy),
}


def check_kinds(specs: Mapping[str, schema.ControlRlSpec], actor: Policy) -> None:
    """Refuse objectives that do not train this policy, or do not train it side by side.

    Raises
    ------
    RecipeError
        Naming the objective and what would do.
    """
    for name, spec in specs.items():
        if not isinstance(actor, _TRAINS[spec.kind]):
            trained = " and ".join(kind.kind for kind in _TRAINS[spec.kind])
            others = [kind for kind, policies in _TRAINS.items() if isinstance(actor, policies)]
            raise RecipeError(
                f"objectives.{name}.kind: {spec.kind} does not train a {actor.kind} policy. It is "
                f"for {trained} policies; {', '.join(others) or 'nothing'} would train this one."
            )
        if isinstance(spec, schema.ReplaySpec) and len(specs) > 1:
            others = [other for other in specs if other != name]
            raise RecipeError(
                f"objectives.{name}.kind: {spec.kind} trains critics of its own data, which "
                f"{', '.join(others)} would train on another. Keep one of them."
            )
        if (
            isinstance(spec, schema.ClippedControlSpec)
            and spec.cloning is not None
            and isinstance(actor, ResidualPolicy)
        ):
            raise RecipeError(
                f"objectives.{name}.cloning: reinforcement learning trains the residual of a "
                "residual policy, and cloning its base. Interleave an objective of kind cloning."
            )


def actor_critic(
    actor: Policy,
    specs: Mapping[str, schema.ControlRlSpec],
    options: schema.CriticSpec,
    seed: int,
) -> ActorCritic:
    """The policy, with the critics that its objectives train."""
    values, q, candidates, tau = None, None, None, 0.7
    structure = options.model_dump()
    for spec in specs.values():
        if not isinstance(spec, schema.DipoSpec):
            values = critic(actor, seed=seed, **structure)
        if isinstance(spec, schema.ReplaySpec):
            q = twin_q(actor, seed=seed, **structure)
        if isinstance(spec, schema.IdqlSpec):
            candidates, tau = spec.candidates, spec.choice_tau
    return ActorCritic(actor, values, q, candidates=candidates, tau=tau)


def acting_objective(
    name: str,
    spec: schema.ControlRlSpec,
    policy: ActorCritic,
    environments: VectorEnvironment,
    demonstrations: Demonstrations | None,
    seed: int,
) -> Objective:
    """An objective of reinforcement learning, with its evaluation in environments of its own.

    Parameters
    ----------
    demonstrations : Demonstrations, optional
        Those that the objective itself learns from.

    Raises
    ------
    HoldfastError
        For numbers that do not fit together, or demonstrations of other rewards.
    """
    source: Source
    loss: ImplicitQ | ImprovedActions | AdvantageWeighted | PolicyOptimisation
    if isinstance(spec, schema.ReplaySpec):
        source, loss = _replay(name, spec, policy, environments, demonstrations, seed)
        rollouts = None
    else:
        assert isinstance(spec, schema.RolloutSpec)
        source = rollouts = _rollouts(name, spec, policy, environments, seed)
        if isinstance(spec, schema.AwrSpec):
            loss = AdvantageWeighted(
                clone_loss(f"objectives.{name}.loss", spec.loss, policy.actor),
                spec.temperature,
                spec.cap,
                spec.vf_coef,
            )
        else:
            assert isinstance(spec, schema.ClippedControlSpec)
            loss = clipped = _clipped(spec, policy.actor)
            if spec.cloning is not None:
                where = f"objectives.{name}.cloning.loss"
                clipped.regularisation = Regularisation(
                    spec.cloning.weight,
                    spec.cloning.of,
                    clone_loss(where, spec.cloning.loss, policy.actor),
                )
                companion = (
                    of_teacher(policy.actor)
                    if demonstrations is None
                    else of_demonstrations(_chunks(demonstrations, policy.actor))
                )
                source = Accompanied(rollouts, companion, seed=seed)
    score = spec.score or ("success" if spec.environment.sparse else "return")

    @cache
    def worlds() -> VectorEnvironment:
        """Made once something is evaluated; every evaluation begins them anew."""
        return make_environments(
            spec.environment.name, environments.count, seed=seed, options=environments.options
        )

    evaluations = {
        chosen: EpisodeEvaluation(worlds, score, chosen) for chosen in (EVALUATION_SEED, PROBE_SEED)
    }

    def evaluate(module: Any, rows: Any) -> Any:
        # Rows are (set of episodes, number): those of the gap are not those of the evaluation.
        return evaluations[rows[0][0]](module, [number for _, number in rows])

    def observed(summary: Summary) -> float | None:
        if rollouts is not None and "approx_kl" in summary.metrics:
            rollouts.observe(summary.metrics["approx_kl"])
        if isinstance(spec, schema.ReplaySpec):
            policy.follow(spec.target_rate)
        clones = isinstance(spec, schema.ReplaySpec | schema.AwrSpec)
        if clones and not summary.metrics["critic_only"]:
            follow_average(policy.actor)
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


def clone_loss(where: str, given: CloningLoss | None, actor: Policy) -> CloningLoss:
    """The cloning loss that was asked for, or the one that fits the policy.

    Raises
    ------
    RecipeError
        If it does not fit.
    """
    kind = given or cloning_loss_of(actor)
    if (kind == "denoising") != isinstance(actor, DiffusionPolicy):
        raise RecipeError(
            f"{where}: {kind} is not for a {actor.kind} policy. denoising is for diffusion "
            "policies, nll and mse for gaussian ones."
        )
    return kind


def follow_average(actor: Policy) -> None:
    """After a step that cloned: the average of a diffusion policy, where it still has one."""
    if isinstance(actor, DiffusionPolicy) and not actor.fine_tuning:
        actor.update_average()


# On rollouts --------------------------------------------------------------------------------------


def _rollouts(
    name: str,
    spec: schema.RolloutSpec,
    policy: ActorCritic,
    environments: VectorEnvironment,
    seed: int,
) -> EnvironmentRollouts:
    rows = {"dppo": "denoising", "awr": "actions"}.get(spec.kind, "decisions")
    options = RolloutOptions(
        rows=rows,  # type: ignore[arg-type]
        **spec.model_dump(include=set(RolloutOptions.__annotations__)),
    )
    source = EnvironmentRollouts(policy, environments, options, seed=seed)
    if spec.batch_size > source.rows:
        raise RecipeError(
            f"objectives.{name}.batch_size is {spec.batch_size}, more than the {source.rows} rows "
            f"of a batch of rollouts (steps {spec.steps} times {environments.count} environments"
            f"{' times the denoising steps' if rows == 'denoising' else ''})"
        )
    return source


def _clipped(spec: schema.ClippedControlSpec, actor: Policy) -> PolicyOptimisation:
    loss = PolicyOptimisation(spec.epsilon, spec.vf_coef, spec.value_clip)
    if isinstance(spec, schema.DppoSpec):
        assert isinstance(actor, DiffusionPolicy)
        loss.fine_tuned_steps = actor.fine_tuned_steps
        loss.epsilon_base, loss.rate = spec.epsilon_base, spec.rate
        loss.denoising_discount = spec.denoising_discount
        if spec.log_ratio == "mean":
            loss.dimensions = actor.horizon * actor.action_size
    return loss


def _chunks(demonstrations: Demonstrations, actor: Policy) -> Chunks:
    return Chunks(demonstrations, history=actor.history, horizon=actor.horizon)


# On a replay buffer -------------------------------------------------------------------------------


def _replay(
    name: str,
    spec: schema.ReplaySpec,
    policy: ActorCritic,
    environments: VectorEnvironment,
    demonstrations: Demonstrations | None,
    seed: int,
) -> tuple[ReplaySource, ImplicitQ | ImprovedActions]:
    actor = policy.actor
    clone = clone_loss(f"objectives.{name}.loss", spec.loss, actor)
    rows, share = None, 0.0
    if demonstrations is not None:
        if spec.environment.sparse:
            _check_sparse(name, demonstrations)
        rows = transitions(demonstrations, history=actor.history, horizon=actor.horizon)
        share = spec.demonstration_share
    options = ReplayOptions(
        steps=spec.steps,
        updates=spec.updates,
        batch_size=spec.batch_size,
        capacity=spec.capacity,
        demonstration_share=share,
        critic_warmup=spec.critic_warmup,
        reward_scale=spec.reward_scale,
    )
    if rows is not None and not 0 < options.demonstrated < spec.batch_size:
        raise RecipeError(
            f"objectives.{name}.demonstration_share: {share} of batch_size {spec.batch_size} are "
            f"{options.demonstrated} rows: both parts of a batch need at least one"
        )
    loss: ImplicitQ | ImprovedActions
    prepare = None
    if isinstance(spec, schema.IdqlSpec):
        loss = ImplicitQ(clone, spec.discount, spec.tau)
    elif isinstance(spec, schema.AwcSpec):
        loss = ImplicitQ(clone, spec.discount, spec.tau, spec.temperature, spec.cap)
    else:
        assert isinstance(spec, schema.DipoSpec)
        loss = ImprovedActions(clone, spec.discount)
        prepare = Improvement(policy, spec.action_steps, spec.action_rate)
    try:
        source = ReplaySource(
            policy,
            environments,
            options,
            seed=seed,
            demonstrations=rows,
            prepare=prepare,
            folder=spec.folder,
        )
    except OSError as error:
        raise RecipeError(
            f"objectives.{name}.folder: no files can be made in {spec.folder}: {error}. Name a "
            "folder that exists and can be written to, or leave it out."
        ) from error
    return source, loss


def _check_sparse(name: str, demonstrations: Demonstrations) -> None:
    for number, episode in enumerate(demonstrations):
        if episode.rewards is None:
            continue  # Refused when transitions are made of it.
        found = None
        if ((episode.rewards != 0) & (episode.rewards != 1)).any():
            found = "rewards other than 0 and 1"
        elif episode.success and not episode.rewards.any():
            found = "a success, but no reward"
        if found is not None:
            raise DataError(
                f"objectives.{name}.data: {demonstrations.source}, episode {number} has {found}, "
                "while environment.sparse is true: critics would learn from two rewards at once. "
                "Record the demonstrations with --sparse, or leave data out."
            )
