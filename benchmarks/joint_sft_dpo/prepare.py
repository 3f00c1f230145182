"""The study's files: texts to pre-train on, and the pre-trained model.

The texts leave out the two data sets of the study (dolly, hh_helpful), so that nothing held out
there was seen before.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from holdfast.recipe import parse_recipe
from holdfast.run import resume, train

HERE = Path(__file__).parent
RUNS = HERE / "runs"
DATA = HERE.parents[2] / "shared" / "data"
PRETRAINED = RUNS / "pretrained" / "model"


def _rows(name: str) -> Iterator[dict[str, str]]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _texts() -> Iterator[str]:
    for row in _rows("gsm8k_train"):
        yield f"{row['question']}\n{row['answer']}"
    for row in _rows("ultrafeedback_train"):
        yield f"{row['prompt']}\n{row['chosen']}"
    for row in _rows("hh_harmless_train"):
        yield row["prompt"] + row["chosen"]
    first = {row["prompt"]: row["chosen"] for row in _rows("qa_feedback_pairs")}
    for prompt, chosen in first.items():
        yield f"{prompt}\n{chosen}"
    with gzip.open(DATA / "tinyshakespeare.txt.gz", "rt", encoding="utf-8") as file:
        play = file.read()
    for start in range(0, len(play), 800):
        yield play[start : start + 800]


def pretrained() -> Path:
    """The directory of the pre-trained model; trained on the first call (some ten minutes)."""
    if PRETRAINED.is_dir():
        return PRETRAINED
    RUNS.mkdir(exist_ok=True)
    texts = RUNS / "pretraining.jsonl"
    if not texts.exists():
        lines = (json.dumps({"text": text}) for text in _texts())
        texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = parse_recipe(
        {
            "name": "pretrained",
            "policy": {
                "model_name_or_path": "tiny-qwen2",
                "config": {"hidden_size": 128, "intermediate_size": 256},
                "tokenizer": {"kind": "bpe", "vocab_size": 2048, "files": [texts.name]},
            },
            "objectives": {
                "text": {
                    "kind": "nll",
                    "data": {"path": texts.name, "held_out": 64, "probe": 0, "max_length": 192},
                    "batch_size": 16,
                }
            },
            "schedule": {"kind": "mix", "weights": {"text": 1.0}},
            "training": {
                "max_steps": 2500,
                "learning_rate": 0.003,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 100,
                "eval_steps": 250,
                "save_steps": 250,
            },
            "output": str(RUNS / "pretrained"),
        },
        file=RUNS / "pretrained.yaml",
    )
    started = (RUNS / "pretrained" / "run.json").exists()
    (resume(RUNS / "pretrained") if started else train(recipe))
    return PRETRAINED
