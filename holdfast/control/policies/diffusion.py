"""A policy that denoises a chunk of actions, step by step.

Ren et al., "Diffusion Policy Policy Optimization" (DPPO), see denoising as a decision process of
its own: every step is a Gaussian whose log-probability is known. Fine-tuning trains the last steps
only, with a copy of the cloned network; the cloned one stays as it is for the steps before.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from holdfast.control.policies.averages import ExponentialAverage
from holdfast.control.policies.denoising import Sampler, denoising_table
from holdfast.control.policies.gaussian import normal_log_probs
from holdfast.control.policies.interface import (
    Decision,
    Policy,
    check_sizes,
    draw_normal,
    normalizer_of,
)
from holdfast.control.policies.networks import Activation, NoiseNetwork
from holdfast.control.policies.normalization import Normalizer

Steps = Literal["all", "fine-tuned"]


class DiffusionPolicy(Policy):
    """Denoises chunks of normalised actions with a network that predicts the noise.

    :attr:`Decision.record` holds ``chain (batch, fine_tuned_steps + 1, horizon, action_size)``, the
    normalised chunk before and after each of the last denoising steps, noisiest first, and
    ``log_probs (batch, fine_tuned_steps)`` of these steps.

    While it is cloned there is one network. :meth:`begin_fine_tuning` freezes it for the earlier
    denoising steps and trains a copy for the last. Acting deterministically still starts from
    noise, and DDPM adds that of its own steps; what is left out is the noise for exploration: the
    floor under the deviations, and all noise in the last step (DDIM: in every step).

    Parameters
    ----------
    observation_size, action_size : int
        Numbers in an observation and in an action.
    horizon : int
        Actions in a chunk, at least 1.
    history : int
        Observations that the policy sees, at least 1.
    hidden : sequence of int
        Sizes of the hidden layers.
    activation : str
        ``mish``, ``relu`` or ``tanh``.
    time_size : int
        Size of the embedding of the denoising step. Even.
    steps : int
        Denoising steps in training, ``K``.
    sampler : str
        ``ddpm``, or ``ddim``, which may skip steps.
    sampling_steps : int, optional
        Denoising steps in sampling, a divisor of ``steps``; by default all.
    fine_tuned_steps : int
        The last sampling steps, which reinforcement learning trains, ``K'``.
    min_sampling_std : float
        Deviations in sampling are no smaller than this: what the policy explores with.
    min_log_prob_std : float
        Deviations in log-probabilities are no smaller than this; positive, since the last step has
        none of its own.
    clip_noise : float
        Noise of a step is clipped to ± this many deviations. Its log-probability is nevertheless
        that of the whole Gaussian, as in DPPO.
    clip_sample : float, optional
        Predictions of the clean chunk are clipped to ± this.
    average_decay : float, optional
        Of the moving average of the cloned network's weights; ``None``: there is no average.
    observations, actions : Normalizer, optional
        Fitted on demonstrations; by default they change nothing.
    seed : int
        Of the initial weights.

    Raises
    ------
    ValueError
        For a number out of range.
    ModelError
        If diffusers, which knows the noise schedule, is not installed.
    """

    kind = "diffusion"
    average: ExponentialAverage | None
    frozen: NoiseNetwork | None
    _timesteps: Tensor
    _signal: Tensor
    _noise: Tensor
    _to_clean: Tensor
    _to_noisy: Tensor
    _std: Tensor

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        *,
        horizon: int = 1,
        history: int = 1,
        hidden: Sequence[int] = (256, 256, 256),
        activation: Activation = "mish",
        time_size: int = 16,
        steps: int = 20,
        sampler: Sampler = "ddpm",
        sampling_steps: int | None = None,
        fine_tuned_steps: int = 10,
        min_sampling_std: float = 0.1,
        min_log_prob_std: float = 0.1,
        clip_noise: float = 3.0,
        clip_sample: float | None = 1.0,
        average_decay: float | None = 0.995,
        observations: Normalizer | None = None,
        actions: Normalizer | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(
            observation_size=observation_size,
            action_size=action_size,
            horizon=horizon,
            history=history,
        )
        sampling_steps = steps if sampling_steps is None else sampling_steps
        table = denoising_table(steps, sampler, sampling_steps)
        # Evaluation leaves out what noise the sampler can do without.
        quiet = (
            table if sampler == "ddpm" else denoising_table(steps, sampler, sampling_steps, eta=0)
        )
        if not 1 <= fine_tuned_steps <= sampling_steps:
            raise ValueError(
                f"fine_tuned_steps is {fine_tuned_steps}: it must lie in [1, {sampling_steps}], "
                "the sampling steps"
            )
        if not 0.0 <= min_sampling_std < math.inf:
            raise ValueError(f"min_sampling_std is {min_sampling_std}: it must be 0 or more")
        for name, number in (
            ("min_log_prob_std", min_log_prob_std),
            ("clip_noise", clip_noise),
            ("clip_sample", math.inf if clip_sample is None else clip_sample),
        ):
            if not number > 0:
                raise ValueError(f"{name} is {number}: it must be positive")
        self.observation_size, self.action_size = observation_size, action_size
        self.horizon, self.history = horizon, history
        self.steps, self.sampling_steps = steps, sampling_steps
        self.fine_tuned_steps = fine_tuned_steps
        self.min_sampling_std, self.min_log_prob_std = min_sampling_std, min_log_prob_std
        self.clip_noise, self.clip_sample = clip_noise, clip_sample
        self._options = {
            "hidden": list(hidden),
            "activation": activation,
            "time_size": time_size,
            "sampler": sampler,
            "average_decay": average_decay,
        }
        self.observations = normalizer_of("observations", observations, observation_size)
        self.actions = normalizer_of("actions", actions, action_size)
        self.network = NoiseNetwork(
            history * observation_size,
            horizon * action_size,
            hidden,
            activation=activation,
            time_size=time_size,
            generator=torch.Generator().manual_seed(seed),
        )
        self.frozen = None
        self.average = (
            None if average_decay is None else ExponentialAverage(self.network, average_decay)
        )
        # These follow from the configuration, so they are no part of the state.
        self._buffer("_timesteps", table.timesteps)
        self._buffer("_signal", table.signal)
        self._buffer("_noise", table.noise)
        self._buffer("_to_clean", torch.stack([table.to_clean, quiet.to_clean]))
        self._buffer("_to_noisy", torch.stack([table.to_noisy, quiet.to_noisy]))
        self._buffer("_std", torch.stack([table.std, quiet.std]))

    def _buffer(self, name: str, numbers: Tensor) -> None:
        self.register_buffer(name, numbers, persistent=False)

    # Acting ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(
        self, observations: Tensor, generator: torch.Generator, *, deterministic: bool = False
    ) -> Decision:
        """Denoise a chunk; see the class for what ``deterministic`` leaves out.

        While the policy is cloned, deterministic decisions are those of the averaged weights.
        """
        features = self.features(observations)
        shape = (len(features), self.horizon, self.action_size)
        last = self._averaged() if deterministic and not self.fine_tuning else self.network
        earlier = self.frozen or last
        chunk = draw_normal(shape, generator, features)
        chain, means = [chunk], []
        for index in range(self.sampling_steps):
            is_last = index >= self.sampling_steps - self.fine_tuned_steps
            indices = self._timesteps.new_full((len(features),), index)
            mean = self._mean(
                last if is_last else earlier, features, chunk, indices, quiet=deterministic
            )
            std = self._std[int(deterministic), index]
            if not deterministic:
                std = std.clamp(min=self.min_sampling_std)
            chunk = mean + std * draw_normal(shape, generator, chunk, self.clip_noise)
            if is_last:
                chain.append(chunk)
                means.append(mean)
            else:
                chain = [chunk]
        actions = self.actions.denormalize(chunk)
        if deterministic:
            return Decision(actions, {})
        log_std = self._log_std()[-self.fine_tuned_steps :, None, None]
        log_probs = normal_log_probs(
            torch.stack(chain[1:], dim=1), torch.stack(means, dim=1), log_std
        ).sum((-2, -1))
        return Decision(actions, {"chain": torch.stack(chain, dim=1), "log_probs": log_probs})

    def log_probs(self, observations: Tensor, record: Mapping[str, Tensor]) -> Tensor:
        """``(batch, fine_tuned_steps)``: see :meth:`Policy.log_probs`."""
        chain = record["chain"]
        expected = (self.fine_tuned_steps + 1, self.horizon, self.action_size)
        if chain.shape[1:] != expected:
            raise ValueError(
                f"record['chain'] has shape {tuple(chain.shape)}: it must be (batch, "
                f"fine_tuned_steps + 1, horizon, action_size), here (batch, {expected[0]}, "
                f"{expected[1]}, {expected[2]})"
            )
        count = self.fine_tuned_steps
        positions = torch.arange(count, device=chain.device).repeat(len(chain))
        found = self.step_log_probs(
            observations.repeat_interleave(count, dim=0),
            chain[:, :-1].flatten(0, 1),
            chain[:, 1:].flatten(0, 1),
            positions,
        )
        return found.view(len(chain), count)

    def step_log_probs(
        self, observations: Tensor, before: Tensor, after: Tensor, positions: Tensor
    ) -> Tensor:
        """Log-probability of single denoising steps, for batches drawn over rows and steps alike.

        Parameters
        ----------
        observations : Tensor
            ``(rows, history, observation_size)``, in the environment's units.
        before, after : Tensor
            ``(rows, horizon, action_size)``: neighbours in a chain.
        positions : Tensor
            ``(rows,)``, integer: which of the last steps it is, in [0, fine_tuned_steps), 0 the
            noisiest.

        Returns
        -------
        Tensor
            ``(rows,)``, in nats, summed over the chunk. Differentiable.
        """
        self.check_chunks("before", before)
        self.check_chunks("after", after)
        indices = positions + (self.sampling_steps - self.fine_tuned_steps)
        mean = self._mean(self.network, self.features(observations), before, indices, quiet=False)
        log_std = _wide(self._log_std()[indices])
        return normal_log_probs(after, mean, log_std).sum((-2, -1))

    def _mean(
        self,
        network: NoiseNetwork,
        features: Tensor,
        noisy: Tensor,
        indices: Tensor,
        *,
        quiet: bool,
    ) -> Tensor:
        """Mean of the chunk after the sampling steps ``indices (rows,)``."""
        timesteps = self._timesteps[indices]
        predicted = network(features, noisy.flatten(1), timesteps).view_as(noisy)
        clean = (noisy - _wide(self._noise[timesteps]) * predicted) / _wide(self._signal[timesteps])
        if self.clip_sample is not None:
            clean = clean.clamp(-self.clip_sample, self.clip_sample)
        to_clean, to_noisy = self._to_clean[int(quiet)], self._to_noisy[int(quiet)]
        return _wide(to_clean[indices]) * clean + _wide(to_noisy[indices]) * noisy

    def _log_std(self) -> Tensor:
        """``(sampling_steps,)``: of the deviations that log-probabilities are taken with."""
        return self._std[0].clamp(min=self.min_log_prob_std).log()

    # Cloning --------------------------------------------------------------------------------------

    def draw_noise(
        self, count: int, generator: torch.Generator, *, steps: Steps = "all"
    ) -> tuple[Tensor, Tensor]:
        """Random numbers for the denoising loss, apart from it so that a batch may be cut.

        Parameters
        ----------
        count : int
            Chunks.
        generator : torch.Generator
            Source of randomness.
        steps : str
            ``all`` steps, or the ``fine-tuned`` ones: those that the trained network acts in after
            :meth:`begin_fine_tuning`.

        Returns
        -------
        timesteps : Tensor
            ``(count,)``, int64, uniform.
        noise : Tensor
            ``(count, horizon, action_size)``, standard normal.
        """
        if steps not in get_args(Steps):
            raise ValueError(f"steps is {steps!r}: it must be one of {', '.join(get_args(Steps))}")
        noisiest = self.sampling_steps - self.fine_tuned_steps
        below = self.steps if steps == "all" else int(self._timesteps[noisiest]) + 1
        device = generator.device
        timesteps = torch.randint(below, (count,), generator=generator, device=device)
        noise = draw_normal((count, self.horizon, self.action_size), generator, self._signal)
        return timesteps.to(noise.device), noise

    def predict_noise(
        self,
        observations: Tensor,
        actions: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The network's prediction of the noise that was mixed into the actions.

        Parameters
        ----------
        observations : Tensor
            ``(batch, history, observation_size)``, in the environment's units.
        actions : Tensor
            ``(batch, horizon, action_size)``, in the environment's units.
        timesteps, noise : Tensor
            From :meth:`draw_noise`.
        mask : Tensor, optional
            ``(batch, horizon)``, bool: positions before the end of the episode. What stands beyond
            is not seen: the middle of the range stands there instead.

        Returns
        -------
        Tensor
            ``(batch, horizon, action_size)``. Differentiable.
        """
        self.check_chunks("actions", actions)
        self.check_chunks("noise", noise)
        clean = self.actions.normalize(actions)
        if mask is not None:
            clean = clean.masked_fill(~mask[..., None], 0.0)
        noisy = _wide(self._signal[timesteps]) * clean + _wide(self._noise[timesteps]) * noise
        predicted = self.network(self.features(observations), noisy.flatten(1), timesteps)
        return predicted.view_as(noise)

    def update_average(self) -> None:
        """Move the average towards the weights; call it after every cloning step."""
        if self.average is not None:
            self.average.update(self.network)

    # Fine-tuning ----------------------------------------------------------------------------------

    @property
    def fine_tuning(self) -> bool:
        """Whether :meth:`begin_fine_tuning` was called."""
        return self.frozen is not None

    def begin_fine_tuning(self) -> None:
        """Freeze the cloned network for the earlier steps and train a copy for the last ones.

        Both start from the averaged weights, where there are any; the average ends here. Further
        calls change nothing. Call it before a state of a fine-tuned policy is loaded.
        """
        if self.fine_tuning:
            return
        self.network.load_state_dict(self._averaged().state_dict())
        self.average = None
        self.frozen = copy.deepcopy(self.network).requires_grad_(False)

    def _averaged(self) -> NoiseNetwork:
        if self.average is None or not self.average.updates:
            return self.network
        network = self.average.network
        assert isinstance(network, NoiseNetwork)
        return network

    # Saving ---------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """See :meth:`Policy.config`."""
        return {
            "observation_size": self.observation_size,
            "action_size": self.action_size,
            "horizon": self.horizon,
            "history": self.history,
            "steps": self.steps,
            "sampling_steps": self.sampling_steps,
            "fine_tuned_steps": self.fine_tuned_steps,
            "min_sampling_std": self.min_sampling_std,
            "min_log_prob_std": self.min_log_prob_std,
            "clip_noise": self.clip_noise,
            "clip_sample": self.clip_sample,
            **self._options,
            "fine_tuning": self.fine_tuning,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DiffusionPolicy:
        """See :meth:`Policy.from_config`."""
        arguments = dict(config)
        fine_tuning = arguments.pop("fine_tuning")
        policy = cls(**arguments)
        if fine_tuning:
            policy.begin_fine_tuning()
        return policy


def _wide(numbers: Tensor) -> Tensor:
    """``(rows,)`` to ``(rows, 1, 1)``."""
    return numbers[:, None, None]
