"""The CUDA kernels on a CPU: run by Triton's interpreter, and compiled but not run.

Triton decides at its import whether kernels are interpreted. Each way has a process of its own.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from holdfast.language.head import (
    Bonus,
    Head,
    Watch,
    chunked_gkd,
    chunked_lco_kl,
    chunked_lco_log_cosh,
    chunked_lco_mse,
    matching,
)
from holdfast.language.head.divergences import (
    ForwardKl,
    JensenShannon,
    LogCosh,
    ReverseKl,
    SquaredError,
)
from holdfast.language.head.matching import dense_match

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

KINDS: dict[str, Any] = {
    "forward kl": ForwardKl,
    "reverse kl": ReverseKl,
    "squared error": SquaredError,
    "log cosh": LogCosh,
}


def kl(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


DENSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward kl": lambda z, t: kl(t, z),
    "reverse kl": lambda z, t: kl(z, t),
    "squared error": lambda z, t: (z - t).square().mean(-1),
    "log cosh": lambda z, t: (torch.logaddexp(z - t, t - z) - math.log(2)).mean(-1),
}


@pytest.fixture(scope="module")
def process() -> Iterator[Callable[..., Any]]:
    """Calls a function with arguments in a process whose Triton interprets, or does not."""
    pools = {
        interpret: ProcessPoolExecutor(1, get_context("spawn"), start, (interpret,))
        for interpret in (True, False)
    }
    yield lambda interpret, of, *args: pools[interpret].submit(of, *args).result()
    for pool in pools.values():
        pool.shutdown()


def start(interpret: bool) -> None:
    import os
    import sys
    import warnings

    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = str(int(interpret))
    torch.set_num_threads(1)
    # The interpreter computes what a kernel then masks, such as inf - inf.
    warnings.simplefilter("ignore", RuntimeWarning)


# A divergence, part by part ----------------------------------------------------------------------


def evaluated(
    kind: str, z: Tensor, t: Tensor, factors: Tensor, width: int, block: int | None
) -> tuple[Tensor, Tensor]:
    """Losses and residuals over parts of the vocabulary; by kernels if they have a block size."""
    vocab = z.shape[1]
    divergence = KINDS[kind](torch.zeros(len(z)), vocab)
    if block is not None:
        from holdfast.language.head import kernels

        kernels._BLOCK = block
        plain, divergence = divergence, kernels.fused(divergence)
        assert divergence is not plain
    # Copies: the residuals overwrite them.
    parts = [
        (z[:, at : at + width].contiguous().clone(), t[:, at : at + width].contiguous())
        for at in range(0, vocab, width)
    ]
    strips = [slice(0, 2), slice(2, len(z))]  # as a tile is cut on a CPU
    for a, b in parts:
        for rows in strips:
            divergence.fold(0, rows, a[rows], b[rows])
    for a, b in parts:
        for rows in strips:
            divergence.residual_(rows, a[rows], b[rows], factors[rows])
    return divergence.losses(), torch.cat([a for a, _ in parts], 1)


def logits(rows: int, vocab: int, shift: float, spread: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows * vocab)
    return [torch.randn(rows, vocab, generator=generator) * spread + shift for _ in range(2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "vocab", "width", "block"),
    [
        (3, 1, 1, 4096),
        (5, 301, 301, 64),
        (4, 301, 100, 64),  # the last of four parts is a single id
        (3, 256, 128, 128),
        (2, 5000, 4500, 4096),
    ],
)
def test_is_the_plain_divergence(process, kind, rows, vocab, width, block):
    z, t = logits(rows, vocab, shift=0.0, spread=3.0)
    factors = torch.linspace(-0.5, 2.0, rows).unsqueeze(1)
    found = process(True, evaluated, kind, z, t, factors, width, block)
    plain = evaluated(kind, z, t, factors, width, None)
    leaf = z.double().requires_grad_()
    losses = DENSE[kind](leaf, t.double())
    (losses * factors.squeeze(1)).sum().backward()
    for expected in (plain, (losses.detach(), leaf.grad)):
        # A loss is a difference of logits of order 10, and may itself be 0.
        for got, want, rounding in zip(found, expected, (1e-6, 1e-7), strict=True):
            atol = 1e-5 * want.abs().max().item() + rounding
            torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_does_not_overflow(process, kind):
    z, t = logits(3, 50, shift=300.0, spread=40.0)
    found = process(True, evaluated, kind, z, t, torch.ones(3, 1), 20, 16)
    leaf = z.double().requires_grad_()
    losses = DENSE[kind](leaf, t.double())
    losses.sum().backward()
    # A logit of 400 is off by up to 1.5e-5.
    torch.testing.assert_close(found[0], losses.detach().float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[1], leaf.grad.float(), rtol=1e-4, atol=1e-5)


# The losses that go through them ------------------------------------------------------------------

CHUNKED: dict[str, Callable[..., Any]] = {
    "kl": chunked_lco_kl,
    "mse": chunked_lco_mse,
    "log cosh": chunked_lco_log_cosh,
}
TILES = [(None, None), (4, 65)]  # the last of three parts is a single id


def loss(
    name: str, kernels: bool, softcap: float | None, tiles: tuple[int | None, int | None]
) -> tuple[list[Tensor], set[str]]:
    """Total, logit gap and gradients of a chunked loss, and what computed it."""
    generator = torch.Generator().manual_seed(1)
    shape, width, vocab = (2, 5), 6, 131

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    hidden, weight, bias = normal(*shape, width), normal(vocab, width), normal(vocab)
    for x in (hidden, weight, bias):
        x.requires_grad_()
    head = Head(weight, bias, scale=0.8, softcap=softcap)
    frozen, other = (normal(*shape, width) for _ in range(2))
    mask = torch.rand(shape, generator=generator) < 0.8
    options: dict[str, Any] = {
        "token_weights": torch.rand(shape, generator=generator),
        "temperature": 0.9,
        "tile_tokens": tiles[0],
        "tile_vocab": tiles[1],
    }
    with pytest.MonkeyPatch.context() as patch:
        used = watch(patch, kernels)
        if name.startswith("gkd"):
            beta = float(name.removeprefix("gkd"))
            terms = chunked_gkd(hidden, head, (frozen, head), mask, beta=beta, **options)
        else:
            ids = torch.randint(vocab, shape, generator=generator)
            bonus = Bonus(offset=normal(*shape), token_ids=ids, amounts=normal(*shape))
            sources = [(frozen, head, 1.0), (other, normal(vocab, width), 0.5)]
            options |= {"bonus": bonus, "watch": Watch()}
            terms = CHUNKED[name](hidden, head, sources, mask, **options)
        terms.total.backward()
    gaps = [terms.metrics["logit_gap"]] if "logit_gap" in terms.metrics else []
    return [terms.total.detach(), *gaps, hidden.grad, weight.grad, bias.grad], used


def watch(patch: pytest.MonkeyPatch, kernels: bool) -> set[str]:
    """The names of the divergences that are begun from here on; forces kernels if asked to."""
    used = set()
    begin = matching._begin

    def watched(*args: Any) -> Any:
        divergence = begin(*args)
        used.add(type(divergence).__name__)
        return divergence

    patch.setattr(matching, "_begin", watched)
    patch.setattr(matching, "_kernels_serve", lambda like: kernels)
    return used


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize(
    ("name", "by"), [("kl", "_Kl"), ("mse", "_Error"), ("log cosh", "_Error"), ("gkd1.0", "_Kl")]
)
def test_a_chunked_loss_is_the_same(process, name, by, tiles):
    softcap = None if tiles[0] is None else 5.0
    found, used = process(True, loss, name, True, softcap, tiles)
    assert used == {by}
    plain, used = loss(name, False, softcap, tiles)
    assert used.isdisjoint({"_Kl", "_Error"})
    for got, want in zip(found, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_jensen_shannon_has_no_kernel(process):
    found, used = process(True, loss, "gkd0.5", True, None, (4, 65))
    assert used == {JensenShannon.__name__}
    plain, _ = loss("gkd0.5", False, None, (4, 65))
    torch.testing.assert_close(found, plain)


def dense(kernels: bool) -> tuple[Tensor, Tensor, set[str]]:
    generator = torch.Generator().manual_seed(2)
    # Laid out column by column.
    z, t = (torch.randn(40, 7, generator=generator).T for _ in range(2))
    z.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        used = watch(patch, kernels)
        terms = dense_match(ForwardKl, z, t, torch.ones(7, dtype=torch.bool), temperature=0.7)
        terms.total.backward()
    assert z.grad is not None
    return terms.total.detach(), z.grad, used


def test_logits_in_any_layout_are_served(process):
    *found, used = process(True, dense, True)
    assert used == {"_Kl"}
    *plain, _ = dense(False)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


# Where they are used ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "installed", "serve"),
    [
        (True, torch.float32, True, True),
        (False, torch.float32, True, False),
        (True, torch.float64, True, False),
        (True, torch.float32, False, False),
    ],
)
def test_serve_float32_on_cuda_where_triton_is(monkeypatch, is_cuda, dtype, installed, serve):
    monkeypatch.setattr(matching, "_has_triton", lambda: installed)
    assert matching._kernels_serve(SimpleNamespace(is_cuda=is_cuda, dtype=dtype)) is serve


def compiled(name: str, flag: str | None, cache: str) -> list[int]:
    """Bytes of machine code for each value of a flag, for rows of any length and of length 1."""
    import os

    os.environ["TRITON_CACHE_DIR"] = cache
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from holdfast.language.head import kernels

    kernel = getattr(kernels, name)
    sizes = []
    # An argument that is 1 is a constant to the compiler.
    for constants in ({"BLOCK": 4096}, {"BLOCK": 1, "columns": 1}):
        for values in ({},) if flag is None else ({flag: True}, {flag: False}):
            constant = constants | values
            types = {
                x: "*fp32" if x.endswith("_ptr") else "i32" if x == "columns" else "fp32"
                for x in kernel.arg_names
            }
            source = ASTSource(kernel, types | dict.fromkeys(constant, "constexpr"), constant)
            sizes.append(len(triton.compile(source, GPUTarget("cuda", 80, 32)).asm["cubin"]))
    return sizes


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("_fold_kl", None),
        ("_residual_kl", "FORWARD"),
        ("_fold_error", "SQUARED"),
        ("_residual_error", "SQUARED"),
    ],
)
def test_compile_for_a_gpu(process, tmp_path, name, flag):
    """The compiler checks types and names, which the interpreter does not."""
    assert min(process(False, compiled, name, flag, str(tmp_path))) > 0
