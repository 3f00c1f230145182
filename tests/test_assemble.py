"""What a recipe is built into: which rows train, and which never do."""

from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from helpers.tiny import demonstrations, write_recipe, write_rows

from holdfast.assemble import alone, assemble, build_schedule, build_trainer
from holdfast.errors import RecipeError
from holdfast.joint import AdaptiveInterleave, Interleave, Surgery
from holdfast.recipe import load_recipe


def assembled(recipe, *overrides, said=None):
    loaded = load_recipe(str(recipe), overrides)
    say = said.append if said is not None else lambda text: None
    return assemble(loaded, Accelerator(cpu=True), say=say)


def origins(rows):
    return {row.origin for row in rows}


def parts(assembly, name):
    objective = assembly.objectives[name]
    return tuple(origins(r) for r in (objective.source.rows, objective.probe, objective.held_out))


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_training_probe_and_held_out_rows_are_apart_and_do_not_depend_on_the_seed(tmp_path, name):
    recipe = write_recipe(tmp_path)
    train, probe, held_out = parts(assembled(recipe), name)
    assert len(held_out) == 9 and len(probe) == 4
    assert not (train & probe or train & held_out or probe & held_out)
    assert parts(assembled(recipe, "training.seed=7"), name) == (train, probe, held_out)


def test_prompts_of_a_held_out_file_are_never_trained_on(tmp_path):
    recipe = write_recipe(tmp_path)
    write_rows(tmp_path / "test.jsonl", demonstrations(5))
    said = []
    assembly = assembled(recipe, "objectives.sft.data.held_out_path=test.jsonl", said=said)
    train, probe, held_out = parts(assembly, "sft")
    assert len(held_out) == 5 and len(train | probe) == 48 - 5
    # The held-out file repeats the first five rows of the training file.
    forbidden = {str(tmp_path / "sft.jsonl") + f":{line}" for line in range(1, 6)}
    assert not forbidden & (train | probe)
    assert "sft: left out 5 training rows with held-out prompts" in said


def test_max_rows_takes_a_part_that_is_not_the_start_of_the_file(tmp_path):
    assembly = assembled(write_recipe(tmp_path), "objectives.sft.data.max_rows=20")
    train, probe, held_out = parts(assembly, "sft")
    lines = sorted(int(origin.rsplit(":", 1)[1]) for origin in train | probe | held_out)
    assert len(lines) == 20 and lines != list(range(1, 21))


def test_optimum_keys_depend_on_everything_but_the_schedule(tmp_path):
    recipe = write_recipe(tmp_path)
    keys = assembled(recipe).keys
    assert assembled(recipe, "schedule.weights={sft: 0.9, dpo: 0.1}").keys == keys
    assert assembled(recipe, "schedule={kind: alright, weights: {sft: 1, dpo: 0}}").keys == keys
    # Another objective's options do not touch this one's optimum.
    other = assembled(recipe, "objectives.dpo.beta=0.5").keys
    assert other["sft"] == keys["sft"] and other["dpo"] != keys["dpo"]
    for change in ("training.learning_rate=0.1", "training.max_steps=9", "training.seed=3"):
        changed = assembled(recipe, change).keys
        assert changed["sft"] != keys["sft"] and changed["dpo"] != keys["dpo"]
    rows = demonstrations(48)
    rows[0]["completion"] = " another"
    write_rows(tmp_path / "sft.jsonl", rows)
    assert assembled(recipe).keys["sft"] != keys["sft"]


def built(recipe, tmp_path, *overrides):
    loaded = load_recipe(str(recipe), overrides)
    accelerator = Accelerator(cpu=True)
    assembly = assemble(loaded, accelerator)
    return build_trainer(loaded, assembly, {}, accelerator, folder=tmp_path, recorder=None)


def test_interleaves_are_built_as_written(tmp_path):
    recipe = str(write_recipe(tmp_path))
    # None of these says of itself how many updates an iteration has.
    objectives = {name: SimpleNamespace(source=None) for name in ("sft", "dpo")}
    pair = "first: sft, second: dpo, combine: true, every: iteration, updates_per_iteration: 3"
    override = f"schedule={{kind: interleave, ratio: 2, {pair}}}"
    fixed = build_schedule(load_recipe(recipe, [override]), {}, objectives)
    assert isinstance(fixed, Interleave)
    assert fixed.cycle == [({"sft": 1.0, "dpo": 1.0}, 1), ({"dpo": 1.0}, 5)]
    override = f"schedule={{kind: adaptive_interleave, form: root, maximum: 7, {pair}}}"
    adaptive = build_schedule(load_recipe(recipe, [override]), {}, objectives)
    assert isinstance(adaptive, AdaptiveInterleave)
    assert (adaptive.form, adaptive.maximum, adaptive.unit) == ("root", 7.0, 3)


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [(4, None, 4), (4, 4, 4), (None, 3, 3), (4, 3, "makes 4 updates"), (None, None, "is missing")],
)
@pytest.mark.parametrize("kind", ["interleave, ratio: 2", "adaptive_interleave"])
def test_an_iteration_has_the_updates_of_its_source(tmp_path, kind, own, given, expected):
    number = "" if given is None else f", updates_per_iteration: {given}"
    override = f"schedule={{kind: {kind}, first: sft, second: dpo, every: iteration{number}}}"
    recipe = load_recipe(str(write_recipe(tmp_path)), [override])
    source = SimpleNamespace() if own is None else SimpleNamespace(updates=own)
    objectives = {"sft": SimpleNamespace(), "dpo": SimpleNamespace(source=source)}
    if isinstance(expected, str):
        with pytest.raises(RecipeError, match=f"updates_per_iteration.*{expected}"):
            build_schedule(recipe, {}, objectives)
        return
    schedule = build_schedule(recipe, {}, objectives)
    if isinstance(schedule, AdaptiveInterleave):
        assert schedule.unit == expected
    else:
        assert schedule.cycle == [({"sft": 1.0}, 1), ({"dpo": 1.0}, 2 * expected)]


def test_a_combiner_and_learning_rates_reach_the_trainer(tmp_path):
    trainer = built(
        write_recipe(tmp_path),
        tmp_path,
        "combiner={method: pcd, scale: match, priority: dpo}",
        "training.learning_rates={model.model.layers: 0.25}",
    )
    combiner = trainer.combiner
    assert isinstance(combiner, Surgery)
    assert (combiner.method, combiner.scale, combiner.priority) == ("pcd", "match", "dpo")
    rates = {group["lr"] for group in trainer._optimizer_plain.param_groups}
    assert 0.25 in rates and 0.003 in rates
    assert trainer.train_step()


def test_a_learning_rate_without_a_parameter_is_an_error_of_the_recipe(tmp_path):
    with pytest.raises(RecipeError, match=r"training.learning_rates\['residual'\].*begin with"):
        built(write_recipe(tmp_path), tmp_path, "training.learning_rates={residual: 0.5}")


def test_an_objective_alone_needs_no_combiner(tmp_path):
    recipe = load_recipe(str(write_recipe(tmp_path)), ["combiner={method: pcd, priority: dpo}"])
    assert alone(recipe, "sft").combiner is None
