"""Recording demonstrations of a policy: a scripted expert, a trained one, or a user's own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from holdfast.control.demonstrations.episodes import Demonstrations, Episode, Floats
from holdfast.control.environments import Act, VectorEnvironment, episode_seeds, keyed_normal
from holdfast.control.environments.interface import Bools
from holdfast.errors import DataError

_NOISE = 1  # sets the keys of action noise apart from those of a policy's own


def record(
    act: Act,
    environments: VectorEnvironment,
    episodes: int,
    *,
    seed: int = 0,
    noise: float = 0.0,
    intended: bool = False,
    keep_failures: bool = False,
    attempts: int | None = None,
    begin: Callable[[Bools], None] | None = None,
) -> Demonstrations:
    """Record episodes.

    What is recorded does not depend on the number of environments, under the condition of
    :func:`~holdfast.control.environments.evaluate`. Chunks of actions are executed one action at a
    time, so that every observation is recorded.

    Parameters
    ----------
    act : callable
        Observations to chunks of actions. Actions are clipped before they are executed and stored.
    environments : VectorEnvironment
        Reset by this.
    episodes : int
        How many to keep, at least 1.
    seed : int
        That the seeds of the episodes are drawn from. They are stored.
    noise : float
        Standard deviation of Gaussian noise on the executed actions, in units of actions.
    intended : bool
        Store the action that was meant in place of the noisy one that was executed: better labels
        for cloning, but no longer what led from one observation to the next.
    keep_failures : bool
        Keep episodes without success as well.
    attempts : int, optional
        Episodes to try at most; by default ten times ``episodes``.
    begin : callable, optional
        As in :func:`~holdfast.control.environments.evaluate`.

    Raises
    ------
    DataError
        If the attempts do not bring enough successes, the task does not say what success is, or
        ``act`` answers in a wrong shape.
    ValueError
        If ``episodes`` or ``attempts`` is below 1, or ``noise`` is negative or not finite.
    """
    attempts = 10 * episodes if attempts is None else attempts
    if episodes < 1 or attempts < 1:
        raise ValueError(f"episodes is {episodes}, attempts {attempts}: both must be at least 1")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise is {noise}: it must be finite and not negative")
    seeds = episode_seeds(seed, attempts, stream="recording")
    kept: list[Episode] = []
    tried, clipped, steps = 0, 0, 0
    while len(kept) < episodes and tried < attempts:
        wave = seeds[tried : tried + episodes - len(kept)]
        tried += len(wave)
        for take in _takes(act, environments, wave, noise, intended, begin):
            clipped += take.clipped
            steps += len(take.actions)
            if not environments.reports_success and not keep_failures:
                raise DataError(
                    f"{environments.name} does not say what success is, so failures cannot be "
                    "left out: ask to keep them"
                )
            if keep_failures or take.success:
                kept.append(take.episode(environments.reports_success))
    if len(kept) < episodes:
        raise DataError(
            f"{environments.name}: {len(kept)} of {tried} attempts succeeded, {episodes} were "
            "asked for; allow more attempts, use less noise, or keep failures"
        )
    options = environments.options
    details = {
        "seed": seed,
        "noise": noise,
        "actions": "intended" if intended else "executed",
        "attempts": tried,
        "clipped": clipped / steps,
        "time_limit": options.time_limit,
        "sparse": options.sparse,
        "keywords": dict(options.keywords),
    }
    return Demonstrations(tuple(kept), "recording", environments.name, details)


@dataclass
class _Take:
    """An episode that is being recorded."""

    seed: int
    observations: list[Floats]
    actions: list[Floats] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    pending: deque[Floats] = field(default_factory=deque)
    clipped: int = 0
    terminated: bool = False
    truncated: bool = False
    success: bool = False

    def episode(self, reports_success: bool) -> Episode:
        return Episode(
            observations=np.stack(self.observations),
            actions=np.stack(self.actions),
            rewards=np.array(self.rewards, dtype=np.float32),
            terminated=self.terminated,
            truncated=self.truncated,
            success=self.success if reports_success else None,
            seed=self.seed,
        )


def _takes(
    act: Act,
    environments: VectorEnvironment,
    seeds: Sequence[int],
    noise: float,
    intended: bool,
    begin: Callable[[Bools], None] | None,
) -> list[_Take]:
    """One take of every seed, in the order of the seeds."""
    low, high, size = environments.action_low, environments.action_high, environments.action_size
    observations = environments.reset(seeds)
    takes: dict[int, _Take] = {}
    begun = environments.running
    while (running := environments.running).any():
        if begin is not None and begun.any():
            begin(begun)
        slots, numbers = np.flatnonzero(running), environments.episodes
        for slot in np.flatnonzero(begun):
            number = int(numbers[slot])
            takes[number] = _Take(seeds[number], [observations[slot, -1]])
        current = {slot: takes[int(numbers[slot])] for slot in slots}
        if any(not take.pending for take in current.values()):
            chunks = _answer(act, environments, observations)
            for slot, take in current.items():
                if not take.pending:
                    take.pending.extend(chunks[slot])
        meant = np.zeros((environments.count, size), dtype=np.float32)
        for slot, take in current.items():
            meant[slot] = take.pending.popleft()
        bounded = np.clip(meant, low, high)
        drawn = _noise(environments) if noise else np.zeros(())
        executed = np.clip(bounded + np.float32(noise) * drawn, low, high).astype(np.float32)
        step = environments.step(executed[:, None])
        for slot, take in current.items():
            take.clipped += bool((bounded[slot] != meant[slot]).any())
            take.actions.append(bounded[slot] if intended else executed[slot])
            take.rewards.append(float(step.rewards[slot]))
            take.observations.append(step.final_observations[slot, -1])
            take.terminated = bool(step.terminated[slot])
            take.truncated = bool(step.truncated[slot])
            take.success = bool(step.success[slot])
        observations, begun = step.observations, step.ended & environments.running
    return [takes[number] for number in range(len(seeds))]


def _answer(act: Act, environments: VectorEnvironment, observations: Floats) -> Floats:
    """Chunks of actions. One of another shape would be taken for other actions, unnoticed."""
    answer = act(observations)
    try:
        chunks = np.asarray(answer, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"{environments.name}: the controller's actions: {error}") from error
    wanted = (environments.count, "horizon", environments.action_size)
    if chunks.ndim != 3 or chunks.shape[::2] != wanted[::2] or not chunks.shape[1]:
        raise DataError(
            f"{environments.name}: the controller's actions have shape {chunks.shape}; they must "
            f"be ({wanted[0]}, horizon, {wanted[2]}): for each environment a chunk of actions, "
            "which may be a single one (horizon 1)"
        )
    return chunks


def _noise(environments: VectorEnvironment) -> Floats:
    """``(count, action_size)``: a function of seed and step of each episode."""
    lengths = environments.episode_lengths
    keys = np.stack([environments.seeds, lengths, np.full_like(lengths, _NOISE)], axis=1)
    return keyed_normal(keys, environments.action_size).astype(np.float32)
