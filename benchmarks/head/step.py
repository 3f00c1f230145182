"""A whole training step of LCO beside one of TRL's GRPO, on the same rollouts.

``python -m benchmarks.head.step STEPS``. One process takes both steps in turn and prints the times
of each, ``{side: {clock: [seconds]}}``, as JSON.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cost.worker import Gate
from benchmarks.head.cases import VOCAB, WIDTH
from holdfast.language.data import Encoded
from holdfast.language.frozen import Frozen
from holdfast.language.model import LanguagePolicy, load_policy
from holdfast.language.on_policy import Lco
from holdfast.language.rollouts import Rollout
from holdfast.language.tokenizers import build_tokenizer

COMPLETIONS, PROMPT, LENGTH = 8, 32, 128
"""Of a step; with the vocabulary and the width, what a step costs."""


def build() -> LanguagePolicy:
    """A small body below a real vocabulary; LoRA leaves the head to be shared."""
    body = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
    policy = load_policy(
        "tiny-qwen2",
        tokenizer=build_tokenizer(),
        config=body | heads,
        lora={"r": 8, "target_modules": ["q_proj", "v_proj"]},
    )
    policy.base.resize_token_embeddings(VOCAB)
    return policy


def rollouts() -> list[Rollout]:
    """Completions that all have their full length, with what the frozen models would show."""
    draw, size = np.random.default_rng(0), PROMPT + LENGTH
    counted = np.arange(size) >= PROMPT
    rows = []
    for index in range(COMPLETIONS):
        ids = draw.integers(0, 256, size).astype(np.int32)
        states = (torch.from_numpy(draw.normal(size=(LENGTH, WIDTH))).float() for _ in range(2))
        signals = dict(zip(("reward_hidden", "reference_hidden"), states, strict=True))
        rows.append(
            Rollout(
                Encoded(ids, counted),
                f"row:{index}",
                True,
                reward=float(index % 2),
                rewards={"reward": float(index % 2)},
                group_std=0.5,
                samples=COMPLETIONS,
                signals=signals,
            )
        )
    return rows


def lco(policy: LanguagePolicy, rows: list[Rollout]) -> Callable[[], Tensor]:
    frozen = Frozen.start_of(policy)  # the same vocabulary matrix
    sources = {"reward": (frozen, 1.0), "reference": (frozen, -1.0)}
    loss = Lco(policy.pad_id, "lco_kl", beta=1.0, sparse=False, sources=sources)

    def evaluate() -> Tensor:
        terms = loss(policy, rows)
        return terms.total / terms.count

    return evaluate


def grpo(policy: LanguagePolicy, rows: list[Rollout], folder: str) -> Callable[[], Tensor]:
    """The loss of TRL's own trainer on the same tokens."""
    import datasets
    import trl

    trainer = trl.GRPOTrainer(
        policy.model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            per_device_train_batch_size=COMPLETIONS,
            num_generations=COMPLETIONS,
            max_completion_length=LENGTH,
            beta=0.0,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "red"}]),
        processing_class=build_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    ids = torch.from_numpy(np.stack([row.tokens.input_ids for row in rows])).long()
    prompts, completions = ids[:, :PROMPT], ids[:, PROMPT:]
    rewards = torch.tensor([row.reward for row in rows])
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": (rewards - rewards.mean()) / (rewards.std() + 1e-4),
        "num_items_in_batch": torch.tensor(completions.numel()),
    }
    return lambda: trainer._compute_loss(trainer.model, batch)


def step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    loss().backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", type=int)
    args = parser.parse_args()
    gate, rows = Gate(), rollouts()
    torch.manual_seed(0)
    policies = build(), build()
    times: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        losses: dict[str, Any] = {
            "holdfast": lco(policies[0], rows),
            "trl": grpo(policies[1], rows, folder),
        }
        sides = {}
        for (side, loss), policy in zip(losses.items(), policies, strict=True):
            policy.train()
            trained = [p for p in policy.parameters() if p.requires_grad]
            sides[side] = loss, torch.optim.AdamW(trained, lr=1e-4)
            times[side] = {"wall": [], "cpu": []}
        for number in range(args.steps):
            for side in list(sides)[:: 1 if number % 2 else -1]:
                wall, cpu = time.perf_counter(), time.process_time()
                step(*sides[side])
                times[side]["wall"].append(time.perf_counter() - wall)
                times[side]["cpu"].append(time.process_time() - cpu)
    gate.say(**times)


if __name__ == "__main__":
    main()
