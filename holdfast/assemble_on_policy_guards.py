"""From the recipe of an on-policy objective to the guards beside its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from holdfast import schema
from holdfast.errors import ModelError
from holdfast.joint import LossTerms
from holdfast.joint.objective import Summary
from holdfast.language.data import Demonstration
from holdfast.language.guards import (
    AdaptiveEntropy,
    AdaptiveKl,
    ClipCov,
    Controller,
    CurvatureGuard,
    KlCov,
    OutlierFilter,
    RowMoments,
    SafeKL,
    SmoothedAdvantages,
    Surrogate,
)
from holdfast.language.imitation import (
    DemonstrationLoss,
    Hints,
    Imitation,
    Members,
    SolveRateGate,
)
from holdfast.language.model import LanguagePolicy
from holdfast.language.on_policy import Lco, PolicyGradient
from holdfast.language.rollouts import Remembers, Rollout
from holdfast.language.signals import Signals


@dataclass
class Guards:
    """What an objective on advantages was asked for besides its loss.

    Attributes
    ----------
    controllers : dict of str to Controller
        They hear of every accepted step.
    filters : dict of str to callable
        Of advantages, in order.
    surrogate : Surrogate, optional
        Among the controllers.
    imitation : Imitation, optional
    """

    controllers: dict[str, Controller] = field(default_factory=dict)
    filters: dict[str, Callable[..., Any]] = field(default_factory=dict)
    surrogate: Surrogate | None = None
    imitation: Imitation | None = None

    @property
    def memory(self) -> dict[str, Remembers]:
        """What of it has a state."""
        parts = {**self.controllers, **self.filters, "imitation": self.imitation}
        return {name: part for name, part in parts.items() if isinstance(part, Remembers)}

    def observe(self, summary: Summary) -> None:
        """Tell the controllers of a step."""
        for controller in self.controllers.values():
            controller.observe({**summary.metrics, "loss": summary.loss})


def guards_of(
    spec: schema.RewardedSpec, demonstrations: Sequence[Demonstration], seed: int
) -> Guards:
    """All but those that are parts of the loss itself."""
    guards = Guards()
    if isinstance(spec, schema.ComparedSpec):
        if spec.smooth_advantages:
            guards.filters["smoothed"] = SmoothedAdvantages(floor=spec.scale_floor)
        if spec.imitation is not None:
            guards.imitation = _imitation(spec.imitation, demonstrations)
    if spec.advantage_filter is not None:
        guards.filters["advantage_filter"] = OutlierFilter(spec.advantage_filter)
    if isinstance(spec, schema.PenalisedSpec) and spec.covariance is not None:
        chosen = spec.covariance
        guards.filters["covariance"] = (
            KlCov(chosen.share)
            if isinstance(chosen, schema.KlCovSpec)
            else ClipCov(chosen.share, chosen.lowest, chosen.highest, seed)
        )
    if spec.stop_on_rise:
        guards.surrogate = Surrogate(spec.num_iterations, spec.steps_per_generation)
        guards.controllers["surrogate"] = guards.surrogate
    return guards


def _imitation(
    spec: schema.MembersSpec | schema.HintsSpec | schema.SolveRateGateSpec,
    demonstrations: Sequence[Demonstration],
) -> Imitation:
    match spec:
        case schema.MembersSpec():
            return Members(demonstrations, spec.count)
        case schema.HintsSpec():
            options = spec.model_dump(exclude={"kind", "coefficient"})
            return Hints(demonstrations, **options)
        case schema.SolveRateGateSpec():
            return SolveRateGate(demonstrations, **spec.model_dump(exclude={"kind"}))


def guarded(
    spec: schema.RewardedSpec,
    policy: LanguagePolicy,
    signals: Signals,
    loss: PolicyGradient | Lco,
    guards: Guards,
    training: schema.TrainingSpec,
) -> Recorded:
    """The loss with its guards, which are put where they belong."""
    signals.filters = list(guards.filters.values())
    penalties = loss.penalties
    if isinstance(spec.kl_control, schema.SafeKlSpec):
        penalties.kl = SafeKL(**spec.kl_control.model_dump(exclude={"kind"}))
    elif isinstance(spec.kl_control, schema.FixedKlSpec):
        penalties.beta = spec.kl_control.coefficient
    elif spec.kl_control is not None:
        penalties.kl = AdaptiveKl(**spec.kl_control.model_dump(exclude={"kind"}))
    penalties.entropy_coef = spec.entropy_coef
    if spec.use_adaptive_entropy:
        penalties.entropy = AdaptiveEntropy(
            spec.entropy_coef,
            target=spec.entropy_target,
            step=spec.entropy_coef_delta,
            lowest=spec.entropy_coef_min,
            highest=spec.entropy_coef_max,
        )
    guards.controllers |= penalties.controllers
    if spec.curvature_mask is not None:
        loss.curvature = _curvature(spec.curvature_mask, policy, training)
        guards.controllers["curvature"] = loss.curvature
    imitation = spec.imitation if isinstance(spec, schema.ComparedSpec) else None
    among = isinstance(imitation, schema.MembersSpec | schema.SolveRateGateSpec)
    if isinstance(loss, Lco):
        loss.mixed = among
        return Recorded(loss, guards.controllers)
    if isinstance(spec, schema.RatioSpec):
        loss.off_policy_threshold = spec.off_policy_mask_threshold
    if isinstance(spec, schema.PenalisedSpec) and spec.covariance is not None:
        # The covariance is that of the policy that sampled.
        signals.behaviour = "logps"
        if isinstance(spec.covariance, schema.KlCovSpec):
            loss.kl_cov_coef = spec.covariance.coefficient
    if isinstance(imitation, schema.MembersSpec):
        loss.demonstrations = DemonstrationLoss(imitation.shaping, imitation.entropy_weights)
    elif among:
        loss.demonstrations = DemonstrationLoss()
    elif isinstance(imitation, schema.HintsSpec):
        loss.hint_coef = imitation.coefficient
    return Recorded(loss, guards.controllers)


def _curvature(
    spec: schema.CurvatureSpec, policy: LanguagePolicy, training: schema.TrainingSpec
) -> CurvatureGuard:
    head = policy.head()
    if head.softcap is not None:
        raise ModelError(
            "curvature_mask needs logits that are linear in the output layer, and this model caps "
            "them (soft cap): leave it out"
        )
    guard = CurvatureGuard(
        training.learning_rate if spec.learning_rate is None else spec.learning_rate,
        spec.objective_limit,
        spec.policy_limit,
        spec.objective_floor,
        random=spec.random,
    )
    if spec.optimizer == "adam":
        if not head.weight.requires_grad:
            raise ModelError(
                "curvature_mask.optimizer adam follows the gradient of the output layer, which is "
                "not trained here: use sgd"
            )
        betas = training.adam_beta1, training.adam_beta2
        vocab, width = head.weight.shape
        guard.rows = RowMoments(vocab, width, betas, training.adam_epsilon)
        guard.gradient = lambda: policy.head().weight.grad
    return guard


@dataclass
class Recorded:
    """A loss whose metrics say as well what its controllers are at."""

    loss: PolicyGradient | Lco
    controllers: Mapping[str, Controller]

    def __call__(self, policy: nn.Module, rows: Sequence[Rollout]) -> LossTerms:
        terms = self.loss(policy, rows)
        settings = {
            name: terms.total.new_tensor([number, 1.0])
            for controller in self.controllers.values()
            for name, number in controller.record.items()
        }
        return replace(terms, metrics={**terms.metrics, **settings})
