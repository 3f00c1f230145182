import sys

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from holdfast.control.policies.denoising import denoising_table
from holdfast.errors import ModelError

CASES = [("ddpm", 20, 20, 1.0), ("ddim", 20, 20, 1.0), ("ddim", 20, 5, 1.0), ("ddim", 20, 5, 0.0)]
CASES += [("ddim", 100, 10, 0.5), ("ddpm", 1, 1, 1.0)]


def scheduler(sampler: str, steps: int, sampling_steps: int):
    kind = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[sampler]
    made = kind(
        num_train_timesteps=steps,
        beta_schedule="squaredcos_cap_v2",
        clip_sample_range=1.0,
        timestep_spacing="trailing",
    )
    made.set_timesteps(sampling_steps)
    return made


@pytest.mark.parametrize(("sampler", "steps", "sampling_steps", "eta"), CASES)
def test_every_step_is_that_of_diffusers(sampler, steps, sampling_steps, eta):
    table = denoising_table(steps, sampler, sampling_steps, eta=eta)
    oracle = scheduler(sampler, steps, sampling_steps)
    assert table.timesteps.tolist() == oracle.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    noisy = 2 * torch.randn(64, 3, generator=generator)
    predicted, fresh = torch.randn(2, 64, 3, generator=generator)
    for index, time in enumerate(table.timesteps.tolist()):
        if sampler == "ddpm":
            # It draws its noise itself: the same numbers from the same seed.
            fresh = torch.randn(64, 3, generator=torch.Generator().manual_seed(time))
            options = {"generator": torch.Generator().manual_seed(time)}
        else:
            options = {"eta": eta, "use_clipped_model_output": True}
            options |= {"variance_noise": fresh} if eta else {}
        expected = oracle.step(predicted, time, noisy, **options).prev_sample
        clean = ((noisy - table.noise[time] * predicted) / table.signal[time]).clamp(-1, 1)
        found = table.to_clean[index] * clean + table.to_noisy[index] * noisy
        found = found + table.std[index] * fresh
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_forward_process_is_that_of_diffusers():
    table = denoising_table(20, "ddpm", 20)
    clean, noise = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0))
    times = torch.arange(20)
    expected = scheduler("ddpm", 20, 20).add_noise(clean, noise, times)
    found = table.signal[:, None] * clean + table.noise[:, None] * noise
    torch.testing.assert_close(found, expected)


def test_ddim_over_all_steps_with_full_noise_is_ddpm():
    ddpm, ddim = denoising_table(20, "ddpm", 20), denoising_table(20, "ddim", 20)
    assert torch.equal(ddpm.timesteps, ddim.timesteps)
    for name in ("to_clean", "to_noisy", "std"):
        torch.testing.assert_close(getattr(ddpm, name), getattr(ddim, name))


@pytest.mark.parametrize(("sampler", "steps", "sampling_steps", "eta"), CASES)
def test_a_perfect_prediction_is_reached_whatever_came_before(sampler, steps, sampling_steps, eta):
    table = denoising_table(steps, sampler, sampling_steps, eta=eta)
    assert table.timesteps[0] == steps - 1
    assert (table.to_clean[-1], table.to_noisy[-1], table.std[-1]) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(("sampler", "steps", "sampling_steps", "eta"), CASES)
def test_a_step_keeps_the_marginal_of_the_forward_process(sampler, steps, sampling_steps, eta):
    """From ``a x0 + b eps`` with the true ``x0`` to the same with the numbers of the step before.

    Its mean's weight is ``to_clean + to_noisy a``, its variance ``to_noisy^2 b^2 + std^2``.
    """
    table = denoising_table(steps, sampler, sampling_steps, eta=eta)
    signal, noise = table.signal[table.timesteps], table.noise[table.timesteps]
    after = torch.cat([signal[1:], torch.ones(1)]), torch.cat([noise[1:], torch.zeros(1)])
    torch.testing.assert_close(table.to_clean + table.to_noisy * signal, after[0])
    variance = (table.to_noisy * noise).square() + table.std.square()
    torch.testing.assert_close(variance, after[1].square(), rtol=1e-5, atol=1e-6)


def test_bad_arguments_name_themselves():
    with pytest.raises(ValueError, match="sampler is 'euler': it must be one of ddpm, ddim"):
        denoising_table(20, "euler", 20)
    with pytest.raises(ValueError, match="steps is 0"):
        denoising_table(0, "ddpm", 0)
    with pytest.raises(ValueError, match="sampling_steps is 10: ddpm takes all 20"):
        denoising_table(20, "ddpm", 10)
    for taken in (0, 7, 40):
        with pytest.raises(ValueError, match=f"sampling_steps is {taken}: it must divide"):
            denoising_table(20, "ddim", taken)


def test_without_diffusers_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModelError, match=r"pip install 'holdfast\[control\]'"):
        denoising_table(20, "ddpm", 20)
