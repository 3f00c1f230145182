"""The page: useful for every kind of run, safe and self-contained."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from holdfast.errors import RunError
from holdfast.report import write_comparison, write_report

MakeRun = Callable[..., Path]
VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)

    def titles(self) -> list[str]:
        return re.findall(r"<figcaption><b>(?:<i.*?</i>)?(.*?)</b>", self.source)


def assert_self_contained(page: Page) -> None:
    assert page.count("script") == page.count("img") == page.count("iframe") == 0
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert (value or "").startswith(("#", "data:")), (tag, value)
    assert "url(http" not in page.source and "@import" not in page.source


def test_report_goes_into_the_run_by_default(make_run: MakeRun) -> None:
    run = make_run()
    assert write_report([run]) == run / "report.html"
    assert sorted(path.name for path in run.iterdir()) == [
        "metrics.jsonl",
        "recipe.yaml",
        "report.html",
        "run.json",
    ]


def test_report_of_one_run_shows_everything(make_run: MakeRun, tmp_path: Path) -> None:
    events = [(7, "refused", "loss of dpo was nan"), (9, "resumed", "from step 8")]
    run = make_run(gaps=True, events=events)
    page = Page(write_report([run], tmp_path / "deep" / "page.html"))
    assert page.titles() == [
        "sft against dpo",
        "Optimality gaps at the last evaluation",
        "sft",
        "dpo",
        "Which objective was updated when",
        "Updates so far",
        "Weighted gaps that the schedule saw",
        "rewards/accuracies",
        "Learning rate",
        "Gradient norm",
        "Clipped gradient norm",
        "Seconds a step",
    ]
    assert page.count("svg") == len(page.titles())
    for words in (
        "quickstart",
        "finished",
        "Started 2026-03-01 12:30 UTC",
        "600 MiB",
        "6.0 s",
        "loss of dpo was nan",
        "from step 8",
        "Resolved recipe",
        "steps: 40",
        "torch: 2.13.0",
        "holdfast train quickstart",
    ):
        assert words in page.text, words
    assert_self_contained(page)


def test_policy_optimisation_is_shown_together(write_run: Callable[..., Path]) -> None:
    metrics = {"reward": 0.5, "sampled_probability": 0.3, "entropy": 1.0, "kl": 0.1, "other": 2.0}
    records = [
        {
            "kind": "train",
            "step": step,
            "objectives": {"rl": {"weight": 1.0, "loss": 0.1, "count": 8, "metrics": metrics}},
            "grad_norm": 2.0,
        }
        for step in range(1, 5)
    ]
    page = write_report([write_run(records)]).read_text("utf-8")
    part = page[page.index("<h2>Policy optimisation") : page.index("<h2>Metrics")]
    titles = ["Reward", "Gradient norm", "Probability of sampled tokens", "Entropy", "KL to the"]
    places = [part.index(f">{title}") for title in titles]
    assert places == sorted(places)
    assert "other" not in part and "other" in page


def test_every_figure_is_described_in_words(make_run: MakeRun) -> None:
    page = Page(write_report([make_run(gaps=True)]))
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert len(set(labels)) == len(labels)
    assert any(label and "from 2.100 at step 0" in label for label in labels)


def test_the_same_run_gives_the_same_bytes(make_run: MakeRun) -> None:
    run = make_run(gaps=True)
    assert write_report([run]).read_bytes() == write_report([run]).read_bytes()


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        (
            {"status": "running", "tail": '{"kind":"tra', "evaluate_every": None, "optima": False},
            ["had not ended", "Which objective was updated when"],
            ["against", "Optimality gaps", "unreadable"],
        ),
        ({"objectives": ["sft"]}, ["Optimality gaps at the last"], ["against", "Updates so far"]),
        (
            {"objectives": ["sft", "dpo", "kl"]},
            ["sft against dpo", "sft against kl", "dpo against kl"],
            [],
        ),
        (
            {"optima": False},
            ["sft against dpo", "needs every optimum"],
            ["Optimality gaps at the last"],
        ),
        ({"steps": 1}, ["sft against dpo"], []),
        ({"steps": 0}, ["sft against dpo"], ["Which objective was updated when"]),
        ({"tail": "{broken\n"}, ["1 unreadable line"], []),
    ],
    ids=["going-on", "one-objective", "three", "no-optima", "one-step", "no-step", "damaged"],
)
def test_every_kind_of_run_gives_a_useful_page(
    make_run: MakeRun, options: dict[str, object], present: list[str], absent: list[str]
) -> None:
    page = Page(write_report([make_run(**options)]))
    for words in present:
        assert words in page.text
    for words in absent:
        assert words not in page.text


def test_a_run_without_any_record_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"name": "new", "status": "running"}')
    assert "Nothing has been recorded yet" in Page(write_report([tmp_path])).text


def test_a_failed_run_says_why(write_run: Callable[..., Path]) -> None:
    page = Page(write_report([write_run(status="failed", reason="3 steps were refused")]))
    assert "Failed: 3 steps were refused" in page.text


def test_a_squeezed_end_is_shown_close_up(write_run: Callable[..., Path]) -> None:
    records = [
        {"kind": "eval", "step": step, "objectives": {"a": {"loss": loss}, "b": {"loss": 2 * loss}}}
        for step, loss in enumerate([9.0, 2.0, 1.9, 1.8])
    ]
    page = Page(write_report([write_run(records, reason="finished")]))
    assert page.titles()[:2] == ["a against b", "a against b, close up"]
    assert "Finished: finished" not in page.text


def test_what_comes_from_files_is_escaped(write_run: Callable[..., Path]) -> None:
    evil = '"><script>alert(1)</script><img src=http://x onerror=y>$title'
    terms = {"loss": 1.0, "count": 1, "weight": 1.0, "metrics": {evil: 1.0}}
    records = [
        {"kind": "eval", "step": 0, "objectives": {evil: terms, "b": terms}},
        {"kind": "train", "step": 1, "objectives": {evil: terms}, "gaps": {evil: 1.0}},
        {"kind": "event", "step": 1, "event": evil, "detail": evil},
    ]
    facts = {"name": evil, "status": evil, "reason": evil, "command": evil, "started": evil}
    runs = [
        write_run(
            records, folder=folder, recipe=f"{folder}: '{evil}'\n", **facts, versions={evil: evil}
        )
        for folder in "ab"
    ]
    for path in (write_report([runs[0]]), write_report(runs, runs[0] / "all.html")):
        page = Page(path)
        assert_self_contained(page)
        assert page.text.count(evil) > 5


def test_half_a_surrogate_pair_does_not_stop_the_page(write_run: Callable[..., Path]) -> None:
    terms = {"\ud800": {"loss": 1.0, "weight": 1.0}}
    run = write_run([{"kind": "train", "step": 1, "objectives": terms}])
    assert Page(write_report([run])).count("svg") > 0


def test_a_long_run_stays_a_small_page(make_run: MakeRun) -> None:
    path = write_report([make_run(steps=20_000, evaluate_every=200, gaps=True)])
    assert path.stat().st_size < 400_000
    assert "Drawn with 800 of" in Page(path).text


def test_many_events_are_counted_rather_than_listed(make_run: MakeRun) -> None:
    events = [(step, "refused", f"refusal {step}") for step in range(1, 61)]
    page = Page(write_report([make_run(steps=60, events=events)]))
    assert "refusal 40" in page.text
    assert "refusal 41" not in page.text
    assert "and 20 more" in page.text


def test_comparison_overlays_every_run(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(f"run {letter}", steps=20 + 20 * i) for i, letter in enumerate("abc")]
    page = Page(write_comparison(runs, tmp_path / "comparison.html"))
    assert "3 runs compared" in page.text
    assert page.titles() == [
        "sft against dpo",
        "Ideal distance",
        "Gap of sft",
        "Gap of dpo",
        "Wall time",
        "Peak memory",
        "Held-out loss of sft",
        "Held-out loss of dpo",
        "rewards/accuracies of sft",
        "rewards/accuracies of dpo",
        "Updates of sft so far",
        "Updates of dpo so far",
    ]
    for slot in range(3):
        assert f"var(--series-{slot})" in page.source
    assert "What differs in the recipes" in page.text
    assert re.findall(r"<code>(.*?)</code></th>", page.source) == ["name", "steps"]
    assert "+50 %" in page.text  # 4 s, then 6 s.
    assert_self_contained(page)


def test_runs_with_other_objectives_can_be_compared(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [
        make_run("joint"),
        make_run("alone", ["kl"], optima=False),
        make_run("new", evaluate_every=None, steps=0, optima=False),
    ]
    page = Page(write_comparison(runs, tmp_path / "comparison.html"))
    assert {"Gap of sft", "Held-out loss of kl"} <= set(page.titles())


def test_many_runs_stay_distinct(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(f"seed {seed}") for seed in range(8)]
    page = Page(write_comparison(runs, tmp_path / "comparison.html"))
    keys = re.findall(r'<span class="key">(<i.*?</i>)', page.source)
    assert len(set(keys[:8])) == 8


def test_report_of_several_runs_has_the_comparison_and_every_run(
    make_run: MakeRun, tmp_path: Path
) -> None:
    page = Page(write_report([make_run("a"), make_run("b")], tmp_path / "both.html"))
    assert "2 runs compared" in page.text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {"run-0", "run-1"} <= set(ids)
    assert_self_contained(page)


def test_a_directory_that_is_not_a_run_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for write in (write_report, write_comparison):
        with pytest.raises(RunError, match="other: not a run directory"):
            write([make_run(f"for {write.__name__}"), tmp_path / "other"])
        with pytest.raises(RunError, match="no run"):
            write([])


def test_an_output_that_cannot_be_written_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunError, match="taken: the page cannot be written"):
        write_report([make_run()], tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quickstart", "taken"]
