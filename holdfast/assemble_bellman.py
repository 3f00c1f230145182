"""From a recipe on logged decisions to the soft Q-function and its objectives."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator

from holdfast import schema
from holdfast.bellman.files import read_transitions
from holdfast.bellman.objectives import DecisionLoss, TransitionBatches, rows_of
from holdfast.bellman.soft_q import SoftQ
from holdfast.bellman.transitions import Transitions
from holdfast.errors import DataError, RecipeError
from holdfast.joint import Objective
from holdfast.joint.table import Table

SPLIT_SEED = 0


def assemble_bellman(
    recipe: schema.Recipe, accelerator: Accelerator, say: Callable[[str], None]
) -> tuple[SoftQ, dict[str, Objective], dict[str, str]]:
    """Read transitions and build the soft Q-function.

    Returns
    -------
    tuple
        Soft Q-function, objectives, and per objective a digest of policy and data.

    Raises
    ------
    HoldfastError
        For a file or an entry that cannot be used.
    """
    spec = recipe.policy
    assert isinstance(spec, schema.SoftQSpec)
    read: dict[str, Transitions] = {}
    for name, objective in recipe.objectives.items():
        assert isinstance(objective, schema.DecisionSpec)
        read[name] = _transitions(name, objective, spec)
        say(f"{name}: {len(read[name])} transitions of {objective.data.path}")
    policy = _policy(spec, read, recipe.training.seed).to(accelerator.device)
    objectives = {}
    for name, objective in recipe.objectives.items():
        assert isinstance(objective, schema.DecisionSpec)
        objectives[name] = _objective(name, objective, read[name], recipe.training.seed)
    start = policy.fingerprint()
    return policy, objectives, {name: _digest(start, rows) for name, rows in read.items()}


def _transitions(name: str, spec: schema.DecisionSpec, policy: schema.SoftQSpec) -> Transitions:
    anchor = {}
    if isinstance(spec, schema.AnchorSpec):
        if spec.anchor_action >= policy.actions:
            raise RecipeError(
                f"objectives.{name}.anchor_action is {spec.anchor_action}, but policy.actions is "
                f"{policy.actions}: actions are numbered from 0"
            )
        anchor = {"anchor_action": spec.anchor_action, "anchor_reward": spec.anchor_reward}
    found = read_transitions(
        spec.data.path,
        actions=policy.actions,
        states=policy.states,
        columns=spec.data.columns,
        **anchor,  # type: ignore[arg-type]
    )
    if isinstance(spec, schema.BellmanSpec) and np.isnan(found.reward).any():
        row = int(np.flatnonzero(np.isnan(found.reward))[0])
        raise DataError(
            f"objectives.{name}.data: {spec.data.path} has no reward in row {row}, and {spec.kind} "
            "needs every one. Use choice_likelihood with anchor_bellman where they are not seen."
        )
    return found


def _policy(spec: schema.SoftQSpec, read: dict[str, Transitions], seed: int) -> SoftQ:
    if spec.states is not None:
        return SoftQ(spec.states, spec.actions)
    sizes = {n: 1 if t.state.ndim == 1 else t.state.shape[1] for n, t in read.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise DataError(f"objectives: observations have different numbers of entries ({told})")
    return SoftQ(next(iter(sizes.values())), spec.actions, spec.hidden, seed=seed)


def _objective(
    name: str, spec: schema.DecisionSpec, transitions: Transitions, seed: int
) -> Objective:
    anchor = spec.anchor_action if isinstance(spec, schema.AnchorSpec) else None
    rows = rows_of(transitions, anchor)
    kept = spec.data.held_out + spec.data.probe
    if kept >= len(rows):
        raise DataError(
            f"objectives.{name}.data: {spec.data.path} has {len(rows)} rows, of which held_out "
            f"{spec.data.held_out} and probe {spec.data.probe} leave none to train on"
        )
    order = list(range(len(rows)))
    random.Random(SPLIT_SEED).shuffle(order)

    def part(start: int, stop: int) -> Table | tuple[()]:
        return rows.take(torch.tensor(order[start:stop])) if stop > start else ()

    train = part(kept, len(rows))
    assert isinstance(train, Table)
    discount = getattr(spec, "discount", 0.0)
    return Objective(
        name=name,
        loss=DecisionLoss(spec.kind, discount),  # type: ignore[arg-type]
        source=TransitionBatches(train, spec.batch_size, seed=seed),
        held_out=part(0, spec.data.held_out),
        probe=part(spec.data.held_out, kept),
        optimum=spec.optimum if isinstance(spec.optimum, float) else None,
        micro_batch_size=spec.micro_batch_size,
    )


def _digest(start: str, transitions: Transitions) -> str:
    digest = hashlib.sha256(start.encode())
    for column in ("state", "action", "reward", "next_state", "terminal"):
        digest.update(np.ascontiguousarray(getattr(transitions, column)).data)
    return digest.hexdigest()
