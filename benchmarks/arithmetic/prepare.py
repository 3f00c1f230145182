"""The study's files and models: expressions, the model that RL starts from, and the teacher.

Two kinds of prompt: calculator expressions that stand in the solutions of
grade-school problems (``<<48/2=24>>``), and sums made here. All numbers are below 100. The
demonstrations are of mixed quality: most of their answers are wrong by a slip, as text that a model
is pre-trained on may be, so that there is something for reinforcement learning to mend.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from holdfast.assemble import assemble
from holdfast.language.data import Prompt
from holdfast.language.generate import Sampling, TransformersGenerator
from holdfast.language.model import load_policy
from holdfast.language.rollouts import seed_of
from holdfast.recipe import parse_recipe
from holdfast.run import resume, train

HERE = Path(__file__).parent
RUNS = HERE / "runs"
DATA = HERE.parents[2] / "shared" / "data"
DEMONSTRATIONS = RUNS / "demonstrations.jsonl"
"""What the starting model is fine-tuned on."""
PROMPTS = RUNS / "prompts.jsonl"
"""What reinforcement learning asks; other expressions than the demonstrations."""
VALIDATION, HELD_OUT = RUNS / "validation.jsonl", RUNS / "held_out.jsonl"
"""What methods are tuned on, and what is reported; neither was ever trained on."""
PAIRS = RUNS / "pairs.jsonl"
BASE, TEACHER = RUNS / "base", RUNS / "teacher"
ROWS = {
    "demonstrations": (1000, 2500),
    "prompts": (900, 900),
    "validation": (128, 128),
    "held_out": (256, 256),
}
"""Calculator expressions and sums in each file."""
SLIPS = 0.65
"""Share of wrong answers among the demonstrations."""
COPIES = 4
"""Demonstrations of every expression, each with a slip or without."""


def calculator() -> list[tuple[str, str]]:
    """Expressions and their values, as they stand in solutions, of whole numbers below 100."""
    found = {}
    with gzip.open(DATA / "gsm8k_train.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            for expression in re.findall(r"<<([^>]*)>>", json.loads(line)["answer"]):
                match = re.fullmatch(r"(\d{1,2}[-+*/]\d{1,2}=)(\d{1,2})", expression)
                if match:
                    found[match[1]] = match[2]
    return sorted(found.items())


def sums() -> list[tuple[str, str]]:
    """All sums of two numbers that stay below 100."""
    return [(f"{a}+{b}=", str(a + b)) for a in range(100) for b in range(100 - a)]


def slip(prompt: str, answer: str, draw: random.Random) -> str:
    """A wrong answer: an operand copied, or one number too many or too few."""
    copied = [number for number in re.findall(r"\d+", prompt) if number != answer]
    near = [str(abs(int(answer) + step)) for step in (-1, 1)]
    return draw.choice(copied * 2 + near)


def write_files() -> None:
    """The four files of rows, of both kinds; no prompt is in two of them."""
    if HELD_OUT.exists():
        return
    RUNS.mkdir(exist_ok=True)
    draw = random.Random(0)
    expressions, additions = calculator(), sums()
    known = {prompt for prompt, _ in expressions}
    additions = [row for row in additions if row[0] not in known]
    draw.shuffle(expressions)
    draw.shuffle(additions)
    for path in (DEMONSTRATIONS, PROMPTS, VALIDATION, HELD_OUT):
        first, second = ROWS[path.stem]
        rows = [("calculator", *expressions.pop()) for _ in range(first)]
        rows += [("sums", *additions.pop()) for _ in range(second)]
        copies, slips = (COPIES, SLIPS) if path == DEMONSTRATIONS else (1, 0.0)
        rows = rows * copies
        draw.shuffle(rows)
        lines = (
            json.dumps(
                {
                    "prompt": prompt,
                    "completion": slip(prompt, answer, draw) if draw.random() < slips else answer,
                    "answer": answer,
                    "task": task,
                }
            )
            + "\n"
            for task, prompt, answer in rows
        )
        path.write_text("".join(lines), encoding="utf-8")


def _trained(name: str, folder: Path, values: dict[str, Any]) -> None:
    if (folder / "model").is_dir():
        return
    recipe = parse_recipe({"name": name, "output": str(folder), **values}, file=RUNS / "x.yaml")
    (resume(folder) if (folder / "run.json").exists() else train(recipe))


def base() -> Path:
    """The model that every run starts from."""
    write_files()
    values = {
        "policy": {"model_name_or_path": "tiny-qwen2", "tokenizer": {"kind": "bytes"}},
        "objectives": {
            "sft": {
                "kind": "nll",
                "data": {
                    "path": str(DEMONSTRATIONS),
                    "held_out_path": str(VALIDATION),
                    "held_out": 0,
                    "probe": 0,
                },
                "batch_size": 128,
            }
        },
        "schedule": {"kind": "mix", "weights": {"sft": 1.0}},
        "training": {
            "max_steps": 3000,
            "learning_rate": 0.003,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 50,
            "weight_decay": 0.1,
            "eval_steps": 100,
            "save_steps": 500,
        },
    }
    _trained("base", BASE, values)
    return BASE / "model"


def teacher() -> Path:
    """The starting model, tuned on pairs of a right answer and a wrong one of its own."""
    start = base()
    if not PAIRS.exists():
        _write_pairs(start)
    values = {
        "policy": {"model_name_or_path": str(start)},
        "objectives": {
            "dpo": {
                "kind": "dpo",
                "beta": 1.0,
                "loss_type": "ipo",
                "data": {"path": str(PAIRS), "held_out": 128, "probe": 0},
                "batch_size": 64,
            }
        },
        "schedule": {"kind": "mix", "weights": {"dpo": 1.0}},
        "training": {
            "max_steps": 600,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "eval_steps": 100,
            "save_steps": 600,
        },
    }
    _trained("teacher", TEACHER, values)
    return TEACHER / "model"


def _write_pairs(start: Path) -> None:
    """Of the prompts that reinforcement learning asks as well: up to two wrong answers each."""
    policy = load_policy(str(start))
    rows = [json.loads(line) for line in PROMPTS.read_text("utf-8").splitlines()]
    rows = [row for row in rows for _ in range(4)]
    ids = [policy.tokenizer(row["prompt"])["input_ids"] for row in rows]
    seeds = [seed_of(f"pairs/{index}") for index in range(len(rows))]
    drawn = TransformersGenerator(policy)(ids, seeds, Sampling(max_completion_length=5))
    pairs: dict[str, dict[str, str]] = {}
    for row, completion in zip(rows, drawn, strict=True):
        text = policy.tokenizer.decode(list(completion.ids), skip_special_tokens=True)
        if completion.completed and text.strip() and text != row["completion"]:
            key = f"{row['prompt']}{text}"
            pairs[key] = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": text}
    PAIRS.write_text("".join(json.dumps(p) + "\n" for p in pairs.values()), encoding="utf-8")


def accuracy(model: Path, rows: Path, temperature: float = 1.0) -> float:
    """Share of right answers among one sample of each row; at temperature 0 the likeliest one."""
    recipe = parse_recipe(
        {
            "name": "accuracy",
            "policy": {"model_name_or_path": str(model)},
            "objectives": {
                "rl": {
                    "kind": "grpo",
                    "data": {
                        "path": str(DEMONSTRATIONS),
                        "held_out_path": str(rows),
                        "held_out": 0,
                        "probe": 0,
                    },
                    "rewards": [{"name": "exact_match"}],
                    "max_completion_length": 5,
                    "evaluation_temperature": temperature,
                    "batch_size": 64,
                }
            },
            "schedule": {"kind": "mix", "weights": {"rl": 1.0}},
            "training": {"max_steps": 1},
        },
        file=RUNS / "x.yaml",
    )
    assembly = assemble(recipe, Accelerator(cpu=True))
    objective = assembly.objectives["rl"]
    prompts: list[Prompt] = list(objective.held_out)
    assert objective.evaluate is not None
    terms = objective.evaluate(assembly.policy, prompts)
    return -float(terms.total / terms.count)


if __name__ == "__main__":
    for name, model in (("base", base()), ("teacher", teacher())):
        for path in (PROMPTS, VALIDATION):
            print(name, path.stem, [accuracy(model, path, t) for t in (0.0, 1.0)])
