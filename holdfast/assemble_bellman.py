"""From a recipe on logged decisions to the soft Q-function and its objectives."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from transformers import get_scheduler

from holdfast import schema
from holdfast.bellman.files import read_transitions
from holdfast.bellman.margin import stability_margin
from holdfast.bellman.networks import Networks, Tables
from holdfast.bellman.objectives import DecisionLoss, TransitionBatches, rows_of
from holdfast.bellman.problem import SaddleProblem
from holdfast.bellman.reference import SaddleReference
from holdfast.bellman.sensitivity import measure_sensitivity
from holdfast.bellman.sgda import CERTIFIED_SIZE, Sgda
from holdfast.bellman.soft_q import SoftQ
from holdfast.bellman.transitions import Transitions
from holdfast.errors import DataError, RecipeError
from holdfast.joint import Objective
from holdfast.joint.table import Table

SPLIT_SEED = 0
REFERENCE_SIZE = 10_000_000
"""Entries of a dense model up to which a run's distance to the exact saddle is recorded."""


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
        For a file or an entry that cannot be used, rows that leave values of a table free, or rates
        with which descent-ascent leaves its saddle.
    """
    spec = recipe.policy
    assert isinstance(spec, schema.SoftQSpec)
    read = _read(recipe)
    for name, rows in read.items():
        say(f"{name}: {len(rows)} transitions of {_spec(recipe, name).data.path}")
    _check_covered(recipe, read)
    policy = _policy(spec, read, recipe.training.seed).to(accelerator.device)
    reference = _reference(recipe, read)
    objectives = {
        name: _objective(name, _spec(recipe, name), rows, recipe.training.seed, reference)
        for name, rows in read.items()
    }
    start = policy.fingerprint()
    return policy, objectives, {name: _digest(start, rows) for name, rows in read.items()}


@dataclass(frozen=True)
class Posed:
    """The saddle problem that a recipe poses.

    Attributes
    ----------
    problem : SaddleProblem
        On the rows that are trained on, with the recipe's tables or networks.
    rows : NDArray
        Where each of them stands among the transitions of the file.
    settings : Sgda
        What the recipe's training is as descent-ascent: its batches, and Adam with its rates.
    """

    problem: SaddleProblem
    rows: NDArray[np.int64]
    settings: Sgda


def pose(recipe: schema.Recipe) -> Posed:
    """Read a recipe's saddle problem.

    Raises
    ------
    HoldfastError
        For a file or an entry that cannot be used, objectives that are no saddle problem, or data
        that do not determine a table.
    """
    assert isinstance(recipe.policy, schema.SoftQSpec)
    read = _read(recipe)
    name, rows = _posing(recipe, read)
    try:
        problem = _problem(recipe, name, read[name][rows], recipe.policy)
    except ValueError as error:
        path = _spec(recipe, name).data.path
        raise DataError(f"objectives.{name}.data: {path}: {error}") from error
    rates = _schedule(recipe.training)
    settings = Sgda(
        steps=recipe.training.max_steps,
        step=rates.__getitem__,
        step_ratio=step_ratio(recipe),
        batch_size=min(_spec(recipe, name).batch_size, len(rows)),
        replacement=False,
        optimiser="adam",
    )
    return Posed(problem, rows, settings)


def stability_record(
    recipe: schema.Recipe,
    folder: Path,
    *,
    rows: int | None = None,
    draws: int | None = None,
    sizes: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """What one observation does to a recipe's estimate, as JSON values.

    Parameters
    ----------
    recipe : Recipe
    folder : Path
        Of the run. Where it holds a trained table, the record says how far that is from the exact
        estimate.
    rows, draws, sizes, seed
        As of :func:`~holdfast.bellman.sensitivity.measure_sensitivity`.
    say : callable
        Told what happens.

    Raises
    ------
    HoldfastError
        For a recipe or data that cannot be used, or a setting that leaves the saddle.
    """
    posed = pose(recipe)
    problem = posed.problem
    table = isinstance(problem.approximator, Tables)
    say(f"{len(problem.transitions)} transitions, {'a table' if table else 'networks'}")
    if sizes is None:
        sizes = 4 if table else 0
    found = measure_sensitivity(
        problem, posed.settings, rows=rows, draws=draws, sizes=sizes, seed=seed
    )
    record = {
        "name": recipe.name,
        "recipe": recipe.fingerprint(),
        "seed": seed,
        **found.record(posed.rows.tolist()),
    }
    trained = folder / "model"
    if table and trained.is_dir():
        model = SoftQ.from_pretrained(trained)
        if problem.anchor_action is None:
            values = model.tables()[0]
        else:
            values = model.rewards(problem.discount)
        seen = problem.transitions.counts(*found.influence.estimate.shape) > 0
        apart = np.abs(values.numpy() - found.influence.estimate)[seen]
        record["trained_error"] = float(apart.max())
    return record


def step_ratio(recipe: schema.Recipe) -> float:
    """Of the dual's to the primal's learning rate."""
    assert isinstance(recipe.policy, schema.SoftQSpec)
    rate = recipe.training.learning_rate
    rates = recipe.policy.learning_rates(rate, recipe.training.learning_rates)
    return rates["zeta"] / rates.get("q", rate)


def _spec(recipe: schema.Recipe, name: str) -> schema.DecisionSpec:
    spec = recipe.objectives[name]
    assert isinstance(spec, schema.DecisionSpec)
    return spec


def _read(recipe: schema.Recipe) -> dict[str, Transitions]:
    assert isinstance(recipe.policy, schema.SoftQSpec)
    return {
        name: _transitions(name, _spec(recipe, name), recipe.policy) for name in recipe.objectives
    }


def _posing(recipe: schema.Recipe, read: dict[str, Transitions]) -> tuple[str, NDArray[np.int64]]:
    """The objective that poses the saddle problem, and the rows that it trains on."""

    def of(kind: type[schema.DecisionSpec]) -> list[str]:
        return [name for name in read if isinstance(recipe.objectives[name], kind)]

    values = [name for name in of(schema.BellmanSpec) if _spec(recipe, name).kind != "td_error"]
    anchors, choices = of(schema.AnchorSpec), of(schema.ChoiceSpec)
    found = (len(values), len(anchors), len(choices), len(read))
    if found not in ((1, 0, 0, 1), (0, 1, 1, 2)):
        told = ", ".join(_spec(recipe, name).kind for name in read)
        raise RecipeError(
            f"objectives: {told} pose no saddle problem: it takes one bellman_saddle, or one "
            "choice_likelihood with one anchor_bellman"
        )
    name = (values or anchors)[0]
    train, _, _ = _parts(name, _spec(recipe, name), len(read[name]))
    if anchors:
        other = read[choices[0]][
            _parts(choices[0], _spec(recipe, choices[0]), len(read[choices[0]]))[0]
        ]
        if not _alike(other, read[name][train]):
            raise RecipeError(
                f"objectives.{choices[0]} and objectives.{name} train on different rows: together "
                "they pose a saddle problem only on the same, so give both one file, and as many "
                "held_out and probe rows"
            )
    return name, train


def _problem(
    recipe: schema.Recipe, name: str, rows: Transitions, policy: schema.SoftQSpec
) -> SaddleProblem:
    spec = recipe.objectives[name]
    assert isinstance(spec, schema.BellmanSpec | schema.AnchorSpec)
    anchor, weight = None, 1.0
    if isinstance(spec, schema.AnchorSpec):
        anchor = spec.anchor_action
        weights = getattr(recipe.schedule, "weights", {})
        others = sum(share for other, share in weights.items() if other != name)
        weight = weights[name] / others if weights.get(name) and others else 1.0
    if policy.states is not None:
        return SaddleProblem.tabular(
            rows,
            spec.discount,
            states=policy.states,
            actions=policy.actions,
            anchor_action=anchor,
            weight=weight,
        )
    if rows.state.ndim == 1:
        wide = {n: getattr(rows, n)[:, None].astype(np.float64) for n in ("state", "next_state")}
        rows = replace(rows, **wide)
    start = _policy(policy, {name: rows}, recipe.training.seed)
    return SaddleProblem(rows, spec.discount, Networks(start.q, start.zeta), anchor, weight)


def _check_covered(recipe: schema.Recipe, read: dict[str, Transitions]) -> None:
    """Refuse a table that Bellman terms alone are to fit where some pair has no row.

    Its value would stay at 0 and enter those of all states that lead there. The likelihood of
    choices tells of such pairs, if only that they are worth little, so with one nothing is refused
    but anchors: they alone hold values down.
    """
    policy = recipe.policy
    assert isinstance(policy, schema.SoftQSpec)
    if policy.states is None:
        return
    chosen = any(isinstance(spec, schema.ChoiceSpec) for spec in recipe.objectives.values())
    for name, transitions in read.items():
        spec = _spec(recipe, name)
        rows = transitions[_parts(name, spec, len(transitions))[0]]
        needed = np.zeros(policy.actions, bool)
        if isinstance(spec, schema.AnchorSpec):
            needed[spec.anchor_action] = True
        elif isinstance(spec, schema.BellmanSpec) and not chosen:
            needed[:] = True
        entered = rows.entered(policy.states)
        counts = rows.counts(policy.states, policy.actions)
        missing = np.argwhere((counts == 0) & entered[:, None] & needed)
        if len(missing):
            state, action = missing[0]
            raise DataError(
                f"objectives.{name}.data: {spec.data.path}: state {state} with action {action} "
                f"does not occur among the {len(rows)} rows that are trained on ({len(missing)} "
                "such pairs), so nothing determines its value; give more rows, fewer held_out, or "
                "observations instead of policy.states"
            )


def _reference(recipe: schema.Recipe, read: dict[str, Transitions]) -> SaddleReference | None:
    """What a table's data determine exactly; a ratio that leaves that saddle is refused.

    ``None`` where it is not known: for networks, large tables, objectives that pose no saddle
    problem, and data that leave some pairs free.
    """
    policy = recipe.policy
    assert isinstance(policy, schema.SoftQSpec)
    if policy.states is None or policy.states**2 * policy.actions > REFERENCE_SIZE:
        return None
    try:
        name, rows = _posing(recipe, read)
        problem = _problem(recipe, name, read[name][rows], policy)
        found = SaddleReference(problem)
    except (ValueError, RecipeError):
        return None
    if 2 * policy.states * policy.actions <= CERTIFIED_SIZE:
        stability_margin(problem, step_ratio(recipe)).check()
    return found


def _schedule(training: schema.TrainingSpec) -> list[float]:
    """The learning rate of ``q`` in every step."""
    rate = training.learning_rates.get("q", training.learning_rate)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    scheduler = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=training.warmup_steps,
        num_training_steps=training.max_steps,
    )
    rates = []
    for _ in range(training.max_steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


def _alike(first: Transitions, second: Transitions) -> bool:
    names = ("state", "action", "next_state", "terminal")
    return all(np.array_equal(getattr(first, n), getattr(second, n)) for n in names)


def _transitions(name: str, spec: schema.DecisionSpec, policy: schema.SoftQSpec) -> Transitions:
    options: dict[str, Any] = {}
    if isinstance(spec, schema.ChoiceSpec):
        options = {"rewards": False}
    elif isinstance(spec, schema.AnchorSpec):
        if spec.anchor_action >= policy.actions:
            raise RecipeError(
                f"objectives.{name}.anchor_action is {spec.anchor_action}, but policy.actions is "
                f"{policy.actions}: actions are numbered from 0"
            )
        options = {"anchor_action": spec.anchor_action, "anchor_reward": spec.anchor_reward}
    return read_transitions(
        spec.data.path,
        actions=policy.actions,
        states=policy.states,
        columns=spec.data.columns,
        **options,
    )


def _policy(spec: schema.SoftQSpec, read: dict[str, Transitions], seed: int) -> SoftQ:
    if spec.states is not None:
        return SoftQ(spec.states, spec.actions)
    sizes = {n: 1 if t.state.ndim == 1 else t.state.shape[1] for n, t in read.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise DataError(f"objectives: observations have different numbers of entries ({told})")
    return SoftQ(next(iter(sizes.values())), spec.actions, spec.hidden, seed=seed)


def _objective(
    name: str,
    spec: schema.DecisionSpec,
    transitions: Transitions,
    seed: int,
    reference: SaddleReference | None,
) -> Objective:
    anchor = spec.anchor_action if isinstance(spec, schema.AnchorSpec) else None
    rows = rows_of(transitions, anchor)
    train, held_out, probe = (
        rows.take(torch.from_numpy(index)) if len(index) else ()
        for index in _parts(name, spec, len(rows))
    )
    assert isinstance(train, Table)
    if spec.kind in ("choice_likelihood", "td_error"):
        reference = None
    discount = getattr(spec, "discount", 0.0)
    return Objective(
        name=name,
        loss=DecisionLoss(spec.kind, discount, reference),  # type: ignore[arg-type]
        source=TransitionBatches(train, spec.batch_size, seed=seed),
        held_out=held_out,
        probe=probe,
        optimum=spec.optimum if isinstance(spec.optimum, float) else None,
        micro_batch_size=spec.micro_batch_size,
    )


def _parts(name: str, spec: schema.DecisionSpec, n: int) -> tuple[NDArray[np.int64], ...]:
    """The rows that are trained on, held out, and probed."""
    kept = spec.data.held_out + spec.data.probe
    if kept >= n:
        raise DataError(
            f"objectives.{name}.data: {spec.data.path} has {n} rows, of which held_out "
            f"{spec.data.held_out} and probe {spec.data.probe} leave none to train on"
        )
    order = list(range(n))
    random.Random(SPLIT_SEED).shuffle(order)
    rows = np.array(order)
    return rows[kept:], rows[: spec.data.held_out], rows[spec.data.held_out : kept]


def _digest(start: str, transitions: Transitions) -> str:
    digest = hashlib.sha256(start.encode())
    for column in ("state", "action", "reward", "next_state", "terminal"):
        digest.update(np.ascontiguousarray(getattr(transitions, column)).data)
    return digest.hexdigest()
