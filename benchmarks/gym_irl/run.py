"""Imitation and reward recovery on gymnasium's classic tasks, from an expert trained here.

``python -m benchmarks.gym_irl.run [--jobs 1] [--minutes 60]``. Finished cells are kept in
``results.json`` and not run again. ``--plot`` only draws what is there.
"""

from __future__ import annotations

import os
import time
from functools import partial
from importlib.metadata import version
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run a core, one thread a run

import torch

from benchmarks.bellman.peers import ask_peer, interpreter, peer_versions
from benchmarks.gym_irl import study
from benchmarks.gym_irl.analysis import HERE, analyse, draw, table
from benchmarks.gym_irl.expert import TASKS, expert, play
from benchmarks.pool import arguments, run_jobs
from benchmarks.results import Results

PEER_TASK = "CartPole-v1"
PEER_SEEDS = 3
PEER_STEPS = 40_000
"""Decisions that imitation's adversarial methods may try out; ours try none."""

SETTINGS = {
    "tasks": {name: vars(task) for name, task in TASKS.items()},
    "episodes": study.EPISODES,
    "hidden": study.HIDDEN,
    "steps": study.STEPS,
    "batch": study.BATCH,
    "grids": study.GRIDS,
    "peer": [PEER_TASK, PEER_SEEDS, PEER_STEPS],
}
ABOUT = {
    "command": "python -m benchmarks.gym_irl.run",
    "seeds": {"tuning": len(study.TUNING_SEEDS), "compared": len(study.SEEDS)},
    "budget": "three quarters of an hour of one core",
    "environments": {"gymnasium": version("gymnasium")},
}


def run_cells(results: Results, cells: Any, workers: int, deadline: float) -> bool:
    """Run what is missing. ``False``: time ran out."""
    jobs = {cell.key: cell for cell in cells}
    return run_jobs(results, jobs, study.run_cell, _told, workers=workers, deadline=deadline)


def _told(values: dict[str, Any]) -> str:
    return f"{values['return']:.1f}, reward off by {values['error']:.2f}"


def peer_run(episodes: int, seed: int) -> Any:
    """imitation's cloning, GAIL and AIRL on the same demonstrations."""
    task = TASKS[PEER_TASK]
    data, _ = play(task, expert(task), episodes, seed=10_000 + seed)
    ends = (data.trajectory[1:] != data.trajectory[:-1]).nonzero()[0] + 1
    question = {
        "task": PEER_TASK,
        "steps": PEER_STEPS,
        "tests": study.TESTS,
        "seed": seed,
        "state": data.state.tolist(),
        "action": data.action.tolist(),
        "last": data.next_state[[*(ends - 1), -1]].tolist(),
        "terminal": data.terminal[[*(ends - 1), -1]].tolist(),
        "starts": [0, *ends.tolist()],
    }
    answer = ask_peer("imitation", HERE / "peer_imitation.py", question)
    return answer | peer_versions("imitation", "stable-baselines3", "gymnasium")


def main() -> None:
    parser = arguments(__doc__, jobs=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(HERE / "results.json", SETTINGS, ABOUT, options.fresh)
    cells = results.content["cells"]
    deadline = time.monotonic() + 60 * options.minutes
    missing = set(TASKS) - set(study.tasks())
    if missing:
        print(f"Skipped: {', '.join(missing)}. Install gymnasium[box2d] for it.")
    if not options.plot:
        for name in study.tasks():
            key = f"{name} | expert"
            print(f"{key}: {results.cell(key, partial(study.baseline, name))}", flush=True)
        if not run_cells(results, study.tuning(), options.jobs, deadline):
            raise SystemExit("Time is up; start again to go on.")
        run_cells(results, study.evaluation(study.chosen_settings(cells)), options.jobs, deadline)
        if interpreter("imitation"):
            for seed in range(PEER_SEEDS):
                for episodes in study.EPISODES:
                    if time.monotonic() < deadline:
                        key = f"imitation | {episodes} episodes | seed {seed}"
                        found = results.cell(key, partial(peer_run, episodes, seed))
                        print(f"{key}: {found}", flush=True)
    summary = analyse(cells)
    results.finish(summary)
    print(table(summary))
    if summary:
        draw(summary)


if __name__ == "__main__":
    main()
