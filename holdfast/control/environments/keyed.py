"""Random numbers as a function of integer keys.

What an episode draws depends on its own seed and step alone. So neither the number of environments
that run side by side nor the order in which they end changes any of them, and there is no state to
save.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Stream = Literal["training", "evaluation", "recording"]
_STREAMS: dict[Stream, int] = {"training": 0, "evaluation": 1, "recording": 2}

# SplitMix64 (Steele, Lea and Flood 2014, figure 15).
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def keyed_uniform(keys: ArrayLike, size: int) -> NDArray[np.float64]:
    """Uniform numbers strictly between 0 and 1.

    Parameters
    ----------
    keys : array
        ``(rows, parts)``, integer. Equal rows draw equal numbers.
    size : int
        Numbers a row.

    Returns
    -------
    ndarray
        ``(rows, size)``.
    """
    state = np.zeros(len(np.asarray(keys)), dtype=np.uint64)
    for part in np.asarray(keys, dtype=np.int64).astype(np.uint64).T:
        state = _mixed(state + _STEP + part)
    columns = np.arange(1, size + 1, dtype=np.uint64) * _STEP
    bits = _mixed(state[:, None] + columns) >> np.uint64(11)
    return (bits.astype(np.float64) + 0.5) / 2.0**53


def keyed_normal(keys: ArrayLike, size: int) -> NDArray[np.float64]:
    """Standard normal numbers ``(rows, size)`` by Box and Muller's transform; as above."""
    uniform = keyed_uniform(keys, 2 * size)
    return np.sqrt(-2.0 * np.log(uniform[:, :size])) * np.cos(2.0 * np.pi * uniform[:, size:])


def episode_seeds(seed: int, count: int, *, stream: Stream) -> list[int]:
    """``count`` seeds of episodes, from 0 to 2³¹ - 1; different streams draw different ones."""
    keys = [(seed, _STREAMS[stream], 0, number) for number in range(count)]
    return [int(value) for value in keyed_uniform(keys, 1)[:, 0] * 2**31] if keys else []


def training_seed(seed: int, slot: int, number: int) -> int:
    """The seed of episode ``number`` in environment ``slot`` of an endless training run."""
    return int(keyed_uniform([(seed, _STREAMS["training"], slot, number)], 1)[0, 0] * 2**31)


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))
