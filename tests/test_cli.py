"""The command line: what each command prints, and one message for what a user can mend."""

import gzip
import inspect
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from helpers.tiny import demonstrations, preferences, write_recipe, write_rows
from typer.testing import CliRunner

import holdfast
from holdfast import cli
from holdfast.joint.combine import METHODS
from holdfast.joint.trainer import Trainer
from holdfast.language.model import load_policy
from holdfast.language.tokenizers import build_tokenizer
from holdfast.recipe import load_recipe, shipped_recipes

COMMANDS = ["check", "train", "resume", "optimum", "stability", "report", "compare", "list"]
GROUPS = {"demos": ["record", "inspect"]}
SMALL = {"hidden_size": 32, "intermediate_size": 48}


@dataclass(frozen=True)
class Answer:
    status: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch, capfd):
    """Runs ``holdfast ARGUMENTS`` in this process, as its entry point does."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["holdfast", *map(str, arguments)])
        capfd.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        return Answer(status, *capfd.readouterr())

    return run


@pytest.fixture
def no_report(monkeypatch):
    """Drawing a page takes seconds, and most tests look at other things."""
    monkeypatch.setattr("holdfast.report.write_report", lambda runs: Path(runs[0]) / "report.html")


def assert_one_message(answer: Answer) -> str:
    """What every error must be like; returns the message."""
    assert answer.status == 2, answer
    assert answer.err.startswith("error: ") and answer.err.count("error:") == 1, answer.err
    assert "Traceback" not in answer.err + answer.out
    return answer.err.removeprefix("error: ").rstrip("\n")


def refused(call, folder: Path, *arguments: object) -> str:
    """The message of a training that must not begin."""
    message = assert_one_message(call("train", folder / "recipe.yaml", *arguments))
    metrics = folder / "run" / "metrics.jsonl"
    assert not metrics.exists() or not metrics.read_text(), "training had begun"
    return message


# Help ---------------------------------------------------------------------------------------------


def test_help_without_arguments_names_every_command():
    for arguments in ([], ["--help"]):
        text = CliRunner().invoke(cli.app, arguments).output
        for command in [*COMMANDS, *GROUPS]:
            assert f" {command} " in text
        assert "holdfast train quickstart" in text


@pytest.mark.parametrize(
    "command", [*COMMANDS, *(f"{group} {name}" for group in GROUPS for name in GROUPS[group])]
)
def test_help_of_every_command_describes_all_it_takes_and_has_an_example(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    found = CliRunner().invoke(cli.app, [*command.split(), "--help"])
    assert found.exit_code == 0
    assert f"holdfast {command}" in found.output.partition("Example")[2], "an example"
    function = getattr(cli, "list_" if command == "list" else command.replace(" ", "_"))
    assert inspect.getdoc(function).splitlines()[0] in found.output
    hints = get_type_hints(function, include_extras=True)
    hints.pop("return")
    for name, hint in hints.items():
        (declared,) = hint.__metadata__
        assert declared.help and declared.help in found.output, name


def test_every_command_is_tested():
    infos = cli.app.registered_commands
    assert {info.name or info.callback.__name__ for info in infos} == set(COMMANDS)
    groups = {
        info.typer_instance.info.name: info.typer_instance for info in cli.app.registered_groups
    }
    assert {
        name: [info.name for info in group.registered_commands] for name, group in groups.items()
    } == GROUPS


def test_the_version_is_that_of_the_package(call):
    answer = call("--version")
    assert answer.status == 0 and answer.out == f"holdfast {holdfast.__version__}\n"


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["train", "a", "--sett", "b=c"]])
def test_a_wrong_command_line_is_answered_with_its_usage(arguments, call):
    answer = call(*arguments)
    assert answer.status == 2 and "Usage:" in answer.err and "Traceback" not in answer.err


# check and list -----------------------------------------------------------------------------------


def test_check_prints_what_a_recipe_resolves_to(call, tmp_path, monkeypatch):
    path = write_recipe(tmp_path / ("long-" * 30), schedule__kind="alright")
    answer = call("check", path, "--set", "training.seed=5", "--set", "schedule.seed=6")
    assert answer.status == 0 and not answer.err
    assert answer.out.endswith(f"# {path} is valid\n")
    expected = load_recipe(str(path), ["training.seed=5", "schedule.seed=6"])
    assert yaml.safe_load(answer.out) == expected.dump(), "whole, however long its lines are"
    assert not (path.parent / "run").exists()


@pytest.mark.parametrize("name", shipped_recipes())
def test_check_knows_shipped_recipes_in_any_folder(name, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("check", name).status == 0


def test_list_names_everything_that_there_is(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    answer = call("list")
    assert answer.status == 0
    kinds = ["nll", "dpo", "language", "sequential", "mix", "alright", "maxright", "tripwires"]
    for name in [*shipped_recipes(), *kinds, "safe", "solve_rate_gate"]:
        assert f" {name} " in answer.out
    assert "[control]" in answer.out  # Brackets are no markup.
    assert all(method in answer.out for method in METHODS)


# The path of a user -------------------------------------------------------------------------------


def test_train_report_and_compare_lead_from_a_recipe_to_pages(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path / "recipes")
    for seed in (0, 1):
        with monkeypatch.context() as patch:
            if seed == 1:  # one page is enough
                patch.setattr("holdfast.report.write_report", lambda runs: runs[0] / "report.html")
            answer = call("train", path, "--set", f"training.seed={seed}", "--output", seed)
        assert answer.status == 0 and not answer.err, answer.err
        assert f"run: {seed}\n" in answer.out and f"report: {seed}/report.html\n" in answer.out
        assert "sft" in answer.out and "dpo" in answer.out
        described = json.loads((tmp_path / str(seed) / "run.json").read_text())
        assert described["command"] == (
            f"holdfast train {path} --set training.seed={seed} --output {seed}"
        )
    page = (tmp_path / "0" / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>") and page.count("</html>") == 1
    assert "max_steps: 8" in page, "the resolved recipe is in it"
    answer = call("compare", "0", "1")
    assert answer.status == 0 and answer.out.endswith("comparison: compare.html\n")
    assert (tmp_path / "compare.html").read_text().count("</html>") == 1
    answer = call("report", "0", "--output", "page.html")
    assert answer.status == 0 and answer.out == "report: page.html\n"
    assert (tmp_path / "page.html").is_file()


def test_a_run_directory_may_be_called_anything(call, no_report, tmp_path, monkeypatch):
    """Names that YAML would read as a number, as nothing, or as a mapping."""
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path)
    for name in ("2024", "null", "a: b", "[x]"):
        answer = call("train", path, "--set", "training.max_steps=1", "--output", name)
        assert answer.status == 0, answer.err
        assert (tmp_path / name / "run.json").is_file() and f"run: {name}\n" in answer.out


def test_resume_of_an_interrupted_and_of_a_finished_run(call, no_report, tmp_path, monkeypatch):
    path = write_recipe(tmp_path)
    run = tmp_path / "run"
    train_step = Trainer.train_step

    def stepped(self):
        if self.step == 6:
            raise KeyboardInterrupt
        return train_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stepped)
        stopped = call("train", path)
    assert stopped.status not in (0, 2) and "Traceback" not in stopped.err
    answer = call("resume", run)
    assert answer.status == 0 and not answer.err
    assert "resumed at step 4" in answer.out and f"run: {run}\n" in answer.out
    again = call("resume", run)
    assert again.status == 0 and "is finished already: nothing to resume" in again.out
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 8


def test_optimum_prints_values_and_keeps_them(call, tmp_path, fresh_cache, monkeypatch):
    path = write_recipe(
        tmp_path,
        objectives__sft__optimum="auto",
        objectives__dpo__optimum="auto",
        schedule={"kind": "maxright", "weights": {"sft": 0.5, "dpo": 0.5}},
    )
    first = call("optimum", path)
    assert first.status == 0 and not first.err
    assert "training on it alone" in first.out and "optima of tiny" in first.out
    files = {p: p.stat().st_mtime_ns for p in fresh_cache.glob("optima/**/*")}
    assert files
    second = call("optimum", path, "--set", "schedule.weights={sft: 0.1, dpo: 0.9}")
    assert second.status == 0 and "training on it alone" not in second.out
    assert files == {p: p.stat().st_mtime_ns for p in fresh_cache.glob("optima/**/*")}
    values = [json.loads(p.read_text()) for p in fresh_cache.glob("optima/*/optimum.json")]
    assert {entry["objective"] for entry in values} == {"sft", "dpo"}
    for entry in values:
        assert f"{entry['optimum']:.6g}" in second.out and f"{entry['optimum']:.6g}" in first.out
    third = call("optimum", path, "--set", "training.learning_rate=0.001")
    assert third.out.count("training on it alone") == 2


# Bad data -----------------------------------------------------------------------------------------


def spoil_line(path: Path, number: int, **columns: object) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[number - 1] = {**rows[number - 1], **columns}
    write_rows(path, [{k: v for k, v in row.items() if v is not ...} for row in rows])


def cut(path: Path, count: int = 12) -> None:
    path.write_bytes(path.read_bytes()[:-count])


SPOILT = {
    "missing": (lambda p: p.unlink(), "{path}: no such file", "recipe.yaml"),
    "empty": (lambda p: p.write_bytes(b""), "{path} is empty: it holds no rows", ""),
    "cut short": (cut, "{path}:{last}: the last line is cut short", "Write the file again"),
    "not UTF-8": (
        lambda p: p.write_bytes(p.read_bytes() + b'{"prompt": "caf\xe9"}\n'),
        "{path}:{after}: not UTF-8: byte 16 of the line is 0xe9",
        "Save the file as UTF-8",
    ),
    "not JSON": (
        lambda p: p.write_text("prompt: a\n" + p.read_text()),
        "{path}:1: not valid JSON",
        "",
    ),
    "not an object": (
        lambda p: p.write_text('["a"]\n' + p.read_text()),
        "{path}:1: found a list, expected one object a line",
        "",
    ),
}


@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize("fault", SPOILT)
def test_a_data_file_that_cannot_be_read_is_named(fault, objective, call, tmp_path):
    write_recipe(tmp_path)
    path = tmp_path / f"{objective}.jsonl"
    count = len(path.read_text().splitlines())
    spoil, start, more = SPOILT[fault]
    spoil(path)
    message = refused(call, tmp_path)
    assert message.startswith(start.format(path=path, last=count, after=count + 1))
    if fault != "missing":
        assert more in message


ROWS = {
    "no column": ("sft", {"completion": ..., "complete": "x"}, 'no column "completion"', "rename"),
    "no chosen": ("dpo", {"chosen": ...}, 'no column "chosen"', "Columns found"),
    "not text": ("sft", {"completion": 5}, '"completion" is a number (5)', "expected text"),
    "empty completion": ("sft", {"completion": " "}, '"completion" is empty', "bad_rows: drop"),
    "empty chosen": ("dpo", {"chosen": ""}, '"chosen" is empty', "bad_rows: drop"),
    "empty rejected": ("dpo", {"rejected": "\n"}, '"rejected" is empty', "bad_rows: drop"),
    "identical": (
        "dpo",
        {"chosen": "a", "rejected": "a"},
        "chosen and rejected are identical",
        "bad_rows: drop",
    ),
    "identical within the limit": (
        "dpo",
        {"chosen": "a" * 90 + "b", "rejected": "a" * 90 + "c"},
        "chosen and rejected are the same within max_length 96 tokens",
        "bad_rows: drop",
    ),
    "long prompt": (
        "sft",
        {"prompt": "p" * 200},
        "the prompt has 200 tokens, which leaves no room",
        "raise max_length above 200",
    ),
    "long prompt of a pair": (
        "dpo",
        {"prompt": "p" * 96},
        "the prompt has 96 tokens, which leaves no room",
        "raise max_length above 96",
    ),
}


@pytest.mark.parametrize("fault", ROWS)
def test_a_row_that_cannot_be_trained_on_is_named_with_file_and_line(fault, call, tmp_path):
    write_recipe(tmp_path)
    objective, columns, what, remedy = ROWS[fault]
    path = tmp_path / f"{objective}.jsonl"
    spoil_line(path, 7, **columns)
    message = refused(call, tmp_path)
    assert message.startswith(f"{path}:7: {what}") and remedy in message


def test_bad_rows_can_be_dropped_and_are_counted(call, no_report, tmp_path):
    write_recipe(tmp_path, training__max_steps=1, objectives__dpo__data__bad_rows="drop")
    for number, columns in ((3, {"chosen": ""}), (7, {"rejected": " It is red, thank you."})):
        spoil_line(tmp_path / "dpo.jsonl", number, **columns)
    spoil_line(tmp_path / "dpo.jsonl", 7, chosen=" It is red, thank you.")
    answer = call("train", tmp_path / "recipe.yaml")
    assert answer.status == 0, answer.err
    path = tmp_path / "dpo.jsonl"
    assert f"dpo: dropped 1 of 40 rows of {path} (empty completion)\n" in answer.out
    assert f"dpo: dropped 1 of 40 rows of {path} (identical chosen and rejected)\n" in answer.out


def test_rows_too_few_to_hold_any_out_are_an_error_of_the_recipe(call, tmp_path):
    write_recipe(tmp_path, objectives__sft__data__held_out=100)
    message = refused(call, tmp_path)
    assert (
        message.startswith("objectives.sft.data: 48 rows") and "leave none to train on" in message
    )


def test_compressed_data_that_are_cut_short_are_named(call, tmp_path):
    write_recipe(tmp_path, objectives__sft__data__path="sft.jsonl.gz")
    path = tmp_path / "sft.jsonl.gz"
    path.write_bytes(gzip.compress((tmp_path / "sft.jsonl").read_bytes())[:-40])
    assert refused(call, tmp_path).startswith(f"{path} is cut short: the compressed data end early")


# demos --------------------------------------------------------------------------------------------


def test_demonstrations_are_recorded_inspected_and_cloned(call, no_report, tmp_path):
    """From the command line alone: a recording, its summary and sheet, and a run on it."""
    file, sheet = tmp_path / "demos.npz", tmp_path / "sheet.png"
    answer = call("demos", "record", "holdfast/point-mass", file, "--episodes", 3)
    assert answer.status == 0 and not answer.err
    assert answer.out.startswith(f"demonstrations: {file}: 3 episodes, ")
    answer = call("demos", "inspect", file, "--sheet", sheet)
    assert (
        answer.status == 0 and "success" in answer.out and f"contact sheet: {sheet}" in answer.out
    )
    assert sheet.read_bytes().startswith(b"\x89PNG")
    data = {"path": "demos.npz", "held_out": 1}
    values = {
        "name": "clone",
        "policy": {"kind": "gaussian", "hidden": [8]},
        "objectives": {"il": {"kind": "cloning", "data": data, "batch_size": 8}},
        "schedule": {"kind": "mix", "weights": {"il": 1.0}},
        "training": {"max_steps": 2},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "clone.yaml").write_text(yaml.safe_dump(values))
    assert call("train", tmp_path / "clone.yaml").status == 0
    answer = call(
        *("demos", "record", "holdfast/point-mass", tmp_path / "own.npz", "--keep-failures"),
        *("--episodes", 1, "--time-limit", 3, "--policy", tmp_path / "run" / "model"),
    )
    assert answer.status == 0 and "1 episodes, 3 steps" in answer.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("record", "holdfast/point-mass", "there.npz"), "there.npz is already there"),
        (("record", "Hopper-v5", "new.npz"), "there is no scripted expert for Hopper-v5"),
        (("record", "metaworld/peg-insert", "new.npz"), "did you mean 'peg-insert-side'?"),
        (("record", "holdfast/point-mass", "new.txt"), "new.txt"),
        (("inspect", "absent.npz"), "absent.npz"),
        (("inspect", "there.npz"), "there.npz"),
    ],
)
def test_demonstrations_that_cannot_be_are_one_message(
    call, arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.npz").write_bytes(b"nothing")
    # Nothing is recorded in vain.
    monkeypatch.setattr("holdfast.control.demonstrations.record", None)
    assert message in assert_one_message(call("demos", *arguments))


# Bad recipes and models ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "train", "optimum"])
def test_a_recipe_that_is_not_valid_is_one_message_of_every_command(command, call, tmp_path):
    path = write_recipe(tmp_path / ("long-" * 30), training__max_stepps=3)
    message = assert_one_message(call(command, path))
    line = path.read_text().splitlines().index("  max_stepps: 3") + 1
    assert message.startswith(f"{path}:{line}: training.max_stepps: unknown entry; did you mean")
    assert "\n" not in message, "not broken into lines"


def test_a_misspelt_recipe_is_answered_with_the_nearest(call):
    message = assert_one_message(call("train", "quickstrat"))
    assert "did you mean 'quickstart'?" in message


def test_a_wrong_override_is_one_message(call, tmp_path):
    write_recipe(tmp_path)
    assert refused(call, tmp_path, "--set", "training.seed").startswith("--set 'training.seed': ")


def test_markup_in_a_message_is_printed_as_it_is(call, tmp_path):
    write_recipe(tmp_path, name="[bold]x[/bold]")
    assert "'[bold]x[/bold]'" in refused(call, tmp_path)


def test_a_model_directory_that_is_missing_is_named(call, tmp_path):
    write_recipe(tmp_path, policy={"model_name_or_path": "./absent"})
    message = refused(call, tmp_path)
    assert message == f"model directory {tmp_path / 'absent'} does not exist"


def test_a_model_directory_without_tokenizer_is_named(call, tmp_path):
    policy = load_policy("tiny-qwen2", tokenizer=build_tokenizer(), config=SMALL)
    policy.save_pretrained(tmp_path / "model")
    for path in (tmp_path / "model").glob("*token*"):
        path.unlink()
    write_recipe(tmp_path, policy={"model_name_or_path": "model"})
    message = refused(call, tmp_path)
    assert message.startswith(f"{tmp_path / 'model'} has no tokenizer that can be loaded")
    assert "policy.tokenizer" in message


def test_a_lora_target_that_matches_nothing_is_answered_with_the_linear_layers(call, tmp_path):
    write_recipe(tmp_path, policy__lora={"target_modules": ["q_prj"]})
    message = refused(call, tmp_path)
    assert "policy.lora.target_modules: 'q_prj' matches nothing in Qwen2ForCausalLM" in message
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in message
    assert "Did you mean 'q_proj'?" in message


def test_a_tokenizer_whose_training_texts_are_missing_is_one_message(call, tmp_path):
    write_recipe(tmp_path, policy__tokenizer={"kind": "bpe", "files": ["absent.jsonl"]})
    assert refused(call, tmp_path).startswith(f"{tmp_path / 'absent.jsonl'}: no such file")


def test_an_unknown_tracker_is_one_message(call, tmp_path):
    write_recipe(tmp_path, training__report_to=["tensorbord"])
    message = refused(call, tmp_path)
    assert message.startswith("training.report_to") and "tensorboard" in message


# Run directories ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a recipe and its finished run."""
    from holdfast.run import train

    folder = tmp_path_factory.mktemp("finished")
    train(load_recipe(str(write_recipe(folder, training__max_steps=1))))
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of them that may be spoilt."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_directory_with_a_run_of_this_recipe_points_to_resume(call, finished):
    before = contents(finished)
    message = assert_one_message(call("train", finished / "recipe.yaml"))
    run = finished / "run"
    assert message.startswith(f"{run} already holds a run of this recipe.")
    assert f"'holdfast resume {run}'" in message and "--overwrite" in message
    assert contents(finished) == before


def test_a_directory_with_a_run_of_another_recipe_names_what_differs(call, finished):
    before = contents(finished)
    answer = call("train", finished / "recipe.yaml", "--set", "objectives.dpo.beta=0.3")
    message = assert_one_message(answer)
    assert "already holds a run of another recipe (it differs in objectives.dpo.beta)" in message
    assert contents(finished) == before


def test_overwrite_replaces_a_run(call, no_report, copied):
    path = copied / "recipe.yaml"
    answer = call("train", path, "--overwrite", "--output", copied / "run", "--set", "name=again")
    assert answer.status == 0, answer.err
    assert json.loads((copied / "run" / "run.json").read_text())["name"] == "again"


@pytest.mark.parametrize("command", ["resume", "report", "compare"])
def test_what_is_not_a_run_directory_is_one_message(command, call, tmp_path):
    message = assert_one_message(call(command, tmp_path))
    assert str(tmp_path) in message and "not a run directory" in message


def test_an_output_that_is_a_file_is_one_message(call, tmp_path):
    write_recipe(tmp_path)
    (tmp_path / "file").touch()
    message = refused(call, tmp_path, "--output", tmp_path / "file")
    assert message.startswith(f"{tmp_path / 'file'} is a file; the run directory must be a folder")


def test_a_resolved_recipe_that_was_damaged_is_one_message(call, copied):
    path = copied / "run" / "recipe.yaml"
    path.write_text(path.read_text().replace("max_steps", "max_stepps"))
    message = assert_one_message(call("resume", copied / "run"))
    assert message.startswith(f"{path}:") and "training.max_stepps: unknown entry" in message


def test_a_run_that_diverges_is_one_message_and_names_the_batches(call, tmp_path):
    path = write_recipe(tmp_path, training__learning_rate=1e30, training__max_refusals=0)
    message = assert_one_message(call("train", path))
    assert "1 steps were refused, more than max_refusals=0" in message
    (first, second) = sorted((tmp_path / "run" / "refused").iterdir())
    assert str(first) in message and str(second) in message


def test_a_defect_of_holdfast_keeps_its_traceback(call, tmp_path, monkeypatch):
    """Only what a user can mend is made short."""
    path = write_recipe(tmp_path)
    monkeypatch.setattr("holdfast.run.assemble", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("train", path)
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["status"] == "failed" and "ZeroDivisionError" in described["reason"]


def test_the_rows_of_these_tests_are_sound():
    """Otherwise a message could be about a row that no test spoilt."""
    assert all(row["completion"].strip() for row in demonstrations(48))
    assert all(row["chosen"] != row["rejected"] for row in preferences(40))
