"""Recipes: what is valid, and messages that lead to what is not."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.tiny import recipe_values, write_recipe
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from holdfast.errors import RecipeError
from holdfast.joint.schedules import Watching
from holdfast.recipe import load_recipe, parse_recipe, shipped_recipes
from holdfast.schema import Recipe, WeightedSpec

STAGES = [{"objective": "sft", "steps": 3}, {"objective": "dpo", "steps": 5}]


def parsed(tmp_path: Path, **changes) -> Recipe:
    return load_recipe(str(write_recipe(tmp_path, **changes)))


def refusal(tmp_path: Path, *, overrides=(), **changes) -> str:
    """The message about a recipe that is not valid, without the path of its file."""
    path = write_recipe(tmp_path, **changes)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), overrides)
    return str(caught.value).replace(f"{path}", "FILE")


def line_of(tmp_path: Path, start: str) -> int:
    """Line of the only line of the written recipe that begins with ``start``, indent apart."""
    lines = (tmp_path / "recipe.yaml").read_text().splitlines()
    (number,) = [n for n, line in enumerate(lines, 1) if line.strip().startswith(start)]
    return number


# What is valid ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description
    read = [objective.data for objective in recipe.objectives.values() if objective.data]
    assert read
    for data in read:
        assert Path(data.path).is_file() and Path(data.path).is_absolute()


def test_a_file_wins_over_a_shipped_recipe_of_the_same_name(tmp_path, monkeypatch):
    path = write_recipe(tmp_path, name="mine")
    path.rename(tmp_path / "quickstart")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart").name == "mine"


def test_relative_paths_start_from_the_folder_of_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder = tmp_path / "recipes"
    (folder / "model").mkdir(parents=True)
    recipe = parsed(
        folder,
        policy__model_name_or_path="model",
        policy__tokenizer={"kind": "bpe", "files": ["sft.jsonl"]},
        objectives__dpo__reference="./not-there",
    )
    assert recipe.objectives["sft"].data.path == str(folder / "sft.jsonl")
    assert recipe.policy.model_name_or_path == str(folder / "model")
    assert recipe.policy.tokenizer.files == (str(folder / "sft.jsonl"),)
    assert recipe.objectives["dpo"].reference == str(folder / "not-there")


def test_names_that_are_no_files_stay_as_they_are(tmp_path):
    recipe = parsed(
        tmp_path,
        policy__model_name_or_path="organisation/model",
        objectives__sft__data__path="organisation/data",
    )
    assert recipe.policy.model_name_or_path == "organisation/model"
    assert recipe.objectives["sft"].data.path == "organisation/data"


def test_numbers_in_scientific_notation_without_a_dot_are_numbers(tmp_path):
    """YAML 1.1 reads ``1e-4`` as text."""
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("learning_rate: 0.003", "learning_rate: 3e-3"))
    recipe = load_recipe(str(path), ["objectives.dpo.optimum=1e-2"])
    assert recipe.training.learning_rate == 0.003
    assert recipe.objectives["dpo"].optimum == 0.01


SCHEDULES = [
    {"kind": "mix", "weights": {"sft": 0.25, "dpo": 0.75}},
    {"kind": "alright", "weights": {"sft": 0.25, "dpo": 0.75}, "seed": 3},
    {"kind": "maxright", "weights": {"sft": 1, "dpo": 0}, "evaluate_every": 2, "smoothing": 0.9},
    {"kind": "sequential", "stages": STAGES},
    {"kind": "interleave", "counts": {"sft": 1, "dpo": 3}},
    {"kind": "interleave", "first": "sft", "second": "dpo", "ratio": 3, "combine": True},
    {"kind": "interleave", "first": "sft", "second": "dpo", "ratio": "inf"},
    {
        "kind": "adaptive_interleave",
        "first": "sft",
        "second": "dpo",
        "form": "root",
        "every": "iteration",
        "updates_per_iteration": 4,
    },
    {
        "kind": "sequential",
        "stages": [
            {"weights": {"sft": 0.5, "dpo": 0.5}, "loss_below": 1.5, "check_every": 2},
            {"objective": "dpo", "steps": 0},
        ],
    },
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["kind"])
def test_a_resolved_recipe_is_read_back_as_the_same(schedule, tmp_path):
    recipe = parsed(
        tmp_path,
        schedule=schedule,
        policy__lora={"r": 2, "target_modules": ["q_proj", "v_proj"]},
        objectives__sft__optimum=1.5,
        objectives__dpo__optimum="auto",
        training__report_to=["tensorboard"],
    )
    elsewhere = tmp_path / "run" / "recipe.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(yaml.safe_dump(recipe.dump(), sort_keys=False))
    again = load_recipe(str(elsewhere))
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()


# The fingerprint ----------------------------------------------------------------------------------

# One change for every leaf of a recipe, found by walking its dump: a new entry is covered at once.
UNNUMBERED = {"name", "description", "output", "training.report_to"}
OTHER_TEXT = {
    "policy.model_name_or_path": "tiny-llama",
    "policy.dtype": "bfloat16",
    "policy.lora.target_modules": "q_proj",
    "objectives.dpo.loss_type": "hinge",
    "objectives.sft.loss_type": "dft",
    "objectives.sft.aggregation": "sequence-sum",
    "objectives.sft.data.bad_rows": "drop",
    "objectives.dpo.data.bad_rows": "drop",
    "objectives.sft.optimum": 0.25,
    "training.lr_scheduler_type": "cosine",
    "combiner.method": "pcgrad",
    "combiner.scale": "match",
}
FIXED = {  # Their other values need other entries beside them.
    "objectives.sft.kind",
    "objectives.dpo.kind",
    "schedule.kind",
    "policy.kind",
    "policy.tokenizer.kind",
    "schedule.weights.sft",
    "schedule.weights.dpo",
    "combiner",
    "combiner.priority",
    "training.guards",
}


def full(combined: bool = False) -> dict:
    """A recipe with everything in it; a combiner has its place under another schedule."""
    kind = "mix" if combined else "maxright"
    values = recipe_values(
        policy__lora={"r": 2},
        policy__tokenizer={"kind": "bpe", "files": ["a.jsonl"], "name_or_path": "b"},
        objectives__sft__optimum="auto",
        objectives__dpo__optimum=0.5,
        schedule={"kind": kind, "weights": {"sft": 0.5, "dpo": 0.5}},
        combiner={"method": "upgrad"} if combined else None,
        training__lr_scheduler_type="linear",
        training__learning_rates={"model.norm": 0.1},
    )
    return Recipe.model_validate(values).dump()


def leaves(value, where=()):
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from leaves(entry, (*where, key))
    else:
        yield where, value


def changed(value, where: str):
    if where in OTHER_TEXT:
        return OTHER_TEXT[where]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 0.01
    if isinstance(value, list):
        return [*value, "other"]
    if isinstance(value, dict):
        return {"hidden_act": "relu"}
    if value is None:
        numbers = ("micro_batch_size", "max_rows", "early_stopping_patience")
        return 3 if where.endswith(numbers) else "other"
    return f"{value}other"


LEAVES = [*leaves(full()), *leaves({"combiner": full(combined=True)["combiner"]})]
SINGLE = [path for path, _ in LEAVES if ".".join(path) not in FIXED]


@pytest.mark.parametrize("path", SINGLE, ids=".".join)
def test_the_fingerprint_changes_with_everything_but_names_and_places(path):
    where = ".".join(path)
    combined = path[0] == "combiner"
    values = full(combined)
    target = values
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = changed(target[path[-1]], where)
    other = Recipe.model_validate(values)
    before = Recipe.model_validate(full(combined))
    assert other != before
    same = other.fingerprint() == before.fingerprint()
    assert same == (where in UNNUMBERED)


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": {"kind": "mix", "weights": {"sft": 0.5, "dpo": 0.5}}},
        {"schedule": {"kind": "maxright", "weights": {"sft": 0.4, "dpo": 0.6}}},
        {"policy__tokenizer": {"kind": "bytes"}},
        {"objectives__sft__kind": "dpo"},
        {"training__guards": [{"kind": "update_norm_cap", "limit": 1.0}]},
    ],
)
def test_the_fingerprint_changes_with_kinds_and_weights(change):
    first = recipe_values(
        objectives__sft__optimum=1.0,
        objectives__dpo__optimum=0.5,
        policy__tokenizer={"kind": "bpe", "files": ["a.jsonl"]},
        schedule={"kind": "maxright", "weights": {"sft": 0.5, "dpo": 0.5}},
    )
    second = copy.deepcopy(first)
    for path, value in change.items():
        *parents, last = path.split("__")
        target = second
        for parent in parents:
            target = target[parent]
        target[last] = value
    digests = {Recipe.model_validate(values).fingerprint() for values in (first, second)}
    assert len(digests) == 2


# Messages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "path", "nearest"),
    [
        ({"training__learning_rat": 1}, "training.learning_rat", "learning_rate"),
        ({"objectives__dpo__bta": 0.1}, "objectives.dpo.bta", "beta"),
        ({"objectives__sft__data__pth": "x"}, "objectives.sft.data.pth", "path"),
        ({"policy__lora": {"rank_": 1, "lora_alpa": 2}}, "policy.lora.rank_", None),
        ({"polcy": {}}, "polcy", "policy"),
        ({"schedule__wieghts": {}}, "schedule.wieghts", "weights"),
    ],
)
def test_an_unknown_entry_is_named_with_line_path_and_nearest_name(change, path, nearest, tmp_path):
    message = refusal(tmp_path, **change)
    line = line_of(tmp_path, path.rpartition(".")[2] + ":")
    assert message.startswith(f"FILE:{line}: {path}: unknown entry")
    assert len(message.splitlines()) == 1
    if nearest is not None:
        assert f"did you mean '{nearest}'?" in message


@pytest.mark.parametrize(
    ("change", "path", "nearest", "known"),
    [
        ({"objectives__dpo__kind": "dpoo"}, "objectives.dpo.kind", "dpo", "nll, dpo"),
        ({"schedule__kind": "alrigth"}, "schedule.kind", "alright", "sequential, mix"),
        ({"objectives__dpo__loss_type": "ippo"}, "objectives.dpo.loss_type", "ipo", "hinge"),
        ({"policy__tokenizer": {"kind": "byte"}}, "policy.tokenizer.kind", "bytes", "bpe"),
        ({"policy__dtype": "float23"}, "policy.dtype", "float32", "bfloat16"),
    ],
)
def test_an_unknown_kind_is_named_with_the_nearest_and_all_known(
    change, path, nearest, known, tmp_path
):
    message = refusal(tmp_path, **change)
    assert message.startswith("FILE:") and f": {path}: " in message
    assert f"did you mean '{nearest}'?" in message and known in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "path", "found"),
    [
        ({"training__max_steps": "many"}, "training.max_steps", "'many'"),
        ({"training__max_steps": 1.5}, "training.max_steps", "1.5"),
        ({"training__max_steps": 0}, "training.max_steps", "0"),
        ({"training": 3}, "training", "a mapping of entries, but found 3"),
        ({"policy": "tiny-qwen2"}, "policy", "a mapping of entries, but found 'tiny-qwen2'"),
        ({"objectives": ["sft"]}, "objectives", "a mapping of entries, but found ['sft']"),
        ({"training__report_to": "wandb"}, "training.report_to", "a list, but found 'wandb'"),
        ({"training__learning_rate": float("inf")}, "training.learning_rate", "inf"),
        ({"objectives__dpo__optimum": "aut"}, "objectives.dpo.optimum", "did you mean 'auto'?"),
        ({"objectives__dpo__optimum": float("nan")}, "objectives.dpo.optimum", "nan"),
        ({"objectives__dpo__optimum": True}, "objectives.dpo.optimum", "True"),
        ({"schedule__weights": {"sft": "half"}}, "schedule.weights.sft", "'half'"),
        ({"objectives__dpo__label_smoothing": 0.5}, "objectives.dpo.label_smoothing", "0.5"),
        ({"objectives__sft__data__max_length": 1}, "objectives.sft.data.max_length", "1"),
        ({"policy__tokenizer": {"kind": "bpe"}}, "policy.tokenizer", "needs files"),
        ({"policy__tokenizer": {"kind": "pretrained"}}, "policy.tokenizer", "name_or_path"),
        ({"name": "a/b"}, "name", "'a/b'"),
        ({"schedule": {"kind": "sequential", "stages": []}}, "schedule.stages", "empty"),
        (
            {"schedule": {"kind": "sequential", "stages": [{"objective": "sft"}]}},
            "schedule.stages.0",
            "needs steps, loss_below",
        ),
        (
            {"schedule": {"kind": "sequential", "stages": [{"steps": 2}]}},
            "schedule.stages.0",
            "either an objective or weights",
        ),
    ],
)
def test_a_wrong_value_is_named_with_line_path_and_what_was_found(change, path, found, tmp_path):
    message = refusal(tmp_path, **change)
    assert len(message.splitlines()) == 1
    place, where, text = message.split(": ", 2)
    line = int(place.removeprefix("FILE:"))
    assert where == path and found in text
    named = (tmp_path / "recipe.yaml").read_text().splitlines()[line - 1]
    last = path.rpartition(".")[2]
    assert last in named or last.isdecimal()


@pytest.mark.parametrize("name", ["a/b", "a.b", "", "../a", "a b"])
def test_a_name_of_an_objective_must_fit_paths_and_file_names(name, tmp_path):
    entry = {"kind": "nll", "data": {"path": "sft.jsonl"}}
    message = refusal(
        tmp_path, objectives={name: entry}, schedule={"kind": "mix", "weights": {name: 1}}
    )
    assert "pattern" in message and repr(name) in message


@pytest.mark.parametrize("missing", ["name", "policy", "objectives", "schedule", "training"])
def test_a_required_entry_that_is_missing_is_named(missing, tmp_path):
    path = write_recipe(tmp_path)
    values = yaml.safe_load(path.read_text())
    del values[missing]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match=f": {missing}: is required, but missing"):
        load_recipe(str(path))


def test_every_wrong_entry_is_reported_at_once(tmp_path):
    message = refusal(
        tmp_path, training__max_steps="x", objectives__dpo__beta=-1, policy__dtype="int8"
    )
    assert [line.split(": ")[1] for line in message.splitlines()] == [
        "policy.dtype",
        "objectives.dpo.beta",
        "training.max_steps",
    ]


def test_an_objective_may_be_called_like_a_kind(tmp_path):
    """The name of the objective stays in the path; the tag of the union does not get there."""
    entry = {"kind": "dpo", "data": {"path": "dpo.jsonl"}, "beta": -1}
    message = refusal(
        tmp_path, objectives={"nll": entry}, schedule={"kind": "mix", "weights": {"nll": 1}}
    )
    assert ": objectives.nll.beta: " in message


# Schedules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mix", "alright", "maxright"])
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"sft": 1.5, "dpo": -0.5}, "weights['sft'] is 1.5: every weight must lie in [0, 1]"),
        ({"sft": 0.5, "dpo": 0.6}, "weights sum to 1.1, not 1"),
        ({"sft": 0.0, "dpo": 0.0}, "weights sum to 0, not 1"),
        ({}, "weights is empty: name at least one objective"),
    ],
)
def test_weights_outside_the_simplex_are_refused(kind, weights, message, tmp_path):
    found = refusal(
        tmp_path,
        schedule={"kind": kind, "weights": weights},
        objectives__sft__optimum=1,
        objectives__dpo__optimum=1,
    )
    line = line_of(tmp_path, "weights:")
    assert found.startswith(f"FILE:{line}: schedule.weights: {message}")


def normalised(numbers: list[float]) -> list[float]:
    return [number / sum(numbers) for number in numbers]


@given(
    st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=4)
    | st.lists(st.floats(0.01, 1), min_size=1, max_size=4).map(normalised)
)
def test_weights_are_valid_exactly_on_the_simplex(numbers):
    weights = {f"o{index}": number for index, number in enumerate(numbers)}
    on_simplex = all(0 <= n <= 1 for n in numbers) and abs(sum(numbers) - 1) <= 1e-6
    try:
        WeightedSpec(weights=weights)
    except ValueError:
        assert not on_simplex
    else:
        assert on_simplex


@pytest.mark.parametrize(
    ("schedule", "where"),
    [
        ({"kind": "mix", "weights": {"sft": 0.5, "dppo": 0.5}}, "schedule.weights.dppo"),
        ({"kind": "alright", "weights": {"sft": 0.5, "dppo": 0.5}}, "schedule.weights.dppo"),
        ({"kind": "maxright", "weights": {"sft": 0.5, "dppo": 0.5}}, "schedule.weights.dppo"),
        (
            {"kind": "sequential", "stages": [STAGES[0], {"objective": "dppo", "steps": 1}]},
            "schedule.stages.1",
        ),
    ],
)
def test_a_schedule_that_names_an_absent_objective_is_refused(schedule, where, tmp_path):
    message = refusal(tmp_path, schedule=schedule)
    line = line_of(tmp_path, "dppo:" if "weights" in schedule else "- objective: dppo")
    assert message == (
        f"FILE:{line}: {where}: names objective 'dppo', which is not defined; did you mean 'dpo'? "
        "Defined: sft, dpo"
    )


def test_maxright_without_an_optimum_is_refused_before_anything_loads(tmp_path):
    message = refusal(
        tmp_path,
        schedule={"kind": "maxright", "weights": {"sft": 0.5, "dpo": 0.5}},
        objectives__sft__optimum=1.0,
    )
    assert "objectives.dpo.optimum: is missing, and schedule maxright needs it" in message


def test_an_objective_outside_the_schedule_needs_no_optimum(tmp_path):
    recipe = parsed(
        tmp_path,
        schedule={"kind": "maxright", "weights": {"sft": 1}},
        objectives__sft__optimum=1.0,
        objectives__dpo__data__probe=0,
    )
    assert recipe.objectives["dpo"].optimum is None


@pytest.mark.parametrize(
    "schedule",
    [
        {"kind": "maxright", "weights": {"sft": 0.5, "dpo": 0.5}},
        {"kind": "sequential", "stages": [STAGES[0], {"objective": "dpo", "loss_below": 0.5}]},
        {
            "kind": "sequential",
            "stages": [{"weights": {"sft": 0.5, "dpo": 0.5}, "steps": 9, "loss_below": 0.5}],
        },
    ],
)
def test_a_schedule_that_probes_needs_probe_rows(schedule, tmp_path):
    changes = {"schedule": schedule, "objectives__dpo__data__probe": 0}
    optima = {"objectives__sft__optimum": 1.0, "objectives__dpo__optimum": 0.1}
    message = refusal(tmp_path, **changes, **optima)
    assert f"objectives.dpo.data.probe: is 0, but schedule {schedule['kind']} evaluates" in message


def test_stages_without_an_end_condition_need_no_probe_rows(tmp_path):
    recipe = parsed(
        tmp_path,
        schedule={"kind": "sequential", "stages": STAGES},
        objectives__sft__data__probe=0,
        objectives__dpo__data__probe=0,
    )
    assert recipe.schedule.objectives == ("sft", "dpo")


def test_an_automatic_optimum_needs_held_out_rows(tmp_path):
    message = refusal(tmp_path, objectives__sft__optimum="auto", objectives__sft__data__held_out=0)
    assert "objectives.sft.optimum: is auto, which evaluates on held-out rows" in message


# --set --------------------------------------------------------------------------------------------


def test_set_replaces_entries_and_adds_what_is_not_there(tmp_path):
    path = write_recipe(tmp_path, policy__lora=None)
    recipe = load_recipe(
        str(path),
        [
            "training.max_steps=3",
            "training.bf16=true",
            "policy.lora.r=4",
            "schedule.weights={sft: 0.25, dpo: 0.75}",
            "objectives.dpo.data.held_out_path=held=out.jsonl",
            "training.max_steps=5",
        ],
    )
    assert recipe.training.max_steps == 5 and recipe.training.bf16
    assert recipe.policy.lora.r == 4
    assert recipe.schedule.weights == {"sft": 0.25, "dpo": 0.75}
    assert recipe.objectives["dpo"].data.held_out_path == str(tmp_path / "held=out.jsonl")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps", "--set 'training.max_steps': expected PATH=VALUE"),
        ("=3", "--set '=3': expected PATH=VALUE"),
        ("training.max_steps.x=1", "'max_steps' is not a mapping of entries"),
        ("training.max_steps={", "the value is not valid YAML"),
        ("training.max_step=3", "--set: training.max_step: unknown entry; did you mean"),
        ("training.max_steps=x", "--set: training.max_steps: input should be a valid integer"),
        ("objectives.dpo.kind=dop", "--set: objectives.dpo.kind: 'dop' is not known"),
    ],
)
def test_a_wrong_override_is_named(override, message, tmp_path):
    found = refusal(tmp_path, overrides=[override])
    assert message in found and len(found.splitlines()) == 1


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; a recipe is a mapping of entries"),
        (b"- a\n- b\n", "holds a list; a recipe is a mapping of entries"),
        (b"name: x\npolicy: [\n", ":3: not valid YAML: "),
        (b"name: x\n\tpolicy: {}\n", ":2: not valid YAML: "),
        (b"name: \xff\xfe\n", "cannot read recipe"),
        (b"name: !!python/object:os.system x\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(content, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_recipe_is_answered_with_the_nearest_shipped_one(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'quickstart'. Shipped: .*quickstart"):
        load_recipe("quickstrat")
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(str(tmp_path))


def test_plain_values_need_no_lines(tmp_path):
    values = recipe_values(training__max_steps=-1)
    with pytest.raises(RecipeError, match=r"mine.yaml: training.max_steps: "):
        parse_recipe(values, file=tmp_path / "mine.yaml")


def test_checking_a_recipe_and_asking_for_help_do_not_import_torch(tmp_path):
    path = write_recipe(tmp_path)
    script = (
        "import sys; from holdfast.cli import app; "
        f"app(['check', {str(path)!r}], standalone_mode=False); "
        "app(['--help'], standalone_mode=False); "
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'accelerate'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is valid" in done.stdout


def test_a_warm_up_that_would_do_nothing_is_refused():
    values = recipe_values(training__warmup_steps=5)
    with pytest.raises(ValidationError, match="constant_with_warmup"):
        Recipe.model_validate(values)


# Interleaves and combiners ------------------------------------------------------------------------


def test_the_two_forms_of_an_interleave_are_the_same_schedule(tmp_path):
    pair = {"kind": "interleave", "first": "sft", "second": "dpo", "ratio": 3}
    counts = {"kind": "interleave", "counts": {"sft": 1, "dpo": 3}}
    cycles = [parsed(tmp_path, schedule=spec).schedule.schedule().cycle for spec in (pair, counts)]
    assert cycles[0] == cycles[1]


PAIR = {"first": "sft", "second": "dpo"}


@pytest.mark.parametrize("ratio", ["inf", float("inf")])
def test_an_infinite_ratio_is_the_second_objective_alone(ratio, tmp_path):
    spec = parsed(tmp_path, schedule={"kind": "interleave", **PAIR, "ratio": ratio}).schedule
    assert spec.ratio == "inf"
    assert spec.objectives == ("dpo",)


@pytest.mark.parametrize(
    ("estimates", "watched", "expected"),
    [(None, False, False), (None, True, True), (False, True, False), (True, False, True)],
)
def test_gains_of_an_interleave_are_estimated_where_they_are_wanted(
    estimates, watched, expected, tmp_path
):
    values = {"kind": "interleave", **PAIR, "ratio": 2, "estimates": estimates}
    recipe = parsed(tmp_path, schedule=values)
    assert isinstance(recipe.schedule.schedule(watched=watched), Watching) == expected
    plain = parsed(tmp_path, schedule={"kind": "interleave", **PAIR, "ratio": 2})
    assert recipe.fingerprint() == plain.fingerprint(), "they change no number of the training"


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"kind": "interleave"}, "either counts, or first, second and ratio"),
        ({"kind": "interleave", "first": "sft", "ratio": 2}, "either counts, or first"),
        ({"kind": "interleave", "counts": {"sft": 1}, "ratio": 2}, "either counts, or first"),
        ({"kind": "interleave", "counts": {"sft": 0}}, "counts['sft'] is 0: it must be a whole"),
        ({"kind": "interleave", "counts": {"sft": 1}, "combine": True}, "nothing else fits"),
        ({"kind": "interleave", **PAIR, "ratio": 0}, "schedule.ratio"),
        ({"kind": "interleave", **PAIR, "ratio": 2.5}, "ratio is 2.5: it must be a whole number"),
        ({"kind": "interleave", **PAIR, "ratio": "all"}, "ratio is 'all': it must be a whole"),
        ({"kind": "interleave", "counts": {"sft": 1}, "estimates": True}, "counts has neither"),
        ({"kind": "interleave", **PAIR, "ratio": 2, "updates_per_iteration": 3}, "every is update"),
        ({"kind": "adaptive_interleave", "first": "sft"}, "schedule.second: is required"),
        ({"kind": "adaptive_interleave", **PAIR, "form": "rot"}, "did you mean 'root'?"),
        ({"kind": "adaptive_interleave", "first": "sft", "second": "sft"}, "both 'sft'"),
        ({"kind": "adaptive_interleave", **PAIR, "maximum": 0.5}, "schedule.maximum"),
        (
            {"kind": "adaptive_interleave", "first": "sft", "second": "dop"},
            "schedule.second: names objective 'dop', which is not defined; did you mean 'dpo'?",
        ),
    ],
)
def test_an_interleave_that_makes_no_sense_is_refused(schedule, message, tmp_path):
    assert message in refusal(tmp_path, schedule=schedule)


@pytest.mark.parametrize(
    ("combiner", "message"),
    [
        ({"method": "upgrd"}, "combiner.method: 'upgrd' is not known; did you mean 'upgrad'?"),
        ({"scale": "norm"}, "combiner.scale: scale is 'norm': it must be none, match or a"),
        ({"scale": -1}, "combiner.scale: scale is -1: it must be none, match or a positive"),
        ({"priority": "sft"}, "only method pcd has one"),
        (
            {"method": "pcd", "priority": "rl"},
            "combiner.priority: names 'rl', which is not an objective of the schedule",
        ),
    ],
)
def test_a_combiner_that_makes_no_sense_is_refused_in_one_line(combiner, message, tmp_path):
    found = refusal(tmp_path, combiner=combiner)
    assert message in found and len(found.splitlines()) == 1


HALVES = {"sft": 0.5, "dpo": 0.5}


@pytest.mark.parametrize(
    ("schedule", "acts"),
    [
        ({"kind": "alright", "weights": HALVES}, False),
        ({"kind": "interleave", **PAIR, "ratio": 2}, False),
        ({"kind": "interleave", **PAIR, "ratio": "inf", "combine": True}, False),
        ({"kind": "interleave", "counts": {"sft": 1, "dpo": 2}}, False),
        ({"kind": "adaptive_interleave", **PAIR}, False),
        ({"kind": "sequential", "stages": [{"objective": "sft", "steps": 2}]}, False),
        ({"kind": "mix", "weights": {"sft": 1.0, "dpo": 0.0}}, False),
        ({"kind": "mix", "weights": HALVES}, True),
        ({"kind": "interleave", **PAIR, "ratio": 2, "combine": True}, True),
        ({"kind": "adaptive_interleave", **PAIR, "combine": True}, True),
        ({"kind": "sequential", "stages": [{"weights": HALVES, "steps": 2}]}, True),
        ({"kind": "fade", **PAIR, "steps": 4}, True),
    ],
)
def test_a_combiner_that_would_never_act_is_refused(schedule, acts, tmp_path):
    if acts:
        assert parsed(tmp_path, schedule=schedule, combiner={}).combiner is not None
    else:
        found = refusal(tmp_path, schedule=schedule, combiner={})
        assert f"combiner: does nothing: no step of schedule {schedule['kind']}" in found


def test_what_is_not_set_leaves_the_fingerprint_alone(tmp_path):
    plain = parsed(tmp_path)
    assert parsed(tmp_path, combiner=None).fingerprint() == plain.fingerprint()
    assert parsed(tmp_path, training__learning_rates={}).fingerprint() == plain.fingerprint()
    assert parsed(tmp_path, combiner={}).fingerprint() != plain.fingerprint()
