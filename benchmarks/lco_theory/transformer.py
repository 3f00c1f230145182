"""Proposition 4.4 on a small transformer: does a gradient step point to where training ends?

The way to the end contains the step itself. In many dimensions that alone gives a sequence of
random steps a positive product, so every step is also judged by the gradient of rows that the
optimiser never sees, and PPO is run a second time with advantages of random sign.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from benchmarks.lco_theory.losses import LCO, LIBRARY
from holdfast.joint import LossTerms
from holdfast.language.losses import nll, optimal_logits
from holdfast.language.losses.policy_gradient import ppo_clip
from holdfast.language.model import LanguagePolicy, load_policy
from holdfast.language.tokenizers import build_tokenizer

METHODS = ("sft", *LCO, "ppo", "ppo, random signs")
RENEW = (4, 80)
"""Updates on one batch of rollouts: as in training, or one batch and one target for all."""
UPDATES = 80
RATE = 2e-3
PRETRAINING_RATE = 5e-3
ROWS = 32
BETA = 1.0
PROMPT = 4
PRETRAINING = {"base": 60, "teacher": 300}
"""Updates on sums with random answers, and on from there with the right ones."""
CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def draw_sums(generator: torch.Generator, rows: int, *, right: bool = True) -> Tensor:
    """``a+b=cc;`` in tokens, ``(rows, 7)``. An ASCII character is its own token."""
    a, b = (torch.randint(10, (rows,), generator=generator) for _ in range(2))
    return write_sums(a, b, a + b if right else torch.randint(19, (rows,), generator=generator))


def write_sums(a: Tensor, b: Tensor, answer: Tensor) -> Tensor:
    digits = [x + ord("0") for x in (a, b, answer // 10, answer % 10)]
    plus, equals, end = (torch.full_like(a, ord(sign)) for sign in "+=;")
    return torch.stack([digits[0], plus, digits[1], equals, *digits[2:], end], dim=-1)


def logits_of(policy: LanguagePolicy, ids: Tensor) -> Tensor:
    """Logits of the completions' tokens, ``(rows, completion, vocab)``."""
    logits: Tensor = policy.base(input_ids=ids, use_cache=False).logits
    return logits[:, PROMPT - 1 : -1]


def chosen(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, ids[:, PROMPT:, None]).squeeze(-1)


@torch.no_grad()
def complete(policy: LanguagePolicy, ids: Tensor, generator: torch.Generator) -> Tensor:
    """The same prompts with completions drawn from the policy."""
    ids = ids.clone()
    for position in range(PROMPT, ids.shape[1]):
        logits = policy.base(input_ids=ids[:, :position], use_cache=False).logits[:, -1]
        ids[:, position] = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return ids


@torch.no_grad()
def probability_of_right(policy: LanguagePolicy) -> float:
    """Mean probability of the right completion over all hundred prompts."""
    a, b = torch.arange(100) // 10, torch.arange(100) % 10
    ids = write_sums(a, b, a + b)
    return round(float(chosen(logits_of(policy, ids), ids).sum(-1).exp().mean()), 4)


def pretrain(seed: int) -> tuple[LanguagePolicy, LanguagePolicy]:
    """A base that knows the form of a sum, and a teacher that went on to learn to add."""
    policies = []
    for stage in (["base"], ["base", "teacher"]):
        generator = torch.Generator().manual_seed(seed)
        tokenizer = build_tokenizer("bytes")
        policy = load_policy("tiny-qwen2", tokenizer=tokenizer, config=CONFIG, seed=seed)
        optimiser = torch.optim.Adam(policy.parameters(), lr=PRETRAINING_RATE)
        for name in stage:
            for _ in range(PRETRAINING[name]):
                ids = draw_sums(generator, ROWS, right=name == "teacher")
                optimiser.zero_grad()
                mean(nll(logits_of(policy, ids), ids[:, PROMPT:])).backward()
                optimiser.step()
        policies.append(policy)
    return policies[0], policies[1]


def mean(terms: LossTerms) -> Tensor:
    return terms.total / terms.count


Loss = Callable[[LanguagePolicy], Tensor]


def build_loss(
    method: str,
    policy: LanguagePolicy,
    base: LanguagePolicy,
    teacher: LanguagePolicy,
    generator: torch.Generator,
) -> Loss:
    """The loss of one batch: demonstrations, or rollouts with everything old frozen.

    The advantage of every token is preference based (equation 13): log π_teacher - log π_base. LCO
    reads all of them, with mean 0 over the vocabulary; PPO that of the sampled token, with mean 0
    under the behaviour policy.
    """
    ids = draw_sums(generator, ROWS)
    if method == "sft":
        return lambda policy: mean(nll(logits_of(policy, ids), ids[:, PROMPT:]))
    ids = complete(policy, ids, generator)
    with torch.no_grad():
        old = logits_of(policy, ids)
        advantages = logits_of(teacher, ids).log_softmax(-1) - logits_of(base, ids).log_softmax(-1)
    mask = torch.ones(ids[:, PROMPT:].shape, dtype=torch.bool)
    if method in LCO:
        centred = advantages - advantages.mean(-1, keepdim=True)
        target = optimal_logits(old, centred, beta=BETA)
        return lambda policy: mean(LIBRARY[method](logits_of(policy, ids), target, mask))
    sampled = advantages.gather(-1, ids[:, PROMPT:, None]).squeeze(-1)
    sampled -= (old.softmax(-1) * advantages).sum(-1)
    if method == "ppo, random signs":
        sampled = sampled * (2 * torch.randint(2, sampled.shape, generator=generator) - 1)
    old_logps = chosen(old, ids)
    return lambda policy: mean(
        ppo_clip(chosen(logits_of(policy, ids), ids), old_logps, sampled, mask)
    )


def gradient(policy: LanguagePolicy, loss: Loss) -> Tensor:
    policy.zero_grad()
    loss(policy).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def train(
    method: str, seed: int, renew: int, base: LanguagePolicy, teacher: LanguagePolicy
) -> dict[str, Any]:
    """Adam from the base; then every gradient against the way to the end.

    Returns
    -------
    dict
        ``own``, ``other``: share of steps on which ``-∇L · (θ_T - θ_t) > 0``, for the gradient of
        the step's batch and for that of an independent one. ``cosine``: of the latter, mean.
        ``right``: probability of the right answer before and after.
    """
    generator = torch.Generator().manual_seed(seed)
    policy = load_policy("tiny-qwen2", tokenizer=base.tokenizer, config=CONFIG, seed=seed)
    policy.load_state_dict(base.state_dict())
    optimiser = torch.optim.Adam(policy.parameters(), lr=RATE)
    before = probability_of_right(policy)
    visited, gradients = [], []
    for t in range(UPDATES):
        if t % renew == 0:
            batches = [build_loss(method, policy, base, teacher, generator) for _ in range(2)]
        visited.append(parameters_to_vector(policy.parameters()).detach())
        other = gradient(policy, batches[1])
        # Last, so that the optimiser steps along it.
        gradients.append(torch.stack([gradient(policy, batches[0]), other]))
        optimiser.step()
    way = parameters_to_vector(policy.parameters()).detach() - torch.stack(visited)
    downhill = -torch.stack(gradients)
    products = (downhill * way[:, None]).sum(-1)
    norms = downhill.norm(dim=-1)
    # Where PPO has clipped every token there is no step to judge.
    moving = (norms > 0).all(-1)
    own, other_share = (products[moving] > 0).double().mean(0).tolist()
    cosine = products / (norms * way.norm(dim=-1, keepdim=True)).clamp(min=1e-30)
    return {
        "own": round(own, 4),
        "other": round(other_share, 4),
        "cosine": round(float(cosine[moving, 1].mean()), 4),
        "judged": int(moving.sum()),
        "right": [before, probability_of_right(policy)],
    }


def run_seed(seed: int) -> dict[str, Any]:
    """All methods from one base, for every way of renewing rollouts."""
    base, teacher = pretrain(seed)
    return {
        "teacher": probability_of_right(teacher),
        "runs": {
            f"{method} | {renew}": train(method, seed, renew, base, teacher)
            for renew in RENEW
            for method in METHODS
        },
    }
