"""Losses on the policy's own completions, bound to rollouts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.errors import TrainingError
from holdfast.joint.objective import LossTerms
from holdfast.language.advantages import gae
from holdfast.language.data import Prompt, collate
from holdfast.language.frozen import Frozen
from holdfast.language.generate import Generator, Sampling
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
from holdfast.language.losses.aggregation import Aggregation, aggregate
from holdfast.language.losses.distillation import minillm_advantages
from holdfast.language.losses.policy_gradient import kl_k3, negative_share, value_loss
from holdfast.language.model import LanguagePolicy
from holdfast.language.rewards import Rewards
from holdfast.language.rollouts import Rollout, sample, seed_of

PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor], LossTerms]
"""``loss(logps, old_logps, advantages, mask)``, all ``(batch, time)``."""


# Signals ------------------------------------------------------------------------------------------


@dataclass
class Signals:
    """Adds to rollouts what a loss needs besides their tokens.

    Attributes
    ----------
    policy : LanguagePolicy
    temperature : float
        Of sampling; log-probabilities are taken at it.
    advantages : callable, optional
        From rewards ``(completions,)``, groups in order, and the size of a group, to advantages
        ``(completions,)``. ``None``: there are none (distillation, or dense advantages).
    behaviour : {"none", "logps", "hidden"}
        What is kept of the policy that sampled. ``none``: rollouts serve a single update, in which
        the policy still is the one that sampled.
    frozen : mapping of str to Frozen
        Models whose hidden states are kept, as ``{name}_hidden``.
    reference : Frozen, optional
        Its log-probabilities are kept, as ``reference_logps``, for a penalty or for the record.
    preference : tuple of (Frozen, Frozen, float), optional
        Preference-tuned model, its reference and ``beta_rm``: the advantage of a sampled token is
        ``beta_rm (log pi_rm - log pi_ref)``.
    critic : tuple of (float, float), optional
        Discount and trace of generalised advantage estimation with the policy's value head. The
        reward is that of the last token, or ``preference`` of every token.
    minillm : tuple of (Frozen, float, bool), optional
        Teacher, its share in sampling, and whether to normalise by length: the advantage is
        MiniLLM's reward of later tokens, and ``old_logps`` are those of the mixture.
    whiten : bool
        Advantages get mean 0 and deviation 1 over the tokens of a batch of rollouts.
    kept_head : KeptHead
        Where the output layer of the policy that sampled is kept, with ``behaviour`` "hidden".
    autocast : callable
        Makes the context that training's forward passes run in.
    """

    policy: LanguagePolicy
    temperature: float = 1.0
    advantages: Callable[[Tensor, int], Tensor] | None = None
    behaviour: Literal["none", "logps", "hidden"] = "none"
    frozen: Mapping[str, Frozen] = field(default_factory=dict)
    reference: Frozen | None = None
    preference: tuple[Frozen, Frozen, float] | None = None
    critic: tuple[float, float] | None = None
    minillm: tuple[Frozen, float, bool] | None = None
    whiten: bool = False
    kept_head: KeptHead = field(default_factory=lambda: KeptHead())
    autocast: Callable[[], Any] = contextlib.nullcontext

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        with self.autocast():
            return self._score(rollouts)

    def state_dict(self) -> dict[str, Any]:
        return self.kept_head.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kept_head.load_state_dict(state, self.policy.head())

    def _score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        signals: list[dict[str, Tensor]] = [{} for _ in rollouts]
        asked: dict[int, list[Tensor]] = {}

        def hidden_of(model: Frozen) -> list[Tensor]:
            """A model may serve several signals and is asked once."""
            if id(model) not in asked:
                asked[id(model)] = model.hidden([row.tokens for row in rollouts])
            return asked[id(model)]

        def logps_of(model: Frozen, temperature: float) -> list[Tensor]:
            return self._logps(hidden_of(model), model.head(), rollouts, temperature)

        def keep(name: str, values: Sequence[Tensor]) -> None:
            for into, value in zip(signals, values, strict=True):
                into[name] = value

        if self.behaviour != "none" or self.critic:
            own = Frozen(self.policy)
            hidden = hidden_of(own)
            if self.behaviour != "none":
                keep("old_logps", self._logps(hidden, own.head(), rollouts))
            if self.behaviour == "hidden":
                keep("old_hidden", hidden)
                self.kept_head.keep(own.head())
            if self.critic:
                assert self.policy.value_head is not None
                with torch.no_grad():
                    kind = self.policy.value_head.weight.dtype
                    values = [self.policy.value_head(h.to(kind)).squeeze(-1) for h in hidden]
                    keep("values", [value.float() for value in values])
        for name, model in self.frozen.items():
            keep(f"{name}_hidden", hidden_of(model))
        if self.reference is not None:
            keep("reference_logps", logps_of(self.reference, self.temperature))
        if self.preference is not None:
            tuned, reference, beta = self.preference
            above, below = logps_of(tuned, 1.0), logps_of(reference, 1.0)
            keep("advantages", [beta * (a - b) for a, b in zip(above, below, strict=True)])
        if self.minillm is not None:
            teacher, alpha, by_length = self.minillm
            theirs = logps_of(teacher, self.temperature)
            for into, logps in zip(signals, theirs, strict=True):
                own_logps, everything = into["old_logps"], torch.ones(1, len(logps)).bool()
                into["advantages"] = minillm_advantages(
                    logps.unsqueeze(0),
                    own_logps.unsqueeze(0),
                    everything.to(logps.device),
                    length_normalization=by_length,
                )[0]
                if alpha:
                    into["old_logps"] = torch.logaddexp(
                        logps + math.log(alpha), own_logps + math.log1p(-alpha)
                    )
        return [
            replace(row, signals={k: v.cpu() for k, v in {**row.signals, **found}.items()})
            for row, found in zip(rollouts, signals, strict=True)
        ]

    def _logps(
        self,
        hidden: Sequence[Tensor],
        head: Head,
        rollouts: Sequence[Rollout],
        temperature: float | None = None,
    ) -> list[Tensor]:
        temperature = self.temperature if temperature is None else temperature
        with torch.no_grad():
            return [
                token_statistics(
                    states, head, _sampled(row).to(states.device), temperature=temperature
                ).logps
                for states, row in zip(hidden, rollouts, strict=True)
            ]

    def credit(self, rollouts: Sequence[Rollout], num_generations: int) -> list[Rollout]:
        found = list(rollouts)
        if self.critic:
            found = [self._estimated(row) for row in rollouts]
        elif self.advantages is not None:
            rewards = torch.tensor([row.reward for row in rollouts], dtype=torch.float64)
            amounts = self.advantages(rewards, num_generations)
            found = [
                _with(row, advantages=torch.full((row.counted,), float(amount)))
                for row, amount in zip(rollouts, amounts, strict=True)
            ]
        return _whitened(found) if self.whiten else found

    def _estimated(self, row: Rollout) -> Rollout:
        assert self.critic is not None
        discount, trace = self.critic
        values = row.signals["values"].unsqueeze(0)
        if self.preference is None and math.isnan(row.reward):
            # Nobody judged it: there is nothing to learn from, for policy or critic.
            return _with(row, advantages=torch.zeros_like(values[0]), returns=values[0])
        if self.preference is not None:
            rewards = row.signals["advantages"].unsqueeze(0)
        else:
            rewards = torch.zeros_like(values)
            rewards[0, -1] = row.reward
        advantages, returns = gae(rewards, values, discount=discount, trace=trace)
        return _with(row, advantages=advantages[0], returns=returns[0])


def _whitened(rollouts: Sequence[Rollout]) -> list[Rollout]:
    everything = torch.cat([row.signals["advantages"] for row in rollouts])
    mean, spread = everything.mean(), everything.std(correction=0).clamp(min=1e-8)
    return [_with(row, advantages=(row.signals["advantages"] - mean) / spread) for row in rollouts]


def _with(row: Rollout, **signals: Tensor) -> Rollout:
    return replace(row, signals={**row.signals, **signals})


def _sampled(row: Rollout) -> Tensor:
    return torch.from_numpy(row.tokens.input_ids[row.tokens.counted].astype("int64"))


class KeptHead:
    """The output layer of the policy that sampled, for as long as its rollouts are used.

    Hidden states are logits only together with it. Where it is not trained nothing has to be kept.
    """

    def __init__(self) -> None:
        self.head: Head | None = None

    def keep(self, head: Head) -> None:
        """Remember a layer as it is now, if it can change."""
        trained = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
        self.head = None
        if trained:
            bias = None if head.bias is None else head.bias.detach().clone()
            self.head = replace(head, weight=head.weight.detach().clone(), bias=bias)

    def state_dict(self) -> dict[str, Any]:
        if self.head is None:
            return {}
        bias = {} if self.head.bias is None else {"bias": self.head.bias}
        return {"weight": self.head.weight, **bias}

    def load_state_dict(self, state: Mapping[str, Any], like: Head) -> None:
        """``like``: the policy's own layer, for what is no tensor in it, and its device."""
        self.head = None
        if state:
            tensors = {name: value.to(like.weight.device) for name, value in state.items()}
            self.head = replace(like, **{"bias": None, **tensors})


# A batch ------------------------------------------------------------------------------------------


class _Batch:
    """Rollouts as padded tensors; signals are put where their tokens are."""

    def __init__(self, policy: nn.Module, rows: Sequence[Rollout], pad_id: int) -> None:
        self.rows = rows
        self.device = next(policy.parameters()).device
        input_ids, labels = collate([row.tokens for row in rows], pad_id)
        self.input_ids, self.labels = input_ids.to(self.device), labels.to(self.device)
        self.mask = self.labels[:, 1:] >= 0

    def has(self, name: str) -> bool:
        return name in self.rows[0].signals

    def flat(self, name: str) -> Tensor:
        """``(counted, ...)``: the signals of all rows, one after another."""
        return torch.cat([row.signals[name] for row in self.rows]).to(self.device)

    def padded(self, name: str) -> Tensor:
        """``(batch, time)``."""
        return torch.zeros(self.mask.shape, device=self.device).masked_scatter(
            self.mask, self.flat(name).float()
        )

    def metrics(self, seen: TokenStatistics) -> dict[str, Tensor]:
        """What every run shows of its rollouts and of how the policy sees them."""
        rows = self.rows
        per_token = {
            "sampled_probability": seen.logps.detach().exp(),
            "entropy": seen.entropy,
        }
        # Rollouts that serve one update were sampled by the very policy that is updated.
        sampled_by = self.padded("old_logps") if self.has("old_logps") else seen.logps.detach()
        per_token["approx_kl"] = kl_k3(sampled_by, seen.logps.detach())
        if self.has("reference_logps"):
            per_token["kl"] = kl_k3(seen.logps.detach(), self.padded("reference_logps"))
        found = {
            name: self._pair(values[self.mask])
            for name, values in per_token.items()
            if values is not None
        }
        by_row: dict[str, list[float]] = {
            "reward": [row.reward for row in rows],
            "reward_std": [row.group_std for row in rows],
            "frac_reward_zero_std": [
                math.nan if math.isnan(row.group_std) else float(row.group_std == 0) for row in rows
            ],
            "completions/mean_length": [row.counted for row in rows],
            "completions/clipped_ratio": [float(not row.completed) for row in rows],
            "samples": [row.samples for row in rows],
        }
        for name in rows[0].rewards:
            by_row[f"rewards/{name}/mean"] = [row.rewards[name] for row in rows]
        for name, numbers in by_row.items():
            values = torch.tensor(numbers, dtype=torch.float64)
            found[name] = self._pair(values[values.isfinite()])
        return found

    @staticmethod
    def _pair(values: Tensor) -> Tensor:
        values = values.detach().double()
        return torch.stack([values.sum(), values.new_tensor(float(values.numel()))])


# Policy gradients ---------------------------------------------------------------------------------


@dataclass
class PolicyGradient:
    """A policy-gradient loss, with a KL penalty and a critic where they are asked for.

    Attributes
    ----------
    pad_id : int
    loss : callable
        ``loss(logps, old_logps, advantages, mask) -> LossTerms``.
    temperature : float
        Of sampling.
    beta : float
        Of the penalty on the k3 estimate of the KL to the reference, per token, 0 or more.
    aggregation, length
        Of the penalty: as those of ``loss``.
    vf_coef : float, optional
        Weight of the critic's loss; ``None``: there is no critic.
    cliprange_value : float
        How far a value may move from the one at sampling before it is clipped.
    """

    pad_id: int
    loss: PolicyLoss
    temperature: float = 1.0
    beta: float = 0.0
    aggregation: Aggregation = "token-mean"
    length: int | None = None
    vf_coef: float | None = None
    cliprange_value: float = 0.2

    def __call__(self, policy: nn.Module, rows: Sequence[Rollout]) -> LossTerms:
        batch = _Batch(policy, rows, self.pad_id)
        critic = _value_head(policy) if self.vf_coef is not None else None

        def read(hidden: Tensor, head: Head, labels: Tensor) -> tuple[TokenStatistics, Any]:
            seen = token_statistics(
                hidden, head, labels, temperature=self.temperature, statistics=True
            )
            values = None
            if critic is not None:
                values = critic(hidden.to(critic.weight.dtype)).squeeze(-1).float()
            return seen, values

        seen, values = policy(batch.input_ids, batch.labels, read=read)
        logps, mask = seen.logps, batch.mask
        old = batch.padded("old_logps") if batch.has("old_logps") else logps.detach()
        terms = self.loss(logps, old, batch.padded("advantages"), mask)
        total = terms.total
        metrics = {**batch.metrics(seen), **terms.metrics}
        if self.beta:
            penalty = kl_k3(logps, batch.padded("reference_logps"))
            amount, _ = aggregate(penalty, mask, self.aggregation, self.length)
            total = total + self.beta * amount
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
    """

    pad_id: int
    kind: str
    beta: float
    sparse: bool = True
    sources: Mapping[str, tuple[Frozen, float]] = field(default_factory=dict)
    centre: Centre = "none"
    temperature: float = 1.0
    behaviour_head: KeptHead = field(default_factory=KeptHead)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"beta is {self.beta}: it must be positive and finite")

    def __call__(self, policy: nn.Module, rows: Sequence[Rollout]) -> LossTerms:
        batch = _Batch(policy, rows, self.pad_id)
        match = _MATCHES[self.kind]

        def read(hidden: Tensor, head: Head, labels: Tensor) -> tuple[LossTerms, TokenStatistics]:
            mask = labels >= 0
            flat, ids = hidden[mask], labels[mask]
            behaviour = batch.flat("old_hidden") if batch.has("old_hidden") else flat.detach()
            sources, bonus = self._target(batch, behaviour, head, ids)
            watch = Watch()
            terms = match(
                flat,
                head,
                sources,
                torch.ones_like(ids, dtype=torch.bool),
                bonus=bonus,
                temperature=self.temperature,
                watch=watch,
            )
            with torch.no_grad():
                # The loss has seen the whole vocabulary: the record needs the sampled token only.
                logps = logits_at(flat, head, ids) / self.temperature - watch.lse
                zeros = logps.new_zeros(mask.shape)
                entropy = zeros.masked_scatter(mask, watch.entropy)
                seen = TokenStatistics(zeros.masked_scatter(mask, logps), mask, entropy)
            return terms, seen

        terms, seen = policy(batch.input_ids, batch.labels, read=read)
        metrics = {**batch.metrics(seen), **terms.metrics}
        if self.sparse:
            metrics["negative_share"] = negative_share(batch.flat("advantages"))
        return LossTerms(terms.total, terms.count, metrics)

    def _target(
        self, batch: _Batch, behaviour: Tensor, head: Head, ids: Tensor
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
        batch = _Batch(policy, rows, self.pad_id)

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
