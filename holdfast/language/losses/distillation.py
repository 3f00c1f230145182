"""Distillation: follow a teacher on the policy's own samples."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from holdfast.joint import LossTerms
from holdfast.language.head.divergences import generalised_jsd
from holdfast.language.head.matching import dense_match


def gkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> LossTerms:
    """Generalised knowledge distillation: a divergence of student and teacher at every token.

    Agarwal et al., "On-Policy Distillation of Language Models", equation 1, in TRL's form:
    ``beta KL(T || M) + (1 - beta) KL(S || M)`` with ``M = (1 - beta) S + beta T``; ``beta`` 0 is
    the forward ``KL(T || S)`` and 1 the reverse ``KL(S || T)``, which are the limits of the others
    only after division by ``beta (1 - beta)``.

    Parameters
    ----------
    student_logits, teacher_logits : Tensor
        ``(..., time, vocab)``. No gradient flows to the teacher.
    mask : Tensor
        ``(..., time)``, bool: the counted tokens.
    beta : float
        In [0, 1].
    temperature : float
        Both are divided by it. Positive.

    Returns
    -------
    LossTerms
        Summed over tokens, in nats.

    Raises
    ------
    ValueError
        For a bad shape or number, or logits that are not finite at a counted token.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}: it must lie in [0, 1]")
    kind = partial(generalised_jsd, beta)
    return dense_match(kind, student_logits, teacher_logits, mask, temperature=temperature)


def minillm_advantages(
    teacher_logps: Tensor,
    student_logps: Tensor,
    mask: Tensor,
    *,
    length_normalization: bool = True,
) -> Tensor:
    """MiniLLM's long-term reward of every token but its own step.

    Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", section 2.2. With
    ``r_t = log p(y_t) - log q(y_t)`` (teacher less student, on the sampled tokens), token ``t``
    earns ``sum_{t' > t} r_t'``: the single step ``t' = t`` is taken exactly, as the reverse KL
    over the vocabulary. With length normalisation the sum is divided by how many terms it has.

    Parameters
    ----------
    teacher_logps, student_logps : Tensor
        ``(batch, time)``: log-probabilities of the sampled tokens.
    mask : Tensor
        ``(batch, time)``, bool. Counted tokens may lie anywhere.
    length_normalization : bool
        Divide by the number of later counted tokens.

    Returns
    -------
    Tensor
        ``(batch, time)``, detached; 0 where nothing follows.

    Raises
    ------
    ValueError
        For shapes that differ, or a mask that is not bool.
    """
    if not teacher_logps.shape == student_logps.shape == mask.shape or mask.ndim != 2:
        raise ValueError(
            f"teacher_logps {tuple(teacher_logps.shape)}, student_logps "
            f"{tuple(student_logps.shape)} and mask {tuple(mask.shape)} must all be (batch, time)"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}, not bool")
    rewards = (teacher_logps - student_logps).detach().masked_fill(~mask, 0.0)
    later = rewards.flip(-1).cumsum(-1).flip(-1) - rewards
    if length_normalization:
        counted = mask.to(rewards.dtype)
        remaining = counted.flip(-1).cumsum(-1).flip(-1) - counted
        later = later / remaining.clamp(min=1.0)
    return later.masked_fill(~mask, 0.0)
