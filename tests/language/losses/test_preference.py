import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from holdfast.language.losses import dpo

VARIANTS = ["sigmoid", "ipo", "hinge"]


def draw(seed: int, pairs: int = 6, dtype=torch.float64) -> list[torch.Tensor]:
    """Chosen, rejected, and both under the reference."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (-20 * torch.rand(pairs, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(4)
    ]


def formula(delta: torch.Tensor, beta: float, variant: str, smoothing: float) -> torch.Tensor:
    """The losses as binary cross-entropy, mean squared error and hinge embedding."""
    if variant == "sigmoid":
        label = torch.full_like(delta, 1 - smoothing)
        return F.binary_cross_entropy_with_logits(beta * delta, label, reduction="sum")
    if variant == "ipo":
        return F.mse_loss(delta, torch.full_like(delta, 1 / (2 * beta)), reduction="sum")
    ones = torch.ones_like(delta)
    return F.margin_ranking_loss(
        beta * delta, torch.zeros_like(delta), ones, margin=1.0, reduction="sum"
    )


def test_worked_example():
    """Two pairs, beta 1/2.

    Log-ratios: chosen -3 - -5 = 2 and -4 - -4 = 0, rejected -6 - -4 = -2 and -1 - -5 = 4. So delta
    is 4 and -4, beta delta 2 and -2. Sigmoid: ln(1 + e^-2) + ln(1 + e^2) = 2 ln(1 + e^-2) + 2.
    Smoothing by 1/4 leaves it: the pairs are mirror images. IPO: (4 - 1)^2 + (-4 - 1)^2 = 34.
    Hinge: 0 + 3. Rewards: chosen 1 and 0, rejected -1 and 2.
    """
    logps = [torch.tensor(x) for x in ([-3.0, -4], [-6.0, -1], [-5.0, -4], [-4.0, -5])]
    sigmoid = 2 * math.log1p(math.exp(-2)) + 2
    assert dpo(*logps, beta=0.5).total.item() == pytest.approx(sigmoid)
    assert dpo(*logps, beta=0.5, label_smoothing=0.25).total.item() == pytest.approx(sigmoid)
    assert dpo(*logps, beta=0.5, variant="ipo").total.item() == pytest.approx(34)
    terms = dpo(*logps, beta=0.5, variant="hinge")
    assert terms.total.item() == pytest.approx(3)
    assert terms.count.item() == 2
    assert {name: value.item() for name, value in terms.metrics.items()} == {
        "rewards/chosen": 1.0,
        "rewards/rejected": 1.0,
        "rewards/accuracies": 1.0,
        "rewards/margins": 0.0,
        "logps/chosen": -7.0,
        "logps/rejected": -7.0,
    }


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(0, 7),
    st.floats(0.01, 5.0),
    st.sampled_from(VARIANTS),
    st.floats(0.0, 0.49),
)
def test_equals_torch_formulas_with_gradients(seed, pairs, beta, variant, smoothing):
    smoothing = smoothing if variant == "sigmoid" else 0.0
    logps = draw(seed, pairs)
    chosen, rejected = (part.requires_grad_() for part in logps[:2])
    delta = (chosen - logps[2]) - (rejected - logps[3])
    expected = formula(delta, beta, variant, smoothing)
    terms = dpo(*logps, beta=beta, variant=variant, label_smoothing=smoothing)
    torch.testing.assert_close(terms.total, expected)
    torch.testing.assert_close(
        torch.autograd.grad(terms.total, [chosen, rejected]),
        torch.autograd.grad(expected, [chosen, rejected]),
    )
    assert terms.count.item() == pairs
    assert terms.metrics["rewards/accuracies"].item() == (delta > 0).sum().item()
    torch.testing.assert_close(terms.metrics["rewards/margins"], beta * delta.detach().sum())
    assert not any(value.requires_grad for value in terms.metrics.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_is_summed_in_single(variant):
    logps = draw(1, 400, torch.bfloat16)
    wide = [part.double() for part in logps]
    terms = dpo(*logps, variant=variant)
    assert terms.total.dtype == torch.float32
    expected = dpo(*wide, variant=variant)
    torch.testing.assert_close(terms.total.double(), expected.total, rtol=1e-5, atol=1e-5)
    for name, value in terms.metrics.items():
        torch.testing.assert_close(value.double(), expected.metrics[name], rtol=1e-5, atol=1e-4)


def test_hopeless_pairs_keep_a_finite_loss_and_gradient():
    chosen = torch.tensor([-1e5, -1.0], requires_grad=True)
    terms = dpo(chosen, torch.tensor([-1.0, -1e5]), torch.zeros(2), torch.zeros(2), beta=1.0)
    terms.total.backward()
    assert terms.total.item() == 99_999.0
    assert chosen.grad.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_metrics_equal_trl(variant):
    """TRL's own loss on made-up model outputs: its trainer is reduced to what the loss reads."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    generator = torch.Generator().manual_seed(2)
    pairs, time, beta, smoothing = 5, 9, 0.3, 0.0
    mask = torch.rand(2 * pairs, time, generator=generator) < 0.6
    mask[:, 1] = True
    mask[:, 0] = False  # a first token is never predicted
    logps = -3 * torch.rand(2 * pairs, time - 1, generator=generator) * mask[:, 1:]
    reference = -8 * torch.rand(2 * pairs, generator=generator)
    blank = torch.zeros_like(logps)
    outputs = SimpleNamespace(log_probs=logps, entropy=blank, mean_logits=blank, is_top1=blank > 0)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(
            device=logps.device, gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[variant],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {
        "input_ids": torch.zeros(2 * pairs, time, dtype=torch.long),
        "attention_mask": torch.ones(2 * pairs, time),
        "completion_mask": mask.long(),
        "ref_chosen_logps": reference[:pairs],
        "ref_rejected_logps": reference[pairs:],
    }
    expected = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)

    lengths = mask.sum(-1) if variant == "ipo" else torch.ones(2 * pairs)
    chosen, rejected = (logps.sum(-1) / lengths).chunk(2)
    ours = dpo(chosen, rejected, *(reference / lengths).chunk(2), beta=beta, variant=variant)
    torch.testing.assert_close(ours.total / ours.count, expected)
    if variant != "ipo":  # there TRL logs the sums over tokens, which the loss does not see
        for name, value in ours.metrics.items():
            theirs = trainer._metrics["eval"][name][0]
            assert value.item() / pairs == pytest.approx(theirs, rel=1e-5)


def test_bad_arguments_name_themselves():
    logps = draw(3)
    names = ("chosen_logps", "rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
    for place, name in enumerate(names):

        def replaced(part: torch.Tensor, place: int = place) -> list[torch.Tensor]:
            return [*logps[:place], part, *logps[place + 1 :]]

        with pytest.raises(ValueError, match=f"{name} has shape \\(5,\\)"):
            dpo(*replaced(logps[place][1:]))
        with pytest.raises(ValueError, match=f"{name} has shape \\(1, 6\\)"):
            dpo(*replaced(logps[place][None]))
        with pytest.raises(ValueError, match=f"^{name} has dtype torch.int64"):
            dpo(*replaced(logps[place].long()))
    for beta in (0.0, -0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="beta is"):
            dpo(*logps, beta=beta)
    for smoothing in (-0.1, 0.5, math.nan):
        with pytest.raises(ValueError, match=r"label_smoothing is .* \[0, 0.5\)"):
            dpo(*logps, label_smoothing=smoothing)
    for variant in ("ipo", "hinge"):
        with pytest.raises(ValueError, match="only sigmoid"):
            dpo(*logps, variant=variant, label_smoothing=0.1)
    with pytest.raises(ValueError, match="variant is 'kto': it must be one of sigmoid, ipo, hinge"):
        dpo(*logps, variant="kto")
