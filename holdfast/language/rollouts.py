"""On-policy samples as a source: prompts in, completions with rewards and signals out."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from holdfast.errors import TrainingError
from holdfast.joint.batches import Batches
from holdfast.joint.objective import Source
from holdfast.language.data import Demonstration, Encoded, Prompt
from holdfast.language.generate import Completion, Generator, Sampling
from holdfast.language.rewards import Rewards


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One completion of a prompt by the policy.

    Attributes
    ----------
    tokens : Encoded
        Prompt and completion; the completion counts.
    origin : str
        Where the prompt came from.
    completed : bool
        The completion ended by itself.
    reward : float
        Weighted sum of the rewards; nan where no function gave one.
    rewards : dict of str to float
        By function.
    group_std : float
        Standard deviation of the reward among the completions of the same prompt; nan where fewer
        than two have one.
    samples : int
        Completions that the source had drawn in all once this one was there.
    demonstration : bool
        The data's own completion in the place of the policy's.
    hint : int
        Counted tokens at the start that the data gave the policy to go on from.
    signals : dict of str to Tensor
        What the loss needs besides, by counted token: ``(counted, ...)``.
    """

    tokens: Encoded
    origin: str
    completed: bool
    reward: float = math.nan
    rewards: dict[str, float] = field(default_factory=dict)
    group_std: float = math.nan
    samples: int = 0
    demonstration: bool = False
    hint: int = 0
    signals: dict[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.tokens.length

    @property
    def counted(self) -> int:
        """Tokens of the completion that count."""
        return int(self.tokens.counted.sum())

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in _PLAIN}
        return {**plain, "tokens": self.tokens.to_json()}


_PLAIN = (
    "origin",
    "completed",
    "reward",
    "rewards",
    "group_std",
    "samples",
    "demonstration",
    "hint",
)


class Annotate(Protocol):
    """Adds to rollouts what their loss needs."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Signals of models: each row on its own, so that rows may be shared among processes."""
        ...

    def credit(self, rollouts: Sequence[Rollout], num_generations: int) -> list[Rollout]:
        """Advantages: of the whole batch of rollouts, groups in order."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What is remembered for the rollouts in use, besides their signals."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Remembers(Protocol):
    """What has a state that belongs into a checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Group(Protocol):
    """What the data's own completions do in the group of a prompt; see ``imitation``."""

    @property
    def members(self) -> int:
        """How many completions of a group the data gives."""
        ...

    def completion(self, origin: str) -> Encoded:
        """The data's completion of a prompt, after that prompt."""
        ...

    def hint(self, origin: str, name: str, step: int) -> Any:
        """Ids that completions of a prompt begin with, in a draw of this name at a step."""
        ...

    def admit(
        self,
        rollouts: list[Rollout],
        num_generations: int,
        score: Callable[[Sequence[Rollout]], list[Rollout]],
    ) -> list[Rollout]:
        """Rollouts with advantages, some of them in exchange for the data's completions."""
        ...

    def due(self, batch_size: int) -> list[Rollout]:
        """A batch that goes before new rollouts, or nothing."""
        ...


class Inner(Protocol):
    """Says when a batch of rollouts has served enough; see ``guards.controllers.Surrogate``."""

    @property
    def exhausted(self) -> bool: ...

    def renew(self) -> None: ...


@dataclass(frozen=True)
class RolloutOptions:
    """How many rollouts are drawn, and how often they are used; names as in TRL.

    Attributes
    ----------
    batch_size : int
        Completions that an optimiser step takes.
    num_generations : int
        Completions of each prompt. Divides ``batch_size * steps_per_generation``.
    steps_per_generation : int
        Optimiser steps that one batch of rollouts is cut into.
    num_iterations : int
        Passes over a batch of rollouts.
    dynamic_sampling : bool
        Replace groups whose rewards are all the same by those of new prompts (DAPO). What was
        drawn in vain counts as drawn.
    max_resampling : int
        Batches that are drawn to that end, at most. After them the rest is taken as it is.
    mask_truncated_completions : bool
        Completions that did not end by themselves count for nothing.
    """

    batch_size: int
    num_generations: int = 8
    steps_per_generation: int = 1
    num_iterations: int = 1
    dynamic_sampling: bool = False
    max_resampling: int = 4
    mask_truncated_completions: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_generations", "steps_per_generation", "num_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.drawn % self.num_generations:
            raise ValueError(
                f"num_generations is {self.num_generations}, which does not divide the "
                f"{self.drawn} completions of a batch of rollouts (batch_size {self.batch_size} "
                f"times steps_per_generation {self.steps_per_generation})"
            )

    @property
    def drawn(self) -> int:
        """Completions in a batch of rollouts."""
        return self.batch_size * self.steps_per_generation

    @property
    def uses(self) -> int:
        """Optimiser steps that a batch of rollouts serves."""
        return self.steps_per_generation * self.num_iterations


class Rollouts:
    """Batches of the policy's own completions, without end.

    Rollouts are drawn when a batch is asked for and none are left. The state holds those that are
    half used, so that a resumed run goes on with them.

    Parameters
    ----------
    prompts : sequence of Prompt
    generator : Generator
        Draws completions with the policy as it stands.
    sampling : Sampling
    rewards : Rewards, optional
        ``None``: the loss needs none (distillation).
    annotate : Annotate
    options : RolloutOptions
    decode : callable
        From token ids to text, for reward functions.
    seed : int
        Of prompts and completions.
    share : callable, optional
        ``share(work, items)``: ``work`` on the items, divided among processes, results in order.
    group : Group, optional
        What the data's own completions do beside the policy's.
    inner : Inner, optional
        May end the use of a batch of rollouts early.
    memory : mapping of str to Remembers
        What else an objective remembers: its state is kept with that of its rollouts.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        generator: Generator,
        sampling: Sampling,
        rewards: Rewards | None,
        annotate: Annotate,
        options: RolloutOptions,
        *,
        decode: Callable[[Sequence[int]], str],
        seed: int,
        share: Callable[[Callable[[Sequence[Any]], list[Any]], Sequence[Any]], list[Any]]
        | None = None,
        group: Group | None = None,
        inner: Inner | None = None,
        memory: Mapping[str, Remembers] | None = None,
    ) -> None:
        self.generator = generator
        self.sampling = sampling
        self.rewards = rewards
        self.annotate = annotate
        self.options = options
        self.decode = decode
        self.seed = seed
        self._share = share or (lambda work, items: work(items))
        self.group = group
        self.inner = inner
        self.memory = memory or {}
        self._prompts = Batches(prompts, options.drawn // options.num_generations, seed=seed)
        self.samples = 0
        """Completions drawn so far."""
        self.round = 0
        """Batches of rollouts drawn so far."""
        self.used = 0
        """Batches that were handed out of the current rollouts."""
        self._rollouts: list[Rollout] = []

    def next(self) -> list[Rollout]:
        """The rollouts of the next optimiser step."""
        spent = self.inner is not None and self.inner.exhausted
        if not self._rollouts or self.used == self.options.uses or spent:
            self._rollouts = []
            if self.group is not None:
                waiting = self.group.due(self.options.batch_size)
                if waiting:
                    waiting = [replace(row, samples=self.samples) for row in waiting]
                    return self._score(waiting)
            self._rollouts = self._collect()
            self.round += 1
            self.used = 0
            if self.inner is not None:
                self.inner.renew()
        iteration, step = divmod(self.used, self.options.steps_per_generation)
        order = list(range(len(self._rollouts)))
        if self.options.steps_per_generation > 1:
            random.Random(f"{self.seed}/{self.round}/{iteration}").shuffle(order)
        size = self.options.batch_size
        batch = [self._rollouts[index] for index in order[step * size : (step + 1) * size]]
        self.used += 1
        if self.used == self.options.uses:
            self._rollouts = []
        return batch

    def _collect(self) -> list[Rollout]:
        wanted = self.options.drawn
        kept: list[Rollout] = []
        spare: list[Rollout] = []
        for attempt in range(1 + self.options.max_resampling):
            drawn = self._draw(self._prompts.next(), attempt)
            self.samples += sum(not row.demonstration for row in drawn)
            if not self.options.dynamic_sampling:
                kept = drawn
                break
            for group in _groups(drawn, self.options.num_generations):
                (kept if group[0].group_std > 0 else spare).extend(group)
            if len(kept) >= wanted:
                break
        rollouts = (kept + spare)[:wanted]
        if self.rewards is not None and all(math.isnan(row.reward) for row in rollouts):
            raise TrainingError(
                f"every reward of a batch of {len(rollouts)} completions is None (functions: "
                f"{', '.join(self.rewards.functions)}): there is nothing to learn from. A function "
                "returns None for a completion it does not judge; see that the data has the column "
                f"it reads. The first prompt: {rollouts[0].origin}."
            )
        rollouts = [replace(row, samples=self.samples) for row in rollouts]
        credited = self.annotate.credit(rollouts, self.options.num_generations)
        if self.group is not None:
            credited = self.group.admit(credited, self.options.num_generations, self._score)
        if self.options.mask_truncated_completions:
            credited = [row if row.completed else masked(row) for row in credited]
        if not any(row.counted for row in credited):
            raise TrainingError(
                f"none of {len(credited)} completions ended within max_completion_length "
                f"{self.sampling.max_completion_length}, so that mask_truncated_completions leaves "
                "no token to learn from. Raise max_completion_length, give stop_strings, or train "
                "the policy to end its completions first."
            )
        return credited

    def _draw(self, prompts: Sequence[Prompt], attempt: int) -> list[Rollout]:
        count = self.options.num_generations
        own = count - (0 if self.group is None else self.group.members)
        step = self.round * self.options.uses
        names = [
            (prompt, f"{self.seed}/{self.round}/{attempt}/{index}")
            for index, prompt in enumerate(prompts)
        ]

        def work(part: Sequence[tuple[Prompt, str]]) -> list[list[Rollout]]:
            if not part:
                return []
            repeated = [prompt for prompt, _ in part for _ in range(own)]
            seeds = [seed_of(f"{name}/{n}") for _, name in part for n in range(own)]
            hints = [
                self.group.hint(prompt.origin, name, step) if self.group is not None else ()
                for prompt, name in part
                for _ in range(own)
            ]
            rollouts = sample(
                repeated, seeds, self.generator, self.sampling, self.rewards, self.decode, hints
            )
            if own < count:
                rollouts = self._joined_by_data([prompt for prompt, _ in part], rollouts, own)
            rollouts = self.annotate.score(_with_spread(rollouts, count))
            return list(_groups(rollouts, count))

        return [row for group in self._share(work, names) for row in group]

    def _joined_by_data(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], own: int
    ) -> list[Rollout]:
        """Every group of the policy's own completions, and then the data's."""
        assert self.group is not None
        given = [
            Rollout(self.group.completion(prompt.origin), prompt.origin, True, demonstration=True)
            for prompt in prompts
            for _ in range(self.group.members)
        ]
        if self.rewards is not None:
            repeated = [prompt for prompt in prompts for _ in range(self.group.members)]
            ids = [row.tokens.input_ids[row.tokens.counted].tolist() for row in given]
            given = _rewarded(given, repeated, ids, self.rewards, self.decode)
        joined: list[Rollout] = []
        for index in range(len(prompts)):
            joined += rollouts[index * own : (index + 1) * own]
            joined += given[index * self.group.members : (index + 1) * self.group.members]
        return joined

    def _score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        return self._share(lambda part: self.annotate.score(part) if part else [], rollouts)

    def state_dict(self) -> dict[str, Any]:
        memory = {name: part.state_dict() for name, part in self.memory.items()}
        return {
            "prompts": self._prompts.state_dict(),
            "samples": self.samples,
            "round": self.round,
            "used": self.used,
            "rollouts": [_pack(row) for row in self._rollouts],
            "annotate": self.annotate.state_dict(),
            **({"memory": memory} if memory else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._prompts.load_state_dict(state["prompts"])
        self.samples, self.round = int(state["samples"]), int(state["round"])
        self.used = int(state["used"])
        self._rollouts = [_unpack(row) for row in state["rollouts"]]
        self.annotate.load_state_dict(state["annotate"])
        for name, part in self.memory.items():
            part.load_state_dict(state["memory"][name])


class PartlyOnPolicy:
    """Batches that the policy wrote, and in between batches of demonstrations (GKD).

    Parameters
    ----------
    rollouts : Source
        The policy's own completions.
    demonstrations : sequence of Demonstration
        What the data has in their place. Needed unless ``share`` is 1.
    annotate : Annotate
    batch_size : int
    share : float
        Probability that a batch is the policy's own, in [0, 1].
    seed : int

    Raises
    ------
    ValueError
        If there are no demonstrations.
    """

    def __init__(
        self,
        rollouts: Source,
        demonstrations: Sequence[Demonstration],
        annotate: Annotate,
        batch_size: int,
        *,
        share: float,
        seed: int,
    ) -> None:
        self.rollouts = rollouts
        self.annotate = annotate
        self.share = share
        self.seed = seed
        self._demonstrations = Batches(demonstrations, batch_size, seed=seed)
        self.drawn = 0
        """Batches so far."""

    def next(self) -> Sequence[Rollout]:
        own = random.Random(f"{self.seed}/own/{self.drawn}").random() < self.share
        self.drawn += 1
        if own:
            return self.rollouts.next()
        rows = self._demonstrations.next()
        return self.annotate.score([Rollout(row.tokens, row.origin, True) for row in rows])

    def state_dict(self) -> dict[str, Any]:
        return {
            "rollouts": self.rollouts.state_dict(),
            "demonstrations": self._demonstrations.state_dict(),
            "drawn": self.drawn,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rollouts.load_state_dict(state["rollouts"])
        self._demonstrations.load_state_dict(state["demonstrations"])
        self.drawn = int(state["drawn"])


def sample(
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    generator: Generator,
    sampling: Sampling,
    rewards: Rewards | None,
    decode: Callable[[Sequence[int]], str],
    hints: Sequence[Sequence[int]] = (),
) -> list[Rollout]:
    """One rewarded completion of every prompt.

    Conversational prompts are answered by a message of the assistant. Where there are ``hints``, a
    completion begins with its prompt's: it is rewarded together with it, and all of it counts.
    """
    given = [prompt.input_ids for prompt in prompts]
    starts = [np.asarray(hint, dtype=np.int32) for hint in hints or [()] * len(prompts)]
    whole = [
        np.concatenate([ids, start]) if len(start) else ids
        for ids, start in zip(given, starts, strict=True)
    ]
    completions = generator(whole, seeds, sampling)
    found = [
        Rollout(_joined(ids, start, row), prompt.origin, row.completed, hint=len(start))
        for ids, start, prompt, row in zip(given, starts, prompts, completions, strict=True)
    ]
    if rewards is None:
        return found
    written = [
        [*start.tolist(), *row.ids.tolist()] for start, row in zip(starts, completions, strict=True)
    ]
    return _rewarded(found, prompts, written, rewards, decode)


def _rewarded(
    rollouts: Sequence[Rollout],
    prompts: Sequence[Prompt],
    ids: list[list[int]],
    rewards: Rewards,
    decode: Callable[[Sequence[int]], str],
) -> list[Rollout]:
    texts: list[Any] = [decode(row) for row in ids]
    texts = [
        text if isinstance(prompt.content, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    table = rewards([prompt.content for prompt in prompts], texts, ids, columns)
    return [
        replace(
            row,
            reward=float(table.total[index]),
            rewards={name: float(values[index]) for name, values in table.by_function.items()},
        )
        for index, row in enumerate(rollouts)
    ]


def seed_of(name: str) -> int:
    """A seed of 63 bits from a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def _joined(prompt: Any, hint: Any, completion: Completion) -> Encoded:
    ids = np.concatenate([prompt, hint, completion.ids])
    return Encoded(ids, np.arange(len(ids)) >= len(prompt))


def _groups(rollouts: Sequence[Rollout], size: int) -> list[list[Rollout]]:
    return [list(rollouts[start : start + size]) for start in range(0, len(rollouts), size)]


def _with_spread(rollouts: Sequence[Rollout], size: int) -> list[Rollout]:
    found = []
    for group in _groups(rollouts, size):
        rewards = np.array([row.reward for row in group])
        rewards = rewards[np.isfinite(rewards)]
        spread = math.nan  # Of fewer than two there is none.
        if len(rewards) > 1:
            # Rounding must not make equal rewards differ.
            spread = float(rewards.std(ddof=1)) if np.ptp(rewards) > 0 else 0.0
        found += [replace(row, group_std=spread) for row in group]
    return found


def masked(row: Rollout) -> Rollout:
    """The row, with nothing in it that counts."""
    tokens = Encoded(row.tokens.input_ids, np.zeros_like(row.tokens.counted))
    return replace(row, tokens=tokens, hint=0, signals={k: v[:0] for k, v in row.signals.items()})


def _pack(row: Rollout) -> dict[str, Any]:
    plain = {name: getattr(row, name) for name in _PLAIN}

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value  # JSON has no nan

    plain["reward"], plain["group_std"] = number(row.reward), number(row.group_std)
    plain["rewards"] = {name: number(value) for name, value in row.rewards.items()}
    # Copies, since safetensors takes no two tensors that share memory.
    tensors = {f"signal/{name}": value.clone() for name, value in row.signals.items()}
    return {
        **plain,
        **tensors,
        "input_ids": torch.from_numpy(row.tokens.input_ids),
        "counted": torch.from_numpy(row.tokens.counted),
    }


def _unpack(state: Mapping[str, Any]) -> Rollout:
    def number(value: float | None) -> float:
        return math.nan if value is None else float(value)

    return Rollout(
        tokens=Encoded(state["input_ids"].numpy(), state["counted"].numpy()),
        origin=state["origin"],
        completed=bool(state["completed"]),
        reward=number(state["reward"]),
        rewards={name: number(value) for name, value in state["rewards"].items()},
        group_std=number(state["group_std"]),
        samples=int(state["samples"]),
        # Rollouts from before these existed have neither.
        demonstration=bool(state.get("demonstration", False)),
        hint=int(state.get("hint", 0)),
        signals={
            name.removeprefix("signal/"): value
            for name, value in state.items()
            if name.startswith("signal/")
        },
    )
