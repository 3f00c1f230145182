"""Runs: what is written, what is trained once only, and what a run never overwrites."""

import contextlib
import errno
import fcntl
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from helpers.tiny import WORDS, write_recipe, write_rows
from safetensors.torch import load_file

from holdfast import run as runs
from holdfast.assemble import accelerator_for, alone, assemble
from holdfast.errors import RecipeError, RunError, TrainingError
from holdfast.joint.interruption import Interruption
from holdfast.joint.trainer import Trainer
from holdfast.language.model import LanguagePolicy, load_policy
from holdfast.language.tokenizers import build_tokenizer
from holdfast.recipe import load_recipe, shipped_recipes

SMALL = {"hidden_size": 32, "intermediate_size": 48}


def trained(folder: Path, *overrides: str, **changes) -> Path:
    return runs.train(load_recipe(str(write_recipe(folder, **changes)), overrides))


def lines(run: Path, kind: str) -> list[dict]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def described(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def close(first: dict, second: dict, atol: float) -> bool:
    return first.keys() == second.keys() and all(
        torch.allclose(first[name], second[name], rtol=0, atol=atol) for name in first
    )


@pytest.fixture
def trainings(monkeypatch):
    """Names the objectives of every training that takes place."""
    names = []
    train = Trainer.train

    def noted(self):
        names.append(tuple(self.objectives))
        return train(self)

    monkeypatch.setattr(Trainer, "train", noted)
    return names


@contextlib.contextmanager
def stopped_at(step: int):
    """Ends a training when it has taken so many steps, as Ctrl-C does when pressed twice."""
    train_step = Trainer.train_step

    def stepped(self):
        if self.step == step:
            raise KeyboardInterrupt
        return train_step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", stepped)
        with pytest.raises(KeyboardInterrupt):
            yield


# What a run writes --------------------------------------------------------------------------------


def test_a_run_directory_holds_all_that_its_readers_expect(tmp_path):
    run = trained(tmp_path)
    facts = described(run)
    assert facts["name"] == "tiny" and facts["status"] == facts["reason"] == "finished"
    assert facts["world_size"] == 1 and facts["peak_memory_bytes"] > 2**20
    assert 0 < facts["parameters"]["trainable"] == facts["parameters"]["total"]
    assert {"holdfast", "torch", "transformers"} <= set(facts["versions"])
    assert facts["optima"] == {} and len(facts["fingerprint"]) == 64
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    assert load_recipe(str(run / "recipe.yaml")).fingerprint() == recipe.fingerprint()
    train, evaluated = lines(run, "train"), lines(run, "eval")
    assert [line["step"] for line in train] == list(range(1, 9))
    assert [line["step"] for line in evaluated] == [0, 4, 8]
    for line in train:
        assert {name: entry["weight"] for name, entry in line["objectives"].items()} == {
            "sft": 0.5,
            "dpo": 0.5,
        }
        assert line["learning_rate"] == 0.003 and line["grad_norm"] > 0
    assert evaluated[0]["objectives"]["dpo"]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert evaluated[-1]["objectives"]["sft"]["loss"] < evaluated[0]["objectives"]["sft"]["loss"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000008",
    ]
    policy = load_policy(str(run / "model"))
    checkpoint = load_file(run / "checkpoints" / "step-00000008" / "policy.safetensors")
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, checkpoint[name])


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_train_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    optima = {objective: 0.5 for objective in load_recipe(name).objectives}
    overrides = [f"objectives.{objective}.optimum=0.5" for objective in optima]
    run = runs.train(load_recipe(name, ["training.max_steps=2", *overrides]))
    assert run == Path("runs") / name and (tmp_path / run / "run.json").is_file()
    assert described(run)["optima"] == optima
    first, second = lines(run, "train")
    assert (first["step"], second["step"]) == (1, 2)


def test_maxright_updates_the_objective_with_the_larger_recorded_gap(tmp_path):
    run = trained(
        tmp_path,
        objectives__sft__optimum=1.0,
        objectives__dpo__optimum=0.1,
        schedule={"kind": "maxright", "weights": {"sft": 0.2, "dpo": 0.8}, "evaluate_every": 3},
    )
    train = lines(run, "train")
    assert {tuple(sorted(line["gaps"])) for line in train} == {("dpo", "sft")}
    first = train[0]["objectives"]
    probed = 0.8 * (0.6931 - 0.1)  # the other gap is still as it was evaluated
    assert list(first) == ["sft"] and train[0]["gaps"]["dpo"] == pytest.approx(probed, abs=1e-3)
    loss = first["sft"]["loss"]
    assert train[0]["gaps"]["sft"] == pytest.approx(0.2 * (loss - 1.0)), "its own, refreshed"
    assert first["sft"]["weight"] == 1.0


def test_held_out_rows_are_never_trained_on(tmp_path, monkeypatch):
    recipe = load_recipe(str(write_recipe(tmp_path)))
    assembly = assemble(recipe, accelerator_for(recipe, tmp_path))
    for objective in assembly.objectives.values():
        parts = [objective.source.rows, objective.probe, objective.held_out]
        origins = [{row.origin for row in part} for part in parts]
        assert [len(part) for part in parts[1:]] == [4, 9] == [len(o) for o in origins[1:]]
        assert not (origins[0] & origins[1] or origins[0] & origins[2] or origins[1] & origins[2])


def test_which_rows_are_held_out_does_not_depend_on_the_seed(tmp_path):
    found = []
    for seed in (0, 1):
        recipe = load_recipe(str(write_recipe(tmp_path)), [f"training.seed={seed}"])
        objectives = assemble(recipe, accelerator_for(recipe, tmp_path)).objectives
        found.append({n: sorted(r.origin for r in o.held_out) for n, o in objectives.items()})
    assert found[0] == found[1]


def test_held_out_rows_may_come_from_a_file_of_their_own(tmp_path):
    rows = [{"prompt": f"Other {n}?", "completion": f" {word}"} for n, word in enumerate(WORDS)]
    tmp_path.joinpath("data").mkdir()
    write_rows(tmp_path / "data" / "held.jsonl", rows)
    path = write_recipe(tmp_path, objectives__sft__data__held_out_path="data/held.jsonl")
    recipe = load_recipe(str(path))
    sft = assemble(recipe, accelerator_for(recipe, tmp_path)).objectives["sft"]
    assert len(sft.held_out) == 9 and all("held.jsonl" in row.origin for row in sft.held_out)
    assert len(sft.source.rows) == 48 - 4


def test_max_rows_takes_a_random_part_of_a_file(tmp_path):
    recipe = load_recipe(str(write_recipe(tmp_path, objectives__sft__data__max_rows=20)))
    sft = assemble(recipe, accelerator_for(recipe, tmp_path)).objectives["sft"]
    rows = [*sft.source.rows, *sft.probe, *sft.held_out]
    numbers = sorted(int(row.origin.rpartition(":")[2]) for row in rows)
    assert len(numbers) == len(set(numbers)) == 20 and numbers[-1] > 20


# The same run, whatever it was cut into -----------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"objectives__sft__micro_batch_size": 1, "objectives__dpo__micro_batch_size": 3},
        {"objectives__sft__micro_batch_size": 100},
        {"training__gradient_checkpointing": True},
    ],
    ids=["micro-batches", "one large batch", "gradient checkpointing"],
)
def test_how_a_step_is_computed_does_not_change_what_is_learnt(changes, tmp_path):
    plain, other = trained(tmp_path / "a"), trained(tmp_path / "b", **changes)
    assert close(weights(plain), weights(other), atol=2e-5)
    start = load_policy("tiny-qwen2", tokenizer=build_tokenizer(), config=SMALL).base.state_dict()
    moved = [(weights(plain)[name] - start[name]).abs().max() for name in weights(plain)]
    assert min(moved) > 1e-3, "with weights that had not moved nothing would be compared"


def test_no_forward_pass_takes_more_rows_than_a_micro_batch(tmp_path, monkeypatch):
    sizes = []
    forward = LanguagePolicy.forward

    def noted(self, input_ids, *rest, **options):
        sizes.append((self.training, input_ids.shape[0]))
        return forward(self, input_ids, *rest, **options)

    monkeypatch.setattr(LanguagePolicy, "forward", noted)
    trained(
        tmp_path,
        objectives__sft__micro_batch_size=4,
        objectives__dpo__micro_batch_size=1,
        training__max_steps=1,
    )
    assert [size for training, size in sizes if training] == [4, 2, 2, 2, 2, 2], "6 rows, 4 pairs"


def test_training_in_bfloat16_learns_on_a_cpu(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        run = trained(tmp_path, training__bf16=True)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    exact = trained(tmp_path / "float32")
    first, last = lines(run, "eval")[0]["objectives"], lines(run, "eval")[-1]["objectives"]
    assert last["sft"]["loss"] < first["sft"]["loss"] - 0.1
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.float32}
    # Policy and reference are the same model and evaluated alike, so DPO starts at log 2.
    assert first["dpo"]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    expected = lines(exact, "eval")[-1]["objectives"]
    assert last["sft"]["loss"] == pytest.approx(expected["sft"]["loss"], abs=0.1)
    assert last["sft"]["loss"] != expected["sft"]["loss"], "it was computed in bfloat16"


# Resuming -----------------------------------------------------------------------------------------


def without_times(run: Path) -> list[dict]:
    found = lines(run, "train") + lines(run, "eval")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


@pytest.mark.parametrize("step", [0, 3, 6])
def test_a_stopped_run_ends_as_if_it_never_was(step, tmp_path):
    whole = trained(tmp_path / "whole")
    with stopped_at(step):
        trained(tmp_path / "cut")
    cut = tmp_path / "cut" / "run"
    assert described(cut)["status"] == "stopped" and not (cut / "model").exists()
    assert runs.resume(cut) == cut
    assert described(cut)["status"] == "finished"
    assert without_times(cut) == without_times(whole)
    assert close(weights(cut), weights(whole), atol=0)


def test_a_run_is_resumed_with_the_threads_it_began_with(tmp_path, monkeypatch):
    """How a sum is split over threads decides its last bits."""
    with stopped_at(1):
        trained(tmp_path)
    path = tmp_path / "run" / "run.json"
    facts = described(tmp_path / "run")
    assert facts["machine"]["threads"] == torch.get_num_threads()
    facts["machine"]["threads"] = 17
    path.write_text(json.dumps(facts))
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    runs.resume(tmp_path / "run")
    assert asked == [17]


def test_one_signal_ends_a_run_after_the_step_with_a_checkpoint(tmp_path, monkeypatch):
    train_step = Trainer.train_step

    def stepped(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stepped)
        run = trained(tmp_path / "cut")
    assert described(run)["status"] == "stopped"
    assert described(run)["reason"] == "interrupted by SIGTERM"
    assert (run / "checkpoints" / "step-00000003").is_dir()
    runs.resume(run)
    assert close(weights(run), weights(trained(tmp_path / "whole")), atol=0)


def test_a_finished_run_is_not_trained_again(tmp_path, trainings):
    run = trained(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    trainings.clear()
    assert runs.resume(run) == run
    assert not trainings and before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_a_trained_tokenizer_is_kept_by_the_run_and_used_to_resume(tmp_path):
    """The texts it was trained on may be gone by then."""
    tmp_path.joinpath("cut").mkdir()
    texts = write_rows(tmp_path / "cut" / "texts.jsonl", [{"text": " ".join(WORDS)}] * 5)
    bpe = {"kind": "bpe", "vocab_size": 300, "files": ["texts.jsonl"]}
    with stopped_at(6):
        trained(tmp_path / "cut", policy__tokenizer=bpe)
    run = tmp_path / "cut" / "run"
    texts.unlink()
    runs.resume(run)
    policy = load_policy(str(run / "model"))
    (word,) = policy.tokenizer(" quick").input_ids
    assert word >= 256, "the tokenizer learnt words"
    assert policy.base.get_input_embeddings().weight.shape[0] == len(policy.tokenizer) > 264
    write_rows(texts, [{"text": " ".join(WORDS)}] * 5)
    bpe = {**bpe, "files": ["../cut/texts.jsonl"]}
    whole = trained(tmp_path / "whole", policy__tokenizer=bpe)
    assert close(weights(run), weights(whole), atol=0)


def test_a_tokenizer_half_written_when_the_run_was_killed_is_written_again(tmp_path, monkeypatch):
    bpe = {"kind": "bpe", "vocab_size": 300, "files": ["sft.jsonl"]}

    def killed(self, folder, *arguments, **options):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "tokenizer.json").write_text("{")
        raise SystemExit(9)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", killed)
        trained(tmp_path, policy__tokenizer=bpe)
    run = tmp_path / "run"
    runs.resume(run)
    assert described(run)["status"] == "finished"
    assert load_policy(str(run / "model")).tokenizer(TEXT).input_ids


TEXT = "red and blue"


def test_a_run_whose_data_have_changed_is_not_resumed(tmp_path):
    with stopped_at(6):
        trained(tmp_path)
    rows = (tmp_path / "sft.jsonl").read_text().splitlines()
    (tmp_path / "sft.jsonl").write_text("\n".join(reversed(rows)) + "\n")
    with pytest.raises(RunError, match="other data or another initial model"):
        runs.resume(tmp_path / "run")


@pytest.mark.parametrize("missing", ["run.json", "recipe.yaml", None])
def test_what_is_no_run_directory_is_not_resumed(missing, tmp_path):
    folder = tmp_path / "nothing"
    if missing is not None:
        folder = trained(tmp_path)
        (folder / missing).unlink()
    with pytest.raises(RunError, match=f"{folder} is not a run directory"):
        runs.resume(folder)


# Directories --------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten_by_the_same_recipe(tmp_path):
    run = trained(tmp_path)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match=f"a run of this recipe. Continue it with .*resume {run}'"):
        trained(tmp_path)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_is_not_overwritten_by_another_recipe_and_the_differences_are_named(tmp_path):
    run = trained(tmp_path)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError) as caught:
        trained(tmp_path, "training.learning_rate=1", "objectives.dpo.beta=0.2", "name=other")
    message = str(caught.value)
    assert "another recipe (it differs in objectives.dpo.beta, training.learning_rate)" in message
    assert "--overwrite" in message
    assert (run / "metrics.jsonl").read_bytes() == before


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    run = trained(tmp_path, "training.learning_rate=0.01")
    (run / "notes.txt").write_text("mine")
    first = weights(run)
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    runs.train(recipe, overwrite=True)
    assert (run / "notes.txt").read_text() == "mine"
    assert [line["step"] for line in lines(run, "train")] == list(range(1, 9))
    assert not close(first, weights(run), atol=1e-3)
    assert close(weights(run), weights(trained(tmp_path / "alone")), atol=0)


def test_a_folder_with_other_things_in_it_is_never_touched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years")
    recipe = load_recipe(str(write_recipe(tmp_path)))
    for overwrite in (False, True):
        with pytest.raises(RunError, match="is not empty and holds no run"):
            runs.train(recipe, overwrite=overwrite)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_run_directory_must_be_a_folder(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(RunError, match="run is a file; the run directory must be a folder"):
        trained(tmp_path)
    with pytest.raises(RunError, match="cannot create run directory"):
        trained(tmp_path, f"output={tmp_path / 'run' / 'below'}")


def test_a_start_that_failed_leaves_no_obstacle(tmp_path):
    """A path is mistyped and then put right: the second start needs no --overwrite."""
    with pytest.raises(Exception, match="no such file"):
        trained(tmp_path, objectives__sft__data__path="stf.jsonl")
    run = tmp_path / "run"
    assert described(run)["status"] == "failed" and "stf.jsonl" in described(run)["reason"]
    assert described(trained(tmp_path))["status"] == "finished"


def test_a_run_that_failed_in_training_is_kept(tmp_path):
    with pytest.raises(TrainingError):
        trained(tmp_path, "training.learning_rate=1e30", "training.max_grad_norm=null")
    with pytest.raises(RunError, match="already holds a run of another recipe"):
        trained(tmp_path)


def test_training_stops_after_too_many_refused_steps_and_keeps_their_batches(tmp_path):
    with pytest.raises(TrainingError, match="refused, more than max_refusals=1"):
        trained(
            tmp_path,
            training__learning_rate=1e30,
            training__max_refusals=1,
            training__max_grad_norm=None,
        )
    run = tmp_path / "run"
    assert described(run)["status"] == "failed" and "max_refusals" in described(run)["reason"]
    refused = [line for line in lines(run, "event") if line["event"] == "refused"]
    assert len(refused) == 2
    batches = sorted((run / "refused").iterdir())
    assert len(batches) == 2 * 2  # each step had two objectives
    for path in batches:
        rows = json.loads(path.read_text())
        assert len(rows) == (6 if path.stem.endswith("sft") else 4)
        assert all(".jsonl:" in row["origin"] for row in rows)


# Policies and references --------------------------------------------------------------------------


def test_a_saved_model_is_loaded_from_a_path_relative_to_the_recipe(tmp_path, monkeypatch):
    policy = load_policy("tiny-llama", tokenizer=build_tokenizer(), config=SMALL, seed=7)
    policy.save_pretrained(tmp_path / "recipes" / "models" / "mine")
    path = write_recipe(
        tmp_path / "recipes", policy={"model_name_or_path": "models/mine"}, training__max_steps=1
    )
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(str(path))
    assembled = assemble(recipe, accelerator_for(recipe, tmp_path)).policy
    assert assembled.fingerprint() == policy.fingerprint()
    run = runs.train(recipe)
    assert load_policy(str(run / "model")).base.config.model_type == "llama"


def test_a_run_can_start_from_the_model_of_another(tmp_path):
    first = trained(tmp_path / "first")
    path = write_recipe(
        tmp_path / "second",
        policy={"model_name_or_path": "../first/run/model"},
        objectives__dpo__reference="../first/run/model",
    )
    second = runs.train(load_recipe(str(path)))
    start, end = lines(second, "eval")[0]["objectives"], lines(first, "eval")[-1]["objectives"]
    assert start["sft"]["loss"] == pytest.approx(end["sft"]["loss"], abs=1e-5)
    assert start["dpo"]["loss"] == pytest.approx(0.6931, abs=1e-4), "its own reference"


def test_a_reference_of_its_own_is_used_and_is_part_of_the_run(tmp_path):
    other = load_policy("tiny-qwen2", tokenizer=build_tokenizer(), config=SMALL, seed=9)
    path = write_recipe(tmp_path, objectives__dpo__reference="other")
    found = {}
    for seed in (9, 10):
        other = load_policy("tiny-qwen2", tokenizer=build_tokenizer(), config=SMALL, seed=seed)
        other.save_pretrained(tmp_path / "other")
        recipe = load_recipe(str(path))
        assembly = assemble(recipe, accelerator_for(recipe, tmp_path))
        objective = assembly.objectives["dpo"]
        loss = objective.loss(assembly.policy.eval(), objective.held_out)
        found[seed] = (loss.total / loss.count).item(), assembly
    assert found[9][0] != found[10][0] and abs(found[9][0] - 0.6931) > 1e-3
    assert found[9][1].fingerprint != found[10][1].fingerprint
    assert found[9][1].keys["dpo"] != found[10][1].keys["dpo"]
    assert found[9][1].keys["sft"] == found[10][1].keys["sft"]


# Optima -------------------------------------------------------------------------------------------

AUTO = {"objectives__sft__optimum": "auto", "objectives__dpo__optimum": "auto"}
MAXRIGHT = {"kind": "maxright", "weights": {"sft": 0.5, "dpo": 0.5}, "evaluate_every": 2}


def test_optima_are_found_once_and_used(tmp_path, fresh_cache, trainings):
    path = str(write_recipe(tmp_path, **AUTO, schedule=MAXRIGHT))
    optima = runs.find_optima(load_recipe(path))
    assert trainings == [("sft",), ("dpo",)]
    trainings.clear()
    assert runs.find_optima(load_recipe(path)) == optima
    assert not trainings, "cached"
    others = [
        "schedule.weights={sft: 0.25, dpo: 0.75}",
        "schedule={kind: alright, weights: {sft: 0.5, dpo: 0.5}}",
        "name=other",
    ]
    for override in others:
        assert runs.find_optima(load_recipe(path, [override])) == optima
    assert not trainings, "neither the schedule nor a name is part of what an optimum depends on"
    unknown = ["schedule={kind: mix, weights: {sft: 1}}", "objectives.sft.optimum=null"]
    assert runs.find_optima(load_recipe(path, unknown)) == optima and not trainings
    run = runs.train(load_recipe(path))
    assert trainings == [("sft", "dpo")]
    assert described(run)["optima"] == optima
    trainings.clear()
    runs.find_optima(load_recipe(path, ["training.learning_rate=0.001"]))
    assert trainings == [("sft",), ("dpo",)]
    trainings.clear()
    runs.find_optima(load_recipe(path, ["objectives.dpo.beta=0.2"]))
    assert trainings == [("dpo",)], "the other objective is as it was"


def test_an_optimum_is_the_lowest_held_out_loss_of_training_alone(tmp_path, fresh_cache):
    recipe = load_recipe(str(write_recipe(tmp_path, **AUTO)))
    optima = runs.find_optima(recipe)
    for name in ("sft", "dpo"):
        values = alone(recipe, name).dump() | {"output": str(tmp_path / f"alone-{name}")}
        solo = tmp_path / f"{name}.yaml"
        solo.write_text(yaml.safe_dump(values))
        run = runs.train(load_recipe(str(solo)))
        losses = [line["objectives"][name]["loss"] for line in lines(run, "eval")]
        assert optima[name] == min(losses) < losses[0]
        assert {tuple(line["objectives"]) for line in lines(run, "train")} == {(name,)}
        assert [line["step"] for line in lines(run, "train")] == list(range(1, 9)), "same budget"


def test_an_optimum_whose_search_was_stopped_is_taken_up_again(tmp_path, fresh_cache, trainings):
    recipe = load_recipe(str(write_recipe(tmp_path / "cut", objectives__sft__optimum="auto")))
    with stopped_at(6):
        runs.find_optima(recipe)
    found = runs.find_optima(recipe)
    (folder,) = {
        path.parent
        for path in fresh_cache.glob("optima/*/optimum.json")
        if "sft" in path.read_text()
    }
    events = [line["event"] for line in lines(folder / "run", "event")]
    assert events == ["resumed"]
    assert found["sft"] == json.loads((folder / "optimum.json").read_text())["optimum"]


def test_an_optimum_whose_search_was_killed_before_it_began_is_taken_up_again(
    tmp_path, fresh_cache, monkeypatch
):
    recipe = load_recipe(str(write_recipe(tmp_path, objectives__sft__optimum="auto")))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(runs, "write_json", lambda *a, **k: (_ for _ in ()).throw(SystemExit(9)))
        runs.find_optima(recipe)
    assert list(fresh_cache.glob("optima/*/run/recipe.yaml"))
    assert runs.find_optima(recipe)["sft"] > 0


def test_numbers_given_by_hand_are_not_searched_for(tmp_path, fresh_cache, trainings):
    recipe = load_recipe(
        str(write_recipe(tmp_path, objectives__sft__optimum=1.5, objectives__dpo__optimum="auto"))
    )
    assert set(runs.find_optima(recipe)) == {"dpo"}
    assert trainings == [("dpo",)]


def write_evaluations(folder: Path, losses: list) -> None:
    evaluations = [
        {"kind": "eval", "step": n, "objectives": {"sft": {"loss": loss}}}
        for n, loss in enumerate(losses)
    ]
    write_rows(folder / "metrics.jsonl", [{"kind": "train", "objectives": {}}, *evaluations])


def test_an_optimum_need_not_be_the_last_loss(tmp_path):
    write_evaluations(tmp_path, [2.0, 1.0, 1.5, "nan"])
    assert runs.lowest_held_out(tmp_path, "sft") == 1.0


@pytest.mark.parametrize("losses", [[], ["nan", "inf"]])
def test_an_optimum_that_was_never_finite_is_an_error(losses, tmp_path):
    write_evaluations(tmp_path, losses)
    with pytest.raises(RunError, match="sft was never evaluated to a finite loss"):
        runs.lowest_held_out(tmp_path, "sft")


# Trackers -----------------------------------------------------------------------------------------


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained(tmp_path, training__report_to=["tensorboard"])
    (events,) = (run / "holdfast").glob("events.out.tfevents.*")
    board = EventAccumulator(str(events.parent))
    board.Reload()
    expected = [line["objectives"]["sft"]["loss"] for line in lines(run, "train")]
    written = board.Scalars("train/sft/loss")
    assert [event.step for event in written] == list(range(1, 9))
    assert [event.value for event in written] == pytest.approx(expected)
    assert "eval/dpo/rewards/accuracies" in board.Tags()["scalars"]
    runs.train(
        load_recipe(str(tmp_path / "recipe.yaml"), ["training.report_to=[tensorboard]"]),
        overwrite=True,
    )
    again = list((run / "holdfast").glob("events.out.tfevents.*"))
    assert len(again) == 1 and again != [events], "those of the first run are gone"


def test_an_unknown_tracker_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(RecipeError, match="training.report_to.*tensorbord.*tensorboard"):
        trained(tmp_path, training__report_to=["tensorbord"])
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.is_wandb_available", lambda: False)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(RecipeError, match="training.report_to: wandb is not installed"):
        trained(tmp_path, training__report_to=["wandb"])
    assert not (tmp_path / "run").exists()


def test_a_disk_that_refuses_the_model_is_one_message(tmp_path, monkeypatch):
    def full(self, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LanguagePolicy, "save_pretrained", full)
    with pytest.raises(RunError, match="No space left.*holdfast resume"):
        trained(tmp_path, training__max_steps=1)
    assert described(tmp_path / "run")["status"] == "failed"


def test_an_interrupted_search_for_an_optimum_is_not_taken_for_one(tmp_path, fresh_cache):
    recipe = load_recipe(str(write_recipe(tmp_path, objectives__sft__optimum="auto")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interruption, "name", lambda self, accelerator: "SIGTERM")
        with pytest.raises(RunError, match="not found yet: interrupted by SIGTERM"):
            runs.find_optima(recipe)
    assert set(runs.find_optima(recipe)) == {"sft", "dpo"}


def test_a_run_in_which_another_process_trains_is_left_alone(tmp_path):
    run = trained(tmp_path, training__max_steps=1)
    handle = os.open(run, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(RunError, match="another process is training"):
            runs.train(load_recipe(str(tmp_path / "recipe.yaml")), overwrite=True)
    finally:
        os.close(handle)
    assert described(run)["status"] == "finished"


def test_a_run_killed_while_it_claimed_its_folder_can_be_started_again(tmp_path):
    recipe = load_recipe(str(write_recipe(tmp_path, training__max_steps=1)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: ti")
    (tmp_path / "run" / "run.json.partial").write_text('{"na')
    assert described(runs.train(recipe))["status"] == "finished"


def test_a_resumed_run_keeps_the_optima_it_started_with(tmp_path):
    run = trained(
        tmp_path,
        schedule={"kind": "maxright", "weights": {"sft": 0.5, "dpo": 0.5}},
        objectives__sft__optimum=1.0,
        objectives__dpo__optimum=0.5,
    )
    kept = described(run) | {"status": "stopped", "optima": {"sft": 0.25, "dpo": 0.75}}
    (run / "run.json").write_text(json.dumps(kept))
    runs.resume(run)
    assert described(run)["optima"] == {"sft": 0.25, "dpo": 0.75}


def test_an_optimum_without_held_out_rows_is_refused_before_training(tmp_path):
    recipe = load_recipe(str(write_recipe(tmp_path, objectives__sft__data__held_out=0)))
    with pytest.raises(RecipeError, match=r"objectives\.sft\.data\.held_out is 0"):
        runs.find_optima(recipe)
