"""Prompts with checkable answers, and a recipe that trains on the policy's own completions."""

import json
from pathlib import Path
from typing import Any

import yaml


def sums(count: int = 40) -> list[dict[str, str]]:
    pairs = [(a, b) for a in range(10) for b in range(10)][:count]
    return [
        {"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)} for a, b in pairs
    ]


def on_policy_values(**changes: Any) -> dict[str, Any]:
    """A valid recipe of one objective, ``rl``; ``changes`` are entries of that objective."""
    objective: dict[str, Any] = {
        "kind": "grpo",
        "data": {"path": "prompts.jsonl", "held_out": 6, "probe": 4, "max_length": 16},
        "rewards": [{"name": "regex", "options": {"pattern": "[a-m0-9]"}}],
        "batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 5,
    }
    return {
        "name": "on-policy",
        "policy": {
            "model_name_or_path": "tiny-qwen2",
            "config": {"hidden_size": 32, "intermediate_size": 48},
        },
        "objectives": {"rl": objective | changes},
        "schedule": {"kind": "sequential", "stages": [{"objective": "rl", "steps": 8}]},
        "training": {"max_steps": 8, "learning_rate": 0.003, "eval_steps": 4, "save_steps": 4},
    }


def write_on_policy(folder: Path, values: dict[str, Any] | None = None, **changes: Any) -> Path:
    """The recipe and its prompts in ``folder``; returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(json.dumps(row) + "\n" for row in sums())
    (folder / "prompts.jsonl").write_text(rows, encoding="utf-8")
    values = values or on_policy_values(**changes)
    values["output"] = str(folder / "run")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path
