"""Matching over the whole vocabulary, against float64 formulas on all logits at once."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from holdfast.joint import LossTerms
from holdfast.language.head import (
    Bonus,
    Head,
    Watch,
    chunked_gkd,
    chunked_lco_kl,
    chunked_lco_log_cosh,
    chunked_lco_mse,
    mean_logits,
)

DENSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": lambda z, t: F.kl_div(
        z.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1),
    "mse": lambda z, t: (z - t).square().mean(-1),
    # log cosh d = log((e^d + e^-d) / 2)
    "log cosh": lambda z, t: (torch.logaddexp(z - t, t - z) - math.log(2)).mean(-1),
}
CHUNKED = {"kl": chunked_lco_kl, "mse": chunked_lco_mse, "log cosh": chunked_lco_log_cosh}


def jensen_shannon(z: Tensor, t: Tensor, beta: float) -> Tensor:
    """By its definition from probabilities; the KL divergences at both ends, as in TRL."""
    student, teacher = z.softmax(-1), t.softmax(-1)
    if beta in (0.0, 1.0):
        return DENSE["kl"](z, t) if beta == 0.0 else DENSE["kl"](t, z)
    middle = (1 - beta) * student + beta * teacher
    to_middle = [(p * (p / middle).log()).sum(-1) for p in (teacher, student)]
    return beta * to_middle[0] + (1 - beta) * to_middle[1]


@dataclass
class Problem:
    """What a loss is given."""

    hidden: Tensor
    head: Head
    sources: list[tuple[Tensor, Tensor | Head, float]]
    mask: Tensor
    bonus: Bonus | None = None
    temperature: float = 1.0
    token_weights: Tensor | None = None

    @property
    def inputs(self) -> list[Tensor]:
        parts = (self.hidden, self.head.weight, self.head.bias)
        return [part for part in parts if part is not None]

    def loss(self, name: str, **tiles: int | None) -> LossTerms:
        return CHUNKED[name](
            self.hidden,
            self.head,
            self.sources,
            self.mask,
            bonus=self.bonus,
            temperature=self.temperature,
            token_weights=self.token_weights,
            **tiles,
        )

    def in_double(self) -> "Problem":
        """The same values as leaves in float64."""

        def head(of: Head) -> Head:
            return replace(
                of, weight=leaf(of.weight), bias=None if of.bias is None else leaf(of.bias)
            )

        return replace(
            self,
            hidden=leaf(self.hidden),
            head=head(self.head),
            sources=[
                (leaf(hidden), head(of) if isinstance(of, Head) else leaf(of), coefficient)
                for hidden, of, coefficient in self.sources
            ],
        )

    def logits(self) -> tuple[Tensor, Tensor]:
        """The policy's and the target's, each over the temperature."""
        target = sum(c * dense_logits(h, of) for h, of, c in self.sources) / self.temperature
        if self.bonus is not None and self.bonus.offset is not None:
            target = target + self.bonus.offset.unsqueeze(-1)
        if self.bonus is not None and self.bonus.amounts is not None:
            hot = F.one_hot(self.bonus.token_ids, len(self.head.weight))
            target = target + hot * self.bonus.amounts.unsqueeze(-1)
        return dense_logits(self.hidden, self.head) / self.temperature, target.detach()

    def expected(self, dense: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Total and count."""
        weights = torch.ones(self.mask.shape) if self.token_weights is None else self.token_weights
        weights = weights.double() * self.mask
        return (dense(*self.logits()) * weights).sum(), weights.sum()


def leaf(values: Tensor) -> Tensor:
    return values.detach().double().requires_grad_()


def dense_logits(hidden: Tensor, weight: Tensor | Head) -> Tensor:
    head = weight if isinstance(weight, Head) else Head(weight)
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def make(
    seed: int,
    shape: tuple[int, ...] = (3, 5),
    width: int = 4,
    vocab: int = 11,
    *,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    counted: float = 0.7,
    sources: tuple[tuple[str, float], ...] = (("policy", 1.0), ("policy", -0.5)),
    bonus: str = "",
    temperature: float = 1.0,
    weighted: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """A problem from a seed; all tensors that could require gradients do.

    A source has the head of the policy (``policy``), one of its own that other sources may share
    (``other``), or the same matrix with a soft cap (``capped``). Both are of another width.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        drawn = torch.randn(*size, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).requires_grad_()

    head = Head(normal(vocab, width), normal(vocab) if bias else None, scale, softcap)
    other = Head(normal(vocab, width + 2), normal(vocab) if bias else None, 0.7)
    heads = {"policy": head, "other": other, "capped": replace(other, softcap=1.5)}
    drawn = [(normal(*shape, heads[k].weight.shape[1]), heads[k], c) for k, c in sources]
    mask = torch.rand(shape, generator=generator) < counted
    offset, amounts = (normal(*shape, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(vocab, shape, generator=generator)
    return Problem(
        normal(*shape, width),
        head,
        # A matrix alone stands for a head without anything else.
        [(h, of.weight if of == Head(of.weight) else of, c) for h, of, c in drawn],
        mask,
        Bonus(
            offset if "offset" in bonus else None,
            ids if "sparse" in bonus else None,
            amounts if "sparse" in bonus else None,
        )
        if bonus
        else None,
        temperature,
        torch.rand(shape, generator=generator) + 0.1 if weighted else None,
    )


def assert_agrees(
    found: LossTerms,
    inputs: list[Tensor],
    problem: Problem,
    dense: Callable[[Tensor, Tensor], Tensor],
    tolerance: float,
    rounding: float = 0.0,
) -> None:
    """Total, count and gradients against the float64 formula; ``rounding``: of gradients."""
    exact = problem.in_double()
    total, count = exact.expected(dense)
    assert found.metrics == {}
    torch.testing.assert_close(
        found.total.double(), total, rtol=tolerance, atol=tolerance * max(1, problem.mask.sum())
    )
    torch.testing.assert_close(found.count.double(), count, rtol=1e-6, atol=0)
    got = torch.autograd.grad(1.7 * found.total, inputs)
    want = torch.autograd.grad(1.7 * total, exact.inputs)
    for one, other, part in zip(got, want, inputs, strict=True):
        assert one.dtype == part.dtype
        size = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(
            one.double(), other, rtol=tolerance + rounding, atol=tolerance * (1 + size)
        )


class Recorder(TorchDispatchMode):
    """Notes every operation: its name and the elements of its largest output."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [part.numel() for part in tree_leaves(out) if isinstance(part, Tensor)]
        self.calls.append((func.overloadpacket.__name__, max(sizes, default=0)))
        return out

    @property
    def largest(self) -> int:
        return max(size for _, size in self.calls)

    @property
    def products(self) -> int:
        return sum(name in {"mm", "addmm", "addmm_"} for name, _ in self.calls)


layouts = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "shape": st.sampled_from([(1,), (7,), (2, 3), (3, 1, 4), (0, 3)]),
        "width": st.integers(1, 6),
        "vocab": st.integers(1, 13),
        "bias": st.booleans(),
        "scale": st.sampled_from([1.0, 0.25, -1.5]),
        "softcap": st.sampled_from([None, 0.5, 30.0]),
        "counted": st.sampled_from([1.0, 0.6, 0.0]),
        "sources": st.lists(
            st.tuples(
                st.sampled_from(["policy", "other", "capped"]),
                st.sampled_from([1.0, -1.0, 0.4, -2.5, 0.0]),
            ),
            min_size=1,
            max_size=4,
        ),
        "bonus": st.sampled_from(["", "offset", "sparse", "offset and sparse"]),
        "temperature": st.sampled_from([1.0, 0.3, 2.5]),
        "weighted": st.booleans(),
    }
)
tiles = st.fixed_dictionaries(
    {name: st.one_of(st.none(), st.integers(1, 15)) for name in ("tile_tokens", "tile_vocab")}
)
betas = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])


@pytest.mark.parametrize("name", CHUNKED)
@settings(max_examples=60, deadline=None)
@given(layouts, tiles)
def test_equals_the_definition_in_double_precision(name, layout, extent):
    problem = make(**layout)
    found = problem.loss(name, **extent)
    assert found.total.dtype == torch.float64
    assert_agrees(found, problem.inputs, problem, DENSE[name], 1e-10)


@pytest.mark.parametrize("name", CHUNKED)
@settings(max_examples=40, deadline=None)
@given(layouts, tiles, st.sampled_from([torch.float32, torch.bfloat16]))
def test_sums_in_single_precision_whatever_the_dtype(name, layout, extent, dtype):
    """Against float64 on the very same (rounded) inputs: only gradients are rounded, once."""
    problem = make(**layout, dtype=dtype)
    found = problem.loss(name, **extent)
    assert found.total.dtype == torch.float32
    rounding = 2**-8 if dtype == torch.bfloat16 else 0.0
    assert_agrees(found, problem.inputs, problem, DENSE[name], 3e-5, rounding)


@settings(max_examples=40, deadline=None)
@given(layouts, tiles, betas, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_gkd_equals_the_definition(layout, extent, beta, dtype):
    kind, _ = layout["sources"][0]
    problem = make(**{**layout, "sources": [(kind, 1.0)], "bonus": ""}, dtype=dtype)
    found = chunked_gkd(
        problem.hidden,
        problem.head,
        problem.sources[0][:2],
        problem.mask,
        beta=beta,
        temperature=problem.temperature,
        token_weights=problem.token_weights,
        **extent,
    )
    rounding = 2**-8 if dtype == torch.bfloat16 else 0.0
    assert_agrees(
        found,
        problem.inputs,
        problem,
        lambda z, t: jensen_shannon(z, t, beta),
        1e-10 if dtype == torch.float64 else 3e-5,
        rounding,
    )


@pytest.mark.parametrize("name", CHUNKED)
def test_sources_may_differ_from_the_policy_in_dtype(name):
    problem = make(1, sources=(("other", 1.0), ("policy", -0.5)), dtype=torch.float32)
    problem.sources = [
        (hidden.detach().to(dtype), *rest)
        for (hidden, *rest), dtype in zip(
            problem.sources, (torch.bfloat16, torch.float64), strict=True
        )
    ]
    assert_agrees(problem.loss(name), problem.inputs, problem, DENSE[name], 1e-5)


@pytest.mark.parametrize("tile", [None, 2], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", CHUNKED)
def test_gradients_pass_finite_differences(name, softcap, tile):
    problem = make(
        2, (4,), 3, 5, bias=True, scale=0.7, softcap=softcap, bonus="offset and sparse",
        sources=(("other", 1.0), ("capped", -0.5)), temperature=1.3, weighted=True,
    )  # fmt: skip

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = replace(problem.head, weight=weight, bias=bias)
        moved = replace(problem, hidden=hidden, head=head)
        return moved.loss(name, tile_tokens=tile, tile_vocab=tile).total

    assert torch.autograd.gradcheck(total, tuple(problem.inputs))


@pytest.mark.parametrize("tile", [None, 2], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gkd_gradients_pass_finite_differences(beta, tile):
    problem = make(3, (4,), 3, 5, bias=True, sources=(("other", 1.0),))

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked_gkd(
            hidden, Head(weight, bias), problem.sources[0][:2], problem.mask, beta=beta,
            temperature=0.7, tile_tokens=tile, tile_vocab=tile,
        ).total  # fmt: skip

    assert torch.autograd.gradcheck(total, tuple(problem.inputs))


# Costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, vocab, options",
    [
        (60, 70, {"tile_tokens": 16, "tile_vocab": 32}),
        (60, 70, {"tile_tokens": 60, "tile_vocab": 35}),
        (60, 70, {"tile_tokens": 59}),
        (4200, 4096, {}),
    ],
)
@pytest.mark.parametrize("name", CHUNKED)
def test_never_holds_the_logits(name, tokens, vocab, options):
    problem = make(
        4, (tokens,), 3, vocab, bias=True, counted=1.1, bonus="offset and sparse",
        sources=(("policy", 1.0), ("other", 0.5), ("capped", -0.5)), dtype=torch.float32,
    )  # fmt: skip
    with Recorder() as forward:
        found = problem.loss(name, **options)
    with Recorder() as backward:
        found.total.backward()
    default = 2**24 // vocab
    limit = options.get("tile_tokens", default) * options.get("tile_vocab", vocab)
    assert forward.products > 0 and forward.largest <= limit < tokens * vocab
    assert backward.largest <= max(tokens * 3, vocab * 3)


HEADS = {"shared": ("policy",) * 3, "shared but the policy's": ("other",) * 3}
KL_VISITS = {"whole rows": 1, "cut rows": 2}


@pytest.mark.parametrize("sources", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("extent", KL_VISITS)
def test_sources_with_one_matrix_are_projected_together(sources, extent):
    tile = {"tile_tokens": 4, "tile_vocab": None if extent == "whole rows" else 4}
    number = 2 if extent == "whole rows" else 4  # of tiles
    coefficients = (1.0, 2.0, -2.0)

    def products(*frozen: str) -> int:
        problem = make(
            5, (8,), 3, 8, counted=1.1, sources=tuple(zip(sources, coefficients, strict=True))
        )
        for name in frozen:
            part = problem.hidden if name == "hidden" else problem.head.weight
            part.requires_grad_(False)
        with Recorder() as forward:
            found = problem.loss("kl", **tile)
        with Recorder() as backward:
            if found.total.requires_grad:
                found.total.backward()
        assert backward.products == 0
        return forward.products

    projections = 2 * KL_VISITS[extent] * number
    one_pass = 2 * number
    assert products("hidden", "weight") == one_pass
    assert products("weight") == projections + number
    assert products() == projections + 2 * number


@pytest.mark.parametrize("name", CHUNKED)
def test_one_matrix_with_two_biases(name):
    problem = make(20, bias=True, sources=(("other", 1.0), ("other", 0.5)))
    (hidden, head, coefficient), *rest = problem.sources
    problem.sources = [(hidden, replace(head, bias=head.bias.detach() + 1.5), coefficient), *rest]
    problem.sources.append((hidden, Head(head.weight, None, head.scale), coefficient))
    assert_agrees(problem.loss(name), problem.inputs, problem, DENSE[name], 1e-10)


def test_a_soft_cap_keeps_projections_apart():
    for kinds, number in (
        (("policy", "other", "other"), 3),
        (("other", "capped", "other"), 3),
        (("policy", "capped", "capped"), 4),
    ):
        problem = make(6, (8,), 3, 8, counted=1.1, sources=tuple((k, 1.0) for k in kinds))
        with torch.no_grad(), Recorder() as recorder:
            problem.loss("kl")
        assert recorder.products == number


@pytest.mark.parametrize("name, visits", [("kl", 2), ("mse", 1), ("log cosh", 1)])
def test_cut_rows_are_projected_no_more_often_than_needed(name, visits):
    problem = make(7, (8,), 3, 8, counted=1.1)
    with Recorder() as recorder:
        problem.loss(name, tile_tokens=8, tile_vocab=4)
    tiles = 2
    assert recorder.products == tiles * (visits * 2 + 2)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_only_what_is_asked_for_gets_a_gradient(frozen):
    problem = make(8, bias=True, counted=1.1, sources=(("policy", 1.0), ("other", 1.0)))
    problem.bonus = make(8, bonus="offset and sparse").bonus
    parts = {
        "hidden": problem.hidden, "weight": problem.head.weight, "bias": problem.head.bias
    }  # fmt: skip
    parts[frozen].requires_grad_(False)
    problem.loss("kl", tile_tokens=2).total.backward()
    assert {name for name, part in parts.items() if part.grad is not None} == set(parts) - {frozen}
    for hidden, _, _ in problem.sources:
        assert hidden.requires_grad and hidden.grad is None
    other = problem.sources[1][1]
    assert other.weight.requires_grad and other.weight.grad is None and other.bias.grad is None
    assert problem.bonus.offset.grad is None and problem.bonus.amounts.grad is None


def test_no_graph_without_gradients():
    problem = make(9)
    with torch.no_grad():
        found = problem.loss("kl")
    assert not found.total.requires_grad
    torch.testing.assert_close(found.total, problem.loss("kl").total.detach())


@pytest.mark.parametrize("name", CHUNKED)
def test_a_graph_may_be_walked_twice(name):
    problem = make(10, softcap=2.0)
    total = problem.loss(name).total
    first = torch.autograd.grad(2.0 * total, problem.inputs, retain_graph=True)
    copies = [grad.clone() for grad in first]
    second = torch.autograd.grad(3.0 * total, problem.inputs)
    for once, copy, again in zip(first, copies, second, strict=True):
        assert torch.equal(once, copy)
        torch.testing.assert_close(again, 1.5 * once)


# Properties ---------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(layouts, tiles, st.floats(-20, 20))
def test_an_offset_moves_the_squared_error_but_not_the_divergence(layout, extent, offset):
    problem = make(**{**layout, "bonus": "sparse", "counted": 1.1, "weighted": False})
    shift = torch.full(problem.mask.shape, offset, dtype=torch.float64)
    shifted = replace(problem, bonus=replace(problem.bonus, offset=shift))
    torch.testing.assert_close(
        shifted.loss("kl", **extent).total, problem.loss("kl", **extent).total
    )
    # mean (d - c)^2 = mean d^2 - 2 c mean d + c^2
    z, t = problem.logits()
    change = (offset**2 - 2 * offset * (z - t).mean(-1)).sum()
    torch.testing.assert_close(
        shifted.loss("mse", **extent).total, problem.loss("mse", **extent).total + change
    )


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_policy_that_is_its_own_target_is_at_rest(name, dtype):
    problem = make(11, bias=True, scale=0.7, counted=1.1, temperature=0.3, dtype=dtype)
    problem.sources = [(problem.hidden.detach(), problem.head, 1.0)]
    found = problem.loss(name)
    tiny = 1e-13 if dtype == torch.float64 else 1e-4
    assert abs(found.total.item()) < tiny
    for grad in torch.autograd.grad(found.total, problem.inputs):
        assert grad.abs().max() < tiny


@pytest.mark.parametrize("name", CHUNKED)
def test_positions_that_do_not_count_are_never_projected(name):
    clean = make(12, (6,), counted=1.1, bonus="offset and sparse", weighted=True)
    clean.mask[[1, 4]] = False
    poison = torch.zeros(6, dtype=torch.float64)
    poison[[1, 4]] = math.nan
    ids = clean.bonus.token_ids.clone()
    ids[[1, 4]] = -100
    poisoned = replace(
        clean,
        hidden=(clean.hidden.detach() + poison[:, None]).requires_grad_(),
        sources=[(hidden.detach() + poison[:, None], *rest) for hidden, *rest in clean.sources],
        bonus=Bonus(clean.bonus.offset + poison, ids, clean.bonus.amounts + poison),
        token_weights=clean.token_weights + poison,
    )
    found, expected = (problem.loss(name) for problem in (poisoned, clean))
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close(found.count.double(), expected.count.double())
    for got, want in zip(
        torch.autograd.grad(found.total, poisoned.inputs),
        torch.autograd.grad(expected.total, clean.inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    assert torch.equal(
        torch.autograd.grad(poisoned.loss(name).total, poisoned.hidden)[0][[1, 4]],
        torch.zeros(2, 4, dtype=torch.float64),
    )


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("broken", ["policy", "source"])
def test_a_broken_hidden_state_shows(name, broken):
    problem = make(13, counted=1.1)
    with torch.no_grad():
        (problem.hidden if broken == "policy" else problem.sources[0][0])[1, 2] = math.nan
    assert problem.loss(name).total.isnan()


@pytest.mark.parametrize("name", CHUNKED)
def test_autocast_leaves_values_and_gradients_in_single_precision(name):
    """Without autocast's care a product of these inputs would be rounded to 8 bits."""
    problem = make(
        14, (2, 9), 16, 23, bias=True, sources=(("policy", 1.0), ("other", -0.5)),
        dtype=torch.float32,
    )  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = problem.loss(name, tile_tokens=5)
    assert found.total.dtype == torch.float32
    assert_agrees(found, problem.inputs, problem, DENSE[name], 1e-5)


@pytest.mark.parametrize("tile", [None, 3], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits_neither_overflow_nor_vanish(tile, size):
    problem = make(15, scale=size, sources=(("other", 1e4),), dtype=torch.float32)
    for name in CHUNKED:
        found = problem.loss(name, tile_tokens=tile, tile_vocab=tile)
        assert_agrees(found, problem.inputs, problem, DENSE[name], 1e-4)
    for beta in (0.0, 0.5, 1.0):
        found = chunked_gkd(
            problem.hidden, problem.head, (problem.sources[0][0] * 1e4, problem.sources[0][1]),
            problem.mask, beta=beta, tile_tokens=tile, tile_vocab=tile,
        )  # fmt: skip
        assert found.total.isfinite() and found.total >= 0
        if beta == 0.5:
            assert found.total <= found.count * (math.log(2) + 1e-5)


@pytest.mark.parametrize("tile", [None, 7])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gkd_equals_trl(beta, temperature, tile):
    divergence = pytest.importorskip("trl.kernels.chunked_divergence")
    problem = make(
        16, (12,), 8, 40, bias=True, scale=0.6, softcap=3.0, counted=1.1,
        sources=(("capped", 1.0),), dtype=torch.float32,
    )  # fmt: skip
    hidden, head, _ = problem.sources[0]
    expected, _ = divergence.ChunkedDivergenceFunction.apply(
        problem.hidden, problem.head.weight, problem.head.bias,
        hidden.detach(), head.weight.detach(), head.bias.detach(),
        beta, temperature, 0.6, 3.0, head.scale, head.softcap,
    )  # fmt: skip
    found = chunked_gkd(
        problem.hidden, problem.head, (hidden, head), problem.mask, beta=beta,
        temperature=temperature, tile_tokens=tile, tile_vocab=tile,
    )  # fmt: skip
    torch.testing.assert_close(found.total, expected.sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(found.total, problem.inputs),
        torch.autograd.grad(expected.sum(), problem.inputs),
        rtol=1e-5,
        atol=1e-5,
    )


# The mean of the logits ---------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(layouts, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.booleans())
def test_mean_logits_are_those_of_all_logits(layout, dtype, autocast):
    problem = make(**{**layout, "softcap": None}, dtype=dtype)
    exact = problem.in_double()
    expected = dense_logits(exact.hidden, exact.head).mean(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = mean_logits(problem.hidden, problem.head)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    if not layout["bias"] and layout["scale"] == 1.0:
        torch.testing.assert_close(mean_logits(problem.hidden, problem.head.weight), found)


def test_mean_logits_with_a_soft_cap_are_refused():
    problem = make(17, softcap=2.0)
    with pytest.raises(ValueError, match="the head has a softcap"):
        mean_logits(problem.hidden, problem.head)


# Bad arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask": torch.ones(3, 5)}, "mask has dtype torch.float32, not bool"),
        ({"hidden": torch.ones(3, 4, 4)}, r"hidden has shape \(3, 4, 4\), not \(3, 5, 4\)"),
        ({"hidden": torch.ones(3, 5, 3)}, r"hidden has shape \(3, 5, 3\), not \(3, 5, 4\)"),
        ({"sources": []}, "sources is empty"),
        (
            {"sources": [(torch.ones(3, 5, 4), torch.ones(11, 4), 1.0),
                         (torch.ones(3, 5, 4), torch.ones(12, 4), 1.0)]},
            "source 1 has a vocabulary of 12, the policy one of 11",
        ),
        (
            {"sources": [(torch.ones(3, 4, 4), torch.ones(11, 4), 1.0)]},
            r"source 0 has hidden states of shape \(3, 4, 4\), not \(3, 5, 4\)",
        ),
        (
            {"sources": [(torch.ones(3, 5, 4), torch.ones(11, 6), 1.0)]},
            r"source 0 has hidden states of shape \(3, 5, 4\), not \(3, 5, 6\)",
        ),
        *(
            (
                {"sources": [(torch.ones(3, 5, 4), torch.ones(11, 4), coefficient)]},
                "source 0 has coefficient (nan|inf): it must be finite",
            )
            for coefficient in (math.nan, math.inf)
        ),
        ({"bonus": Bonus(torch.ones(5))}, r"offset has shape \(5,\), not that of mask \(3, 5\)"),
        ({"bonus": Bonus(amounts=torch.ones(3, 5))}, "token_ids and amounts belong together"),
        (
            {"bonus": Bonus(token_ids=torch.ones(3, 5, dtype=torch.long))},
            "token_ids and amounts belong together",
        ),
        (
            {"bonus": Bonus(None, torch.ones(5, dtype=torch.long), torch.ones(3, 5))},
            r"token_ids has shape \(5,\)",
        ),
        (
            {"bonus": Bonus(None, torch.ones(3, 5, dtype=torch.long), torch.ones(5))},
            r"amounts has shape \(5,\)",
        ),
        ({"bonus": Bonus(None, torch.ones(3, 5), torch.ones(3, 5))}, "token_ids has dtype"),
        *(
            (
                {"bonus": Bonus(None, torch.full((3, 5), wrong), torch.ones(3, 5))},
                rf"token_ids has ids from {wrong} to {wrong}: .* must lie in \[0, 11\)",
            )
            for wrong in (-1, 11)
        ),
        *(
            ({"temperature": temperature}, "temperature is")
            for temperature in (0.0, -1.0, math.inf, math.nan)
        ),
        ({"token_weights": torch.ones(5)}, r"token_weights has shape \(5,\), not that of mask"),
    ],
)  # fmt: skip
def test_bad_arguments_name_themselves(changes: dict[str, Any], message: str):
    problem = replace(make(18, counted=1.1), **changes)
    for name in CHUNKED:
        with pytest.raises(ValueError, match=message):
            problem.loss(name)


def test_bad_numbers_name_themselves():
    problem = make(19)
    for name in ("tile_tokens", "tile_vocab"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            problem.loss("kl", **{name: 0})
    for beta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"beta is {beta}: it must lie in"):
            chunked_gkd(
                problem.hidden, problem.head, problem.sources[0][:2], problem.mask, beta=beta
            )


def test_a_large_constant_leaves_the_logit_gap_what_it_is():
    hidden, weight = torch.randn(5, 4), torch.randn(30, 4)
    mask = torch.ones(5, dtype=torch.bool)
    sources = [(torch.randn(5, 4), weight, 1.0)]
    found = [
        chunked_lco_kl(
            hidden,
            weight,
            sources,
            mask,
            bonus=Bonus(torch.full((5,), constant)),
            watch=Watch(),
            tile_tokens=2,
            tile_vocab=7,
        ).metrics["logit_gap"]
        for constant in (0.0, 3000.0)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("tile", [(None, None), (2, 3), (3, 11)])
@pytest.mark.parametrize("match", [chunked_lco_kl, chunked_lco_mse, chunked_lco_log_cosh])
def test_what_is_watched_is_what_dense_logits_show_and_changes_nothing_else(match, tile):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, other, weight = normal(4, 5).requires_grad_(), normal(4, 5), normal(11, 5)
    mask = torch.tensor([True, False, True, True])
    sources, options = [(other, weight, 0.7)], {"tile_tokens": tile[0], "tile_vocab": tile[1]}
    watch = Watch()
    terms = match(hidden, weight, sources, mask, watch=watch, **options)
    plain = match(hidden, weight, sources, mask, **options)
    gaps = (hidden @ weight.T - 0.7 * other @ weight.T).std(-1, correction=0)
    torch.testing.assert_close(terms.metrics["logit_gap"], gaps[mask].sum().detach())
    seen = torch.distributions.Categorical(logits=(hidden @ weight.T).detach()[mask])
    torch.testing.assert_close(watch.entropy, seen.entropy())
    torch.testing.assert_close(watch.lse, (hidden @ weight.T)[mask].logsumexp(-1).detach())
    assert terms.total == plain.total and not plain.metrics
    grads = [torch.autograd.grad(x.total, hidden)[0] for x in (terms, plain)]
    assert torch.equal(*grads)
