"""Demonstrations as transitions of chunks, for objectives that learn from logged rewards."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from holdfast.control.demonstrations import Chunks, Demonstrations
from holdfast.errors import DataError


def transitions(demonstrations: Demonstrations, *, history: int, horizon: int) -> dict[str, Tensor]:
    """A transition from every step: the chunk that begins there, and where it led.

    Parameters
    ----------
    demonstrations : Demonstrations
        At least one episode.
    history, horizon : int
        Observations a policy sees, and actions in a chunk; both at least 1.

    Returns
    -------
    dict of str to Tensor
        ``(rows, ...)`` each: ``observations`` and ``final_observations`` ``(history, size)``,
        ``actions`` ``(horizon, action_size)``, ``mask`` ``(horizon,)``, ``rewards`` ``()``, summed
        over the actions that count, and ``terminated`` ``()``. Where an episode was cut and its
        last observation was not kept, the chunks that would lead there are left out.

    Raises
    ------
    DataError
        If that leaves out all, or an episode has no rewards.
    """
    chunks = Chunks(demonstrations, history=history, horizon=horizon)
    after, rewards, terminated, known = [], [], [], []
    for number, episode in enumerate(demonstrations):
        if episode.rewards is None:
            raise DataError(
                f"{demonstrations.source}, episode {number} has no rewards, and there is nothing "
                "else for critics to learn from. Name demonstrations that have them."
            )
        steps = len(episode)
        ends = np.minimum(np.arange(steps) + horizon, steps)
        seen = np.concatenate(
            [np.repeat(episode.observations[:1], history - 1, axis=0), episode.observations]
        )
        has_last = len(episode.observations) > steps
        last = ends if has_last else np.minimum(ends, steps - 1)
        after.append(seen[last[:, None] + np.arange(history)])
        summed = np.concatenate([[0.0], np.cumsum(episode.rewards, dtype=np.float64)])
        rewards.append(summed[ends] - summed[:-1])
        at_end = ends == steps
        terminated.append(at_end & episode.terminated)
        # What follows the end of an episode is never looked at.
        known.append(~at_end | has_last | episode.terminated)
    kept = torch.from_numpy(np.flatnonzero(np.concatenate(known)))
    if not len(kept):
        raise DataError(
            f"{demonstrations.source}: no step leads to an observation that was kept, so there is "
            "no transition to learn from. Keep the last observation of episodes that were cut."
        )
    rows = chunks.gather(kept)._asdict()
    rows["final_observations"] = torch.from_numpy(np.concatenate(after))[kept]
    rows["rewards"] = torch.from_numpy(np.concatenate(rewards)).float()[kept]
    rows["terminated"] = torch.from_numpy(np.concatenate(terminated))[kept]
    return rows
