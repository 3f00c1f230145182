"""Numbers as a person reads them."""

from __future__ import annotations

from datetime import datetime

MISSING = "–"


def number(value: float | None, digits: int = 4) -> str:
    """``digits`` significant digits, trailing zeros too, with a true minus sign."""
    if value is None:
        return MISSING
    return f"{value:#.{digits}g}".rstrip(".").replace("-", "−")


def percent(value: float | None, *, signed: bool = False) -> str:
    """A share or a relative change as a percentage."""
    if value is None:
        return MISSING
    whole = round(100 * value)
    return f"{whole:{'+' if signed and whole else ''}d} %".replace("-", "−")


def duration(seconds: float | None) -> str:
    """``850 ms``, ``12.3 s``, ``4 min 05 s``, ``2 h 05 min``."""
    if seconds is None:
        return MISSING
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def moment(stamp: object) -> str:
    """An ISO 8601 time to the minute; anything else as it is."""
    try:
        found = datetime.fromisoformat(str(stamp))
    except ValueError:
        return MISSING if stamp is None else str(stamp)
    return f"{found:%Y-%m-%d %H:%M} {found.tzname() or ''}".strip()


def size(amount: float | None) -> str:
    """Bytes with a binary prefix."""
    if amount is None:
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1023.5:
            return (
                f"{amount:.0f} {unit}" if amount >= 100 or unit == "B" else f"{amount:.3g} {unit}"
            )
        amount /= 1024
    return f"{amount:.4g} TiB"


def count(value: float | None) -> str:
    """A whole number with thousands set apart: ``12 345``."""
    return MISSING if value is None else f"{round(value):,}".replace(",", "\u202f")
