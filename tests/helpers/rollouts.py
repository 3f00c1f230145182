"""Small policies far from uniform, rollouts of unequal length, and their logits by transformers."""

import numpy as np
import torch
from torch.testing import assert_close

from holdfast.language.data import Encoded
from holdfast.language.model import LanguagePolicy, load_policy
from holdfast.language.rollouts import Rollout
from holdfast.language.tokenizers import build_tokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 48}


def build(seed: int, lora: bool = False) -> LanguagePolicy:
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"]} if lora else None
    policy = load_policy(
        "tiny-qwen2", tokenizer=build_tokenizer(), config=SMALL, seed=seed, lora=options
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # Far from uniform, and adapters that do something.
        for name, parameter in policy.named_parameters():
            if parameter.ndim > 1:
                scale = 0.3 if "lora_B" in name else 0.02
                parameter.mul_(4).add_(torch.randn(parameter.shape, generator=generator) * scale)
    return policy.eval()


def rollouts(count: int = 5, seed: int = 0) -> list[Rollout]:
    draw = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        prompt, completion = draw.integers(1, 7, 2)
        ids = draw.integers(0, 256, prompt + completion).astype(np.int32)
        tokens = Encoded(ids, np.arange(prompt + completion) >= prompt)
        advantages = torch.from_numpy(draw.normal(size=completion)).float()
        rows.append(
            Rollout(
                tokens,
                f"rows:{index}",
                bool(index % 2),
                reward=float(index),
                rewards={"length": float(index)},
                group_std=float(index > 1),
                samples=40,
                signals={"advantages": advantages},
            )
        )
    return rows


def dense(policy: LanguagePolicy, row: Rollout) -> torch.Tensor:
    """Logits ``(counted, vocab)`` of the counted tokens, from transformers."""
    ids = torch.from_numpy(row.tokens.input_ids.astype(np.int64)).unsqueeze(0)
    logits = policy.model(input_ids=ids, use_cache=False).logits[0, :-1]
    return logits[torch.from_numpy(row.tokens.counted[1:])]


def sampled(row: Rollout) -> torch.Tensor:
    return torch.from_numpy(row.tokens.input_ids[row.tokens.counted].astype(np.int64))


def dense_logps(policy: LanguagePolicy, row: Rollout, temperature: float = 1.0) -> torch.Tensor:
    logps = (dense(policy, row) / temperature).log_softmax(-1)
    return logps.gather(1, sampled(row).unsqueeze(1)).squeeze(1)


def gradients(policy: LanguagePolicy, total: torch.Tensor) -> list[torch.Tensor]:
    trained = [p for p in policy.parameters() if p.requires_grad]
    found = torch.autograd.grad(total, trained, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


def same_gradients(policy: LanguagePolicy, one: torch.Tensor, two: torch.Tensor) -> None:
    assert_close(one, two, rtol=1e-4, atol=1e-5)
    for left, right in zip(gradients(policy, one), gradients(policy, two), strict=True):
        assert_close(left, right, rtol=1e-3, atol=1e-5)
