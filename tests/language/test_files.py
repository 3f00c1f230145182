import csv
import gzip
import json
from unittest import mock

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import DataError
from holdfast.language.files import RawRow, kind_of, read_rows, read_text

ROWS = [{"prompt": "a\u2028b", "completion": "é😀"}, {"prompt": "c\nd", "completion": '"e", f'}]
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_csv(path, rows):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


WRITERS = {
    "rows.jsonl": write_jsonl,
    "rows.jsonl.gz": write_jsonl,
    "rows.csv": write_csv,
    "rows.csv.gz": write_csv,
    "rows.parquet": write_parquet,
}


def refusal(source, base, **options):
    with pytest.raises(DataError) as caught:
        read_rows(source, base=base, **options)
    return str(caught.value)


# What can be read -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name, ROWS)
    assert [row.values for row in read_rows(name, base=tmp_path)] == ROWS


def test_relative_paths_start_from_base_and_absolute_ones_do_not(tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "rows.jsonl", ROWS)
    relative = read_rows("../data/rows.jsonl", base=tmp_path / "data")
    absolute = read_rows(tmp_path / "data" / "rows.jsonl", base=tmp_path / "elsewhere")
    assert [row.values for row in relative] == [row.values for row in absolute] == ROWS


def test_origin_is_the_line_of_the_file_although_blank_lines_are_skipped(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \r\n{"a": 2}\r\n')
    assert read_rows("rows.jsonl", base=tmp_path) == [
        RawRow({"a": 1}, "rows.jsonl:1"),
        RawRow({"a": 2}, "rows.jsonl:4"),
    ]


def test_origin_of_a_csv_row_is_the_line_on_which_it_begins(tmp_path):
    (tmp_path / "rows.csv").write_text('text\n"one\ntwo"\n\nthree\n')
    assert read_rows("rows.csv", base=tmp_path) == [
        RawRow({"text": "one\ntwo"}, "rows.csv:2"),
        RawRow({"text": "three"}, "rows.csv:5"),
    ]


def test_csv_fields_may_be_longer_than_the_default_limit(tmp_path):
    limit = csv.field_size_limit()
    write_csv(tmp_path / "rows.csv", [{"text": "x" * (limit + 1)}])
    (row,) = read_rows("rows.csv", base=tmp_path)
    assert len(row.values["text"]) == limit + 1
    assert csv.field_size_limit() == limit


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries({"prompt": any_text, "completion": any_text}), min_size=1))
def test_any_text_survives_jsonl_and_csv(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    for name in ("rows.jsonl", "rows.csv.gz"):
        WRITERS[name](folder / name, rows)
        assert [row.values for row in read_rows(name, base=folder)] == rows


def test_a_folder_is_loaded_as_a_data_set_with_its_splits(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_parquet(folder / "train-00000-of-00001.parquet", ROWS)
    write_parquet(folder / "test-00000-of-00001.parquet", ROWS[:1])
    train = read_rows("set", base=tmp_path)
    assert [row.values for row in train] == ROWS
    assert [row.origin for row in train] == ["set[train]:1", "set[train]:2"]
    assert [row.values for row in read_rows("set", base=tmp_path, split="test")] == ROWS[:1]


def test_a_subset_of_a_data_set_is_chosen_by_name(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, rows in (("one", ROWS[:1]), ("two", ROWS[1:])):
        write_parquet(folder / f"{name}.parquet", rows)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one.parquet\n"
        "- config_name: two\n  data_files: two.parquet\n---\n"
    )
    assert [row.values for row in read_rows("set", base=tmp_path, name="two")] == ROWS[1:]


@pytest.mark.parametrize("source", ["rows", "owner/rows", "owner/rows-v1.5", "owner/rows.en"])
def test_what_looks_like_a_hub_id_is_asked_of_the_hub(tmp_path, source):
    hub = datasets.Dataset.from_list(ROWS)
    with mock.patch.object(datasets, "load_dataset", return_value=hub) as load:
        rows = read_rows(source, base=tmp_path, split="test", name="main")
    load.assert_called_once_with(source, "main", split="test")
    assert rows[1] == RawRow(ROWS[1], f"{source}[test]:2")


def test_text_is_read_line_by_line_with_line_ends(tmp_path):
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress("a\u2028\n\né".encode()))
    assert list(read_text("text.txt.gz", base=tmp_path)) == ["a\u2028\n", "\n", "é"]
    with pytest.raises(DataError, match="no such file"):
        list(read_text("other.txt", base=tmp_path))


# What cannot ----------------------------------------------------------------------------------


def test_missing_file_names_the_place_and_close_names(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "unrelated.md").touch()
    message = refusal("trian.jsonl", tmp_path)
    assert "trian.jsonl: no such file" in message
    assert str(tmp_path / "trian.jsonl") in message
    assert message.endswith("Close names in that folder: train.jsonl.")


def test_missing_folder_is_named(tmp_path):
    message = refusal("data/sets/rows.jsonl", tmp_path)
    assert f"The folder {tmp_path / 'data' / 'sets'} does not exist" in message


@pytest.mark.parametrize(
    "source", ["rows.josnl", "./rows", "../rows", "data/rows.txt", "a/b/c", "/nowhere/rows"]
)
def test_what_can_only_be_a_file_is_not_asked_of_the_hub(tmp_path, source):
    (tmp_path / "data").mkdir()
    with mock.patch.object(datasets, "load_dataset") as load:
        assert "no such file" in refusal(source, tmp_path)
    load.assert_not_called()


def test_unknown_kind_of_file_lists_the_known_ones(tmp_path):
    (tmp_path / "rows.xlsx").write_text("rows")
    message = refusal("rows.xlsx", tmp_path)
    assert "rows.xlsx: unknown kind of file" in message
    assert ".jsonl, .jsonl.gz, .csv, .csv.gz, .parquet" in message


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_without_bytes_is_empty(tmp_path, name):
    (tmp_path / name).touch()
    assert f"{name} is empty" in refusal(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "content"), [("rows.jsonl", "\n \n"), ("rows.csv", "prompt,completion\n")]
)
def test_a_file_without_rows_is_empty(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert f"{name} is empty" in refusal(name, tmp_path)


def test_a_parquet_file_without_rows_is_empty(tmp_path):
    pyarrow.parquet.write_table(
        pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet"
    )
    assert "a.parquet is empty" in refusal("a.parquet", tmp_path)


@pytest.mark.parametrize("kept", [0.99, 0.5])
def test_truncated_gzip_is_cut_short(tmp_path, kept):
    path = tmp_path / "rows.jsonl.gz"
    write_jsonl(path, [{"text": f"{number * number}"} for number in range(500)])
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert "rows.jsonl.gz is cut short" in refusal(path.name, tmp_path)


@pytest.mark.parametrize("damage", ["not gzip at all", "flipped bytes"])
def test_damaged_gzip_is_refused(tmp_path, damage):
    path = tmp_path / "rows.jsonl.gz"
    write_jsonl(path, [{"text": f"{number * number}"} for number in range(500)])
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(b'{"text": "a"}\n' if damage == "not gzip at all" else bytes(data))
    message = refusal(path.name, tmp_path)
    assert message.startswith("rows.jsonl.gz")
    assert "gzip" in message or "not UTF-8" in message or "JSON" in message


def test_last_line_without_its_end_is_cut_short(tmp_path):
    whole = '{"text": "a"}\n{"text": "bcd"}'
    for kept in range(len('{"text": "a"}\n') + 1, len(whole)):
        (tmp_path / "rows.jsonl").write_text(whole[:kept])
        assert "rows.jsonl:2: the last line is cut short" in refusal("rows.jsonl", tmp_path)
    (tmp_path / "rows.jsonl").write_text(whole)
    assert len(read_rows("rows.jsonl", base=tmp_path)) == 2


def test_last_line_cut_within_a_character_is_cut_short(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes('{"text": "😀'.encode()[:-1])
    message = refusal("rows.jsonl", tmp_path)
    assert "rows.jsonl:1: the last line is cut short, within a character" in message


def test_invalid_json_names_the_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": }\n{"a": 3}\n')
    message = refusal("rows.jsonl", tmp_path)
    assert message.startswith("rows.jsonl:2: not valid JSON: Expecting value")


def test_deeply_nested_json_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("[" * 200_000 + "\n")
    assert "rows.jsonl:1: not valid JSON" in refusal("rows.jsonl", tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_bytes_that_are_not_utf8_are_located(tmp_path, name):
    head = {"rows.jsonl": b'{"text": "a"}\n{"text": "', "rows.csv": b"text\n12345678901"}[name]
    (tmp_path / name).write_bytes(head + "é".encode("latin-1") + b'"}\n')
    column = len(head) - head.index(b"\n")
    message = refusal(name, tmp_path)
    assert f"{name}:2: not UTF-8: byte {column} of the line is 0xe9" in message


@pytest.mark.parametrize(
    ("line", "kind"),
    [("[1]", "a list"), ('"a"', "text"), ("7", "a number (7)"), ("null", "null")],
)
def test_a_line_that_is_no_object_is_refused(tmp_path, line, kind):
    (tmp_path / "rows.jsonl").write_text(f'{{"a": 1}}\n{line}\n')
    assert f"rows.jsonl:2: found {kind}, expected one object a line" in refusal(
        "rows.jsonl", tmp_path
    )


def test_csv_row_with_too_few_or_too_many_fields_is_refused(tmp_path):
    for fields in ("x", "x,y,z"):
        (tmp_path / "rows.csv").write_text(f'a,b\n"1\n1",2\n{fields}\n')
        message = refusal("rows.csv", tmp_path)
        assert f"rows.csv:4: found {len(fields.split(','))} fields, expected 2" in message


def test_csv_cut_within_quotes_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text('a,b\n1,2\n"3')
    assert "rows.csv:3: not valid CSV: unexpected end of data" in refusal("rows.csv", tmp_path)


def test_truncated_parquet_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    write_parquet(path, ROWS)
    path.write_bytes(path.read_bytes()[:-9])
    assert "rows.parquet is not a sound parquet file, or is cut short" in refusal(
        path.name, tmp_path
    )


def test_a_file_has_no_splits_or_subsets(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    for options in ({"split": "test"}, {"name": "main"}):
        assert "rows.jsonl is one file" in refusal("rows.jsonl", tmp_path, **options)


def test_a_folder_without_data_or_without_the_split_is_refused(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    assert refusal("set", tmp_path).startswith("set (split 'train') cannot be loaded")
    write_parquet(folder / "train.parquet", ROWS)
    message = refusal("set", tmp_path, split="validation")
    assert message.startswith("set (split 'validation') cannot be loaded")
    assert "train" in message.removeprefix("set (split 'validation')")


def test_a_damaged_file_in_a_folder_is_refused(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.parquet").write_bytes(b"PAR1 and then nothing")
    assert refusal("set", tmp_path).startswith("set (split 'train') cannot be loaded")


def test_an_unreachable_hub_is_an_error_that_mentions_the_file_as_well(tmp_path):
    unreachable = ConnectionError("Couldn't reach the hub\nsecond line")
    with mock.patch.object(datasets, "load_dataset", side_effect=unreachable):
        message = refusal("owner/rows", tmp_path)
    assert message == (
        "owner/rows (split 'train') cannot be loaded: Couldn't reach the hub. "
        "There is no file owner/rows either."
    )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "null"),
        (True, "a truth value (true)"),
        (2.5, "a number (2.5)"),
        ("", "text"),
        ({}, "an object"),
        ([], "a list"),
        (b"", "of type bytes"),
    ],
)
def test_values_are_described_in_words(value, words):
    assert kind_of(value) == words
