"""What rollouts carry besides their tokens: log-probabilities, hidden states, advantages."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from holdfast.language.advantages import gae
from holdfast.language.frozen import Frozen
from holdfast.language.head import Head, token_statistics
from holdfast.language.losses.distillation import minillm_advantages
from holdfast.language.model import LanguagePolicy
from holdfast.language.rollouts import Rollout


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
    filters : sequence of callable
        ``filter(rollouts, num_generations)``: what becomes of advantages, in order.
    value : callable
        From the outputs of the value head ``(tokens, heads)`` to values ``(tokens,)``.
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
    filters: Sequence[Callable[[Sequence[Rollout], int], list[Rollout]]] = ()
    value: Callable[[Tensor], Tensor] = partial(torch.squeeze, dim=-1)
    kept_head: KeptHead = field(default_factory=KeptHead)
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
                    values = [self.policy.value_head(h.to(kind)) for h in hidden]
                    keep("values", [self.value(value).float() for value in values])
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
        states = torch.cat(list(hidden))
        tokens = torch.cat([_sampled(row) for row in rollouts]).to(states.device)
        with torch.no_grad():
            logps = token_statistics(states, head, tokens, temperature=temperature).logps
        return list(logps.split([len(row) for row in hidden]))

    def credit(self, rollouts: Sequence[Rollout], num_generations: int) -> list[Rollout]:
        found = list(rollouts)
        if self.critic:
            found = [self._estimated(row) for row in rollouts]
        elif self.advantages is not None:
            rewards = torch.tensor([row.reward for row in rollouts], dtype=torch.float64)
            amounts = self.advantages(rewards, num_generations)
            found = [
                _with(row, advantages=_of_tokens(row, float(amount)))
                for row, amount in zip(rollouts, amounts, strict=True)
            ]
        if self.whiten:
            found = _whitened(found)
        for change in self.filters:
            found = change(found, num_generations)
        return found

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


def _of_tokens(row: Rollout, advantage: float) -> Tensor:
    """The advantage of a sequence at its tokens; what was given as a hint has not earned it."""
    amounts = torch.full((row.counted,), advantage)
    amounts[: row.hint] = 0.0
    return amounts


def _with(row: Rollout, **signals: Tensor) -> Rollout:
    return replace(row, signals={**row.signals, **signals})


def _sampled(row: Rollout) -> Tensor:
    return torch.from_numpy(row.tokens.input_ids[row.tokens.counted].astype("int64"))
