import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.control.policies import (
    Critic,
    DiffusionPolicy,
    GaussianPolicy,
    ImplicitPolicy,
    Normalizer,
    ResidualPolicy,
    TwinQ,
    load_policy,
)
from holdfast.errors import ModelError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shared() -> dict:
    return {
        "horizon": 2,
        "history": 2,
        "hidden": (8, 8),
        "observations": Normalizer.fit(torch.randn(20, 4, generator=seeded(1))),
        "actions": Normalizer.fit(torch.randn(20, 3, generator=seeded(2))),
        "seed": 5,
    }


def diffusion(**changes) -> DiffusionPolicy:
    made = DiffusionPolicy(4, 3, **shared(), steps=4, fine_tuned_steps=2, **changes)
    made.update_average()
    return made


def fine_tuned() -> DiffusionPolicy:
    made = diffusion(sampler="ddim", sampling_steps=2, clip_sample=None, clip_noise=float("inf"))
    made.begin_fine_tuning()
    with torch.no_grad():
        made.network.body[0].weight += 0.1
    return made


MADE = {
    "gaussian": lambda: GaussianPolicy(
        4, 3, **shared(), activation="tanh", std=0.3, learn_std=True, std_range=(0.1, 0.9)
    ),
    "unbounded": lambda: GaussianPolicy(4, 3, **shared(), bounded=False),
    "diffusion": diffusion,
    "fine-tuned": fine_tuned,
    "residual": lambda: ResidualPolicy(diffusion(average_decay=None), hidden=(4,), scale=0.3),
    "implicit": lambda: ImplicitPolicy(
        diffusion(),
        TwinQ(4, 3, horizon=2, history=2, hidden=(5,), activation="relu", seed=1),
        Critic(4, 2, (6,), activation="tanh", seed=2),
        candidates=3,
        tau=0.9,
    ),
    "residual twice": lambda: ResidualPolicy(ResidualPolicy(GaussianPolicy(4, 3, **shared()))),
}


@pytest.mark.parametrize("name", MADE)
def test_a_loaded_policy_is_the_saved_one(name, tmp_path):
    made = MADE[name]()
    made.save_pretrained(tmp_path / "policy")
    before = torch.random.get_rng_state()
    loaded = load_policy(tmp_path / "policy")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert type(loaded) is type(made) and loaded.config() == made.config()
    assert loaded.state_dict().keys() == made.state_dict().keys()
    observations = torch.randn(6, made.history, 4, generator=seeded(3))
    for deterministic in (False, True):
        expected = made.act(observations, seeded(4), deterministic=deterministic)
        found = loaded.act(observations, seeded(4), deterministic=deterministic)
        assert torch.equal(found.actions, expected.actions)
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in made.parameters()
    ]


def test_saving_replaces_what_was_there(tmp_path):
    MADE["diffusion"]().save_pretrained(tmp_path)
    MADE["gaussian"]().save_pretrained(tmp_path)
    assert isinstance(load_policy(tmp_path), GaussianPolicy)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "policy.json",
        "policy.safetensors",
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    MADE["gaussian"]().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "policy")


@pytest.mark.parametrize("name", ["policy.json", "policy.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"holds no control policy: {name} is not there"):
        load_policy(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match="nowhere holds no control policy"):
        load_policy(tmp_path / "nowhere")


def test_a_run_directory_leads_to_the_policy_in_it(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run" / "model")
    with pytest.raises(ModelError, match=r"Did you mean .*run/model\?"):
        load_policy(tmp_path / "run")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"format": 1}', '{"format": 1, "kind": "x"}']
)
def test_a_damaged_description_is_a_model_error(folder, text):
    (folder / "policy.json").write_text(text)
    with pytest.raises(ModelError, match="does not describe a control policy"):
        load_policy(folder)


def change(folder, **changes) -> None:
    path = folder / "policy.json"
    described = json.loads(path.read_text())
    described["config"] |= changes.pop("config", {})
    path.write_text(json.dumps(described | changes))


def test_another_format_and_an_unknown_kind_are_named(folder):
    change(folder, format=7)
    with pytest.raises(ModelError, match="format 7, but this version of Holdfast reads format 1"):
        load_policy(folder)
    change(folder, format=1, kind="gausian")
    with pytest.raises(ModelError, match=r"'gausian' is not known.*did you mean 'gaussian'\?"):
        load_policy(folder)


@pytest.mark.parametrize(
    "config", [{"horizon": 0}, {"surprise": 1}, {"hidden": "wide"}, {"std": "big"}]
)
def test_a_configuration_that_does_not_fit_its_kind_is_a_model_error(folder, config):
    change(folder, config=config)
    with pytest.raises(ModelError, match="does not describe a policy of the kind 'gaussian'"):
        load_policy(folder)


def test_weights_of_another_policy_are_a_model_error(folder):
    change(folder, config={"hidden": [9]})
    with pytest.raises(ModelError, match="policy.safetensors does not fit policy.json"):
        load_policy(folder)


def test_a_missing_tensor_is_a_model_error(folder):
    tensors = load_file(folder / "policy.safetensors")
    del tensors["actions.low"]
    save_file(tensors, folder / "policy.safetensors")
    with pytest.raises(ModelError, match="actions.low"):
        load_policy(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_damaged_weights_are_a_model_error(folder, keep):
    path = folder / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="policy.safetensors is damaged"):
        load_policy(folder)


def test_pickled_weights_are_not_read(folder):
    torch.save({"w": torch.ones(1)}, folder / "policy.safetensors")
    with pytest.raises(ModelError, match="is damaged"):
        load_policy(folder)


def test_where_nothing_can_be_written_the_message_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match="cannot write the policy to"):
        MADE["gaussian"]().save_pretrained(tmp_path / "file" / "policy")
