import pytest
import torch

from holdfast.control.losses.cloning import denoising, mse, nll
from holdfast.control.policies import DiffusionPolicy, GaussianPolicy, Normalizer, ResidualPolicy

SIZES = {"observation_size": 5, "action_size": 3, "horizon": 4, "history": 2, "hidden": (16, 16)}
BASES = ["gaussian", "diffusion"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disturb(module: torch.nn.Module, seed: int) -> None:
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def base_of(kind: str) -> GaussianPolicy | DiffusionPolicy:
    options = SIZES | {
        "observations": Normalizer.fit(3.0 + torch.randn(50, 5, generator=seeded(1))),
        "actions": Normalizer.fit(2.0 * torch.randn(50, 3, generator=seeded(2))),
    }
    if kind == "gaussian":
        made = GaussianPolicy(**options)
        disturb(made.head.network, 3)
        return made
    made = DiffusionPolicy(**options, steps=5, fine_tuned_steps=2)
    disturb(made.network, 3)
    return made


def policy(kind: str, *, trained: bool = True, **changes) -> ResidualPolicy:
    made = ResidualPolicy(base_of(kind), **{"hidden": (16,)} | changes)
    if trained:
        disturb(made.residual.network, 4)
    return made


def observe(batch: int) -> torch.Tensor:
    return 3.0 + torch.randn(batch, 2, 5, generator=seeded(5))


@pytest.mark.parametrize("kind", BASES)
def test_it_starts_exactly_at_its_base(kind):
    made, observations = policy(kind, trained=False), observe(6)
    expected = made.base.act(observations, seeded(6), deterministic=True)
    found = made.act(observations, seeded(6), deterministic=True)
    assert torch.equal(found.actions, expected.actions)
    assert found.record == {}


@pytest.mark.parametrize("kind", BASES)
def test_actions_are_the_base_plus_the_scaled_residual_in_normalised_units(kind):
    made, observations = policy(kind, scale=0.2), observe(6)
    decision = made.act(observations, seeded(6))
    record = decision.record
    expected = made.actions.denormalize(record["base"] + 0.2 * record["residual"])
    torch.testing.assert_close(decision.actions, expected, rtol=1e-5, atol=1e-5)
    base = made.base.act(observations, seeded(6), deterministic=True).actions
    torch.testing.assert_close(record["base"], made.actions.normalize(base))


@pytest.mark.parametrize("kind", BASES)
def test_exploration_is_that_of_the_residual(kind):
    made = policy(kind, trained=False, std=0.5)
    record = made.act(observe(1).expand(4000, -1, -1), seeded(6)).record
    assert record["residual"].std(0).mean().item() == pytest.approx(0.5, rel=0.02)
    assert abs(record["residual"].mean().item()) < 0.02


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("cut", [1, 2, 5, 17])
def test_the_ratio_is_one_before_the_first_update_however_the_batch_is_cut(kind, cut):
    made, observations = policy(kind), observe(17)
    record = made.act(observations, seeded(6)).record
    assert torch.equal(made.log_probs(observations, record), record["log_probs"])
    for start in range(0, 17, cut):
        part = slice(start, start + cut)
        again = made.log_probs(observations[part], {n: v[part] for n, v in record.items()})
        ratio = torch.exp(again - record["log_probs"][part])
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", BASES)
def test_the_ratio_stays_one_when_imitation_moves_the_base(kind):
    """What was recorded is the base's chunk, not its weights."""
    made, observations = policy(kind), observe(6)
    record = made.act(observations, seeded(6)).record
    disturb(made.base, 7)
    assert torch.equal(made.log_probs(observations, record), record["log_probs"])


@pytest.mark.parametrize("kind", BASES)
def test_reinforcement_learning_reaches_the_residual_and_nothing_of_the_base(kind):
    made, observations = policy(kind, learn_std=True), observe(6)
    record = made.act(observations, seeded(6)).record
    made.log_probs(observations, record).sum().backward()
    assert all(parameter.grad is None for parameter in made.base.parameters())
    assert all(parameter.grad.any() for parameter in made.residual.parameters())


@pytest.mark.parametrize("kind", ["gaussian mse", "gaussian nll", "diffusion"])
def test_imitation_reaches_the_base_and_nothing_of_the_residual(kind):
    made, observations = policy(kind.split()[0]), observe(6)
    actions = torch.randn(6, 4, 3, generator=seeded(8))
    mask = torch.ones(6, 4, dtype=torch.bool)
    cloned = made.cloned
    assert cloned is made.base
    if kind == "diffusion":
        timesteps, noise = cloned.draw_noise(6, seeded(9))
        predicted = cloned.predict_noise(observations, actions, timesteps, noise)
        terms = denoising(predicted, noise, mask)
    elif kind == "gaussian nll":
        terms = nll(cloned.position_log_probs(observations, actions), mask)
    else:
        terms = mse(cloned.mean(observations), cloned.actions.normalize(actions), mask)
    terms.total.backward()
    assert all(parameter.grad is None for parameter in made.residual.parameters())
    trained = [p for p in made.base.parameters() if p.requires_grad]
    assert trained and all(parameter.grad.any() for parameter in trained)


def test_a_state_names_every_tensor_once():
    pointers = [tensor.data_ptr() for tensor in policy("diffusion").state_dict().values()]
    assert len(pointers) == len(set(pointers))


def test_bad_arguments_name_themselves():
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="scale is"):
            policy("gaussian", scale=scale)
    made = policy("gaussian")
    record = dict(made.act(observe(6), seeded(6)).record)
    for name in ("base", "residual"):
        with pytest.raises(ValueError, match=rf"record\['{name}'\] has shape \(6, 3\)"):
            made.log_probs(observe(6), record | {name: torch.zeros(6, 3)})
