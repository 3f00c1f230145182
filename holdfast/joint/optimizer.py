"""How to train, and the optimiser that does it: AdamW, with learning rates by module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True)
class TrainerOptions:
    """How to train. Names and meanings follow ``transformers.TrainingArguments``.

    Attributes
    ----------
    max_steps : int
        Optimiser steps of the whole run.
    learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon : float
        AdamW. Biases and norms (tensors of fewer than two dimensions) are not decayed. Parameters
        that got no gradient in a step keep their values and moments.
    learning_rates : mapping of str to float
        Other learning rates by parameter name or its beginning, up to a dot: ``{"residual": 1e-3}``
        for a module of that name. The longest one that fits wins.
    lr_scheduler_type, warmup_steps
        As in ``transformers.get_scheduler``.
    max_grad_norm : float, optional
        Limit of a :class:`~holdfast.joint.guards.GradientClip`. ``None``: no clipping.
    eval_steps, save_steps : int
        Optimiser steps between evaluations on held-out rows, and between checkpoints.
    early_stopping_patience : int, optional
        Stop after this many evaluations in a row in which no objective's held-out loss fell by more
        than ``early_stopping_threshold`` below its best.
    max_refusals : int
        How many steps may be refused (non-finite loss, gradient or update) before training stops.
    seed : int
        Seed of dropout. Sources and schedules have their own.
    """

    max_steps: int
    learning_rate: float = 1e-4
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    lr_scheduler_type: str = "constant"
    warmup_steps: int = 0
    max_grad_norm: float | None = 1.0
    eval_steps: int = 100
    save_steps: int = 100
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    max_refusals: int = 3
    seed: int = 0


def adamw(
    named: Sequence[tuple[str, nn.Parameter]], options: TrainerOptions
) -> tuple[torch.optim.Optimizer, list[str | None]]:
    """The optimiser, and for each of its groups the entry of ``learning_rates`` that it follows."""
    groups: dict[tuple[str | None, bool], list[nn.Parameter]] = {}
    for matrices in (True, False):
        for name, parameter in named:
            if (parameter.ndim >= 2) == matrices:
                entry = _entry(name, options.learning_rates)
                groups.setdefault((entry, matrices), []).append(parameter)
    listed = [
        {
            "params": parameters,
            "weight_decay": options.weight_decay if matrices else 0.0,
            "lr": options.learning_rate if entry is None else options.learning_rates[entry],
        }
        for (entry, matrices), parameters in groups.items()
    ]
    optimizer = torch.optim.AdamW(
        listed,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=True,
    )
    return optimizer, [entry for entry, _ in groups]


def check_learning_rates(policy: nn.Module, options: TrainerOptions) -> None:
    """Refuse a learning rate of its own that no parameter would have.

    Raises
    ------
    ValueError
        Naming what the policy's trainable parameters begin with.
    """
    names = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    # One that fits, but is everywhere outdone by longer ones, does nothing either.
    unused = set(options.learning_rates) - {_entry(name, options.learning_rates) for name in names}
    for entry in sorted(unused):
        known = ", ".join(sorted({name.partition(".")[0] for name in names}))
        raise ValueError(
            f"learning_rates[{entry!r}] decides the rate of no trainable parameter; their names "
            f"begin with {known}"
        )


def _entry(name: str, rates: Mapping[str, float]) -> str | None:
    """The longest entry that a parameter's name equals or goes on from after a dot."""
    fitting = [entry for entry in rates if name == entry or name.startswith(f"{entry}.")]
    return max(fitting, key=len, default=None)
