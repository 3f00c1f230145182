"""The shipped data are what their generator writes, and make a fair pair of objectives."""

import importlib.util
import json
from pathlib import Path

import pytest

import holdfast

DATA = Path(holdfast.__file__).parent / "recipes" / "data"
DEMONSTRATIONS = DATA / "quickstart_demonstrations.jsonl"
PREFERENCES = DATA / "quickstart_preferences.jsonl"
COLUMNS = {
    DEMONSTRATIONS: {"prompt", "completion"},
    PREFERENCES: {"prompt", "chosen", "rejected"},
}


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_generator_writes_the_committed_bytes():
    spec = importlib.util.spec_from_file_location("quickstart_data", DATA / "generate.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    written = {name: text.encode() for name, text in generator.files().items()}
    assert written == {path.name: path.read_bytes() for path in DATA.glob("*.jsonl")}


def test_sums_are_right():
    for row in rows(DATA / "sums.jsonl"):
        left, right = row["prompt"].removesuffix("=").split("+")
        assert row["completion"] == row["answer"] == str(int(left) + int(right))


@pytest.mark.parametrize("path", COLUMNS, ids=lambda path: path.stem)
def test_every_row_has_its_columns_filled_and_is_short(path):
    assert len(rows(path)) == 600
    for row in rows(path):
        assert set(row) == COLUMNS[path]
        assert row["prompt"].endswith("\nA:")
        for column in COLUMNS[path] - {"prompt"}:
            assert row[column].strip()
            assert row[column].startswith(" "), "prompt and answer join without a seam"
            assert len((row["prompt"] + row[column]).encode()) <= 96


def test_no_prompt_occurs_twice():
    prompts = [row["prompt"] for path in COLUMNS for row in rows(path)]
    assert len(prompts) == len(set(prompts))


def test_the_rejected_answer_is_a_word_that_demonstrations_teach():
    taught = {row["completion"] for row in rows(DEMONSTRATIONS)}
    preferences = rows(PREFERENCES)
    for row in preferences:
        assert row["chosen"] != row["rejected"]
        assert f"The answer is{row['rejected']}." in row["chosen"]
    known = sum(row["rejected"] in taught for row in preferences)
    assert known >= 0.85 * len(preferences)


def test_a_held_out_fact_can_be_learnt_from_other_wordings():
    """Every fifth demonstration held out, its answer occurs among the other four fifths."""
    listed = rows(DEMONSTRATIONS)
    kept = {row["completion"] for index, row in enumerate(listed) if index % 5}
    held_out = [row["completion"] for row in listed[::5]]
    assert sum(answer in kept for answer in held_out) >= 0.75 * len(held_out)
