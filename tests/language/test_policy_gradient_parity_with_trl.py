"""The same losses, gradients, metrics and advantages as TRL, on the same samples of one policy.

TRL's own trainer generates, scores and computes its loss; only the behaviour policy is moved away
from the policy, so that ratios differ from 1, and completions are cut to unequal lengths.
"""

import logging
import math

import pytest
import torch
from torch import Tensor

from holdfast.language.advantages import group_normalized, leave_one_out
from holdfast.language.losses import cispo, gspo, kl_k3, ppo_clip
from holdfast.language.model import load_policy
from holdfast.language.tokenizers import build_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

SMALL = {"hidden_size": 32, "intermediate_size": 48}
SIZE, TIME = 4, 7
REWARDS = [1.0, None, 0.25, 0.0, 2.0, 2.5, -1.0, 0.5]
MISSING = torch.tensor([math.nan if reward is None else reward for reward in REWARDS])


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    """Progress bars and advice of trainers that are only compared with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        logging.disable(logging.WARNING)
        yield
        logging.disable(logging.NOTSET)


def reward(completions: list[str], **_: object) -> list[float | None]:
    return REWARDS[: len(completions)]


def trainer_of(kind: str, tmp_path, **more):
    """A trainer of TRL, and a batch that it has generated and scored."""
    rows = [{"prompt": "red"}, {"prompt": "a longer one"}]
    options = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "per_device_train_batch_size": len(REWARDS),
        "num_generations": SIZE,
        "max_completion_length": TIME,
        "beta": 0.0,
        "seed": 3,
        **more,
    }
    policy = load_policy("tiny-qwen2", tokenizer=build_tokenizer(), config=SMALL)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    trainer = getattr(trl, f"{kind}Trainer")(
        policy.base,
        reward_funcs=reward,
        args=getattr(trl, f"{kind}Config")(**options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=build_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # TRL draws its completions from the global generator
        batch = trainer._generate_and_score_completions([row for row in rows for _ in range(SIZE)])
    lengths = torch.tensor([7, 1, 4, 6, 2, 7, 5, 3])
    batch["completion_mask"] = (torch.arange(TIME) < lengths[:, None]).long()
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    return trainer, batch


def logps_of(trainer, batch: dict[str, Tensor]) -> Tensor:
    """Of the completions under the policy, by TRL's forward pass."""
    ids, attention = (
        torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], -1)
        for kind in ("ids", "mask")
    )
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, TIME)[0]


def elsewhere(logps: Tensor, spread: float) -> Tensor:
    """Log-probabilities of another policy."""
    noise = torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))
    return logps.detach() + spread * noise


def gradients(trainer, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(trainer.model.parameters())))


def assert_same(trainer, theirs: Tensor, ours: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    mine, expected = gradients(trainer, ours), gradients(trainer, theirs)
    assert max(part.abs().max() for part in expected) > 1e-2, "there is something to compare"
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


CLIPPED = {"epsilon": 0.2, "epsilon_high": 0.28}
FIXED = {"aggregation": "fixed-length", "length": TIME}

# Options of TRL, and the loss here.
CASES = {
    "grpo": (
        {"loss_type": "grpo", "epsilon": 0.2},
        lambda *known: ppo_clip(*known, aggregation="sequence-mean"),
    ),
    "dr_grpo": (
        {"loss_type": "dr_grpo", "scale_rewards": "none", **CLIPPED},
        lambda *known: ppo_clip(*known, **FIXED, **CLIPPED),
    ),
    "dapo": (
        {"loss_type": "dapo", **CLIPPED},
        lambda *known: ppo_clip(*known, **CLIPPED),
    ),
    "dapo, two-sided": (
        {"loss_type": "dapo", "delta": 1.5, **CLIPPED},
        lambda *known: ppo_clip(*known, delta=1.5, **CLIPPED),
    ),
    "dapo, scale of the batch": (
        {"loss_type": "dapo", "scale_rewards": "batch", **CLIPPED},
        lambda *known: ppo_clip(*known, **CLIPPED),
    ),
    "gspo": (
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
        },
        gspo,
    ),
    "gspo, wide": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", **CLIPPED},
        lambda *known: gspo(*known, **CLIPPED),
    ),
    "gspo, over tokens": (
        {"loss_type": "dapo", "importance_sampling_level": "sequence", **CLIPPED},
        lambda *known: gspo(*known, aggregation="token-mean", **CLIPPED),
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.2},
        lambda *known: cispo(*known, epsilon_high=1.2),
    ),
    "cispo, as published": (
        {"loss_type": "cispo", "epsilon_high": 5.0},
        cispo,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_metrics_and_advantages_are_those_of_trl(name, tmp_path):
    options, loss = CASES[name]
    trainer, batch = trainer_of("GRPO", tmp_path, **options)
    scale = options.get("scale_rewards", "group")
    advantages = group_normalized(MISSING, SIZE, scale=scale)
    torch.testing.assert_close(advantages, batch["advantages"], rtol=1e-5, atol=1e-6)
    assert advantages[1] == 0 and advantages.abs().max() > 0.5

    logps = logps_of(trainer, batch)
    batch["old_per_token_logps"] = elsewhere(logps, 0.3)
    theirs = trainer._compute_loss(trainer.model, batch)
    mask = batch["completion_mask"].bool()
    terms = loss(logps, batch["old_per_token_logps"], advantages, mask)
    assert_same(trainer, theirs, terms.total / terms.count)

    recorded = trainer._metrics["train"]
    shared = set(terms.metrics) & set(recorded)
    assert len(shared) == (1 if "cispo" in name else 3)
    for key in shared:
        total, count = terms.metrics[key].tolist()
        assert total / count == pytest.approx(recorded[key][-1], abs=1e-6), key
    if name != "cispo, as published":
        assert sum(terms.metrics[key][0] for key in shared) > 0, "something is clipped"


def test_leave_one_out_and_its_clipped_sequences_are_those_of_trl(tmp_path):
    """There a whole sequence is one action: its log-probability is the sum."""
    trainer, batch = trainer_of("RLOO", tmp_path, **CLIPPED)
    advantages = leave_one_out(MISSING, SIZE)
    torch.testing.assert_close(advantages, batch["advantages"], rtol=1e-5, atol=1e-6)
    logps = logps_of(trainer, batch)
    mask = batch["completion_mask"].bool()
    sums = (logps * mask).sum(-1)
    batch["old_logps"] = elsewhere(sums, 0.6)
    theirs = trainer._compute_loss(trainer.model, batch)
    terms = ppo_clip(sums[:, None], batch["old_logps"][:, None], advantages, mask[:, :1], **CLIPPED)
    assert_same(trainer, theirs, terms.total / terms.count)
    for key in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        total, count = terms.metrics[key].tolist()
        assert total / count == pytest.approx(trainer._metrics["train"][key][-1], abs=1e-6), key
    assert terms.metrics["clip_ratio/region_mean"][0] > 0


def test_the_divergence_from_the_reference_is_that_of_trl(tmp_path):
    """Added to the loss, without the ratio in front of it."""
    options = {"loss_type": "dapo", "use_bias_correction_kl": False, **CLIPPED}
    trainer, batch = trainer_of("GRPO", tmp_path, **options)
    trainer.beta = 0.3
    logps = logps_of(trainer, batch)
    batch["old_per_token_logps"] = elsewhere(logps, 0.3)
    batch["ref_per_token_logps"] = elsewhere(logps, -0.5)
    theirs = trainer._compute_loss(trainer.model, batch)
    mask = batch["completion_mask"].bool()
    terms = ppo_clip(logps, batch["old_per_token_logps"], batch["advantages"], mask, **CLIPPED)
    divergence = (kl_k3(logps, batch["ref_per_token_logps"]) * mask).sum()
    assert divergence > 1
    assert_same(trainer, theirs, (terms.total + 0.3 * divergence) / terms.count)
