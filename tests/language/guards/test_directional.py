"""Radii along a step in tiles, against logits that are held whole and differentiated otherwise."""

import math

import numpy as np
import pytest
import torch
from helpers.rollouts import build, dense, rollouts
from torch.func import functional_call, jvp
from torch.testing import assert_close

from holdfast.joint.guards import LogRatioBudget
from holdfast.joint.guards.proposed import AlongStep
from holdfast.joint.objective import Spread
from holdfast.language.data import Demonstration, Encoded, Preference
from holdfast.language.guards.directional import SoftmaxRadii, directional_radii
from holdfast.language.head import Head

TOKENS, VOCAB, WIDTH = 7, 11, 4
TILES = [(None, None), (3, 4)]
EVERYTHING = Spread()


class Layer:
    """A random output layer in double precision, a random step, and its dense logits."""

    def __init__(self, *, vocab=VOCAB, bias=True, scale=1.0, softcap=None, temperature=1.0):
        draw = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=draw, dtype=torch.float64)

        self.at = normal(TOKENS, WIDTH), normal(vocab, WIDTH), normal(vocab) if bias else None
        self.step = normal(TOKENS, WIDTH), normal(vocab, WIDTH), normal(vocab) if bias else None
        self.head = Head(self.at[1], self.at[2], scale, softcap)
        self.temperature = temperature

    def logits(self, hidden, weight, bias=None):
        values = hidden @ weight.T
        values = self.head.scale * (values if bias is None else values + bias)
        if self.head.softcap is not None:
            values = self.head.softcap * torch.tanh(values / self.head.softcap)
        return values / self.temperature

    def rates(self):
        at, step = ([x for x in side if x is not None] for side in (self.at, self.step))
        return jvp(self.logits, tuple(at), tuple(step))

    def radii(self, spread=EVERYTHING, tiles=(None, None), step=None):
        d_hidden, d_weight, d_bias = step or self.step
        return directional_radii(
            self.at[0],
            d_hidden,
            self.head,
            d_weight,
            d_bias,
            spread,
            self.temperature,
            tile_tokens=tiles[0],
            tile_vocab=tiles[1],
        )


def extent(rates):
    return rates.amax(-1) - rates.amin(-1)


LAYERS = {
    "plain": {"bias": False},
    "bias": {},
    "scale": {"scale": 0.3, "temperature": 0.7},
    "soft cap": {"scale": 0.5, "softcap": 2.0, "temperature": 1.4},
}


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_radii_are_those_of_all_logits_whatever_the_tiles(options, tiles):
    layer = Layer(**options)
    _, rates = layer.rates()
    assert_close(layer.radii(tiles=tiles), math.pi / extent(rates))


def test_what_the_step_leaves_alone_has_no_part_in_it():
    layer = Layer()
    still = layer.step[0], None, None
    expected = layer.step[0] @ layer.at[1].T
    assert_close(layer.radii(step=still), math.pi / extent(expected))
    nothing = torch.zeros_like(layer.step[0]), None, None
    assert layer.radii(step=nothing).isinf().all()


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("floor", [1e-6, 0.05, 0.2])
def test_a_floor_leaves_improbable_ids_out_of_the_spread(options, tiles, floor):
    layer = Layer(**options)
    logits, rates = layer.rates()
    kept = logits.softmax(-1) >= floor
    expected = [
        math.pi / extent(row[keep]) if keep.any() else torch.tensor(math.inf).double()
        for row, keep in zip(rates, kept, strict=True)
    ]
    assert_close(layer.radii(Spread(floor), tiles), torch.stack(expected))
    assert (layer.radii(Spread(floor), tiles) >= layer.radii(tiles=tiles)).all()


def test_where_no_id_is_probable_enough_nothing_is_bounded():
    layer = Layer()
    assert layer.radii(Spread(0.99)).isinf().any()


@pytest.mark.parametrize("gone", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("floor", [0.0, 0.01])
def test_rates_that_are_not_finite_show_at_their_token_alone(gone, floor):
    layer = Layer()
    d_hidden = layer.step[0].clone()
    d_hidden[2, 1] = gone
    found = layer.radii(Spread(floor), step=(d_hidden, *layer.step[1:]))
    assert found.isnan().tolist() == [index == 2 for index in range(TOKENS)]
    # A budget does not let such a step pass.
    verdict, _ = LogRatioBudget(1.0).update(_Found(found), {})
    assert verdict.refused is not None


class _Found:
    norm = 1.0

    def __init__(self, values):
        self.values = values

    def radii(self, derivative, spread):
        return {"a": self.values}


def test_two_ids_have_their_exact_radius_where_it_is_asked_for():
    layer = Layer(vocab=2, temperature=0.6)
    logits, rates = layer.rates()
    gap = logits[:, 0] - logits[:, 1]
    expected = (gap.square() + math.pi**2).sqrt() / extent(rates)
    assert_close(layer.radii(Spread(binary=True)), expected)
    assert_close(layer.radii(), math.pi / extent(rates))
    three = Layer(vocab=3)
    assert_close(three.radii(Spread(binary=True)), three.radii())


def test_no_tokens_have_no_radii_and_half_precision_is_summed_in_single():
    layer = Layer(bias=False)
    weight = layer.at[1].bfloat16()
    hidden, d_hidden = (x.bfloat16() for x in (layer.at[0], layer.step[0]))
    found = directional_radii(hidden, d_hidden, Head(weight), None, None, EVERYTHING)
    assert found.dtype == torch.float32
    expected = math.pi / extent(d_hidden.float() @ weight.float().T)
    assert_close(found, expected)
    assert directional_radii(
        hidden[:0], hidden[:0], Head(weight), None, None, EVERYTHING
    ).shape == (0,)


# Of a language model ------------------------------------------------------------------------------


def mixed_rows():
    """Rows of every kind that an objective may have."""
    drawn = rollouts(4)
    pair = Preference(drawn[1].tokens, drawn[2].tokens, "rows:1")
    return [Demonstration(drawn[0].tokens, "rows:0"), pair, drawn[3]], drawn


def step_of(policy, size):
    draw = torch.Generator().manual_seed(3)
    before = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
    step = {name: size * torch.randn(value.shape, generator=draw) for name, value in before.items()}
    return before, step


class Logits(torch.nn.Module):
    """All logits of the counted tokens, from transformers' own forward pass."""

    def __init__(self, policy, rows):
        super().__init__()
        self.policy, self.rows = policy, rows

    def forward(self):
        return torch.cat([dense(self.policy, row) for row in self.rows])


def dense_radii(policy, rows, before, step, temperature):
    """By five-point differences of all logits: norms of a model run in single precision."""
    model, h = Logits(policy, rows), 0.02

    def at(by):
        moved = {f"policy.{name}": before[name] + by * step[name] for name in before}
        with torch.no_grad():
            return functional_call(model, moved, ()) / temperature

    return math.pi / extent((8 * (at(h) - at(-h)) - at(2 * h) + at(-2 * h)) / (12 * h))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("derivative", "tolerance"), [("jvp", 1e-3), ("finite_difference", 1e-2)])
def test_radii_of_a_model_are_those_of_its_logits_row_by_row(derivative, tolerance, lora):
    policy = build(1, lora)
    rows, drawn = mixed_rows()
    before, step = step_of(policy, 0.01)
    along = AlongStep(policy, before, step, derivative)
    radii = SoftmaxRadii(policy.pad_id, temperature=0.7)
    found = radii(along, rows, EVERYTHING)
    assert_close(found, dense_radii(policy, drawn, before, step, 0.7), rtol=tolerance, atol=0.0)
    alone = torch.cat([radii(along, [row], EVERYTHING) for row in rows])
    assert_close(found, alone, rtol=tolerance, atol=0.0)


def test_a_quantile_of_a_models_tokens_keeps_to_the_budget():
    policy = build(1)
    rows, drawn = mixed_rows()
    before, step = step_of(policy, 0.01)

    class Update:
        norm = 1.0

        def radii(self, derivative, spread):
            along = AlongStep(policy, before, step, derivative)
            return {"a": SoftmaxRadii(policy.pad_id)(along, rows, spread)}

    found = dense_radii(policy, drawn, before, step, 1.0)
    changes = np.sort(math.pi / found.double().numpy())
    for quantile in (0.5, 0.9, 1.0):
        guard = LogRatioBudget(changes[0] / 2, quantile=quantile)
        verdict, _ = guard.update(Update(), guard.init())
        at = math.ceil(quantile * len(changes)) - 1
        assert verdict.factor == pytest.approx(changes[0] / 2 / changes[at], rel=1e-3)
        kept = changes * verdict.factor <= guard.limit * (1 + 1e-3)
        assert kept.mean() >= quantile and (kept.all() == (quantile == 1.0))


def test_a_row_without_a_counted_token_bounds_nothing():
    policy = build(1)
    ids = np.arange(1, 5, dtype=np.int32)
    row = Demonstration(Encoded(ids, np.zeros(4, dtype=bool)), "rows:0")
    before, step = step_of(policy, 0.01)
    found = SoftmaxRadii(policy.pad_id)(AlongStep(policy, before, step, "jvp"), [row], EVERYTHING)
    assert found.shape == (0,)
