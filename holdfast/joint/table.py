"""Rows held column by column: thousands of transitions are cut and gathered at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor


class Table(Sequence["Table"]):
    """Rows of equal form, as columns. A row is a table of one row.

    Parameters
    ----------
    columns : mapping of str to Tensor
        ``(rows, ...)`` each; at least one column.
    facts : mapping of str to (float, float)
        What is known of the whole that the rows were taken from, as sums and their counts. Parts of
        a table keep them, and a mean over parts is that of the whole.

    Raises
    ------
    ValueError
        If the columns have different numbers of rows, or there are none.
    """

    def __init__(
        self,
        columns: Mapping[str, Tensor],
        facts: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        sizes = {column.shape[0] for column in columns.values()}
        if len(sizes) != 1:
            raise ValueError(
                f"columns have {sorted(sizes)} rows: every one must have as many as the others"
            )
        self.columns = dict(columns)
        self.facts = dict(facts or {})
        (self._rows,) = sizes

    def __len__(self) -> int:
        return self._rows

    @overload
    def __getitem__(self, index: int) -> Table: ...

    @overload
    def __getitem__(self, index: slice) -> Table: ...

    def __getitem__(self, index: int | slice) -> Table:
        if isinstance(index, int):
            start = range(len(self))[index]
            index = slice(start, start + 1)
        return Table({name: column[index] for name, column in self.columns.items()}, self.facts)

    def __iter__(self) -> Iterator[Table]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: Tensor) -> Table:
        """The rows ``indices`` ``(count,)``, in their order."""
        return Table({name: column[indices] for name, column in self.columns.items()}, self.facts)

    def to(self, device: torch.device) -> Table:
        """On ``device``: this table itself, if it is there already."""
        if all(column.device == device for column in self.columns.values()):
            return self
        return Table({name: column.to(device) for name, column in self.columns.items()}, self.facts)

    def metrics(self) -> dict[str, Tensor]:
        """The facts as metrics of a loss."""
        return {name: torch.tensor(pair, dtype=torch.float64) for name, pair in self.facts.items()}

    def to_json(self) -> dict[str, Any]:
        return {name: column.tolist() for name, column in self.columns.items()}

    def state_dict(self) -> dict[str, Any]:
        # Copies, since safetensors takes no two tensors that share memory.
        columns = {name: column.clone() for name, column in self.columns.items()}
        return {
            "columns": columns,
            "facts": {name: list(pair) for name, pair in self.facts.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Table:
        facts = {name: (float(total), float(n)) for name, (total, n) in state["facts"].items()}
        return cls(state["columns"], facts)
