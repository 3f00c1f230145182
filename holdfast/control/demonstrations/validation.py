"""Whether demonstrations can be learnt from, in the environment they are meant for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from holdfast.control.demonstrations.episodes import Demonstrations, Episode
from holdfast.control.demonstrations.faults import fault
from holdfast.control.environments import VectorEnvironment

_ROUNDING = 1e-5  # relative to the bounds: what a detour over another precision may add


def validate(
    demonstrations: Demonstrations,
    environments: VectorEnvironment | None = None,
    *,
    clip: bool = False,
    allow_cut: bool = False,
) -> Demonstrations:
    """Check demonstrations, against an environment if one is given.

    Parameters
    ----------
    demonstrations : Demonstrations
        As they were read.
    environments : VectorEnvironment, optional
        Whose observations and actions they must have.
    clip : bool
        Clip actions that are out of bounds instead of refusing them.
    allow_cut : bool
        Accept episodes that neither terminated nor were truncated.

    Returns
    -------
    Demonstrations
        The same, with clipped actions if that was asked for.

    Raises
    ------
    DataError
        Names file, episode, step and field of the first fault: no episodes, a shape that is not the
        environment's, a value that is not finite, an action out of bounds, an episode cut short.
    """
    source = demonstrations.source
    if not demonstrations.episodes:
        raise fault(source, "there are no episodes")
    sizes = {
        "observations": (environments or demonstrations).observation_size,
        "actions": (environments or demonstrations).action_size,
    }
    whose = "episode 0" if environments is None else environments.name
    for number, episode in enumerate(demonstrations):
        for field, size in sizes.items():
            found = getattr(episode, field).shape[1]
            if found != size:
                raise fault(
                    source,
                    f"they have {found} entries, those of {whose} have {size}",
                    episode=number,
                    field=field,
                )
        for field in ("observations", "actions", "rewards"):
            values = getattr(episode, field)
            if values is not None:  # A file need not have rewards.
                _finite(source, number, field, values)
        if not (episode.terminated or episode.truncated or allow_cut):
            raise fault(
                source,
                "the episode neither terminated nor was truncated: the recording was cut short. "
                "Leave it out, or set allow_cut to true if only its actions matter",
                episode=number,
                step=len(episode) - 1,
            )
    if environments is None:
        return demonstrations
    return replace(
        demonstrations,
        episodes=tuple(
            _bounded(source, number, episode, environments, clip)
            for number, episode in enumerate(demonstrations)
        ),
    )


def _finite(source: str, number: int, field: str, values: np.ndarray) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        where = tuple(np.argwhere(bad)[0].tolist())
        entry = f"entry {where[1]} " if len(where) > 1 else ""
        raise fault(
            source,
            f"{entry}is {values[where]}, not a finite number",
            episode=number,
            step=where[0],
            field=field,
        )


def _bounded(
    source: str, number: int, episode: Episode, environments: VectorEnvironment, clip: bool
) -> Episode:
    low, high = environments.action_low, environments.action_high
    clipped = np.clip(episode.actions, low, high)
    beyond = np.abs(clipped - episode.actions) > _ROUNDING * (1 + np.abs(episode.actions))
    if beyond.any() and not clip:
        step, entry = np.argwhere(beyond)[0].tolist()
        raise fault(
            source,
            f"entry {entry} is {episode.actions[step, entry]:.6g}, beyond "
            f"[{low[entry]:.6g}, {high[entry]:.6g}] of {environments.name}. "
            f"{beyond.any(axis=1).mean():.1%} of this episode's actions are out of bounds; "
            "training clips them, as most environments do; make sure that this is what was meant",
            episode=number,
            step=step,
            field="actions",
        )
    return replace(episode, actions=clipped)
