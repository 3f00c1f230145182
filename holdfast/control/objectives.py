"""Losses of control bound to what they are computed from: demonstrations, rollouts, episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.control.acting import acting, one_thread
from holdfast.control.actor_critic import ActorCritic
from holdfast.control.cloning import CloningLoss, draw_noise
from holdfast.control.demonstrations import Chunks
from holdfast.control.environments import (
    SimulatorError,
    VectorEnvironment,
    episode_seeds,
    evaluate,
)
from holdfast.control.losses import dppo, ppo, value_loss
from holdfast.control.losses.cloning import denoising, mse, nll
from holdfast.control.policies import DiffusionPolicy, GaussianPolicy
from holdfast.control.regularisation import Regularisation
from holdfast.joint.batches import Batches
from holdfast.joint.objective import LossTerms
from holdfast.joint.table import Table

# Imitation ----------------------------------------------------------------------------------------


class DemonstrationBatches:
    """Shuffled batches of demonstrated chunks, without end.

    For a diffusion policy the noise and the denoising steps of a batch are drawn with it, so that
    the loss of a row does not depend on how the batch is cut.

    Parameters
    ----------
    chunks : Chunks
    batch_size : int
    diffusion : DiffusionPolicy, optional
        Whose noise is drawn.
    seed : int
    """

    def __init__(
        self,
        chunks: Chunks,
        batch_size: int,
        diffusion: DiffusionPolicy | None = None,
        *,
        seed: int,
    ) -> None:
        self.chunks = chunks
        self.diffusion = diffusion
        self._indices = Batches(range(len(chunks)), batch_size, seed=seed)
        self._generator = torch.Generator().manual_seed(seed)

    def next(self) -> Table:
        indices = torch.tensor(self._indices.next())
        return demonstrated(self.chunks, indices, self.diffusion, self._generator)

    def state_dict(self) -> dict[str, Any]:
        return {
            "indices": self._indices.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._indices.load_state_dict(state["indices"])
        self._generator.set_state(state["generator"])


def demonstrated(
    chunks: Chunks,
    indices: Tensor,
    diffusion: DiffusionPolicy | None,
    generator: torch.Generator,
) -> Table:
    """Rows of demonstrations ``indices`` ``(count,)``, with noise for a diffusion policy."""
    columns = chunks.gather(indices)._asdict()
    if diffusion is not None:
        columns |= draw_noise(diffusion, len(indices), generator)
    return Table(columns)


@dataclass
class Cloning:
    """Imitation of demonstrations.

    Attributes
    ----------
    kind : str
        ``nll`` or ``mse`` for a Gaussian policy, ``denoising`` for a diffusion policy. Trains the
        policy that imitation is meant for: the base of a residual policy.
    """

    kind: CloningLoss

    def __call__(self, policy: nn.Module, rows: Sequence[Any]) -> LossTerms:
        assert isinstance(rows, Table)
        terms: LossTerms = policy(lambda inner: self._terms(inner, rows.to(inner.device).columns))
        return terms

    def _terms(self, inner: ActorCritic, rows: Mapping[str, Tensor]) -> LossTerms:
        actor = inner.actor.cloned
        observations, actions, mask = rows["observations"], rows["actions"], rows["mask"]
        if self.kind == "denoising":
            assert isinstance(actor, DiffusionPolicy)
            predicted = actor.predict_noise(
                observations, actions, rows["timesteps"], rows["noise"], mask
            )
            return denoising(predicted, rows["noise"], mask)
        assert isinstance(actor, GaussianPolicy)
        if self.kind == "nll":
            return nll(actor.position_log_probs(observations, actions), mask)
        return mse(actor.mean(observations), actor.actions.normalize(actions), mask)


# Reinforcement learning ---------------------------------------------------------------------------


@dataclass
class PolicyOptimisation:
    """PPO on chunks of actions or, with ``fine_tuned_steps``, on denoising steps (DPPO).

    Attributes
    ----------
    epsilon : float
        How far the ratio may leave 1.
    vf_coef : float
        Weight of the critic's loss.
    value_clip : float, optional
        How far a value may move from the one at the rollout, in the units of the critic.
    fine_tuned_steps : int, optional
        Of a diffusion policy; ``None``: decisions are whole chunks.
    epsilon_base, rate, denoising_discount : float
        See :func:`~holdfast.control.losses.dppo`.
    dimensions : int
        What log-ratios of denoising steps are divided by.
    regularisation : Regularisation, optional
        A cloning term; batches are then :class:`~holdfast.control.regularisation.Accompanied`.
    """

    epsilon: float = 0.2
    vf_coef: float = 0.5
    value_clip: float | None = None
    fine_tuned_steps: int | None = None
    epsilon_base: float = 0.001
    rate: float = 3.0
    denoising_discount: float = 0.99
    dimensions: int = 1
    regularisation: Regularisation | None = None

    def __call__(self, policy: nn.Module, rows: Sequence[Any]) -> LossTerms:
        assert isinstance(rows, Table)
        # The ratio of a policy that is not trained yet is known to be 1.
        critic_only = bool(rows.facts.get("critic_only", (0.0, 1.0))[0])

        def read(inner: ActorCritic) -> tuple[Tensor, Tensor, Tensor | None]:
            columns = rows.to(inner.device).columns
            with torch.set_grad_enabled(torch.is_grad_enabled() and not critic_only):
                log_probs = self._log_probs(inner, columns)
                beside = self.regularisation
                cloned = None if beside is None else beside.losses(inner.actor, columns)
            return log_probs, inner.values(columns["observations"]), cloned

        log_probs, values, cloned = policy(read)
        columns = rows.to(log_probs.device).columns
        terms = self._surrogate(log_probs, columns)
        error = value_loss(
            values,
            columns["returns"],
            old_values=None if self.value_clip is None else columns["old_values"],
            epsilon=self.value_clip,
        )
        metrics = {
            **rows.metrics(),
            **terms.metrics,
            **error.metrics,
            "value_loss": error.total.detach(),
        }
        whole = LossTerms(terms.total + self.vf_coef * error.total, terms.count, metrics)
        if self.regularisation is None or cloned is None:
            return whole
        return self.regularisation.add(whole, cloned)

    def _log_probs(self, inner: ActorCritic, columns: Mapping[str, Tensor]) -> Tensor:
        if self.fine_tuned_steps is None:
            return inner.actor.log_probs(columns["observations"], columns)
        assert isinstance(inner.actor, DiffusionPolicy)
        return inner.actor.step_log_probs(
            columns["observations"], columns["before"], columns["after"], columns["position"]
        )

    def _surrogate(self, log_probs: Tensor, columns: Mapping[str, Tensor]) -> LossTerms:
        old, advantages = columns["old_log_probs"], columns["advantages"]
        if self.fine_tuned_steps is None:
            return ppo(log_probs, old, advantages, epsilon=self.epsilon)
        return dppo(
            log_probs,
            old,
            advantages,
            columns["position"],
            epsilon=self.epsilon,
            epsilon_base=self.epsilon_base,
            rate=self.rate,
            denoising_discount=self.denoising_discount,
            fine_tuned_steps=self.fine_tuned_steps,
            dimensions=self.dimensions,
        )


# Evaluation ---------------------------------------------------------------------------------------


@dataclass
class EpisodeEvaluation:
    """Episodes on fixed seeds: the mean success, or return, as a loss with its sign turned.

    Rows are the numbers of episodes. However they are cut or shared, each is run once. The noise
    that a diffusion policy starts from is drawn for each part anew, so its score may depend on the
    cut, as it does on the noise.

    Attributes
    ----------
    environments : callable
        Gives environments other than those that are trained in; asked whenever it is evaluated.
    score : str
        ``success`` or ``return``.
    seed : int
        Of the set of episodes: evaluations differ by policy alone.

    Raises
    ------
    SimulatorError
        If the score is success, and the task does not say what success is.
    """

    environments: Callable[[], VectorEnvironment]
    score: Literal["success", "return"]
    seed: int = 0

    @one_thread()
    def __call__(self, policy: nn.Module, rows: Sequence[int]) -> LossTerms:
        assert isinstance(policy, ActorCritic)
        # Of another part other noise: that of its first episode.
        *_, noise = episode_seeds(self.seed, rows[0] + 1, stream="evaluation")
        act = acting(policy.behaviour, seed=noise)
        worlds = self.environments()
        found = evaluate(act, worlds, list(rows), self.seed)
        if self.score == "success" and found.success is None:
            raise SimulatorError(
                f"{worlds.name} does not say what success is, so it cannot be the score of an "
                "evaluation: take score: return"
            )
        metrics = {
            "reward": torch.tensor(found.returns.sum()),
            # For the interval of the mean return.
            "reward_squared": torch.tensor((found.returns**2).sum()),
            "episode_length": torch.tensor(float(found.lengths.sum())),
        }
        if found.success is not None:
            metrics["success"] = torch.tensor(float(found.success.sum()))
        score = metrics["success" if self.score == "success" else "reward"]
        return LossTerms(-score, torch.tensor(len(rows)), metrics)
