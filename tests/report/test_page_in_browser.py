"""The page in headless Chromium."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.report import write_report

MakeRun = Callable[..., Path]
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


def browse(path: Path, profile: Path) -> tuple[str, list[str]]:
    """The document as Chromium sees it, and what it complained about."""
    assert BROWSER is not None
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    done = subprocess.run(
        [BROWSER, *flags, f"--user-data-dir={profile}", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_draws_the_page_without_complaint(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("<one>", gaps=True), make_run("two", ["sft", "dpo", "kl"])]
    path = write_report(runs, tmp_path / "page.html")
    document, complaints = browse(path, tmp_path / "profile")
    assert document.count("<svg") == path.read_text("utf-8").count("<svg") > 20
    assert complaints == []


def test_the_content_policy_stops_and_reports_outside_requests(
    make_run: MakeRun, tmp_path: Path
) -> None:
    path = write_report([make_run(steps=1)], tmp_path / "page.html")
    spoilt = path.read_text("utf-8").replace("<main>", "<main><img src='http://localhost:9/x.png'>")
    path.write_text(spoilt, "utf-8")
    _, complaints = browse(path, tmp_path / "profile")
    assert any("localhost:9" in line and "Content Security Policy" in line for line in complaints)
