"""Numbers as a person reads them."""

from __future__ import annotations

import pytest

from holdfast.report import text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.224, "0.2240"), (-1.5, "−1.500"), (1234.5, "1234"), (3e-5, "3.000e−05"), (None, "–")],
)
def test_number(value: float | None, shown: str) -> None:
    assert text.number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0444, "44.4 ms"),
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (None, "–"),
    ],
)
def test_duration(seconds: float | None, shown: str) -> None:
    assert text.duration(seconds) == shown


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        (512, "512 B"),
        (1536, "1.5 KiB"),
        (1023.9 * 2**20, "1 GiB"),
        (584.2 * 2**20, "584 MiB"),
        (3 * 2**40, "3 TiB"),
        (None, "–"),
    ],
)
def test_size(amount: float | None, shown: str) -> None:
    assert text.size(amount) == shown


def test_percent_count_and_moment() -> None:
    assert text.percent(0.405) == "40 %"
    assert text.percent(-0.02, signed=True) == "−2 %"
    assert text.percent(0.1, signed=True) == "+10 %"
    assert text.percent(-0.001, signed=True) == "0 %"
    assert text.count(1234567) == "1\u202f234\u202f567"
    assert text.moment("2026-03-01T12:30:59+00:00") == "2026-03-01 12:30 UTC"
    assert text.moment("yesterday") == "yesterday"
    assert text.moment(None) == "–"
