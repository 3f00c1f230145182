"""What is measured on: rows, tokenizer and models, the same for every trainer."""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[3] / "shared" / "data"
ROWS = 480
"""Rows of each kind."""

BLOCK = 10
"""Steps of a block, and between the evaluations of MAXRIGHT's gaps."""

VOCABULARY = 2048
"""Tokens of the byte-pair encoding."""


@dataclass(frozen=True)
class Setting:
    """A model and a batch.

    Attributes
    ----------
    config : dict
        Entries of a ``Qwen2Config``.
    batch_size : int
        Rows an update takes: demonstrations, or pairs.
    max_length : int
        Tokens a sequence may have.
    learning_rate : float
        Constant.
    steps : int
        Steps of a race between trainers.
    blocks : int
        Blocks of every schedule.
    """

    config: dict[str, Any]
    steps: int
    blocks: int
    batch_size: int = 8
    max_length: int = 256
    learning_rate: float = 1e-3


def _qwen2(hidden: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "vocab_size": vocabulary,
    }


SETTINGS = {
    "tiny": Setting(_qwen2(64, VOCABULARY), steps=40, blocks=20),
    "large vocabulary": Setting(_qwen2(128, 32768), steps=10, blocks=6),
}


def model_folder(folder: Path, setting: str) -> Path:
    return folder / setting.replace(" ", "-")


def rows_file(folder: Path, kind: str, setting: str | None = None) -> Path:
    """``kind``: ``sft`` or ``dpo``. With a setting: only the rows of its race."""
    return (model_folder(folder, setting) if setting else folder) / f"{kind}.jsonl"


def recipe_values(
    folder: Path, setting: str, stages: dict[str, int], *, race: bool, probe: int = 0
) -> dict[str, Any]:
    """A recipe on the prepared rows, one objective after the other.

    Parameters
    ----------
    race : bool
        Only on the rows of the race.
    probe : int
        Probe rows of each objective.
    """
    chosen = SETTINGS[setting]

    def objective(kind: str, name: str) -> dict[str, Any]:
        data = {
            "path": str(rows_file(folder, name, setting if race else None)),
            "held_out": 0,
            "probe": probe,
            "max_length": chosen.max_length,
        }
        return {"kind": kind, "data": data, "batch_size": chosen.batch_size}

    known = {"sft": objective("nll", "sft"), "dpo": objective("dpo", "dpo")}
    return {
        "name": "cost",
        "policy": {"model_name_or_path": str(model_folder(folder, setting))},
        "objectives": {name: known[name] for name in stages},
        "schedule": {
            "kind": "sequential",
            "stages": [{"objective": name, "steps": steps} for name, steps in stages.items()],
        },
        "training": {
            "max_steps": sum(stages.values()),
            "learning_rate": chosen.learning_rate,
        },
    }


def prepare(folder: Path) -> str:
    """Write rows, tokenizer and models. Returns where the rows come from."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from holdfast.language.data import load_demonstrations, load_preferences, read_rows
    from holdfast.language.tokenizers import train_bpe

    demonstrations, preferences, origin = _public_rows() if DATA.is_dir() else _made_up_rows()
    texts = [text for row in (*demonstrations, *preferences) for text in row.values()]
    tokenizer = train_bpe(texts, VOCABULARY)
    for name, setting in SETTINGS.items():
        torch.manual_seed(0)
        config = Qwen2Config(
            **setting.config,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(model_folder(folder, name))
        tokenizer.save_pretrained(model_folder(folder, name))
    shortest = min(setting.max_length for setting in SETTINGS.values())
    for kind, rows, load in (
        ("sft", demonstrations, load_demonstrations),
        ("dpo", preferences, load_preferences),
    ):
        file = rows_file(folder, kind)
        _write(file, rows)
        # Every trainer must keep every row, or their batches would differ.
        raw = read_rows(file.name, base=folder)
        kept, _ = load(raw, tokenizer, max_length=shortest, bad_rows="drop")
        lines = sorted(int(row.origin.rpartition(":")[2]) for row in kept)[:ROWS]
        usable = [rows[line - 1] for line in lines]
        if len(usable) < ROWS:
            raise ValueError(f"{len(usable)} usable {kind} rows, but {ROWS} are needed")
        _write(file, usable)
        for name, setting in SETTINGS.items():
            _write(rows_file(folder, kind, name), usable[: setting.steps * setting.batch_size])
    return origin


Rows = list[dict[str, str]]


def _write(file: Path, rows: Rows) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _public_rows() -> tuple[Rows, Rows, str]:
    from holdfast.language.data import read_rows

    def completion(text: str) -> str:
        # Begins with one space, so that no token spans the boundary: trainers find it in different
        # ways, and must agree.
        return " " + text.strip()

    demonstrations = [
        {
            "prompt": row.values["prompt"].strip() + "\n\nAnswer:",
            "completion": completion(row.values["completion"]),
        }
        for row in read_rows("dolly_train.jsonl.gz", base=DATA)[: 4 * ROWS]
    ]
    preferences = [
        {
            "prompt": row.values["prompt"].strip(),
            "chosen": completion(row.values["chosen"]),
            "rejected": completion(row.values["rejected"]),
        }
        for row in read_rows("hh_helpful_train.jsonl.gz", base=DATA)
    ]
    return demonstrations, preferences, "dolly (demonstrations), hh_helpful (preferences)"


def _made_up_rows() -> tuple[Rows, Rows, str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(2000)]

    def text(longest: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(4, longest)))

    demonstrations = [
        {"prompt": f"{text(40)}\n\nAnswer:", "completion": f" {text(60)}"} for _ in range(2 * ROWS)
    ]
    preferences = [
        {"prompt": f"{text(40)}:", "chosen": f" {text(50)}", "rejected": f" {text(50)}"}
        for _ in range(2 * ROWS)
    ]
    return demonstrations, preferences, "made up of random words"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write rows, tokenizer and models.")
    parser.add_argument("folder", type=Path)
    print(prepare(parser.parse_args().folder))
