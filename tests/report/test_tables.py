"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from holdfast.errors import RunError
from holdfast.report import comparison_table, summary_table


def shown(table: Table, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_summary_has_a_row_for_each_objective(make_run: Callable[..., Path]) -> None:
    # sft: 1.1 + exp(-4 n / 40) after n updates, optimum 1; dpo: 2.1 + ..., optimum 2.
    text = shown(summary_table(make_run()))
    sft = next(line for line in text.splitlines() if "sft" in line).split()
    dpo = next(line for line in text.splitlines() if "dpo" in line).split()
    assert int(sft[1]) + int(dpo[1]) == 40
    assert (sft[2], sft[4], dpo[2], dpo[4]) == ("2.100", "1.000", "3.100", "2.000")
    assert float(sft[5]) == pytest.approx(float(sft[3]) - 1.0, abs=1e-3)
    assert "ideal distance 0." in text
    assert "6.0 s" in text
    assert "600 MiB" in text


def test_summary_of_a_run_without_optima_says_unknown(make_run: Callable[..., Path]) -> None:
    text = shown(summary_table(make_run(optima=False)))
    assert "ideal distance –" in text


def test_comparison_is_relative_to_the_first_run(make_run: Callable[..., Path]) -> None:
    runs = [make_run("first"), make_run("second", steps=80, status="stopped")]
    text = shown(comparison_table(runs))
    assert "first" in text and "second" in text and "(stopped)" in text
    # 0.1 s a step and 2 s more: 6 s, then 10 s.
    assert "(+67 %)" in text
    assert "(0 %)" in text


def test_comparison_fits_a_narrow_terminal(make_run: Callable[..., Path]) -> None:
    runs = [make_run("sequential"), make_run("maxright")]
    lines = shown(comparison_table(runs), width=80).splitlines()
    assert any("sequential" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_markup_in_names_is_shown_as_it_is(make_run: Callable[..., Path]) -> None:
    run = make_run("[red]x[-red]", ["[bold]sft[-bold]"])
    assert "[bold]sft[-bold]" in shown(summary_table(run))
    assert "[red]x[-red]" in shown(comparison_table([run]))


def test_a_directory_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        summary_table(tmp_path)
    with pytest.raises(RunError, match="not a run directory"):
        comparison_table([tmp_path])
    with pytest.raises(RunError, match="no run was named"):
        comparison_table([])
