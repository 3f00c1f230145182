"""A recipe and data files small enough for a test, written into a folder."""

import json
from pathlib import Path
from typing import Any

import yaml

WORDS = ["red", "green", "blue", "cold", "warm", "tall", "small", "round", "quick", "slow"]


def demonstrations(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"Q: item {n} {WORDS[n % 10]}?\nA:", "completion": f" {WORDS[n * 7 % 10]}"}
        for n in range(count)
    ]


def preferences(count: int) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"Q: thing {n} {WORDS[n % 9]}?\nA:",
            "chosen": f" It is {WORDS[n * 3 % 10]}, thank you.",
            "rejected": f" {WORDS[n * 7 % 10]}",
        }
        for n in range(count)
    ]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_values(**changes: Any) -> dict[str, Any]:
    """The values of a valid recipe; ``changes`` by dotted path, with ``__`` for dots."""
    values: dict[str, Any] = {
        "name": "tiny",
        "policy": {
            "model_name_or_path": "tiny-qwen2",
            "config": {"hidden_size": 32, "intermediate_size": 48},
        },
        "objectives": {
            "sft": {
                "kind": "nll",
                "data": {"path": "sft.jsonl", "held_out": 9, "probe": 4, "max_length": 96},
                "batch_size": 6,
            },
            "dpo": {
                "kind": "dpo",
                "data": {"path": "dpo.jsonl", "held_out": 9, "probe": 4, "max_length": 96},
                "batch_size": 4,
            },
        },
        "schedule": {"kind": "mix", "weights": {"sft": 0.5, "dpo": 0.5}},
        "training": {"max_steps": 8, "learning_rate": 0.003, "eval_steps": 4, "save_steps": 4},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    return values


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Data files and a recipe in ``folder``; returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "sft.jsonl", demonstrations(48))
    write_rows(folder / "dpo.jsonl", preferences(40))
    values = recipe_values(output=str(folder / "run"), **changes)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path
