"""Tables against lists of rows."""

import pytest
import torch

from holdfast.joint.table import Table


def table(rows=5):
    columns = {"a": torch.arange(rows), "b": torch.arange(2.0 * rows).view(rows, 2)}
    return Table(columns, {"reward": (3.0, 2.0)})


def test_parts_are_the_rows_that_a_list_would_give():
    whole = table()
    assert len(whole) == 5 and len(whole[1:4]) == 3 and len(whole[::2]) == 3
    assert whole[-1].columns["a"].tolist() == [4]
    assert [row.columns["a"].item() for row in whole] == [0, 1, 2, 3, 4]
    assert whole.take(torch.tensor([3, 1])).columns["b"].tolist() == [[6.0, 7.0], [2.0, 3.0]]


def test_the_mean_of_a_fact_over_parts_is_that_of_the_whole():
    whole = table()
    parts = [part.metrics()["reward"] for part in (whole[:2], whole[2:])]
    total, count = sum(parts)
    assert total / count == whole.metrics()["reward"][0] / whole.metrics()["reward"][1] == 1.5


def test_a_state_gives_the_same_table_back():
    back = Table.from_state(table().state_dict())
    assert back.facts == table().facts
    for name, column in table().columns.items():
        assert torch.equal(back.columns[name], column)


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 3\] rows"):
        Table({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(IndexError):
        table()[5]
