"""Proposition 4.4 on linear models: does a gradient step point to the optimum?

``z = W x``: a loss that is convex in the logits is convex in W, so that
``-∇L(W) · (W* - W) >= L(W) - L(W*) >= 0`` at every W, exactly. Softmax policies over a few answers,
many contexts, float64; the losses are the library's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.lco_theory.losses import LCO, LIBRARY, nll
from holdfast.language.losses import nll as library_nll
from holdfast.language.losses.policy_gradient import ppo_clip

CONTEXTS, FEATURES, ANSWERS = 512, 4, 5
MINIBATCH = 16
STEPS = 120
RENEW = 4
"""Steps that PPO makes on one set of samples."""
METHODS = ("sft", *LCO, "ppo")
RATES = {"sft": 1.0, "mse": ANSWERS / 4, "log_cosh": ANSWERS / 2, "kl": 1.0, "ppo": 0.3}
"""Near 1 / L, so that the convex losses come close to their optimum; a fifth for minibatches."""
FAR = (0.1, 1.0, 10.0)
"""Distances from the optimum, a parameter, of the random points."""
ROUNDING = 1e-9
"""Loss gaps below this are closer to the optimum than the optimum is known."""


@dataclass(frozen=True)
class Problem:
    """Contexts, a behaviour policy, advantages that are linear in the context, and labels.

    Attributes
    ----------
    x : Tensor, (contexts, features)
    old, optimum : Tensor, (answers, features)
        Of the behaviour policy, and of the target ``W_old + M / β`` (β = 1), which is attainable.
    labels : Tensor, (contexts,)
        Drawn from another linear policy.
    fitted : Tensor, (answers, features)
        Where the likelihood of the labels is largest.
    """

    x: Tensor
    old: Tensor
    optimum: Tensor
    labels: Tensor
    fitted: Tensor

    @property
    def advantages(self) -> Tensor:
        """``(contexts, answers)``, centred under the behaviour policy."""
        raw = self.x @ (self.optimum - self.old).T
        p = (self.x @ self.old.T).softmax(-1)
        return raw - (p * raw).sum(-1, keepdim=True)


def draw_problem(seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(CONTEXTS, FEATURES)
    old, direction, demonstrator = (normal(ANSWERS, FEATURES) for _ in range(3))
    labels = torch.multinomial((x @ demonstrator.T).softmax(-1), 1, generator=generator)
    labels = labels.squeeze(-1)
    return Problem(x, old, old + direction, labels, fit(x, labels, old))


def fit(x: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    """Maximum likelihood by damped Newton, at the point whose shift is that of ``start``."""
    onehot = F.one_hot(labels, ANSWERS).double()

    def loss(flat: Tensor) -> Tensor:
        return nll(x @ flat.view(ANSWERS, FEATURES).T, onehot).mean()

    flat = start.flatten()
    for _ in range(100):
        gradient = torch.func.grad(loss)(flat)
        if float(gradient.norm()) < 1e-14:
            break
        # The Hessian does not see a shift of all answers; neither does the pseudo-inverse.
        step = torch.linalg.pinv(torch.func.hessian(loss)(flat), hermitian=True) @ gradient
        size = 1.0
        while loss(flat - size * step) > loss(flat) + 1e-15:
            size /= 2
        flat = flat - size * step
    return flat.view(ANSWERS, FEATURES)


Loss = Callable[[Tensor, Tensor], Tensor]
"""From W and the rows of the batch to the mean loss."""


def losses(problem: Problem) -> dict[str, Loss]:
    """SFT and LCO with the library's losses."""
    target = problem.x @ problem.optimum.T

    def likelihood(w: Tensor, rows: Tensor) -> Tensor:
        terms = library_nll(problem.x[rows] @ w.T, problem.labels[rows])
        return terms.total / terms.count

    def matching(name: str) -> Loss:
        def loss(w: Tensor, rows: Tensor) -> Tensor:
            mask = torch.ones(len(rows), dtype=torch.bool)
            terms = LIBRARY[name](problem.x[rows] @ w.T, target[rows], mask)
            return terms.total / terms.count

        return loss

    return {"sft": likelihood, **{name: matching(name) for name in LCO}}


def sampled_surrogate(problem: Problem, behaviour: Tensor, generator: torch.Generator) -> Loss:
    """PPO's clipped loss of one answer a context, drawn from ``behaviour``."""
    logp = (problem.x @ behaviour.T).log_softmax(-1)
    token = torch.multinomial(logp.exp(), 1, generator=generator)
    old_logp, advantage = (values.gather(-1, token) for values in (logp, problem.advantages))

    def loss(w: Tensor, rows: Tensor) -> Tensor:
        chosen = (problem.x[rows] @ w.T).log_softmax(-1).gather(-1, token[rows])
        mask = torch.ones(chosen.shape, dtype=torch.bool)
        terms = ppo_clip(chosen, old_logp[rows], advantage[rows], mask)
        return terms.total / terms.count

    return loss


def gradient(loss: Loss, w: Tensor, rows: Tensor) -> tuple[float, Tensor]:
    leaf = w.detach().clone().requires_grad_()
    value = loss(leaf, rows)
    return float(value.detach()), torch.autograd.grad(value, leaf)[0]


def trajectory(problem: Problem, method: str, minibatch: bool, seed: int) -> dict[str, Any]:
    """Gradient descent from the behaviour policy: on how many steps is ``-∇ · (W* - W) > 0``?

    ``W*`` is the loss's own optimum. PPO has none, so its steps are held against LCO's target (the
    optimum with a KL term) and against the end of its own run.
    """
    generator = torch.Generator().manual_seed(seed)
    convex = losses(problem)
    optimum = problem.fitted if method == "sft" else problem.optimum
    everything = torch.arange(CONTEXTS)
    best = None if method == "ppo" else gradient(convex[method], optimum, everything)[0]
    w = problem.old
    visited, gradients, slack = [], [], []
    for t in range(STEPS):
        if method != "ppo":
            loss = convex[method]
        elif t % RENEW == 0:
            loss = sampled_surrogate(problem, w, generator)
        if best is not None:
            value, full = gradient(loss, w, everything)
            if value - best < ROUNDING:
                break
            slack.append(float((full * (w - optimum)).sum()) - (value - best))
        rows = everything
        if minibatch:
            rows = torch.randperm(CONTEXTS, generator=generator)[:MINIBATCH]
        step = gradient(loss, w, rows)[1]
        visited.append(w)
        gradients.append(step)
        w = w - RATES[method] * (0.2 if minibatch else 1.0) * step
    found: dict[str, Any] = {"steps": len(visited), "optimum": aligned(visited, gradients, optimum)}
    if best is None:
        found["own_end"] = aligned(visited, gradients, w)
    else:
        found["least_slack"] = min(slack)
    return found


def aligned(visited: list[Tensor], gradients: list[Tensor], goal: Tensor) -> float:
    """Share of steps whose negative gradient has a positive product with the way to ``goal``."""
    products = torch.stack(
        [-(g * (goal - w)).sum() for w, g in zip(visited, gradients, strict=True)]
    )
    moving = torch.stack([g.norm() for g in gradients]) > 0
    return float((products[moving] > 0).double().mean())


def anywhere(problem: Problem, method: str, points: int, seed: int) -> dict[str, float]:
    """The same with the full batch at random points around the optimum, by distance."""
    generator = torch.Generator().manual_seed(seed)
    optimum = problem.fitted if method == "sft" else problem.optimum
    rows = torch.arange(CONTEXTS)
    shares = {}
    for distance in FAR:
        held = 0
        for _ in range(points):
            offset = torch.randn(optimum.shape, generator=generator, dtype=torch.float64)
            w = optimum + distance * offset
            loss = (
                sampled_surrogate(problem, w, generator)
                if method == "ppo"
                else losses(problem)[method]
            )
            held += float((gradient(loss, w, rows)[1] * (w - optimum)).sum()) > 0
        shares[f"{distance:g}"] = held / points
    return shares
