"""Matplotlib figures as SVG text that follows the page: its fonts, its colours, light or dark.

Matplotlib draws with placeholder colours; each becomes a CSS variable of the page, so that one
figure serves both themes. Text stays text. The same data give the same bytes.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

COLOURS = 6
"""How many series colours the page defines before they repeat."""

INK, MUTED, RULE, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = [f"#0000{index + 1:02x}" for index in range(COLOURS)]
_VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--card"} | {
    colour: f"--series-{index}" for index, colour in enumerate(SERIES)
}

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.id": None,
    "text.parse_math": False,
    "font.size": 12.5,
    "axes.labelsize": 12.5,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "axes.formatter.limits": (-4, 6),
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.0,
    "lines.solid_joinstyle": "round",
    "path.simplify": True,
}

_NO_METADATA: Mapping[str, None] = {"Date": None, "Creator": None, "Format": None, "Type": None}


def drawn(draw: Callable[..., Figure]) -> Callable[..., str]:
    """Run a drawing function in the report's style and return the page's SVG."""

    @functools.wraps(draw)
    def wrapped(name: str, description: str, *args: Any, **options: Any) -> str:
        style: Any = _STYLE | {"svg.hashsalt": name}
        with matplotlib.rc_context(style), warnings.catch_warnings():
            # The browser draws the text; a glyph that Matplotlib lacks is no loss.
            warnings.filterwarnings("ignore", message="Glyph")
            return _page_svg(draw(*args, **options), name, description)

    return wrapped


def _page_svg(figure: Figure, name: str, description: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    # Ids are unique within a figure only, and a page has many figures. Most name nothing needed.
    used = set(re.findall(r"#(\w+)[\")]", svg))
    svg = re.sub(
        r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg
    )
    svg = svg.replace('xlink:href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    svg = re.sub(
        r"(fill|stroke): (#[0-9a-f]{6})",
        lambda found: (
            f"{found[1]}: var({_VARIABLES[found[2]]})" if found[2] in _VARIABLES else found[0]
        ),
        svg,
    )
    svg = re.sub(r" font-family: [^;]*;| transform=\"rotate\(-0 [^\"]*\"", "", svg)
    svg = re.sub(r'(?<= (?:d|x|y)=")[^"]*', _rounded, svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    head = f'<svg {view[0] if view else ""} role="img" aria-label="{escape(description)}">'
    return re.sub(r"\s*\n\s*", "\n", head + svg[svg.index(">") + 1 :])


def _rounded(found: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", found[0])
