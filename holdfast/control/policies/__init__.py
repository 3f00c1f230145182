"""Control policies: Gaussian, diffusion, and a residual on top of either; and their critics."""

from holdfast.control.policies.averages import ExponentialAverage, untrained_copy
from holdfast.control.policies.critic import Critic, TwinQ
from holdfast.control.policies.diffusion import DiffusionPolicy
from holdfast.control.policies.gaussian import GaussianPolicy
from holdfast.control.policies.implicit import ImplicitPolicy
from holdfast.control.policies.interface import Decision, Policy
from holdfast.control.policies.loading import load_policy, policy_from_config
from holdfast.control.policies.normalization import Normalizer
from holdfast.control.policies.residual import ResidualPolicy

__all__ = [
    "Critic",
    "Decision",
    "DiffusionPolicy",
    "ExponentialAverage",
    "GaussianPolicy",
    "ImplicitPolicy",
    "Normalizer",
    "Policy",
    "ResidualPolicy",
    "TwinQ",
    "load_policy",
    "policy_from_config",
    "untrained_copy",
]
