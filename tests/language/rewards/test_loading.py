"""Rewards are found by name, and what cannot be found or used is named with what is near."""

import json
import subprocess
import sys

import pytest

from holdfast.errors import RecipeError
from holdfast.language.rewards import BUILT_IN, load_reward

CODE = """
from dataclasses import dataclass

@dataclass
class Judge:
    bonus: "float"

    def __call__(self, completions, **columns):
        return [len(c) + self.bonus for c in completions]

def length(completions, **columns):
    return [float(len(c)) for c in completions]

def narrow(prompts, completions, completion_ids):
    return [0.0]

judge = Judge(0.5)
number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CODE, encoding="utf-8")
    return path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package ``judges`` with modules that work and modules that do not."""
    folder = tmp_path / "judges"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "good.py").write_text(CODE, encoding="utf-8")
    (folder / "broken.py").write_text("1 / 0", encoding="utf-8")
    (folder / "lacking.py").write_text("import no_such_package_at_all", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "judges"]:
        del sys.modules[name]


def refusal(path, options=None):
    with pytest.raises(RecipeError) as caught:
        load_reward(path, options)
    return str(caught.value)


def test_functions_and_callable_objects_of_a_file_are_found(file):
    assert load_reward(f"{file}:length")(completions=["abc"]) == [3.0]
    assert load_reward(f"{file}:judge")(completions=["abc"]) == [3.5]


def test_a_relative_file_is_found_from_the_current_folder(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert load_reward("mine.py:length")(completions=["abc"]) == [3.0]


def test_files_of_one_name_are_kept_apart(file, tmp_path):
    other = tmp_path / "other" / "mine.py"
    other.parent.mkdir()
    other.write_text("def length(completions, **columns):\n    return [-1.0]\n", encoding="utf-8")
    first, second = load_reward(f"{file}:length"), load_reward(f"{other}:length")
    assert first(completions=["abc"]) == [3.0] and second(completions=["abc"]) == [-1.0]


def test_a_file_does_not_take_the_place_of_a_module_of_its_name(tmp_path):
    (tmp_path / "json.py").write_text(CODE, encoding="utf-8")
    load_reward(f"{tmp_path / 'json.py'}:length")
    assert sys.modules["json"] is json


def test_functions_of_a_module_are_found(package):
    assert load_reward("judges.good.length")(completions=["abc"]) == [3.0]


def test_rewards_of_trl_are_found():
    reward = load_reward("trl.rewards.think_format_reward")
    completions = [[{"role": "assistant", "content": "<think>\na\n</think>\nb"}]]
    assert reward(prompts=[""], completions=completions, completion_ids=[[]]) == [1.0]


def test_built_in_rewards_are_found_and_take_options():
    batch = {"prompts": [""], "completions": ["5"], "completion_ids": [[1]]}
    assert load_reward("exact_match")(**batch, answer=["5"]) == [1.0]
    assert load_reward("numeric_answer", {"column": "final"})(**batch, final=["5"]) == [1.0]
    assert load_reward("regex", {"pattern": "[a-z]"})(**batch) == [0.0]


def test_every_name_of_a_built_in_reward_is_that_of_its_factory():
    assert list(BUILT_IN) == [
        "exact_match",
        "numeric_answer",
        "math_verify",
        "regex",
        "soft_overlong",
        "sequence_classifier",
    ]
    assert all(factory.__name__ == name for name, factory in BUILT_IN.items())


def test_rewards_are_found_without_importing_torch():
    code = (
        "import sys; from holdfast.language.rewards import load_reward; "
        "load_reward('regex', {'pattern': 'a'}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# What cannot be used ------------------------------------------------------------------------------


def test_an_unknown_name_suggests_the_nearest_and_says_what_there_is():
    message = refusal("exact_mach")
    assert message.startswith("there is no reward 'exact_mach'; did you mean 'exact_match'?")
    assert "soft_overlong" in message and "file.py:name or package.module.name" in message


def test_a_missing_file_suggests_the_nearest(file):
    missing = file.with_name("mien.py")
    assert refusal(f"{missing}:length") == (
        f"reward '{missing}:length': there is no file {missing}; did you mean 'mine.py'?"
    )


def test_a_file_that_is_not_python_is_refused(tmp_path):
    (tmp_path / "rewards.yaml").touch()
    assert "is not a Python file" in refusal(f"{tmp_path / 'rewards.yaml'}:length")


@pytest.mark.parametrize(
    ("code", "reason"),
    [("def f(:", "SyntaxError"), ("raise RuntimeError('no key')", "RuntimeError: no key")],
)
def test_a_file_that_cannot_be_executed_says_why(tmp_path, code, reason):
    path = tmp_path / "broken.py"
    path.write_text(code, encoding="utf-8")
    before = set(sys.modules)
    assert f"{path} cannot be imported ({reason}" in refusal(f"{path}:length")
    assert set(sys.modules) == before


def test_a_missing_module_is_named(package):
    assert "there is no module 'jugdes'" in refusal("jugdes.good.length")
    assert "there is no module 'judges.god'" in refusal("judges.god.length")


def test_a_module_that_cannot_be_imported_says_why(package):
    assert refusal("judges.broken.f").endswith(
        "judges.broken cannot be imported (ZeroDivisionError: division by zero)"
    )
    assert "judges.lacking cannot be imported (ModuleNotFoundError: No module named 'no_such" in (
        refusal("judges.lacking.f")
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lenght", "has no 'lenght'; did you mean 'length'?"),
        ("number", "'number' in .* is a number \\(3\\), expected a function f\\(prompts"),
        ("Judge", "'Judge' in .* is a class, expected a function"),
        ("narrow", "must end with \\*\\*columns"),
    ],
)
def test_what_is_no_reward_function_is_refused(file, package, name, message):
    for path in (f"{file}:{name}", f"judges.good.{name}"):
        with pytest.raises(RecipeError, match=message):
            load_reward(path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("regex", {"patern": "a"}, "reward 'regex' has no option 'patern'; did you mean 'pattern'"),
        ("regex", {}, "reward 'regex' needs the option pattern"),
        ("regex", {"pattern": "("}, "reward 'regex': pattern '(' is not a regular expression"),
        ("regex", {"pattern": 3}, "reward 'regex': "),
        ("soft_overlong", None, "needs the option max_completion_len, soft_punish_cache"),
        (
            "soft_overlong",
            {"max_completion_len": 4, "soft_punish_cache": 5},
            "reward 'soft_overlong': soft_punish_cache is 5",
        ),
    ],
)
def test_options_that_are_not_valid_are_refused(name, options, message):
    assert message in refusal(name, options)


def test_a_function_of_ones_own_takes_no_options(file):
    assert "takes no options (found: column)" in refusal(f"{file}:length", {"column": "a"})
