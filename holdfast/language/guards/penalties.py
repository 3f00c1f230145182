"""What a loss on the policy's own completions adds to itself: a KL penalty, an entropy bonus."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.language.guards.controllers import AdaptiveEntropy, AdaptiveKl, Controller
from holdfast.language.guards.safe import SafeKL
from holdfast.language.head import Head, chunked_gkd
from holdfast.language.losses.aggregation import Aggregation, aggregate
from holdfast.language.losses.policy_gradient import kl_k3


@dataclass
class Penalties:
    """Penalties with coefficients that are fixed, or that a controller sets.

    Where a coefficient is 0 its term is not computed: the loss is bit for bit the one without it.

    Attributes
    ----------
    beta : float
        Coefficient of the k3 estimate of the KL divergence to the reference, 0 or more.
    kl : AdaptiveKl or SafeKL, optional
        Sets that coefficient in the place of ``beta``.
    entropy_coef : float
        Coefficient of the entropy over the whole vocabulary.
    entropy : AdaptiveEntropy, optional
        Sets that coefficient in the place of ``entropy_coef``.
    aggregation : str
        Of the loss that they are added to; the KL penalty is aggregated as it is.
    length : int, optional
        The same.
    """

    beta: float = 0.0
    kl: AdaptiveKl | SafeKL | None = None
    entropy_coef: float = 0.0
    entropy: AdaptiveEntropy | None = None
    aggregation: Aggregation = "token-mean"
    length: int | None = None

    @property
    def kl_coefficient(self) -> float:
        return self.beta if self.kl is None else self.kl.coefficient

    @property
    def entropy_coefficient(self) -> float:
        return self.entropy_coef if self.entropy is None else self.entropy.coefficient

    @property
    def controllers(self) -> dict[str, Controller]:
        """By name: those there are."""
        named = {"kl": self.kl, "entropy": self.entropy}
        return {name: one for name, one in named.items() if one is not None}

    def divergence(self, logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
        """The KL penalty ``(batch, time)`` summed as the loss is, times its coefficient."""
        total, _ = aggregate(kl_k3(logps, reference_logps), mask, self.aggregation, self.length)
        return self.kl_coefficient * total

    def narrowness(self, hidden: Tensor, head: Head, mask: Tensor, temperature: float) -> Tensor:
        """The negative entropy, summed, times its coefficient.

        Divided by the count of the loss it is the mean over tokens, or, unless the loss is a mean
        over tokens, over sequences of their means: it has the size of an entropy whatever the
        aggregation. It costs a projection of its own.

        Parameters
        ----------
        hidden : Tensor
            ``(batch, time, width)``.
        head : Head
        mask : Tensor
            ``(batch, time)``, bool.
        temperature : float
            Of sampling.
        """
        weights = torch.ones(mask.shape, device=mask.device)
        if self.aggregation != "token-mean":
            weights = weights * (self.length or 1) / mask.sum(-1, keepdim=True).clamp(min=1)
        # An entropy is the log of the vocabulary less the divergence to the uniform distribution,
        # which is a softmax of zeros.
        vocab = len(head.weight)
        uniform = hidden.new_zeros(*mask.shape, 1), head.weight.new_zeros(vocab, 1)
        terms = chunked_gkd(
            hidden, head, uniform, mask, beta=1.0, temperature=temperature, token_weights=weights
        )
        widest = torch.log(terms.total.new_tensor(float(vocab))) * terms.count
        return self.entropy_coefficient * (terms.total - widest)
