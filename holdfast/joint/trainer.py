"""The trainer: one optimiser step after another, each on the objectives of its turn.

The trainer knows nothing of tokens or joints. It asks the schedule for a turn, takes the mean
gradient of each objective in it, combines them, lets the guards look, and steps. Losses return
sums, so the mean is taken once, over all micro-batches and ranks.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import get_scheduler

from holdfast.errors import RunError, TrainingError
from holdfast.joint.checkpoint import (
    Checkpoint,
    Checkpoints,
    pack_optimizer,
    reunite,
    separate,
    unpack_optimizer,
)
from holdfast.joint.combine import Combiner, WeightedSum
from holdfast.joint.geometry import Geometry
from holdfast.joint.guards import GradientClip, Guard, Guards, LogRatioBudget, Seen, Trip
from holdfast.joint.guards.proposed import ProposedGradient, ProposedUpdate
from holdfast.joint.interruption import Interruption
from holdfast.joint.objective import Along, Objective, Row, Spread, Summary
from holdfast.joint.optimizer import TrainerOptions, adamw, check_learning_rates
from holdfast.joint.processes import keep_process_group
from holdfast.joint.record import Recorder, peak_memory_bytes
from holdfast.joint.schedules import Schedule, Watching
from holdfast.joint.sums import Sums


@dataclass
class _Progress:
    """What the trainer itself remembers; all of it is in the checkpoint."""

    step: int = 0
    refusals: int = 0
    seconds: float = 0.0
    best: dict[str, float] = field(default_factory=dict)
    evaluated_at: int = -1
    evaluations_without_improvement: int = 0
    good_step: int | None = None
    pending_step: int | None = None


class Trainer:
    """Trains ``policy`` on ``objectives`` as ``schedule`` decides.

    Parameters
    ----------
    policy : nn.Module
        Its parameters that require a gradient are trained.
    objectives : mapping of str to Objective
        Must hold every objective that the schedule names.
    schedule : Schedule
        Decides the turn of every step.
    options : TrainerOptions
    accelerator : Accelerator, optional
        Device, precision and processes. By default a plain one.
    combiner : Combiner, optional
        How several gradients become one. By default their weighted sum.
    recorder : Recorder, optional
        Only on the main process. ``None``: nothing is recorded.
    checkpoints : Checkpoints, optional
        ``None``: none are written.
    guards : sequence of Guard
        Applied in order, each to what those before it left: on the gradient, on the update that
        the optimiser proposes, and on a turn that is over. A ``GradientClip`` among them takes the
        place of the one that ``options.max_grad_norm`` asks for.
    fingerprint : str
        Identifies the recipe; a checkpoint of another one is not loaded.

    Raises
    ------
    ValueError
        If the schedule names an objective that is absent, nothing is trainable, a learning rate
        fits no parameter, or a guard does not fit the run.
    """

    def __init__(
        self,
        policy: nn.Module,
        objectives: Mapping[str, Objective],
        schedule: Schedule,
        options: TrainerOptions,
        *,
        accelerator: Accelerator | None = None,
        combiner: Combiner | None = None,
        recorder: Recorder | None = None,
        checkpoints: Checkpoints | None = None,
        guards: Sequence[Guard] = (),
        fingerprint: str = "",
    ) -> None:
        absent = [name for name in schedule.objectives if name not in objectives]
        if absent:
            raise ValueError(
                f"schedule names {', '.join(absent)}, "
                f"but the objectives are {', '.join(objectives)}"
            )
        self.accelerator = accelerator or Accelerator()
        keep_process_group()
        self.policy = policy
        self.objectives = objectives
        self.schedule = schedule
        self.options = options
        self.combiner = combiner or WeightedSum()
        self.guards = _guards(guards, options)
        self.recorder = recorder
        self.checkpoints = checkpoints
        self.fingerprint = fingerprint
        self._progress = _Progress()
        self._probed: dict[str, float] = {}
        self._interruption = Interruption()

        self._check_guards()
        self._named = [(n, p) for n, p in policy.named_parameters() if p.requires_grad]
        if not self._named:
            raise ValueError("policy has no parameter that requires a gradient")
        check_learning_rates(policy, options)
        self._optimizer_plain, self._rated = adamw(self._named, options)
        self._lr = get_scheduler(
            options.lr_scheduler_type,
            self._optimizer_plain,
            num_warmup_steps=options.warmup_steps,
            num_training_steps=options.max_steps,
        )
        # Evaluation uses the plain policy: ranks may hold unequal shares of the held-out rows, and
        # a wrapped module's forward may wait for the others.
        self.model, self._optimizer = self.accelerator.prepare(policy, self._optimizer_plain)
        self._parameters = [parameter for _, parameter in self._named]
        policy.train()

    @property
    def step(self) -> int:
        """Optimiser steps done, refused ones included."""
        return self._progress.step

    def train(self) -> str:
        """Train to the end.

        Returns
        -------
        str
            Why training ended: ``"finished"``, or the reason for an earlier stop.

        Raises
        ------
        TrainingError
            If more than ``max_refusals`` steps were refused.
        """
        with self._interruption:
            if self.step == 0:
                self._evaluate_once()
                if self._rolls_back:
                    self.save()
            # A run that ended here, but was killed before it could say so, ends here again.
            reason = self._out_of_patience()
            while reason is None:
                reason = self._advance()
        return reason

    def _advance(self) -> str | None:
        if self.step >= self.options.max_steps:
            return "finished"
        if not self.train_step():
            self._evaluate_once()
            self.save()
            return "the schedule has no more turns"
        last = self.step >= self.options.max_steps
        if last or self.step % self.options.eval_steps == 0:
            self._evaluate_once()
        reason = self._out_of_patience()
        interrupted = self._interruption.name(self.accelerator)
        if interrupted:
            reason = f"interrupted by {interrupted}"
        if reason or last or self.step % self.options.save_steps == 0:
            self.save()
        return reason

    # One step -------------------------------------------------------------------------------------

    def train_step(self) -> bool:
        """Take one optimiser step. ``False``: the schedule has nothing left to do."""
        started = time.perf_counter()
        self._seed_dropout()
        self._probed.clear()
        turn = self.schedule.next(self._probe)
        if not turn.weights:
            return False
        batches: dict[str, Sequence[Row]] = {}
        summaries: dict[str, Summary] = {}
        gradients: dict[str, list[Tensor | None]] = {}
        for name in turn.weights:
            objective = self.objectives[name]
            batches[name] = objective.source.next()
            gradients[name], summaries[name] = self._gradient(objective, batches[name])
        if _watches(self.schedule):
            self.schedule.watch(gradients, self._parameters)
        geometry = Geometry.of(gradients) if len(gradients) > 1 else None
        gradient = self.combiner(gradients, turn.weights, geometry)
        proposed = ProposedGradient(gradient)
        grad_norm = proposed.norm
        refused = None if math.isfinite(grad_norm) else "the gradient is not finite"
        for name, summary in summaries.items():
            # Nothing counted: nothing to learn, and nothing wrong either.
            if summary.count and not math.isfinite(summary.loss):
                refused = f"the loss of {name} is {summary.loss}"
        guarded: dict[str, Any] = {}
        if refused is None:
            guarded, refused = self.guards.scale("gradient", proposed)
        for parameter, part in zip(self._parameters, gradient, strict=True):
            parameter.grad = part
        if refused is None:
            of_update, refused = self._update(batches)
            guarded |= of_update
        if refused is None:
            for name, summary in summaries.items():
                seen = self.objectives[name].observed(summary)
                if seen is not None:
                    self.schedule.observe(name, seen)
        self._forget_gradients()
        rates = dict(zip(self._rated, self._lr.get_last_lr(), strict=True))
        with warnings.catch_warnings():
            # torch takes a rate that moves before the first update for a mistake; after a refused
            # step it is none.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self._lr.step()
        self._progress.step += 1
        self._progress.seconds += time.perf_counter() - started
        if self.recorder is not None:
            self.recorder.write(
                "train",
                self.step,
                objectives={
                    name: {"weight": weight, **summaries[name].as_record()}
                    for name, weight in turn.weights.items()
                },
                gaps=self.schedule.gaps,
                learning_rate=rates.get(None, next(iter(rates.values()))),
                grad_norm=grad_norm,
                clipped_grad_norm=proposed.norm,
                seconds=self._progress.seconds,
                **self._details(geometry, rates, guarded),
            )
            text = "  ".join(f"{name} {summary.loss:.4f}" for name, summary in summaries.items())
            self.recorder.progress(self.step, self.options.max_steps, text)
        trip = self.guards.watch(Seen(summaries, grad_norm, refused))
        self._judge_checkpoints()
        if refused is not None:
            self._refuse(refused, batches)
        if trip is not None:
            self._act(trip, batches)
        return True

    def _update(self, batches: Mapping[str, Sequence[Row]]) -> tuple[dict[str, Any], str | None]:
        """Take the optimiser's step, as far as the guards let it.

        What they record, and why the step was refused, if it was: parameters are then as before,
        and the optimiser's moments have seen the gradient.
        """
        # Accelerate's step scales gradients and knows accelerators. On a CPU it is the plain one,
        # and takes twice as long for a small policy.
        on_cpu = self.accelerator.device.type == "cpu"
        optimizer = self._optimizer_plain if on_cpu else self._optimizer
        if not self.guards.of("update"):
            optimizer.step()
            return {}, None

        def radii(along: Along, spread: Spread) -> dict[str, Tensor]:
            return {name: self._radii(name, rows, along, spread) for name, rows in batches.items()}

        update = ProposedUpdate(self.policy, self._named, radii)
        optimizer.step()
        update.take()
        if not math.isfinite(update.norm):
            update.undo()
            return {}, "the update is not finite"
        norm = update.norm
        records, refused = self.guards.scale("update", update)
        if refused is None:
            update.apply()
        else:
            update.undo()
        records["update_norm"] = norm
        return records, refused

    def _radii(self, name: str, rows: Sequence[Row], along: Along, spread: Spread) -> Tensor:
        """Of the softmaxes that a batch counts, over all micro-batches and ranks."""
        objective = self.objectives[name]
        assert objective.radii is not None
        shard = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        training = self.policy.training
        self.policy.eval()
        parts = _cut(shard, objective.micro_batch_size)
        found = torch.cat([objective.radii(along, part, spread) for part in parts])
        self.policy.train(training)
        if self.accelerator.num_processes == 1:
            return found
        ranks = gather_object([found.cpu()])
        return torch.cat(ranks).to(found.device)

    def _details(
        self,
        geometry: Geometry | None,
        rates: Mapping[str | None, float],
        guarded: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What only some steps, schedules or options have to record."""
        details: dict[str, Any] = {}
        if geometry is not None:
            details["geometry"] = {**geometry.as_record(), **self.combiner.used}
        if _watches(self.schedule):
            details["estimates"] = self.schedule.estimates
        if self.options.learning_rates:
            details["learning_rates"] = {n: rate for n, rate in rates.items() if n is not None}
        if self.guards.of("update"):
            details["guards"] = dict(guarded)
        return details

    def _gradient(
        self, objective: Objective, rows: Sequence[Row]
    ) -> tuple[list[Tensor | None], Summary]:
        """The mean gradient over a batch, whatever its micro-batches and ranks."""
        world = self.accelerator.num_processes
        shard = rows[self.accelerator.process_index :: world]
        if not shard:
            raise RunError(
                f"objective {objective.name!r}: a batch of {len(rows)} rows cannot be shared by "
                f"{world} processes. Use a batch_size of at least {world}."
            )
        if not self.policy.training:
            self.policy.train()
        self._forget_gradients()
        parts = _cut(shard, objective.micro_batch_size)
        sums = Sums()
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                terms = objective.loss(self.model, part)
                self.accelerator.backward(terms.total)
            sums.add(terms)
        summary = sums.mean(self.accelerator)
        gradient = [parameter.grad for parameter in self._parameters]
        present = [part for part in gradient if part is not None]
        if present and summary.count > 0:
            # Data-parallel training averages gradients over ranks; the sum is what is wanted.
            torch._foreach_mul_(present, world / summary.count)
        return gradient, summary

    def _forget_gradients(self) -> None:
        # The optimiser's own `zero_grad` does no more, but takes a tenth of a small policy's step.
        for parameter in self._parameters:
            parameter.grad = None

    def _refuse(self, reason: str, batches: Mapping[str, Sequence[Row]]) -> None:
        self._progress.refusals += 1
        saved = self._save_batches(batches)
        if self.recorder is not None:
            self.recorder.event(self.step, "refused", f"{reason}{saved}")
        if self._progress.refusals > self.options.max_refusals:
            raise TrainingError(
                f"training stopped at step {self.step}: {self._progress.refusals} steps were "
                f"refused, more than max_refusals={self.options.max_refusals}. The last one: "
                f"{reason}{saved}. Lower the learning rate, or look at the batch."
            )

    def _save_batches(self, batches: Mapping[str, Sequence[Row]]) -> str:
        """Where they are now, as the end of a sentence."""
        if self.recorder is None:
            return ""
        paths = [self.recorder.save_batch(self.step, name, rows) for name, rows in batches.items()]
        return f"; its batch is in {', '.join(str(path) for path in paths)}"

    # Guards of turns ------------------------------------------------------------------------------

    @property
    def _rolls_back(self) -> bool:
        wires = self.guards.tripwires
        return wires is not None and wires.then == "roll_back"

    def _check_guards(self) -> None:
        if self._rolls_back and self.checkpoints is None:
            raise ValueError("tripwires are to roll back, but no checkpoints are kept")
        for name in self.schedule.objectives:
            for guard in self.guards.of("update"):
                if isinstance(guard, LogRatioBudget) and self.objectives[name].radii is None:
                    raise ValueError(
                        f"{guard.name} bounds the change of log-probabilities, but objective "
                        f"{name!r} does not say what its softmaxes are. Use update_norm_cap."
                    )

    def _act(self, trip: Trip, batches: Mapping[str, Sequence[Row]]) -> None:
        reason = f"{trip.reason}{self._save_batches(batches)}"
        done = "the run stops here"
        if trip.then == "reduce":
            self._scale_rates(trip.rate_factor)
            done = f"learning rates are multiplied by {trip.rate_factor:g}"
        elif trip.then == "roll_back":
            good = self._roll_back(trip.rate_factor)
            done = f"back to step {good}; learning rates are multiplied by {trip.rate_factor:g}"
        if self.recorder is not None:
            self.recorder.event(self.step, "tripwire", f"{reason}. {done}")
        if trip.then == "stop":
            raise TrainingError(
                f"training stopped at step {self.step} by a tripwire: {reason}. Checkpoints, if "
                "there are any, are from before. Lower the learning rate, or look at the batch."
            )
        if trip.then == "roll_back":
            # A kill from now on must not bring back what was undone.
            self._progress.good_step, self._progress.pending_step = self.step, None
            self.save()

    def _judge_checkpoints(self) -> None:
        """A checkpoint is good once so many turns after it went well: they show what it holds."""
        progress, wires = self._progress, self.guards.tripwires
        if wires is None or progress.pending_step is None:
            return
        if not self.guards.quiet:
            progress.pending_step = None
        elif self.step - progress.pending_step >= wires.patience:
            progress.good_step, progress.pending_step = progress.pending_step, None

    def _roll_back(self, factor: float) -> int:
        """Put back all but the count of steps; returns the step of the checkpoint."""
        now = self._progress
        assert self.checkpoints is not None and now.good_step is not None
        checkpoint = self.checkpoints.load(now.good_step)
        self._restore_training(checkpoint)
        self.guards.roll_back(checkpoint.state["guards"])
        # Refusals of the stretch that was undone are undone as well.
        now.refusals = checkpoint.state["progress"]["refusals"]
        self._scale_rates(factor)
        return checkpoint.step

    def _scale_rates(self, factor: float) -> None:
        """Multiply all learning rates, those to come as well."""
        self._lr.base_lrs = [rate * factor for rate in self._lr.base_lrs]
        self._lr._last_lr = [rate * factor for rate in self._lr._last_lr]
        groups = self._optimizer_plain.param_groups
        for group, rate in zip(groups, self._lr._last_lr, strict=True):
            group["lr"] = rate

    def _seed_dropout(self) -> None:
        # Dropout draws from torch's global generator. Its seed is a function of the step, so that
        # a resumed run sees the same masks without storing any generator.
        rank = self.accelerator.process_index
        seed = hash((self.options.seed, self.step, rank)) & 0x7FFF_FFFF_FFFF_FFFF
        if self.accelerator.device.type == "cpu":
            # torch.manual_seed would first look for devices, for a millisecond.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    # Evaluation -----------------------------------------------------------------------------------

    def evaluate(self, objective: Objective, rows: Sequence[Row]) -> Summary:
        """Mean loss and metrics over ``rows``, in evaluation mode, without a graph."""
        shard = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        training = self.policy.training
        self.policy.eval()
        sums = Sums()
        with torch.no_grad():
            for part in _cut(shard, objective.micro_batch_size) if shard else []:
                sums.add((objective.evaluate or objective.loss)(self.policy, part))
        self.policy.train(training)
        return sums.mean(self.accelerator)

    def _probe(self, name: str) -> float:
        if name not in self._probed:
            objective = self.objectives[name]
            if not objective.probe:
                raise ValueError(f"objective {name!r} has no probe rows, but its gap is needed")
            self._probed[name] = self.evaluate(objective, objective.probe).loss
        return self._probed[name]

    def _evaluate_once(self) -> None:
        """Evaluate on held-out rows, unless a resumed run already did at this step."""
        progress = self._progress
        if progress.evaluated_at == self.step:
            return
        progress.evaluated_at = self.step
        summaries = {
            name: self.evaluate(objective, objective.held_out)
            for name, objective in self.objectives.items()
            if objective.held_out
        }
        if not summaries:
            return
        improved = False
        for name, summary in summaries.items():
            best = progress.best.get(name, math.inf)
            if summary.loss < best - self.options.early_stopping_threshold:
                improved = True
                progress.best[name] = summary.loss
        progress.evaluations_without_improvement = (
            0 if improved else progress.evaluations_without_improvement + 1
        )
        if self.recorder is not None:
            self.recorder.write(
                "eval",
                self.step,
                objectives={name: summary.as_record() for name, summary in summaries.items()},
                seconds=progress.seconds,
            )

    def _out_of_patience(self) -> str | None:
        patience = self.options.early_stopping_patience
        if patience is None or self._progress.evaluations_without_improvement < patience:
            return None
        return f"no held-out loss improved in {patience} evaluations"

    # State ----------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, if this run keeps any."""
        if self.checkpoints is None:
            return
        progress = self._progress
        if self._rolls_back and progress.good_step is None:
            progress.good_step = self.step  # where the run starts
        elif self._rolls_back and self.guards.quiet and progress.pending_step is None:
            progress.pending_step = self.step
        if self.accelerator.is_main_process:
            tensors, packed = pack_optimizer(self._optimizer_plain)
            sources, rows = separate(
                {name: objective.source.state_dict() for name, objective in self.objectives.items()}
            )
            schedule, watched = separate(self.schedule.state_dict())
            state = {
                "fingerprint": self.fingerprint,
                "progress": vars(progress),
                "optimizer": packed,
                "lr_scheduler": self._lr.state_dict(),
                "schedule": schedule,
                "combiner": self.combiner.state_dict(),
                "guards": self.guards.state_dict(),
                "sources": sources,
            }
            policy = {**dict(self._named), **_persistent_buffers(self.policy)}
            groups = {"policy": policy, "optimizer": tensors}
            groups |= {n: t for n, t in (("sources", rows), ("schedule", watched)) if t}
            needed = [s for s in (progress.good_step, progress.pending_step) if s is not None]
            self.checkpoints.save(Checkpoint(self.step, groups, state), spare=needed)
            if self.recorder is not None:
                self.recorder.describe(
                    seconds=progress.seconds, peak_memory_bytes=peak_memory_bytes()
                )
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Load the newest whole checkpoint and rewind the record to it.

        Returns
        -------
        int
            The step it stands at; 0 where there is no checkpoint yet.

        Raises
        ------
        RunError
            If the checkpoint belongs to another recipe.
        """
        if self.checkpoints is None:
            raise ValueError("checkpoints is None: there is nothing to resume from")
        checkpoint, damaged = self.checkpoints.load_newest()
        if checkpoint is not None:
            self._restore(checkpoint)
        if self.recorder is not None:
            # Without a checkpoint even the evaluation before the first step happens again.
            self.recorder.rewind(self.step if checkpoint is not None else -1)
            for line in damaged:
                self.recorder.event(self.step, "damaged", f"{line}; an earlier one is used")
            if checkpoint is not None:
                self.recorder.event(
                    self.step, "resumed", f"from the checkpoint of step {self.step}"
                )
        return self.step

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        if state["fingerprint"] != self.fingerprint:
            raise RunError(
                f"the checkpoint of step {checkpoint.step} was written with another recipe, other "
                "data or another initial model. Put them back as they were, or start a new run."
            )
        self._restore_training(checkpoint)
        self.guards.load_state_dict(state.get("guards", {}))
        self._lr.load_state_dict(state["lr_scheduler"])
        self._progress = _Progress(**state["progress"])

    def _restore_training(self, checkpoint: Checkpoint) -> None:
        """All but guards, learning rates and progress."""
        state = checkpoint.state
        here = {**dict(self._named), **_persistent_buffers(self.policy)}
        saved = checkpoint.tensors["policy"]
        if set(here) != set(saved):
            raise RunError("the checkpoint's parameters are not those of the policy")
        with torch.no_grad():
            for name, tensor in here.items():
                tensor.copy_(saved[name])
        unpack_optimizer(self._optimizer_plain, checkpoint.tensors["optimizer"], state["optimizer"])
        # Copies lie in memory as any tensor does. Those of a file may begin at any byte, and inner
        # products, on which a schedule may decide, depend on that in their last bits.
        kept = checkpoint.tensors.get("schedule", {})
        watched = {name: tensor.clone() for name, tensor in kept.items()}
        self.schedule.load_state_dict(reunite(state["schedule"], watched))
        self.combiner.load_state_dict(state.get("combiner", {}))
        sources = reunite(state["sources"], checkpoint.tensors.get("sources", {}))
        for name, source_state in sources.items():
            self.objectives[name].source.load_state_dict(source_state)


def _watches(schedule: Schedule) -> TypeGuard[Watching]:
    # `isinstance` of a protocol looks up every name, at every step.
    return hasattr(schedule, "watch")


def _guards(guards: Sequence[Guard], options: TrainerOptions) -> Guards:
    """Those given, and the clip of the options unless there is one among them."""
    given = any(isinstance(guard, GradientClip) for guard in guards)
    if given or options.max_grad_norm is None:
        return Guards(guards)
    return Guards([GradientClip(options.max_grad_norm), *guards])


def _cut(rows: Sequence[Row], size: int | None) -> list[Sequence[Row]]:
    size = size or len(rows)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    saved = module.state_dict(keep_vars=True)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {
        name: value
        for name, value in saved.items()
        if isinstance(value, Tensor) and name not in parameters
    }
