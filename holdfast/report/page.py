"""The report: one HTML page that needs nothing but itself.

Everything that comes from files is escaped, and the page's content policy forbids scripts and
every outside request.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from holdfast.errors import RunError
from holdfast.report.one_run import recipe, run_sections
from holdfast.report.read import read_runs
from holdfast.report.runs import POINTS, labels
from holdfast.report.several_runs import comparison_sections
from holdfast.report.stability import read_stability, stability_sections


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of one run, or of several with a comparison before them.

    Parameters
    ----------
    runs : sequence of Path
        Run directories, going on or ended.
    output : Path, optional
        The HTML file. By default ``report.html`` in the run's directory; for several runs, in the
        current directory.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    RunError
        If a directory is not a run, or the page cannot be written.
    """
    loaded = read_runs(runs)
    if len(loaded) == 1:
        (run,) = loaded
        return _write(run.name, run_sections(run, "run"), output or run.path / "report.html")
    names = labels(loaded)
    links = "".join(
        f'<a href="#run-{index}">{escape(name)}</a>' for index, name in enumerate(names)
    )
    body = comparison_sections(loaded) + f"<h2>The runs one by one</h2><nav>{links}</nav>"
    for index, run in enumerate(loaded):
        sections = run_sections(run, f"run-{index}")
        body += f'<section class="run" id="run-{index}">{sections}</section>'
    return _write(f"{len(loaded)} runs", body, output or Path("report.html"))


def write_comparison(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write a page that lays runs over one another.

    Parameters
    ----------
    runs : sequence of Path
        Run directories, going on or ended.
    output : Path, optional
        The HTML file. By default ``comparison.html`` in the current directory.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    RunError
        If a directory is not a run, or the page cannot be written.
    """
    loaded = read_runs(runs)
    body = comparison_sections(loaded) + "<h2>Recipes</h2>"
    for name, run in zip(labels(loaded), loaded, strict=True):
        body += recipe(run, name)
    return _write(f"Comparison of {len(loaded)} runs", body, output or Path("comparison.html"))


def write_stability(folder: Path, output: Path | None = None) -> Path:
    """Write the page of what ``holdfast stability`` measured.

    Parameters
    ----------
    folder : Path
        With ``stability.json`` in it.
    output : Path, optional
        The HTML file. By default ``stability.html`` in the folder.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    RunError
        If there is no result, or the page cannot be written.
    """
    found = read_stability(folder)
    title = f"Stability of {found.get('name', folder.name)}"
    return _write(title, stability_sections(found), output or folder / "stability.html")


def _write(title: str, body: str, output: Path) -> Path:
    here = files("holdfast.report")
    html = Template(here.joinpath("page.html").read_text("utf-8")).substitute(
        title=escape(title),
        style=here.joinpath("page.css").read_text("utf-8"),
        body=body,
        points=POINTS,
    )
    # Renamed once whole: a page that is open in a browser is never half written.
    part = output.with_name(output.name + ".part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # A name may hold half a surrogate pair, which no encoding can write.
        part.write_bytes(html.encode("utf-8", "replace"))
        os.replace(part, output)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(f"{output}: the page cannot be written: {error.strerror}") from error
    return output
