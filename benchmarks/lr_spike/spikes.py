"""Training with one step at a thousand times the learning rate, on digits and on a tiny model."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.arithmetic import study as arithmetic
from benchmarks.arithmetic.prepare import DEMONSTRATIONS, HELD_OUT, RUNS
from holdfast.assemble import assemble, build_trainer
from holdfast.joint import LossTerms, Mix, Objective
from holdfast.joint.batches import Batches
from holdfast.joint.guards import GradientClip, Guard, LogRatioBudget, UpdateNormCap
from holdfast.joint.objective import Along, Spread
from holdfast.joint.optimizer import TrainerOptions
from holdfast.joint.trainer import Trainer
from holdfast.recipe import parse_recipe

FACTOR = 1000.0
"""Of the learning rate, in one step."""
GUARDS = {
    "none": "none",
    "clip": "gradient_clip",
    "cap": "update_norm_cap",
    "budget": "log_ratio_budget",
}


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes
    ----------
    task : str
        ``digits``, ``sft`` or ``grpo``.
    guard : str
        One of ``GUARDS``.
    option : float
        Its limit; 0 without a guard. Of the budget in radii: a limit of ``option * pi`` nats.
    learning_rate : float
    seed : int
    spike : bool
    """

    task: str
    guard: str
    option: float
    learning_rate: float
    seed: int
    spike: bool = True

    @property
    def group(self) -> str:
        option = f"-{self.option:g}" if self.option else ""
        return f"{self.task}/{self.guard}{option}" + ("" if self.spike else "/no spike")

    @property
    def key(self) -> str:
        return f"{self.group}/lr{self.learning_rate:g}/seed{self.seed}"

    @property
    def limit(self) -> float:
        return self.option * (math.pi if self.guard == "budget" else 1.0)


@dataclass(frozen=True)
class Length:
    """Steps of a run, the one at which the rate is raised (from 0), and those between scores."""

    steps: int
    at: int
    every: int


LENGTHS = {
    "digits": Length(200, 50, 10),
    "sft": Length(120, 40, 10),
    "grpo": Length(100, 40, 10),
}


def run(trainer: Trainer, length: Length, score: Any, *, spike: bool) -> dict[str, Any]:
    """Train; the learning rate is ``FACTOR`` times as high in one step."""
    curve: list[float] = [score()]
    change: float | None = None
    groups = trainer._optimizer_plain.param_groups
    for step in range(length.steps):
        rates = [group["lr"] for group in groups]
        if spike and step == length.at:
            before = torch.cat([p.detach().flatten().clone() for p in trainer._parameters])
            for group in groups:
                group["lr"] *= FACTOR
        trainer.train_step()
        if spike and step == length.at:
            after = torch.cat([p.detach().flatten() for p in trainer._parameters])
            change = float((after - before).norm())
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        if (step + 1) % length.every == 0:
            curve.append(score())
    return {"curve": [round(x, 4) for x in curve], "moved": change}


# Digits -------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images ``(1797, 64)`` of digits in [0, 1], and what they show."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise SystemExit("digits come with scikit-learn: pip install scikit-learn") from None
    found = load_digits()
    return torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)


class Classifier(nn.Module):
    """64-128-10 with ReLU."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.layers(images),)


def cross_entropy(policy: nn.Module, rows: Sequence[tuple[Tensor, int]]) -> LossTerms:
    (logits,) = policy(torch.stack([row[0] for row in rows]))
    targets = torch.tensor([row[1] for row in rows])
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    return LossTerms(loss, torch.tensor(len(rows)))


def radii(along: Along, rows: Sequence[tuple[Tensor, int]], spread: Spread) -> Tensor:
    ((_, rates),) = along(torch.stack([row[0] for row in rows]))
    assert rates is not None
    return torch.pi / (rates.amax(-1) - rates.amin(-1))


def guards_of(cell: Cell) -> list[Guard]:
    match cell.guard:
        case "clip":
            return [GradientClip(cell.limit)]
        case "cap":
            return [UpdateNormCap(cell.limit)]
        case "budget":
            return [LogRatioBudget(cell.limit)]
    return []


def run_digits(cell: Cell) -> dict[str, Any]:
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(cell.seed))
    train, test = order[:1347], order[1347:]
    rows = [(images[i], int(labels[i])) for i in train.tolist()]
    policy = Classifier(cell.seed)
    objective = Objective("sft", cross_entropy, Batches(rows, 64, seed=cell.seed), radii=radii)
    length = LENGTHS["digits"]
    trainer = Trainer(
        policy,
        {"sft": objective},
        Mix({"sft": 1.0}),
        TrainerOptions(
            max_steps=length.steps,
            learning_rate=cell.learning_rate,
            max_grad_norm=None,
            max_refusals=length.steps,
            seed=cell.seed,
        ),
        accelerator=Accelerator(cpu=True),
        guards=guards_of(cell),
    )

    def score() -> float:
        with torch.no_grad():
            (logits,) = policy(images[test])
        return float((logits.argmax(-1) == labels[test]).float().mean())

    return run(trainer, length, score, spike=cell.spike)


# A tiny language model ----------------------------------------------------------------------------


def run_language(cell: Cell) -> dict[str, Any]:
    """SFT on right answers, scored by held-out loss; or GRPO, scored by held-out accuracy."""
    length = LENGTHS[cell.task]
    values = arithmetic.Cell(
        "grpo", "sparse", 1, cell.learning_rate, cell.seed, clip=False
    ).recipe()
    name = "reported"
    if cell.task == "sft":
        name = "sft"
        data = {"path": str(DEMONSTRATIONS), "held_out_path": str(HELD_OUT)}
        values["objectives"] = {
            "sft": {
                "kind": "nll",
                "data": data | {"held_out": 0, "probe": 0},
                "batch_size": 64,
            }
        }
        values["schedule"] = {"kind": "mix", "weights": {"sft": 1.0}}
    training = values["training"]
    training["max_steps"] = length.steps
    if cell.guard == "clip":
        training["max_grad_norm"] = cell.limit
    elif cell.guard != "none":
        training["guards"] = [{"kind": GUARDS[cell.guard], "limit": cell.limit}]
    values["output"] = str(RUNS / "spike" / cell.key)
    folder = RUNS / "spikes" / cell.key
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = parse_recipe(values, file=RUNS / "spike.yaml")
    accelerator = Accelerator(cpu=True)
    assembly = assemble(recipe, accelerator)
    trainer = build_trainer(recipe, assembly, {}, accelerator, folder=folder, recorder=None)
    trainer.checkpoints = None
    objective = assembly.objectives[name]

    def score() -> float:
        return -trainer.evaluate(objective, objective.held_out).loss

    found = run(trainer, length, score, spike=cell.spike)
    shutil.rmtree(folder)
    return found


def run_cell(cell: Cell) -> dict[str, Any]:
    torch.set_num_threads(1)
    return run_digits(cell) if cell.task == "digits" else run_language(cell)
