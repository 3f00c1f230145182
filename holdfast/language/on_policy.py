"""Losses on the policy's own completions, bound to rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.errors import TrainingError
from holdfast.joint.objective import LossTerms
from holdfast.language.data import Prompt
from holdfast.language.frozen import Frozen
from holdfast.language.generate import Generator, Sampling
from holdfast.language.guards.curvature import CurvatureGuard
from holdfast.language.guards.penalties import Penalties
from holdfast.language.head import (
    Bonus,
    Head,
    Source,
    TokenStatistics,
    Watch,
    chunked_gkd,
    chunked_lco_kl,
    chunked_lco_log_cosh,
    chunked_lco_mse,
    mean_logits,
    token_statistics,
)
from holdfast.language.imitation import DemonstrationLoss
from holdfast.language.losses.aggregation import aggregate
from holdfast.language.losses.policy_gradient import (
    negative_share,
    off_policy_sequences,
    value_loss,
)
from holdfast.language.model import LanguagePolicy
from holdfast.language.rewards import Rewards
from holdfast.language.rollout_batch import RolloutBatch, pair, which
from holdfast.language.rollouts import Rollout, sample, seed_of
from holdfast.language.signals import KeptHead, Signals

PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor], LossTerms]
"""``loss(logps, old_logps, advantages, mask)``, all ``(batch, time)``."""


# Policy gradients ---------------------------------------------------------------------------------


@dataclass
class PolicyGradient:
    """A policy-gradient loss, with penalties, guards and a critic where they are asked for.

    Attributes
    ----------
    pad_id : int
    loss : callable
        ``loss(logps, old_logps, advantages, mask) -> LossTerms``.
    temperature : float
        Of sampling.
    penalties : Penalties
        Aggregated as ``loss`` is.
    vf_coef : float, optional
        Weight of the critic's loss; ``None``: there is no critic.
    cliprange_value : float
        How far a value may move from the one at sampling before it is clipped.
    value : callable
        From the outputs of the value head ``(batch, time, heads)`` to values ``(batch, time)``.
    curvature : CurvatureGuard, optional
        Tokens that it masks leave loss and normaliser.
    off_policy_threshold : float, optional
        As in :func:`~holdfast.language.losses.policy_gradient.off_policy_sequences`.
    kl_cov_coef : float
        Coefficient of ``|log r|`` at the tokens that
        :class:`~holdfast.language.guards.filters.KlCov` has marked. 0: none are.
    demonstrations : DemonstrationLoss, optional
        Where the data's own completions are among the rollouts.
    hint_coef : float
        Coefficient of the negative log-likelihood of hints.
    """

    pad_id: int
    loss: PolicyLoss
    temperature: float = 1.0
    penalties: Penalties = field(default_factory=Penalties)
    vf_coef: float | None = None
    cliprange_value: float = 0.2
    value: Callable[[Tensor], Tensor] = partial(torch.squeeze, dim=-1)
    curvature: CurvatureGuard | None = None
    off_policy_threshold: float | None = None
    kl_cov_coef: float = 0.0
    demonstrations: DemonstrationLoss | None = None
    hint_coef: float = 0.0

    def __call__(self, policy: nn.Module, rows: Sequence[Rollout]) -> LossTerms:
        batch = RolloutBatch(policy, rows, self.pad_id)
        critic = _value_head(policy) if self.vf_coef is not None else None
        advantages = batch.padded("advantages")

        def read(hidden: Tensor, head: Head, labels: Tensor) -> tuple[Any, ...]:
            guard = self.curvature
            seen = token_statistics(
                hidden,
                head,
                labels,
                temperature=self.temperature,
                statistics=True,
                moments=guard is not None,
            )
            mask = batch.mask & ~batch.hinted
            found: dict[str, Tensor] = {}
            if guard is not None:
                kept, found = guard(seen, advantages, hidden, head, labels, self.temperature)
                mask = mask & kept
            narrowness = None
            if self.penalties.entropy_coefficient:
                narrowness = self.penalties.narrowness(hidden, head, mask, self.temperature)
            values = None
            if critic is not None:
                values = self.value(critic(hidden.to(critic.weight.dtype))).float()
            return seen, mask, narrowness, values, found

        seen, mask, narrowness, values, found = policy(batch.input_ids, batch.labels, read=read)
        logps = seen.logps
        old = batch.padded("old_logps") if batch.has("old_logps") else logps.detach()
        if self.off_policy_threshold is not None:
            left = off_policy_sequences(
                logps, old, advantages, mask, threshold=self.off_policy_threshold
            )
            found["off_policy_masked"] = pair(left[mask])
            found |= which("off_policy_masked", left & mask, seen)
            advantages = advantages.masked_fill(left, 0.0)
        terms = self._terms(batch, seen, old, advantages, mask)
        total = terms.total
        metrics = {**batch.metrics(seen), **terms.metrics, **found}

        def summed(per_token: Tensor, mask: Tensor) -> Tensor:
            shape = self.penalties.aggregation, self.penalties.length
            return aggregate(per_token, mask, *shape)[0]

        if self.kl_cov_coef:
            marked = batch.padded("guard/kl_cov") > 0
            total = total + self.kl_cov_coef * summed((logps - old).abs() * marked, mask)
        if self.hint_coef:
            total = total - self.hint_coef * summed(logps, batch.hinted)
            metrics["hint_length"] = pair(batch.hinted.sum(-1))
        if self.penalties.kl_coefficient:
            reference = batch.padded("reference_logps")
            total = total + self.penalties.divergence(logps, reference, mask)
        if narrowness is not None:
            total = total + narrowness
        if self.vf_coef is not None:
            error = value_loss(
                values,
                batch.padded("returns"),
                batch.padded("values"),
                mask,
                cliprange_value=self.cliprange_value,
            )
            total = total + self.vf_coef * error.total
            metrics |= {"value_loss": error.total.detach(), **error.metrics}
        return LossTerms(total, terms.count, metrics)

    def _terms(
        self,
        batch: RolloutBatch,
        seen: TokenStatistics,
        old: Tensor,
        advantages: Tensor,
        mask: Tensor,
    ) -> LossTerms:
        """The loss of the policy's own completions, and that of the data's."""
        if self.demonstrations is None:
            return self.loss(seen.logps, old, advantages, mask)
        given, own = batch.given, ~batch.given
        assert seen.entropy is not None
        tokens = batch.mask.sum(-1, keepdim=True).clamp(min=1)
        entropy = seen.entropy.sum(-1, keepdim=True) / tokens
        amounts = self.demonstrations.own_advantages(advantages[own], entropy[own])
        terms = self.loss(seen.logps[own], old[own], amounts, mask[own])
        losses = self.demonstrations(seen.logps[given], entropy[given], advantages[given])
        shape = self.penalties.aggregation, self.penalties.length
        total, count = aggregate(losses, mask[given], *shape)
        metrics = {
            "demonstrations": pair(given),
            "demonstration_logps": pair(seen.logps[given][mask[given]]),
        }
        return LossTerms(terms.total + total, terms.count + count, {**terms.metrics, **metrics})


def _value_head(policy: nn.Module) -> nn.Linear:
    inner: Any = policy
    while not isinstance(inner, LanguagePolicy):
        inner = inner.module  # a data-parallel wrapper
    assert inner.value_head is not None
    return inner.value_head


# Logits-convex optimisation -----------------------------------------------------------------------

_MATCHES = {
    "lco_kl": chunked_lco_kl,
    "lco_mse": chunked_lco_mse,
    "lco_log_cosh": chunked_lco_log_cosh,
}
Centre = Literal["none", "mean", "logprob"]


@dataclass
class Lco:
    """Match the optimal logits ``z* = z_old + A / beta`` over the whole vocabulary.

    With sparse advantages the sampled token alone has one (equation 11). With frozen models the
    advantage is a combination of their logits: ``A = sum_j c_j z_j`` (equation 13:
    ``beta_rm (z_rm - z_ref)``; equation 12: the logits of a language model, less their
    log-sum-exp). A constant per token changes nothing for ``lco_kl``; for the others ``centre``
    says which one is taken.

    Attributes
    ----------
    pad_id : int
    kind : str
        ``lco_kl``, ``lco_mse`` or ``lco_log_cosh``.
    beta : float
        KL strength, positive.
    sparse : bool
        Use the rollouts' advantages at sampled tokens.
    sources : mapping of str to (Frozen, float)
        Frozen models behind dense advantages, with their coefficients in ``A``.
    centre : str
        ``none``: raw logits, as they come. ``mean``: advantages of mean 0 over the vocabulary.
        ``logprob``: differences of log-probabilities, as equations 12 and 13 have them.
    temperature : float
        Of sampling.
    behaviour_head : KeptHead
        With it, hidden states of the policy that sampled are its logits.
    penalties : Penalties
        Aggregated over tokens, as the loss is.
    mixed : bool
        The data's own completions are among the rollouts: they are learnt from as all others, by
        their advantages.
    curvature : CurvatureGuard, optional
        For ``lco_kl`` with sparse advantages alone: at the policy that sampled, its gradient is
        that of a policy gradient with the advantage ``1 - 1 / Z``, ``Z = 1 + pi(a) (exp(A / beta) -
        1)``. Tokens that it masks leave loss and normaliser.
    """

    pad_id: int
    kind: str
    beta: float
    sparse: bool = True
    sources: Mapping[str, tuple[Frozen, float]] = field(default_factory=dict)
    centre: Centre = "none"
    temperature: float = 1.0
    behaviour_head: KeptHead = field(default_factory=KeptHead)
    penalties: Penalties = field(default_factory=Penalties)
    mixed: bool = False
    curvature: CurvatureGuard | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"beta is {self.beta}: it must be positive and finite")

    def __call__(self, policy: nn.Module, rows: Sequence[Rollout]) -> LossTerms:
        batch = RolloutBatch(policy, rows, self.pad_id)
        match = _MATCHES[self.kind]

        def read(hidden: Tensor, head: Head, labels: Tensor) -> tuple[Any, ...]:
            mask = labels >= 0
            flat, ids = hidden[mask], labels[mask]
            behaviour = batch.flat("old_hidden") if batch.has("old_hidden") else flat.detach()
            sources, bonus = self._target(batch, behaviour, head, ids)
            kept = ~batch.hinted[mask]
            found: dict[str, Tensor] = {}
            if self.curvature is not None:
                passed, found = self._passed(self.curvature, batch, flat, head, ids)
                kept &= passed
            watch = Watch()
            terms = match(
                flat,
                head,
                sources,
                kept,
                bonus=bonus,
                temperature=self.temperature,
                watch=watch,
            )
            mask = mask.masked_scatter(mask, kept)
            with torch.no_grad():
                # The loss has seen the whole vocabulary: the record needs the sampled token only.
                logps = logits_at(flat[kept], head, ids[kept]) / self.temperature - watch.lse
                zeros = logps.new_zeros(mask.shape)
                entropy = zeros.masked_scatter(mask, watch.entropy)
                seen = TokenStatistics(zeros.masked_scatter(mask, logps), mask, entropy)
            total = terms.total
            if self.penalties.kl_coefficient:
                own = token_statistics(hidden, head, labels, temperature=self.temperature).logps
                reference = batch.padded("reference_logps")
                total = total + self.penalties.divergence(own, reference, mask)
            if self.penalties.entropy_coefficient:
                total = total + self.penalties.narrowness(hidden, head, mask, self.temperature)
            return LossTerms(total, terms.count, {**terms.metrics, **found}), seen

        terms, seen = policy(batch.input_ids, batch.labels, read=read)
        metrics = {**batch.metrics(seen), **terms.metrics}
        if self.mixed:
            metrics["demonstrations"] = pair(batch.given)
        if self.sparse:
            metrics["negative_share"] = negative_share(batch.flat("advantages"))
        return LossTerms(terms.total, terms.count, metrics)

    def _passed(
        self, guard: CurvatureGuard, batch: RolloutBatch, flat: Tensor, head: Head, ids: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The tokens ``(counted,)`` that may be learnt from."""
        with torch.no_grad():
            seen = token_statistics(flat, head, ids, temperature=self.temperature, moments=True)
            others = torch.log1p(-seen.logps.exp().clamp(max=1.0 - 1e-7))
            normaliser = torch.logaddexp(others, seen.logps + batch.flat("advantages") / self.beta)
            advantages = -torch.expm1(-normaliser)
        return guard(seen, advantages, flat, head, ids, self.temperature)

    def _target(
        self, batch: RolloutBatch, behaviour: Tensor, head: Head, ids: Tensor
    ) -> tuple[list[Source], Bonus]:
        with torch.no_grad():
            sampled_by = self.behaviour_head.head if batch.has("old_hidden") else None
            sources: list[Source] = [(behaviour, sampled_by or head, 1.0)]
            offset = torch.zeros(len(ids), device=ids.device)
            for name, (model, coefficient) in self.sources.items():
                states, layer = batch.flat(f"{name}_hidden"), model.head()
                # Advantages are at temperature 1, and all logits are divided by it.
                share = coefficient / self.beta
                sources.append((states, layer, share * self.temperature))
                if self.centre == "mean":
                    offset -= share * mean_logits(states, layer)
                elif self.centre == "logprob":
                    offset -= share * log_normaliser(states, layer, ids)
            amounts = None
            if self.sparse:
                amounts = batch.flat("advantages").float() / self.beta
                if not bool(amounts.isfinite().all()):
                    raise TrainingError("advantages are not finite: look at the rewards")
                if self.centre == "mean":
                    offset -= amounts / len(head.weight)
        token_ids = ids if self.sparse else None
        return sources, Bonus(offset, token_ids, amounts)


def log_normaliser(hidden: Tensor, head: Head, ids: Tensor) -> Tensor:
    """Log-sum-exp of the logits at every row ``(rows,)``, in tiles: a logit less its log-prob."""
    return logits_at(hidden, head, ids) - token_statistics(hidden, head, ids).logps


def logits_at(hidden: Tensor, head: Head, ids: Tensor) -> Tensor:
    """The logit of one id in every row ``(rows,)``, at least in float32."""
    kind = torch.promote_types(hidden.dtype, torch.float32)
    found = (hidden.to(kind) * head.weight[ids].to(kind)).sum(-1)
    if head.bias is not None:
        found = found + head.bias[ids]
    found = found * head.scale
    return found if head.softcap is None else head.softcap * torch.tanh(found / head.softcap)


# Distillation -------------------------------------------------------------------------------------


@dataclass
class Distillation:
    """Follow a teacher over the whole vocabulary (GKD), and MiniLLM's reward of later tokens.

    Attributes
    ----------
    pad_id : int
    teacher : Frozen
        Rollouts carry its hidden states as ``teacher_hidden``.
    beta : float
        Of the divergence, as in :func:`holdfast.language.losses.gkd`. MiniLLM's is 1.
    temperature : float
        Of the divergence.
    later : callable, optional
        MiniLLM: a policy-gradient loss on the reward of later tokens, added to the divergence.
    sampling : float
        Temperature of sampling, at which that loss takes log-probabilities.
    """

    pad_id: int
    teacher: Frozen
    beta: float
    temperature: float = 1.0
    later: PolicyLoss | None = None
    sampling: float = 1.0

    def __call__(self, policy: nn.Module, rows: Sequence[Rollout]) -> LossTerms:
        batch = RolloutBatch(policy, rows, self.pad_id)

        def read(hidden: Tensor, head: Head, labels: Tensor) -> tuple[LossTerms, TokenStatistics]:
            mask = labels >= 0
            teacher = batch.flat("teacher_hidden"), self.teacher.head()
            terms = chunked_gkd(
                hidden[mask],
                head,
                teacher,
                torch.ones_like(labels[mask], dtype=torch.bool),
                beta=self.beta,
                temperature=self.temperature,
            )
            seen = token_statistics(
                hidden, head, labels, temperature=self.sampling, statistics=True
            )
            return terms, seen

        terms, seen = policy(batch.input_ids, batch.labels, read=read)
        metrics = {**batch.metrics(seen), "divergence": terms.total.detach()}
        if self.later is None:
            return LossTerms(terms.total, terms.count, metrics)
        old = batch.padded("old_logps") if batch.has("old_logps") else seen.logps.detach()
        more = self.later(seen.logps, old, batch.padded("advantages"), batch.mask)
        return LossTerms(terms.total + more.total, terms.count, {**metrics, **more.metrics})


# Evaluation ---------------------------------------------------------------------------------------


@dataclass
class DivergenceEvaluation:
    """The training loss on fresh completions of prompts: for objectives without a reward."""

    generator: Generator
    sampling: Sampling
    signals: Signals
    loss: Callable[[nn.Module, Sequence[Rollout]], LossTerms]
    decode: Callable[[Sequence[int]], str]

    def __call__(self, policy: nn.Module, rows: Sequence[Prompt]) -> LossTerms:
        found = sample(rows, _seeds(rows), self.generator, self.sampling, None, self.decode)
        return self.loss(policy, self.signals.score(found))


@dataclass
class RewardEvaluation:
    """Mean reward on prompts, as a loss: smaller is better, so its sign is turned.

    The same prompts get the same seeds every time, so that evaluations differ by policy alone.
    """

    generator: Generator
    sampling: Sampling
    rewards: Rewards
    decode: Callable[[Sequence[int]], str]

    def __call__(self, policy: nn.Module, rows: Sequence[Prompt]) -> LossTerms:
        found = sample(rows, _seeds(rows), self.generator, self.sampling, self.rewards, self.decode)
        rewards = torch.tensor([row.reward for row in found], dtype=torch.float64)
        rewards = rewards[rewards.isfinite()]
        by_row = {
            "completions/mean_length": [float(row.counted) for row in found],
            "completions/clipped_ratio": [float(not row.completed) for row in found],
        }
        for name in found[0].rewards:
            by_row[f"rewards/{name}/mean"] = [row.rewards[name] for row in found]
        metrics = {"reward": rewards.sum()}
        for name, numbers in by_row.items():
            values = torch.tensor(numbers, dtype=torch.float64)
            values = values[values.isfinite()]
            metrics[name] = torch.stack([values.sum(), values.new_tensor(float(len(values)))])
        return LossTerms(-rewards.sum(), torch.tensor(len(rewards)), metrics)


def _seeds(rows: Sequence[Prompt]) -> list[int]:
    """The same for the same prompt, wherever its file lies."""
    return [seed_of(f"evaluation/{row.group}") for row in rows]
