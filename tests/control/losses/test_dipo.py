import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from holdfast.control.losses import improve_actions

seeds = st.integers(0, 2**31)


def bowl(goal: Tensor):
    """A value that is largest at ``goal``, row by row."""
    return lambda actions: -(actions - goal).square().flatten(1).sum(-1)


def drawn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1


@settings(max_examples=25)
@given(seeds, st.integers(1, 12))
def test_actions_climb_as_by_adam(seed, steps):
    """Kingma and Ba, "Adam", algorithm 1, written out for the gradient of the value."""
    goal, start = drawn(seed, 2, 3, 2), 0.9 * drawn(seed + 1, 2, 3, 2)
    found = improve_actions(bowl(goal), start, steps=steps, rate=0.01)
    first, second, actions = torch.zeros_like(start), torch.zeros_like(start), start.clone()
    for step in range(1, steps + 1):
        slope = 2 * (actions - goal)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope.square()
        move = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        actions = (actions - 0.01 * move).clamp(-1, 1)
    torch.testing.assert_close(found, actions)
    assert (bowl(goal)(found) > bowl(goal)(start)).all()


def test_actions_stay_in_bounds():
    start = torch.full((2, 3), 0.95)
    found = improve_actions(bowl(torch.full((2, 3), 9.0)), start, rate=0.1)
    assert (found == 1).all() and (start == 0.95).all()
    found = improve_actions(bowl(torch.full((2, 3), -9.0)), start, rate=0.5, bounds=(-0.5, 1.0))
    assert (found == -0.5).all()


@given(seeds, st.integers(1, 5))
def test_an_action_is_improved_alike_in_a_batch_of_any_size(seed, size):
    goal, start = drawn(seed, 5, 2), drawn(seed + 1, 5, 2)
    whole = improve_actions(bowl(goal), start, rate=0.01, steps=3)
    parts = [
        improve_actions(bowl(goal[rows]), start[rows], rate=0.01, steps=3)
        for rows in (slice(at, at + size) for at in range(0, 5, size))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_only_actions_are_moved():
    network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    before = [part.clone() for part in network.parameters()]
    with torch.no_grad():
        found = improve_actions(lambda actions: network(actions)[:, 0], torch.zeros(4, 2))
    assert not found.requires_grad and (found != 0).any()
    for part, old in zip(network.parameters(), before, strict=True):
        assert part.grad is None and torch.equal(part, old)


def test_errors_name_what_is_wrong():
    actions, value = torch.zeros(2, 3), bowl(torch.zeros(2, 3))
    for name, options in (
        ("steps", {"steps": 0}),
        ("rate", {"rate": math.nan}),
        ("bounds", {"bounds": (1.0, 1.0)}),
    ):
        with pytest.raises(ValueError, match=name):
            improve_actions(value, actions, **options)
    with pytest.raises(ValueError, match="actions"):
        improve_actions(value, actions.long())
    with pytest.raises(ValueError, match="q returns"):
        improve_actions(lambda given: given.square(), actions)
