"""One update of DPPO, and one of two objectives by UPGrad, each beside a plain implementation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from holdfast.control.actor_critic import ActorCritic
from holdfast.control.objectives import PolicyOptimisation
from holdfast.control.policies import Critic, DiffusionPolicy
from holdfast.control.policies.denoising import DenoisingTable, denoising_table
from holdfast.joint import Surgery
from holdfast.joint.geometry import Geometry
from holdfast.joint.table import Table

OBSERVATION, ACTION, HORIZON, STEPS, FINE_TUNED = 11, 3, 4, 20, 10
"""Hopper, chunks of four actions, and the denoising steps of DPPO's own configuration."""

Timed = Callable[[], float]
"""Does the work once, and says how many seconds it took."""


# DPPO ---------------------------------------------------------------------------------------------


def dppo_case(
    rows: int, hidden: Sequence[int]
) -> tuple[ActorCritic, Table, PolicyOptimisation, DenoisingTable]:
    """A policy that is fine-tuned, rows of what it did, and the loss of them."""
    actor = DiffusionPolicy(
        OBSERVATION,
        ACTION,
        horizon=HORIZON,
        hidden=hidden,
        steps=STEPS,
        fine_tuned_steps=FINE_TUNED,
        seed=0,
    )
    actor.begin_fine_tuning()
    policy = ActorCritic(actor, Critic(OBSERVATION, hidden=(256, 256, 256), seed=1))
    draw = torch.Generator().manual_seed(0)
    observations = torch.randn(rows, 1, OBSERVATION, generator=draw)
    record = actor.act(observations, draw).record
    positions = torch.randint(FINE_TUNED, (rows,), generator=draw)
    which = torch.arange(rows)
    columns = {
        "observations": observations,
        "before": record["chain"][which, positions],
        "after": record["chain"][which, positions + 1],
        # As after some updates: ratios are not all 1.
        "old_log_probs": record["log_probs"][which, positions]
        + 0.05 * torch.randn(rows, generator=draw),
        "position": positions,
        "advantages": torch.randn(rows, generator=draw),
        "returns": torch.randn(rows, generator=draw),
        "old_values": torch.randn(rows, generator=draw),
    }
    loss = PolicyOptimisation(
        epsilon=0.01,
        fine_tuned_steps=FINE_TUNED,
        dimensions=HORIZON * ACTION,
    )
    return policy, Table(columns), loss, denoising_table(STEPS, "ddpm", STEPS)


def plain_dppo(
    policy: ActorCritic, table: DenoisingTable, columns: dict[str, Tensor], loss: PolicyOptimisation
) -> Tensor:
    """The mean of the same loss, written out for this one case."""
    actor = policy.actor
    assert isinstance(actor, DiffusionPolicy)
    position = columns["position"]
    index = position + STEPS - FINE_TUNED
    timestep = table.timesteps[index]

    def of(numbers: Tensor, where: Tensor) -> Tensor:
        return numbers[where][:, None, None]

    before = columns["before"]
    features = columns["observations"].flatten(1)
    predicted = actor.network(features, before.flatten(1), timestep).view_as(before)
    clean = (before - of(table.noise, timestep) * predicted) / of(table.signal, timestep)
    mean = of(table.to_clean, index) * clean.clamp(-1, 1) + of(table.to_noisy, index) * before
    std = of(table.std, index).clamp(min=actor.min_log_prob_std)
    log_probs = torch.distributions.Normal(mean, std).log_prob(columns["after"]).sum((-2, -1))
    ratio = ((log_probs - columns["old_log_probs"]) / loss.dimensions).exp()
    through = position / (FINE_TUNED - 1)
    share = torch.expm1(loss.rate * through) / torch.expm1(torch.tensor(loss.rate))
    bound = loss.epsilon_base + (loss.epsilon - loss.epsilon_base) * share
    gains = columns["advantages"] * loss.denoising_discount ** (FINE_TUNED - 1 - position)
    clipped = torch.clamp(ratio, 1 - bound, 1 + bound)
    surrogate = -torch.minimum(ratio * gains, clipped * gains)
    values = policy.critic.network(features).squeeze(-1)  # type: ignore[union-attr]
    return (surrogate + loss.vf_coef * 0.5 * (values - columns["returns"]) ** 2).mean()


def dppo_updates(rows: int, hidden: Sequence[int]) -> dict[str, Timed]:
    """Loss, backward and a step of AdamW, of Holdfast and plain."""
    policy, batch, loss, table = dppo_case(rows, hidden)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def timed(mean: Callable[[], Tensor]) -> Timed:
        def once() -> float:
            started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            mean().backward()
            optimizer.step()
            return time.perf_counter() - started

        return once

    def ours() -> Tensor:
        terms = loss(policy, batch)
        return terms.total / terms.count

    return {
        "holdfast": timed(ours),
        "plain": timed(lambda: plain_dppo(policy, table, batch.columns, loss)),
    }


# Surgery ------------------------------------------------------------------------------------------


def surgery_updates(rows: int, width: int = 512) -> dict[str, Timed]:
    """Backward passes of two losses, and what makes one gradient of them.

    ``sum``: the backward of the sum. ``holdfast``: two backwards, then UPGrad. ``torchjd``: its
    Jacobian and UPGrad.
    """
    torch.manual_seed(0)
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 16))
    parameters = list(net.parameters())
    inputs = [torch.randn(rows, 64) for _ in range(2)]
    goal = torch.randn(rows, 16)

    def losses() -> tuple[Tensor, Tensor]:
        return (net(inputs[0]) - goal).square().mean(), (net(inputs[1]) + goal).square().mean()

    def clear() -> None:
        for parameter in parameters:
            parameter.grad = None

    def summed() -> float:
        clear()
        one, other = losses()
        started = time.perf_counter()
        (one + other).backward()
        return time.perf_counter() - started

    combiner = Surgery("upgrad")

    def holdfast() -> float:
        both = dict(zip(("one", "other"), losses(), strict=True))
        started = time.perf_counter()
        gradients = {}
        for name, loss in both.items():
            clear()
            loss.backward()
            gradients[name] = [parameter.grad for parameter in parameters]
        combiner(gradients, dict.fromkeys(gradients, 1.0), Geometry.of(gradients))
        return time.perf_counter() - started

    timed: dict[str, Timed] = {"sum": summed, "holdfast": holdfast}
    try:
        from torchjd.aggregation import UPGrad
        from torchjd.autojac import backward, jac_to_grad
    except ImportError:
        return timed
    aggregator = UPGrad()

    def torchjd() -> float:
        clear()
        one, other = losses()
        started = time.perf_counter()
        backward([one, other])
        jac_to_grad(parameters, aggregator)
        return time.perf_counter() - started

    return {**timed, "torchjd": torchjd}
