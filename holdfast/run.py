"""Runs: train a recipe into a directory, resume it, find optima."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import math
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console

from holdfast.assemble import (
    Assembly,
    accelerator_for,
    alone,
    assemble,
    build_trainer,
    cache_folder,
)
from holdfast.errors import HoldfastError, RecipeError, RunError
from holdfast.joint.record import Recorder, machine, peak_memory_bytes, versions, write_json
from holdfast.language.model import LanguagePolicy
from holdfast.recipe import load_recipe
from holdfast.schema import ControlSpec, Recipe, SoftQSpec

TRACKERS = "holdfast"
"""What trackers call the project; those that write files name a folder of the run after it."""
STABILITY = "stability.json"
"""What a measurement of stability writes into a run directory, beside ``stability.html``."""


def run_folder(recipe: Recipe) -> Path:
    """Where a recipe's run lives."""
    return Path(recipe.output or Path("runs") / recipe.name)


def train(recipe: Recipe, *, overwrite: bool = False, console: Console | None = None) -> Path:
    """Train a recipe from its start.

    Parameters
    ----------
    recipe : Recipe
        Validated.
    overwrite : bool
        Replace a run that is already there.
    console : Console, optional
        Where a person is told what happens.

    Returns
    -------
    Path
        The run directory.

    Raises
    ------
    RunError
        If the directory already holds a run.
    HoldfastError
        For anything else that a user can mend.
    """
    folder = run_folder(recipe)
    accelerator = accelerator_for(recipe, folder)
    if accelerator.is_main_process:
        _make(folder)
    accelerator.wait_for_everyone()
    with _alone_in(folder, accelerator):
        if accelerator.is_main_process:
            _claim(folder, recipe, overwrite)
        accelerator.wait_for_everyone()
        return _execute(recipe, folder, accelerator, console=console)


def resume(folder: Path, *, console: Console | None = None) -> Path:
    """Continue a run from its newest whole checkpoint, bit for bit as if it had never stopped.

    Raises
    ------
    RunError
        If there is no run in ``folder``, or another process is training in it.
    """
    recipe = recipe_of(folder)
    described = json.loads((folder / "run.json").read_text("utf-8"))
    if described.get("status") == "finished":
        if console is not None:
            console.print(f"{folder} is finished already: nothing to resume", soft_wrap=True)
        return folder
    threads = described.get("machine", {}).get("threads")
    if threads:
        # How a sum is split over threads decides its last bits.
        torch.set_num_threads(threads)
    accelerator = accelerator_for(recipe, folder)
    with _alone_in(folder, accelerator):
        return _execute(
            recipe,
            folder,
            accelerator,
            resume=True,
            # Those that the run started with, whatever the cache has by now.
            optima=described.get("optima"),
            console=console,
        )


def find_optima(recipe: Recipe, *, console: Console | None = None) -> dict[str, float]:
    """The optimum of every objective whose ``optimum`` is ``auto`` or missing.

    Each is trained alone, from the same start and for the same budget; the optimum is its lowest
    mean loss on held-out rows. Values are cached under a digest of what they depend on, which does
    not include the schedule: another weight never repeats them.
    """
    _quieten_libraries()
    wanted = [name for name, spec in recipe.objectives.items() if spec.optimum in ("auto", None)]
    for name in wanted:
        spec = recipe.objectives[name]
        if not spec.has_held_out:
            raise RecipeError(
                f"objectives.{name}.{spec.held_out_entry} is 0, but an optimum is found on "
                "held-out rows"
            )
    accelerator = accelerator_for(recipe, cache_folder())
    assembly = assemble(recipe, accelerator, say=_say(console, accelerator))
    return {name: _optimum(recipe, name, assembly.keys[name], console) for name in wanted}


def measure_stability(
    recipe: Recipe,
    *,
    rows: int | None = None,
    draws: int | None = None,
    sizes: int | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> Path:
    """Measure what one observation does to the estimate of a recipe on logged decisions.

    Parameters
    ----------
    recipe : Recipe
        Its policy is a soft Q-function.
    rows, draws, sizes, seed
        As of :func:`holdfast.bellman.sensitivity.measure_sensitivity`; ``sizes`` is by default 4
        for tables and 0 for networks, whose runs take long.
    console : Console, optional
        Where a person is told what happens.

    Returns
    -------
    Path
        The run directory, which need not hold a run. The result is its ``stability.json``.

    Raises
    ------
    RecipeError
        If the recipe is not on logged decisions.
    HoldfastError
        For anything else that a user can mend, such as a setting that leaves the saddle.
    """
    if not isinstance(recipe.policy, SoftQSpec):
        raise RecipeError(
            f"policy.kind is {recipe.policy.kind}: stability is measured for soft_q, on logged "
            "decisions"
        )
    _quieten_libraries()
    try:
        from holdfast.assemble_bellman import stability_record
    except ImportError as error:
        raise RecipeError(
            f"policy.kind soft_q needs a package that is not installed ({error}): pip install "
            "holdfast[bellman]"
        ) from error
    folder = run_folder(recipe)
    _make(folder)
    say = console.print if console is not None else lambda text: None
    record = stability_record(
        recipe, folder, rows=rows, draws=draws, sizes=sizes, seed=seed, say=say
    )
    write_json(folder / STABILITY, record)
    return folder


def recipe_of(folder: Path) -> Recipe:
    """The resolved recipe of a run.

    Raises
    ------
    RunError
        If ``folder`` is not a run directory.
    """
    path = folder / "recipe.yaml"
    if not path.is_file() or not (folder / "run.json").is_file():
        raise RunError(
            f"{folder} is not a run directory: it has no recipe.yaml and run.json. Name the folder "
            "that 'holdfast train' printed, such as runs/quickstart."
        )
    return load_recipe(str(path))


@contextlib.contextmanager
def _alone_in(folder: Path, accelerator: Accelerator, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder. The kernel lifts the lock, even after a SIGKILL."""
    if not accelerator.is_main_process:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RunError(
                f"another process is training in {folder}: wait for it, or stop it"
            ) from None
        yield
    finally:
        os.close(handle)


def _make(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; the run directory must be a folder. Set 'output'.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create run directory {folder}: {error}") from error


def _claim(folder: Path, recipe: Recipe, overwrite: bool) -> None:
    """Make ``folder`` the directory of this recipe's run."""
    # A recipe alone is a claim that was cut short; run.json completes it.
    # A measurement of stability needs no run.
    ours = {"recipe.yaml", "run.json.partial", STABILITY, "stability.html"}
    if {path.name for path in folder.iterdir()} - ours:
        _refuse_or_clear(folder, recipe, overwrite)
    text = yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    write_json(
        folder / "run.json",
        {
            "name": recipe.name,
            "status": "running",
            "reason": None,
            "command": shlex.join(["holdfast", *sys.argv[1:]]),
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine(),
        },
    )


def _refuse_or_clear(folder: Path, recipe: Recipe, overwrite: bool) -> None:
    if not (folder / "run.json").is_file():
        raise RunError(
            f"{folder} is not empty and holds no run. Choose another 'output', or empty it."
        )
    if overwrite or _failed_before_training(folder):
        _clear(folder)
        return
    old = recipe_of(folder)
    if old.fingerprint() == recipe.fingerprint():
        raise RunError(
            f"{folder} already holds a run of this recipe. Continue it with 'holdfast resume "
            f"{folder}', start again with --overwrite, or choose another 'output'."
        )
    raise RunError(
        f"{folder} already holds a run of another recipe (it differs in "
        f"{', '.join(_differences(old.dump(), recipe.dump()))}). Choose another 'output', or "
        "replace it with --overwrite."
    )


def _failed_before_training(folder: Path) -> bool:
    """Whether a run ended for a reason such as a mistyped path: it is no loss to start again."""
    described = json.loads((folder / "run.json").read_text("utf-8"))
    return described.get("status") == "failed" and not (folder / "metrics.jsonl").exists()


def _clear(folder: Path) -> None:
    """Remove what a run wrote, and only that."""
    kinds = ("checkpoints", "refused", "model", "rollouts", "tokenizer", "tokenizer.partial")
    for name in (*kinds, TRACKERS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("run.json", "recipe.yaml", "metrics.jsonl", "report.html"):
        (folder / name).unlink(missing_ok=True)


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: list[str] = []
        for key in dict.fromkeys([*old, *new]):
            longer = f"{where}.{key}" if where else str(key)
            found += _differences(old.get(key), new.get(key), longer)
        return found
    return [] if old == new or where in ("name", "description", "output") else [where]


def _execute(
    recipe: Recipe,
    folder: Path,
    accelerator: Accelerator,
    *,
    resume: bool = False,
    optima: Mapping[str, float] | None = None,
    console: Console | None,
) -> Path:
    _quieten_libraries()
    main = accelerator.is_main_process
    say = _say(console, accelerator)
    recorder: Recorder | None = None
    try:
        assembly = assemble(recipe, accelerator, tokenizer_folder=folder / "tokenizer", say=say)
        if optima is None:
            optima = _optima(recipe, assembly, console)
        if main:
            trackers = _start_trackers(recipe, accelerator)
            recorder = Recorder(folder, console, trackers)
            recorder.describe(
                status="running",
                reason=None,
                parameters=_parameters(assembly),
                world_size=accelerator.num_processes,
                versions=versions() | {"transformers": transformers.__version__},
                optima=optima,
                fingerprint=assembly.fingerprint,
            )
            _keep_tokenizer(assembly, folder / "tokenizer")
        trainer = build_trainer(
            recipe, assembly, optima, accelerator, folder=folder, recorder=recorder
        )
        if resume:
            step = trainer.resume()
            say(f"resumed at step {step}" if step else "no checkpoint yet: starting over")
        reason = trainer.train()
        if main and recorder is not None:
            assembly.policy.save_pretrained(folder / "model")
            if isinstance(recipe.policy, ControlSpec) and not reason.startswith("interrupted"):
                from holdfast.assemble_control import film_rollouts

                film_rollouts(recipe, assembly.policy, folder / "rollouts")
            recorder.describe(
                # An interrupted run can be resumed; the others are over.
                status="stopped" if reason.startswith("interrupted") else "finished",
                reason=reason,
                peak_memory_bytes=peak_memory_bytes(),
            )
    except BaseException as error:
        if main and (folder / "run.json").is_file():
            known = json.loads((folder / "run.json").read_text("utf-8"))
            status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            reason = str(error) if isinstance(error, HoldfastError) else repr(error)
            with contextlib.suppress(OSError):
                write_json(folder / "run.json", {**known, "status": status, "reason": reason})
        if isinstance(error, OSError):
            raise RunError(
                f"the run in {folder} failed: {error}. Check space and rights there and in the "
                f"cache {cache_folder()}, then run 'holdfast resume {folder}'."
            ) from error
        raise
    finally:
        if recorder is not None:
            recorder.close()
    accelerator.wait_for_everyone()
    if recipe.training.report_to:
        accelerator.end_training()
    return folder


def _optima(recipe: Recipe, assembly: Assembly, console: Console | None) -> dict[str, float]:
    """Numbers as given; those that are ``auto`` found on demand."""
    optima = {}
    for name, spec in recipe.objectives.items():
        if spec.optimum == "auto":
            optima[name] = _optimum(recipe, name, assembly.keys[name], console)
        elif isinstance(spec.optimum, float):
            optima[name] = spec.optimum
    return optima


def _optimum(recipe: Recipe, name: str, key: str, console: Console | None) -> float:
    folder = cache_folder() / "optima" / key
    cached = folder / "optimum.json"
    solo = alone(recipe, name)
    accelerator = accelerator_for(solo, folder)
    main = accelerator.is_main_process
    if main:
        (folder / "run").mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    # Another run of a sweep may be looking for the same optimum: wait for it, and take its value.
    with _alone_in(folder, accelerator, wait=True):
        known: list[Any] = [None, False]  # the value, and whether a search had begun
        if main and cached.is_file():
            known = [json.loads(cached.read_text("utf-8"))["optimum"], True]
        elif main:
            known = [None, (folder / "run" / "run.json").is_file()]
            _say(console, accelerator)(
                f"optimum of {name}: training on it alone (kept for later runs)"
            )
            if not known[1]:
                _claim(folder / "run", solo, overwrite=False)
        broadcast_object_list(known)
        if known[0] is not None:
            return float(known[0])
        run = _execute(solo, folder / "run", accelerator, resume=known[1], console=console)
        described = json.loads((run / "run.json").read_text("utf-8"))
        if described["status"] != "finished":
            raise RunError(
                f"the optimum of {name} is not found yet: {described['reason']}. The same command "
                "goes on where it stopped."
            )
        value = lowest_held_out(run, name)
        if main:
            write_json(cached, {"objective": name, "optimum": value})
        accelerator.wait_for_everyone()
        return value


def lowest_held_out(folder: Path, name: str) -> float:
    """The lowest mean held-out loss that a run reached on an objective.

    Raises
    ------
    RunError
        If it was never evaluated to a finite value.
    """
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    losses = [
        float(line["objectives"][name]["loss"])
        for line in lines
        if line["kind"] == "eval" and name in line["objectives"]
    ]
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        raise RunError(f"{folder}: {name} was never evaluated to a finite loss on held-out rows")
    return min(finite)


def _start_trackers(recipe: Recipe, accelerator: Accelerator) -> Accelerator | None:
    if not recipe.training.report_to:
        return None
    accelerator.init_trackers(TRACKERS, config={"name": recipe.name})
    return accelerator


def _keep_tokenizer(assembly: Assembly, folder: Path) -> None:
    """Whole or not at all: a run that is killed meanwhile can still be resumed."""
    if folder.is_dir() or not isinstance(assembly.policy, LanguagePolicy):
        return
    partial = folder.with_name("tokenizer.partial")
    shutil.rmtree(partial, ignore_errors=True)
    assembly.policy.tokenizer.save_pretrained(partial)
    partial.rename(folder)


def _quieten_libraries() -> None:
    """Their notes and bars would garble the messages and the progress that a person reads."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # They tell one another which of their names are on the way out.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|accelerate")


def _parameters(assembly: Assembly) -> dict[str, int]:
    parameters = list(assembly.policy.parameters())
    return {
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "total": sum(p.numel() for p in parameters),
    }


def _say(console: Console | None, accelerator: Accelerator) -> Any:
    def say(text: str) -> None:
        if console is not None and accelerator.is_main_process:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    return say
