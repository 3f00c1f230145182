"""Pictures of what a policy does: frames of episodes, strips, contact sheets and GIFs.

Where a simulator cannot draw, for want of a graphics driver or of a renderer, the path of the
observations is drawn instead.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from holdfast.control.demonstrations import Demonstrations, Episode
from holdfast.control.environments import (
    Act,
    EnvironmentOptions,
    SimulatorError,
    VectorEnvironment,
    episode_seeds,
    make_environments,
)
from holdfast.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Picture = NDArray[np.uint8]
_WIDTH = 160  # pixels of a frame in what is written
_GAP = 4  # pixels between frames


@dataclass(frozen=True)
class Film:
    """An episode in pictures.

    Attributes
    ----------
    frames : list of ndarray
        ``(height, width, 3)`` each, at least one.
    caption : str
        What can be said of it in a line.
    drawn : str
        Why the path of the observations stands in for frames; empty where it does not.
    """

    frames: list[Picture]
    caption: str
    drawn: str = ""


def film(
    act: Act,
    name: str,
    episodes: int = 1,
    *,
    seed: int = 0,
    options: EnvironmentOptions | None = None,
    every: int = 4,
    most: int = 64,
) -> list[Film]:
    """Let a policy act, and take a picture every few steps.

    Parameters
    ----------
    act : callable
        Observations to chunks of actions.
    name, options
        As in :func:`~holdfast.control.environments.make_environments`.
    episodes, seed : int
        The first episodes that :func:`~holdfast.control.environments.evaluate` runs with this seed.
    every : int
        Steps between pictures.
    most : int
        Pictures of an episode, at least 2: in a longer one there are twice as many steps between
        them, or four times, and so on.
    """
    options = options or EnvironmentOptions()
    try:
        environments = make_environments(name, 1, options=replace(options, render=True))
    except SimulatorError:  # Not to be had with a renderer; without one its path is drawn.
        environments = make_environments(name, 1, options=options)
    try:
        return [
            _film(act, environments, episode_seed, every, most)
            for episode_seed in episode_seeds(seed, episodes, stream="evaluation")
        ]
    finally:
        environments.close()


def replay(demonstrations: Demonstrations, episode: int, *, pictures: int = 8) -> Film:
    """A recorded episode in about so many pictures.

    It is run again from its seed and actions; where that is not possible, its path is drawn.
    """
    recorded = demonstrations.episodes[episode]
    caption = _caption(f"episode {episode}", recorded)
    why = _obstacle(demonstrations, recorded)
    if not why:
        details = demonstrations.details
        options = EnvironmentOptions(
            time_limit=details.get("time_limit"),
            sparse=bool(details.get("sparse", False)),
            keywords=details.get("keywords") or {},
            render=True,
        )
        environments = None
        try:
            environments = make_environments(demonstrations.environment or "", 1, options=options)
            every = max(len(recorded) // (pictures - 1), 1) if pictures > 1 else len(recorded)
            frames, why = _frames_of(environments, recorded, every)
        except SimulatorError as error:
            frames, why = [], str(error)
        finally:
            if environments is not None:
                environments.close()
        if not why:
            return Film(frames, caption)
    return Film([draw_path(recorded.observations)], caption, why)


def strip(frames: Sequence[Picture], columns: int = 8) -> Image:
    """Frames side by side, evenly chosen, the first and the last among them."""
    from PIL import Image

    chosen = np.unique(np.linspace(0, len(frames) - 1, min(columns, len(frames))).round())
    pictures = [_scaled(frames[int(number)]) for number in chosen]
    width = sum(picture.width + _GAP for picture in pictures) - _GAP
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + _GAP
    return sheet


def contact_sheet(films: Sequence[Film], columns: int = 8) -> Image:
    """A strip for every film, with its caption above it."""
    from PIL import Image, ImageDraw

    line = 16
    strips = [strip(shown.frames, columns) for shown in films]
    captions = [shown.caption + (" (drawn)" if shown.drawn else "") for shown in films]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = max(max(row.width for row in strips), *(round(pen.textlength(c)) for c in captions))
    height = sum(row.height + line + _GAP for row in strips)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    top = 0
    for row, caption in zip(strips, captions, strict=True):
        pen.text((0, top + 2), caption, fill="black")
        sheet.paste(row, (0, top + line))
        top += row.height + line + _GAP
    return sheet


def save_picture(picture: Image, path: Path) -> None:
    """Write a picture in the form that the name ends in.

    Raises
    ------
    DataError
        If there is no such form, or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: the picture cannot be written: {error}") from error


def save_gif(frames: Sequence[Picture], path: Path, *, seconds: float = 0.1) -> None:
    """Write an animation that repeats; ``seconds`` a frame."""
    first, *others = [_scaled(frame) for frame in frames]
    first.save(
        path,
        format="GIF",
        save_all=True,
        append_images=others,
        duration=round(1000 * seconds),
        loop=0,
    )


def save_films(films: Sequence[Film], folder: Path) -> None:
    """Write animations, single pictures as PNG, and ``rollouts.json``, which lists them.

    Raises
    ------
    DataError
        If the folder cannot be written.
    """
    listed = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, shown in enumerate(films):
            file = f"{number}.{'gif' if len(shown.frames) > 1 else 'png'}"
            if len(shown.frames) > 1:
                save_gif(shown.frames, folder / file)
            else:
                _scaled(shown.frames[0]).save(folder / file)
            listed.append({"file": file, "caption": shown.caption, "drawn": shown.drawn})
        (folder / "rollouts.json").write_text(json.dumps(listed, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise DataError(f"{folder}: the rollouts cannot be written: {error}") from error


def draw_path(observations: NDArray[np.floating], size: int = 160) -> Picture:
    """The two entries that vary most over ``observations`` ``(time, entries)``, as a path.

    From the green to the red dot. With one entry, over time.
    """
    from PIL import Image, ImageDraw

    observations = np.asarray(observations, dtype=np.float64)
    spread = observations.std(axis=0)
    axes = np.sort(np.argsort(-spread, kind="stable")[:2])
    points = observations[:, axes]
    if points.shape[1] == 1:
        points = np.concatenate([np.arange(len(points))[:, None], points], axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    scale = np.where(high > low, high - low, 1.0)
    margin = size // 10
    pixels = margin + (points - low) / scale * (size - 2 * margin)
    pixels[:, 1] = size - pixels[:, 1]
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    if len(pixels) > 1:
        pen.line([tuple(point) for point in pixels.tolist()], fill="#4e79a7", width=2)
    for (x, y), colour in ((pixels[0], "#59a14f"), (pixels[-1], "#e15759")):
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
    return np.asarray(image)


def _film(act: Act, environments: VectorEnvironment, seed: int, every: int, most: int) -> Film:
    observations = environments.reset([seed])
    frames: list[Picture] = []
    seen, total, taken, success, why = [observations[0, -1]], 0.0, 0, False, ""
    while environments.running.any():
        for action in act(observations)[0]:
            if taken % every == 0 and not why:
                if len(frames) >= most:
                    frames, every = frames[::2], 2 * every
                if taken % every == 0:
                    why = _take(environments, frames)
            step = environments.step(action[None, None])
            taken += 1
            seen.append(step.final_observations[0, -1])
            total, success = float(step.episode_returns[0]), bool(step.success[0])
            observations = step.observations
            if step.ended[0]:
                break
    # The simulator stands still once its only episode has ended, so this is the end of it.
    why = why or _take(environments, frames)
    outcome = ("success, " if success else "no success, ") if environments.reports_success else ""
    caption = f"seed {seed}: {outcome}return {total:.4g}, {taken} steps"
    return Film([draw_path(np.stack(seen))] if why else frames, caption, why)


def _frames_of(
    environments: VectorEnvironment, episode: Episode, every: int
) -> tuple[list[Picture], str]:
    assert episode.seed is not None
    frames: list[Picture] = []
    environments.reset([episode.seed])
    for number, action in enumerate(episode.actions):
        if number % every == 0 and (why := _take(environments, frames)):
            return frames, why
        step = environments.step(action[None, None])
        if step.ended[0]:
            break
    return frames, _take(environments, frames)


def _take(environments: VectorEnvironment, frames: list[Picture]) -> str:
    """Take a picture; returns why there is none."""
    try:
        frames.append(environments.render()[0])
    except Exception as error:  # Whatever a missing driver makes a renderer raise: many kinds.
        return f"{type(error).__name__}: {error}"
    return ""


def _obstacle(demonstrations: Demonstrations, episode: Episode) -> str:
    """Why an episode cannot be run again."""
    if demonstrations.environment is None:
        return "the environment is not known"
    if episode.seed is None:
        return "the seed of the episode is not known"
    if demonstrations.details.get("actions") == "intended":
        return "the executed actions were not kept"
    return ""


def _caption(name: str, episode: Episode) -> str:
    outcome = {True: "success, ", False: "no success, ", None: ""}[episode.success]
    total = episode.total_reward
    earned = "" if total is None else f"return {total:.4g}, "
    return f"{name}: {outcome}{earned}{len(episode)} steps"


def _scaled(frame: Picture) -> Image:
    from PIL import Image

    picture = Image.fromarray(frame)
    if picture.width <= _WIDTH:
        return picture
    return picture.resize((_WIDTH, max(round(picture.height * _WIDTH / picture.width), 1)))
