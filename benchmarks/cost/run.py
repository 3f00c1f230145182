"""The cost of a step: schedules beside Sequential, and Holdfast beside TRL.

``python -m benchmarks.cost.run`` from the root of the repository; see README.md beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from benchmarks.cost.material import BLOCK, DATA, ROWS, SETTINGS, VOCABULARY
from benchmarks.results import Results, bootstrap_interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RACES = {
    "sft": ("holdfast", "trl"),
    "dpo": ("holdfast", "trl, precomputed", "trl"),
}
WARM_UP = 3
"""Steps of a race that are not counted."""

TARGETS = {"ALRIGHT": 1.03, "MAXRIGHT": 1.10}
LIBRARIES = ("torch", "transformers", "accelerate", "trl")

Array = NDArray[np.float64]


class Bench:
    """A folder with rows and models, and processes that work in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HOLDFAST_CACHE": str(folder / "cache"),
        }

    def run(self, module: str, *arguments: str) -> str:
        """What a module of this study prints."""
        command = [sys.executable, "-m", f"benchmarks.cost.{module}", *arguments]
        with self._log() as log:
            done = subprocess.run(
                command, env=self.environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        return self._checked(done.stdout if done.returncode == 0 else "")

    def worker(self, *arguments: str) -> Worker:
        command = [sys.executable, "-m", "benchmarks.cost.worker", *arguments, str(self.folder)]
        return Worker(self, command)

    def _log(self) -> IO[str]:
        return (self.folder / "log").open("a", encoding="utf-8")

    def _checked(self, output: str) -> str:
        if not output:
            raise RuntimeError((self.folder / "log").read_text("utf-8")[-2000:])
        return output


class Worker:
    """A trainer in a process of its own. See worker.py for what is said."""

    def __init__(self, bench: Bench, command: list[str]) -> None:
        self._bench = bench
        with bench._log() as log:
            self._process = subprocess.Popen(
                command,
                env=bench.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.start: dict[str, float] = self._read()

    def step(self) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def finish(self) -> dict[str, Any]:
        end = self._read()
        self._process.wait()
        return self.start | end

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._bench._checked(self._process.stdout.readline()))


@contextlib.contextmanager
def prepared() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        bench.run("material", folder)
        yield bench


def compare_schedules(setting: str) -> Any:
    with prepared() as bench:
        return json.loads(bench.run("schedules", setting, str(bench.folder)))


def race(stage: str, setting: str) -> dict[str, Any]:
    """Trainers step in turn, one step each: what slows one down slows down the other."""
    steps = SETTINGS[setting].steps
    with prepared() as bench, contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for side in RACES[stage]:
            workers[side] = bench.worker(side, json.dumps({stage: steps}), setting)
            stack.callback(workers[side].stop)
        times: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
        for number in range(steps):
            for side in list(workers)[:: 1 if number % 2 else -1]:
                times[side].append(workers[side].step())
        return {
            side: worker.finish()
            | {clock: [round(t[clock], 6) for t in times[side]] for clock in ("wall", "cpu")}
            for side, worker in workers.items()
        }


def whole_run(setting: str) -> dict[str, Any]:
    """Holdfast's both stages in one process, for its memory."""
    stages = {"sft": SETTINGS[setting].steps, "dpo": SETTINGS[setting].steps}
    with prepared() as bench:
        worker = bench.worker("holdfast", json.dumps(stages), setting)
        for _ in range(sum(stages.values())):
            worker.step()
        return worker.finish()


# Reading ------------------------------------------------------------------------------------------


def median_ratio(pairs: Array) -> dict[str, Any]:
    """Of pairs of times, ``(pairs, 2)``."""

    def statistic(sample: Array) -> float:
        return float(np.median(sample[:, 0] / sample[:, 1]))

    return {"ratio": statistic(pairs), "interval": bootstrap_interval(pairs, statistic)}


def read_schedules(cell: dict[str, Any]) -> dict[str, Any]:
    summary = {}
    for name, found in cell.items():
        blocks = np.array(found["blocks"])
        stages = found["stage_seconds"]
        summary[name] = {
            "wall": median_ratio(blocks[:, :2]),
            "cpu": median_ratio(blocks[:, 2:]),
            "updates": found["updates"],
            "stage_seconds": stages,
        }
        if name != "Mix":
            summary[name]["even"] = at_even_mix(
                blocks[:, 2:], statistics.mean(stage["cpu"] for stage in stages.values())
            )
    return summary


def at_even_mix(blocks: Array, update: float) -> dict[str, Any]:
    """The ratio, were both objectives updated equally often: ``update`` seconds on average.

    What a step costs beyond its update does not depend on the objective that is updated.
    """

    def statistic(sample: Array) -> float:
        return float(1 + np.median(sample[:, 0] - sample[:, 1]) / BLOCK / update)

    return {"ratio": statistic(blocks), "interval": bootstrap_interval(blocks, statistic)}


def read_race(cell: dict[str, Any]) -> dict[str, Any]:
    ours = cell["holdfast"]
    summary: dict[str, Any] = {"holdfast": _milliseconds(ours)}
    for side in (side for side in cell if side != "holdfast"):
        theirs = cell[side]
        summary[side] = {
            **_milliseconds(theirs),
            **{
                clock: median_ratio(np.array([ours[clock], theirs[clock]]).T[WARM_UP:])
                for clock in ("wall", "cpu")
            },
            "peak memory": ours["peak"] / theirs["peak"],
            "memory beyond imports": (ours["peak"] - ours["imported"])
            / (theirs["peak"] - theirs["imported"]),
            "first loss": abs(ours["losses"][0] - theirs["losses"][0]),
            "largest difference of losses": max(
                abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)
            ),
            "first gradient norm": abs(ours["grad_norm"] / theirs["grad_norm"] - 1),
        }
    return summary


def _milliseconds(side: dict[str, Any]) -> dict[str, float]:
    return {
        "milliseconds": 1e3 * statistics.median(side["wall"][WARM_UP:]),
        "cpu milliseconds": 1e3 * statistics.median(side["cpu"][WARM_UP:]),
        "set-up seconds": side["set_up"],
        "peak MB": side["peak"] / 1e6,
        "imports MB": side["imported"] / 1e6,
    }


def read_pipeline(sft: dict[str, Any], dpo: dict[str, Any], whole: dict[str, Any]) -> Any:
    """SFT then DPO, as many steps of each: the ratio of summed times."""
    summary = {}
    for side in RACES["dpo"][1:]:
        times = np.array(
            [
                sft["holdfast"]["wall"],
                dpo["holdfast"]["wall"],
                sft["trl"]["wall"],
                dpo[side]["wall"],
            ]
        ).T[WARM_UP:]

        def statistic(sample: Array) -> float:
            ours_sft, ours_dpo, theirs_sft, theirs_dpo = np.median(sample, axis=0)
            return float((ours_sft + ours_dpo) / (theirs_sft + theirs_dpo))

        summary[side] = {
            "wall": {
                "ratio": statistic(times),
                "interval": bootstrap_interval(times, statistic),
            },
            "peak memory": whole["peak"] / max(sft["trl"]["peak"], dpo[side]["peak"]),
        }
    return summary


# Showing ------------------------------------------------------------------------------------------


def _ratio(entry: dict[str, Any]) -> str:
    low, high = entry["interval"]
    return f"{entry['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def table(summary: dict[str, Any]) -> str:
    lines = [
        "| model | schedule | time over Sequential | processor time over Sequential "
        "| the same at an even mix | updates (SFT + DPO) |",
        "|---|---|---|---|---|---|",
    ]
    for setting, found in summary["schedules"].items():
        for name, entry in found.items():
            sft, dpo = entry["updates"].values()
            even = _ratio(entry["even"]) if "even" in entry else ""
            lines.append(
                f"| {setting} | {name} | {_ratio(entry['wall'])} | {_ratio(entry['cpu'])} | "
                f"{even} | {sft} + {dpo} |"
            )
    lines += [
        "",
        "| model | stage | against | ms a step (ours, theirs) | time | processor time | peak MB "
        "(ours, theirs) | peak memory | beyond imports | first loss differs by | any loss by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for setting, stages in summary["trl"].items():
        for stage in RACES:
            ours = stages[stage]["holdfast"]
            for side in RACES[stage][1:]:
                entry = stages[stage][side]
                lines.append(
                    f"| {setting} | {stage} | {side} | {ours['milliseconds']:.0f}, "
                    f"{entry['milliseconds']:.0f} | {_ratio(entry['wall'])} | "
                    f"{_ratio(entry['cpu'])} | {ours['peak MB']:.0f}, {entry['peak MB']:.0f} | "
                    f"{entry['peak memory']:.2f} | {entry['memory beyond imports']:.2f} | "
                    f"{entry['first loss']:.0e} | {entry['largest difference of losses']:.0e} |"
                )
        for side, entry in stages["sft, then dpo"].items():
            lines.append(
                f"| {setting} | sft, then dpo | {side} | | {_ratio(entry['wall'])} | | | "
                f"{entry['peak memory']:.2f} | | | |"
            )
    return "\n".join(lines)


def draw(summary: dict[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colours = dict(zip(SETTINGS, ("tab:blue", "tab:orange"), strict=True))
    names = list(next(iter(summary["schedules"].values())))
    for offset, (setting, found) in zip((-0.12, 0.12), summary["schedules"].items(), strict=True):
        for row, name in enumerate(names):
            entry = found[name]["wall"]
            _point(left, entry, row + offset, colours[setting], setting if row == 0 else None)
    for row, name in enumerate(names):
        if name in TARGETS:
            left.plot([TARGETS[name]] * 2, [row - 0.35, row + 0.35], color="black", linestyle=":")
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("time of its updates / time of the same updates under Sequential")
    left.set_title("Schedules (dotted: target)")
    labels = [(stage, side) for stage in RACES for side in RACES[stage][1:]]
    for offset, (setting, stages) in zip((-0.12, 0.12), summary["trl"].items(), strict=True):
        for row, (stage, side) in enumerate(labels):
            entry = stages[stage][side]
            _point(right, entry["wall"], row + offset, colours[setting], None)
            right.plot(
                entry["peak memory"], row + offset, "s", color=colours[setting], fillstyle="none"
            )
    right.plot([], [], "ko", label="time a step")
    right.plot([], [], "ks", fillstyle="none", label="peak resident memory")
    right.set_yticks(range(len(labels)), [_label(*label) for label in labels])
    right.set_xscale("log")
    ticks = (0.02, 0.05, 0.1, 0.2, 0.5, 1)
    right.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    right.minorticks_off()
    right.set_xlabel("Holdfast / TRL")
    right.set_title("One objective at a time, beside TRL")
    for axes in (left, right):
        axes.axvline(1.0, color="grey", linewidth=0.8)
        axes.invert_yaxis()
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label(stage: str, side: str) -> str:
    if stage == "sft":
        return "SFT"
    return "DPO, reference\n" + ("before training" if "precomputed" in side else "in every step")


def _point(axes: Any, entry: dict[str, Any], y: float, colour: str, label: str | None) -> None:
    axes.plot(entry["interval"], [y, y], color=colour, linewidth=1.5)
    axes.plot(entry["ratio"], y, "o", color=colour, label=label)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="measure finished cells again")
    options = parser.parse_args(arguments)
    public = "dolly (SFT) and hh_helpful (DPO)"
    results = Results(
        HERE / "results.json",
        settings={
            "settings": {name: asdict(setting) for name, setting in SETTINGS.items()},
            "rows": f"{ROWS} of {public if DATA.is_dir() else 'random words'}",
            "tokens": VOCABULARY,
            "libraries": {name: version(name) for name in LIBRARIES},
        },
        about={
            "study": "Time and memory of a training step",
            "command": "python -m benchmarks.cost.run",
            "budget": "15 minutes on one core that is free",
        },
        fresh=options.fresh,
    )
    summary: dict[str, Any] = {"schedules": {}, "trl": {}}
    for setting in SETTINGS:
        races = {
            stage: results.cell(f"{setting} | {stage} beside TRL", partial(race, stage, setting))
            for stage in RACES
        }
        whole = results.cell(f"{setting} | whole run", partial(whole_run, setting))
        summary["trl"][setting] = {
            **{stage: read_race(cell) for stage, cell in races.items()},
            "sft, then dpo": read_pipeline(races["sft"], races["dpo"], whole),
        }
        cell = results.cell(f"{setting} | schedules", partial(compare_schedules, setting))
        summary["schedules"][setting] = read_schedules(cell)
    print(table(summary))
    draw(summary, HERE / "cost.png")
    results.finish(summary)


if __name__ == "__main__":
    main()
