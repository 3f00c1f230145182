"""The tiled output layer against float64 formulas, and what it must never hold or compute."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from holdfast.language.head import Head, TokenStatistics, dense_statistics, token_statistics

IGNORED = -100


def reference(hidden: Tensor, head: Head, labels: Tensor, temperature: float = 1.0) -> dict:
    """Every statistic by its definition, from all logits at once, differentiable."""
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return of_logits(logits, labels, temperature)


def of_logits(logits: Tensor, labels: Tensor, temperature: float) -> dict:
    logits = logits / temperature
    vocab = logits.shape[-1]
    logps = -torch.nn.functional.cross_entropy(
        logits.reshape(-1, vocab), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    mask = labels != IGNORED
    return {
        "logps": logps.view(labels.shape),
        "entropy": torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
        * mask,
        "correct": (logits.argmax(-1) == labels) & mask,
        "mask": mask,
    }


def agree(found: TokenStatistics, expected: dict, tolerance: float) -> None:
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(found.logps, expected["logps"], **close)
    torch.testing.assert_close(found.mask, expected["mask"])
    if found.entropy is not None:
        torch.testing.assert_close(found.entropy, expected["entropy"], **close)
        assert not found.entropy.requires_grad
        assert torch.equal(found.correct, expected["correct"])


def make(
    seed: int,
    shape: tuple[int, ...] = (3, 5),
    width: int = 4,
    vocab: int = 11,
    *,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    ignored: float = 0.3,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Head, Tensor]:
    """Hidden states, a head and labels from a seed; all parts require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        drawn = torch.randn(*size, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).requires_grad_()

    head = Head(normal(vocab, width), normal(vocab) if bias else None, scale, softcap)
    labels = torch.randint(vocab, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = IGNORED
    return normal(*shape, width), head, labels


def parts(hidden: Tensor, head: Head) -> list[Tensor]:
    return [part for part in (hidden, head.weight, head.bias) if part is not None]


def upcast(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Leaves with the same values in float64."""
    weight, bias = (
        None if part is None else part.detach().double().requires_grad_()
        for part in (head.weight, head.bias)
    )
    return hidden.detach().double().requires_grad_(), Head(weight, bias, head.scale, head.softcap)


def gradients(
    logps: Tensor, inputs: list[Tensor], seed: int, *, retain: bool = False
) -> tuple[Tensor, ...]:
    """Of a sum in which every token has its own weight."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(logps.shape, generator=generator, dtype=torch.float64)
    return torch.autograd.grad((logps * weights).sum(), inputs, retain_graph=retain)


class Recorder(TorchDispatchMode):
    """Notes every operation: its name and the elements of its largest output."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.calls.append((func.overloadpacket.__name__, max(sizes, default=0)))
        return out

    @property
    def largest(self) -> int:
        return max(size for _, size in self.calls)

    @property
    def products(self) -> int:
        return sum(name in {"mm", "addmm", "addmm_"} for name, _ in self.calls)


def test_a_worked_example():
    """Hidden state (1, 0), weight rows (0, 0), (ln 2, 0), (ln 5, 0): logits 0, ln 2, ln 5.

    The softmax is (1, 2, 5) / 8. The label 2 has log-probability ln(5/8) and is the most probable.
    The entropy is (1/8) ln 8 + (1/4) ln 4 + (5/8) ln(8/5). The gradient of the log-probability by
    the hidden state is w_2 - sum_v p_v w_v: in its first part (3/8) ln 5 - (1/4) ln 2. By the
    weight rows it is (onehot - p) h: -1/8, -1/4 and 3/8 in their first part.
    """
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [math.log(2), 0.0], [math.log(5), 0.0]], requires_grad=True)
    for tile_vocab in (1, 2, 3, None):
        found = token_statistics(
            hidden, Head(weight), torch.tensor([2]), statistics=True, tile_vocab=tile_vocab
        )
        assert found.logps.item() == pytest.approx(math.log(5 / 8), abs=1e-6)
        expected = math.log(8) / 8 + math.log(4) / 4 + 5 / 8 * math.log(8 / 5)
        assert found.entropy.item() == pytest.approx(expected, abs=1e-6)
        assert found.correct.item() is True
        by_hidden, by_weight = torch.autograd.grad(found.logps.sum(), [hidden, weight])
        first = 3 / 8 * math.log(5) - math.log(2) / 4
        torch.testing.assert_close(by_hidden, torch.tensor([[first, 0.0]]))
        torch.testing.assert_close(
            by_weight, torch.tensor([[-1 / 8, 0.0], [-1 / 4, 0.0], [3 / 8, 0.0]])
        )


layouts = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "shape": st.sampled_from([(1,), (7,), (2, 3), (3, 1, 4), (0, 3)]),
        "width": st.integers(1, 6),
        "vocab": st.integers(1, 13),
        "bias": st.booleans(),
        "scale": st.sampled_from([1.0, 0.25, -1.5]),
        "softcap": st.sampled_from([None, 0.5, 30.0]),
        "ignored": st.sampled_from([0.0, 0.4, 1.0]),
    }
)
tiles = st.one_of(st.none(), st.integers(1, 15))
temperatures = st.sampled_from([1.0, 0.3, 2.5])


@settings(max_examples=100, deadline=None)
@given(layouts, tiles, tiles, temperatures)
def test_equals_the_definition_in_double_precision(layout, tile_tokens, tile_vocab, temperature):
    hidden, head, labels = make(**layout)
    expected = reference(hidden, head, labels, temperature)
    found = token_statistics(
        hidden,
        head,
        labels,
        temperature=temperature,
        statistics=True,
        tile_tokens=tile_tokens,
        tile_vocab=tile_vocab,
    )
    assert found.logps.dtype == torch.float64
    agree(found, expected, 1e-10)
    inputs = parts(hidden, head)
    torch.testing.assert_close(
        gradients(found.logps, inputs, 1), gradients(expected["logps"], inputs, 1)
    )


@settings(max_examples=50, deadline=None)
@given(layouts, tiles, tiles, temperatures, st.sampled_from([torch.float32, torch.bfloat16]))
def test_sums_in_single_precision_whatever_the_dtype(
    layout, tile_tokens, tile_vocab, temperature, dtype
):
    """Against float64 on the very same (rounded) inputs: only gradients are rounded, once."""
    hidden, head, labels = make(**layout, dtype=dtype)
    wide, wide_head = upcast(hidden, head)
    expected = reference(wide, wide_head, labels, temperature)
    found = token_statistics(
        hidden,
        head,
        labels,
        temperature=temperature,
        tile_tokens=tile_tokens,
        tile_vocab=tile_vocab,
    )
    assert found.logps.dtype == torch.float32
    agree(found, expected, 1e-5)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2e-5
    for got, want, part in zip(
        gradients(found.logps, parts(hidden, head), 2),
        gradients(expected["logps"], parts(wide, wide_head), 2),
        parts(hidden, head),
        strict=True,
    ):
        assert got.dtype == part.dtype
        torch.testing.assert_close(got.double(), want, rtol=rounding, atol=2e-5)


@settings(max_examples=50, deadline=None)
@given(
    layouts,
    temperatures,
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_dense_equals_the_definition(layout, temperature, dtype):
    drawn, _, labels = make(**{**layout, "width": layout["vocab"]}, dtype=dtype)
    logits = drawn.detach().requires_grad_()
    wide = logits.detach().double().requires_grad_()
    expected = of_logits(wide, labels, temperature)
    found = dense_statistics(logits, labels, temperature=temperature)
    assert found.entropy is None and found.correct is None
    agree(found, expected, 1e-10 if dtype == torch.float64 else 1e-5)
    (got,), (want,) = gradients(found.logps, [logits], 3), gradients(expected["logps"], [wide], 3)
    assert got.dtype == dtype
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 2e-5)
    torch.testing.assert_close(got.double(), want, rtol=rounding, atol=2e-5)
    if dtype == torch.float64:
        with_statistics = dense_statistics(logits, labels, temperature=temperature, statistics=True)
        agree(with_statistics, expected, 1e-10)


@settings(max_examples=40, deadline=None)
@given(layouts, tiles, tiles, temperatures)
def test_tiled_equals_dense_in_single_precision(layout, tile_tokens, tile_vocab, temperature):
    """At the size of a real vocabulary's logits the two may differ by 1e-5, no more."""
    layout = {**layout, "vocab": layout["vocab"] * 97, "softcap": None}
    hidden, head, labels = make(**layout, dtype=torch.float32)
    logits = hidden @ head.weight.T * head.scale
    if head.bias is not None:
        logits = logits + head.bias * head.scale
    dense = dense_statistics(logits, labels, temperature=temperature, statistics=True)
    found = token_statistics(
        hidden,
        head,
        labels,
        temperature=temperature,
        statistics=True,
        tile_tokens=tile_tokens,
        tile_vocab=tile_vocab and tile_vocab * 31,
    )
    torch.testing.assert_close(found.logps, dense.logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy, dense.entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [None, 2], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_pass_finite_differences(tile, softcap):
    hidden, head, labels = make(5, (4,), 3, 5, bias=True, scale=0.7, softcap=softcap)

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        scored = Head(weight, bias, head.scale, head.softcap)
        return token_statistics(
            hidden, scored, labels, temperature=1.3, tile_tokens=tile, tile_vocab=tile
        ).logps

    assert torch.autograd.gradcheck(logps, (hidden, head.weight, head.bias))


def test_dense_gradients_pass_finite_differences():
    logits, _, labels = make(6, (2, 3), width=5)
    labels = labels.where(labels < 5, 4)
    assert torch.autograd.gradcheck(
        lambda logits: dense_statistics(logits, labels, temperature=0.7).logps, (logits,)
    )


@pytest.mark.parametrize(
    "tokens, vocab, options",
    [
        (60, 70, {"tile_tokens": 16, "tile_vocab": 32}),
        (60, 70, {"tile_tokens": 60, "tile_vocab": 35}),
        (1100, 4096, {}),
    ],
)
def test_never_holds_the_logits(tokens, vocab, options):
    hidden, head, labels = make(
        7, (tokens,), 3, vocab, bias=True, softcap=5.0, ignored=0.0, dtype=torch.float32
    )
    with Recorder() as forward:
        found = token_statistics(hidden, head, labels, statistics=True, **options)
    with Recorder() as backward:
        found.logps.sum().backward()
    limit = options.get("tile_tokens", 512) * options.get("tile_vocab", 2048)
    assert forward.products > 0 and forward.largest <= limit < tokens * vocab
    assert backward.products > 0 and backward.largest <= max(limit, head.weight.numel())
    assert backward.largest < tokens * vocab


@pytest.mark.parametrize("tile", [None, 4], ids=["one tile", "many tiles"])
def test_what_is_frozen_costs_no_product(tile):
    def count(*frozen: str) -> tuple[int, dict[str, Tensor | None]]:
        hidden, head, labels = make(8, (8,), 3, 8, bias=True, ignored=0.0)
        leaves = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
        for name in frozen:
            leaves[name].requires_grad_(False)
        logps = token_statistics(hidden, head, labels, tile_tokens=tile, tile_vocab=tile).logps
        with Recorder() as recorder:
            logps.sum().backward()
        return recorder.products, {name: leaf.grad for name, leaf in leaves.items()}

    tiles = 1 if tile is None else 4
    projections = 0 if tile is None else tiles
    everything, grads = count()
    assert everything == projections + 2 * tiles
    assert all(grad is not None for grad in grads.values())

    products, grads = count("weight", "bias")
    assert products == projections + tiles
    assert grads["weight"] is None and grads["bias"] is None and grads["hidden"] is not None

    products, grads = count("hidden", "bias")
    assert products == projections + tiles
    assert grads["hidden"] is None and grads["weight"] is not None


def test_positions_that_do_not_count_are_never_projected():
    hidden, head, labels = make(9, (6,), ignored=0.0)
    labels[[1, 4]] = IGNORED
    poisoned = hidden.detach().clone()
    poisoned[[1, 4]] = math.nan
    poisoned.requires_grad_()
    found = token_statistics(poisoned, head, labels, statistics=True)
    agree(found, reference(hidden, head, labels), 1e-10)
    found.logps.sum().backward()
    assert torch.equal(poisoned.grad[[1, 4]], torch.zeros(2, 4, dtype=torch.float64))
    assert poisoned.grad.isfinite().all() and head.weight.grad.isfinite().all()


@pytest.mark.parametrize("tile", [None, 4])
def test_nothing_counted_gives_zeros_with_zero_gradients(tile):
    hidden, head, labels = make(10, bias=True, ignored=1.1)
    found = token_statistics(
        hidden, head, labels, statistics=True, tile_tokens=tile, tile_vocab=tile
    )
    assert not found.mask.any() and not found.correct.any()
    assert torch.equal(found.logps, torch.zeros(3, 5, dtype=torch.float64))
    assert torch.equal(found.entropy, torch.zeros(3, 5, dtype=torch.float64))
    found.logps.sum().backward()
    for part in parts(hidden, head):
        assert torch.equal(part.grad, torch.zeros_like(part))


@pytest.mark.parametrize("tile", [None, 4], ids=["one tile", "many tiles"])
def test_a_graph_may_be_walked_twice(tile):
    hidden, head, labels = make(11, softcap=2.0)
    found = token_statistics(hidden, head, labels, tile_tokens=tile, tile_vocab=tile)
    inputs = parts(hidden, head)
    first = gradients(found.logps, inputs, 1, retain=True)
    torch.testing.assert_close(gradients(found.logps, inputs, 1), first, rtol=0, atol=0)


def test_no_graph_without_gradients():
    hidden, head, labels = make(12)
    with torch.no_grad():
        found = token_statistics(hidden, head, labels, statistics=True)
    assert not found.logps.requires_grad
    agree(found, reference(hidden, head, labels), 1e-10)


@pytest.mark.parametrize("tile", [None, 4], ids=["one tile", "many tiles"])
def test_autocast_leaves_values_and_gradients_in_single_precision(tile):
    """Without autocast's care a product of these inputs would be rounded to 8 bits."""
    hidden, head, labels = make(13, (2, 9), 16, 23, bias=True, dtype=torch.float32)
    wide, wide_head = upcast(hidden, head)
    expected = reference(wide, wide_head, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_statistics(
            hidden, head, labels, statistics=True, tile_tokens=tile, tile_vocab=tile
        )
        grads = gradients(found.logps, parts(hidden, head), 4)
    assert found.logps.dtype == torch.float32
    agree(found, expected, 1e-5)
    torch.testing.assert_close(
        tuple(grad.double() for grad in grads),
        gradients(expected["logps"], parts(wide, wide_head), 4),
        rtol=1e-5,
        atol=1e-5,
    )


def test_autocast_hidden_states_meet_a_single_precision_head():
    hidden, head, labels = make(14, dtype=torch.float32)
    rounded = hidden.detach().bfloat16().requires_grad_()
    found = token_statistics(rounded, head, labels)
    agree(found, reference(rounded.double(), Head(head.weight.double()), labels), 1e-5)
    found.logps.sum().backward()
    assert rounded.grad.dtype == torch.bfloat16 and head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("tile", [None, 3], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits_neither_overflow_nor_vanish(tile, size):
    hidden, head, labels = make(15, scale=size)
    single = Head(head.weight.detach().float(), None, size)
    found = token_statistics(
        hidden.float(), single, labels, statistics=True, tile_tokens=tile, tile_vocab=tile
    )
    expected = reference(hidden, head, labels)
    torch.testing.assert_close(found.logps.double(), expected["logps"], rtol=1e-5, atol=1e-2)
    assert found.entropy.isfinite().all() and (found.entropy >= -1e-6).all()
    assert torch.equal(found.correct, expected["correct"])


@pytest.mark.parametrize("tile", [None, 2, 3, 4])
@pytest.mark.parametrize("statistics", [False, True])
def test_banned_ids_are_as_if_they_were_not_there(tile, statistics):
    hidden, head, labels = make(16, vocab=6, ignored=0.0)
    labels = labels % 2 + 4  # ids 4 and 5 are left once 0 to 3 are banned
    bias = torch.zeros(6, dtype=torch.float64)
    bias[:4] = -math.inf
    banned = Head(head.weight, bias)
    found = token_statistics(hidden, banned, labels, statistics=statistics, tile_vocab=tile)
    expected = reference(hidden, Head(head.weight[4:]), labels - 4)
    agree(found, expected, 1e-10)
    inputs = parts(hidden, head)
    torch.testing.assert_close(
        gradients(found.logps, inputs, 5), gradients(expected["logps"], inputs, 5)
    )
    logits = hidden @ head.weight.T + bias
    agree(dense_statistics(logits, labels, statistics=statistics), expected, 1e-10)


@pytest.mark.parametrize("tile", [None, 4], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("statistics", [False, True])
def test_a_broken_hidden_state_shows_in_its_own_value_only(tile, statistics):
    hidden, head, labels = make(17, (6,), ignored=0.0)
    with torch.no_grad():
        hidden[2] = math.nan
    found = token_statistics(
        hidden, head, labels, statistics=statistics, tile_tokens=tile, tile_vocab=tile
    )
    assert found.logps.isnan().tolist() == [False, False, True, False, False, False]


def test_equal_logits_make_no_prediction():
    head = Head(torch.zeros(7, 2))
    found = token_statistics(torch.ones(7, 2), head, torch.arange(7), statistics=True, tile_vocab=3)
    assert not found.correct.any()
    torch.testing.assert_close(found.entropy, torch.full((7,), math.log(7)))


def test_log_probabilities_and_entropies_equal_trl():
    utils = pytest.importorskip("trl.trainer.utils")
    hidden, head, labels = make(18, (2, 6), 8, 40, ignored=0.0, dtype=torch.float32)
    logits = (hidden @ head.weight.T).detach()
    found = token_statistics(
        hidden, head, labels, temperature=0.7, statistics=True, tile_tokens=5, tile_vocab=9
    )
    logps = utils.selective_log_softmax(logits, labels, temperature=0.7)
    torch.testing.assert_close(found.logps, logps, rtol=1e-5, atol=1e-5)
    entropy = utils.entropy_from_logits(logits / 0.7)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-5, atol=1e-5)


def test_bad_arguments_name_themselves():
    hidden, head, labels = make(19, vocab=11, ignored=0.0)
    with pytest.raises(ValueError, match=r"hidden has shape \(3, 4, 4\), not \(3, 5, 4\)"):
        token_statistics(hidden[:, 1:], head, labels)
    with pytest.raises(ValueError, match=r"hidden has shape \(3, 5, 3\), not \(3, 5, 4\)"):
        token_statistics(hidden[..., 1:], head, labels)
    for wrong in (11, -1):
        with pytest.raises(ValueError, match=r"labels has ids .* must lie in \[0, 11\)"):
            token_statistics(hidden, head, labels.index_fill(0, torch.tensor([1]), wrong))
    with pytest.raises(ValueError, match="labels has dtype torch.float32"):
        token_statistics(hidden, head, labels.float())
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature is"):
            token_statistics(hidden, head, labels, temperature=temperature)
        with pytest.raises(ValueError, match="temperature is"):
            dense_statistics(hidden, labels % 4, temperature=temperature)
    for name in ("tile_tokens", "tile_vocab"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            token_statistics(hidden, head, labels, **{name: 0})
    with pytest.raises(ValueError, match=r"logits has shape \(3, 4, 4\), not \(3, 5, 'vocab'\)"):
        dense_statistics(hidden[:, 1:], labels)
    with pytest.raises(ValueError, match="weight has shape"):
        Head(torch.zeros(3))
    with pytest.raises(ValueError, match=r"bias has shape \(2,\), not \(3,\)"):
        Head(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="softcap is 0"):
        Head(torch.zeros(3, 2), softcap=0.0)
