"""The part of a page that is about one run."""

from __future__ import annotations

import itertools
from html import escape

from holdfast.report import decisions, parts, plots, text
from holdfast.report.plots import Line
from holdfast.report.robots import METRICS as ACTING
from holdfast.report.robots import about_robots, robot_sections
from holdfast.report.runs import (
    EMPTY,
    Run,
    cumulative_updates,
    flattened,
    smoothed,
    smoothing_window,
    step_seconds,
    thinned_mean,
)

MAX_EVENTS = 40
"""Events listed on the page; the rest are counted."""


def run_sections(run: Run, prefix: str) -> str:
    """Everything about one run; ``prefix`` keeps the ids of its figures apart from others."""
    slots = {name: slot for slot, name in enumerate(run.objectives)}
    sections = [
        _header(run),
        _numbers(run),
        _objectives(run, slots),
        robot_sections(run, slots, prefix),
        _objective_space(run, slots, prefix),
        _losses(run, slots, prefix),
        _turns(run, slots, prefix),
        _dynamics(run, slots, prefix),
        _decisions(run, slots, prefix),
        _metrics(run, slots, prefix),
        _optimiser(run, prefix),
        _events(run),
        "<h2>How it was run</h2>",
        recipe(run, "Resolved recipe"),
        _circumstances(run),
    ]
    return "".join(sections)


def _header(run: Run) -> str:
    status = escape(run.status)
    facts = [f"Started {escape(text.moment(run.facts.get('started')))}"]
    facts.append(f"<code>{escape(str(run.path))}</code>")
    lines = [f'<p class="lead">{" · ".join(facts)}</p>']
    if run.facts.get("reason") not in (None, "", run.status):
        lines.append(f"<p>{status.capitalize()}: {escape(str(run.facts['reason']))}</p>")
    if run.status == "running":
        lines.append("<p>This run had not ended when the page was written.</p>")
    if run.unreadable:
        lines.append(
            f"<p>{run.unreadable} unreadable line(s) of metrics.jsonl have been left out.</p>"
        )
    title = f'<h1>{escape(run.name)}</h1><span class="status {status}">{status}</span>'
    return f'<div class="title">{title}</div>{"".join(lines)}'


def _numbers(run: Run) -> str:
    distance, pace = run.ideal_distance, run.seconds_per_step
    trainable, total = run.parameters("trainable"), run.parameters("total")
    needed = "needs every optimum and an evaluation"
    rows = [
        (
            "Ideal distance",
            text.number(distance),
            needed if distance is None else "on held-out rows",
        ),
        ("Optimiser steps", text.count(run.steps), ""),
        ("Wall time", text.duration(run.wall_seconds), f"{text.duration(pace)} a step"),
        ("Peak memory", text.size(run.peak_memory), ""),
        ("Trainable parameters", text.count(trainable), f"of {text.count(total)}"),
    ]
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{value}{f'<small>{extra}</small>' if extra else ''}</dd></div>"
        for name, value, extra in rows
    )
    return f'<dl class="numbers">{cells}</dl>'


def _objectives(run: Run, slots: dict[str, int]) -> str:
    if not slots:
        return "<p>Nothing has been recorded yet.</p>"
    rows = []
    for name, slot in slots.items():
        held_out = run.held_out.get(name, EMPTY)
        training = run.training.get(name, EMPTY)
        recent = smoothed(training, smoothing_window(len(training))).last
        share = text.percent(run.update_share(name))
        rows.append(
            [
                parts.symbol(slot) + escape(name),
                text.number(held_out.first),
                text.number(held_out.last),
                text.number(run.optimum(name)),
                text.number(run.gap(name)),
                f"{text.count(run.updates(name))} <small>{share}</small>",
                text.number(recent),
            ]
        )
    head = [
        "objective",
        "held-out, first",
        "last",
        "optimum f*",
        "gap f − f*",
        "updates",
        "training loss, smoothed",
    ]
    return parts.table(head, rows)


def _objective_space(run: Run, slots: dict[str, int], prefix: str) -> str:
    figures: list[str] = []
    for x, y in itertools.combinations(slots, 2):
        figures += parts.trajectories([run], [None], x, y, f"{prefix}-space-{slots[x]}-{slots[y]}")
    gaps = [(name, run.gap(name), slot) for name, slot in slots.items()]
    if any(gap is not None for _, gap, _ in gaps):
        rows: list[tuple[str, float | None, int | None]] = [*gaps]
        if len(slots) > 1:
            rows.append(("ideal distance", run.ideal_distance, None))
        told = "; ".join(f"{name} {text.number(value)}" for name, value, _ in rows)
        svg = plots.bars(f"{prefix}-gaps", f"Optimality gaps. {told}.", rows, text.number)
        figures.append(
            parts.figure(
                "Optimality gaps at the last evaluation",
                svg,
                "Held-out loss less the optimum; the ideal distance is the Euclidean norm of all.",
            )
        )
    if not figures:
        return ""
    return f'<h2>Objective space</h2><p class="note">{parts.SPACE}</p>{parts.grid(figures)}'


def _losses(run: Run, slots: dict[str, int], prefix: str) -> str:
    figures = []
    for name, slot in slots.items():
        training = run.training.get(name, EMPTY)
        held_out = run.held_out.get(name, EMPTY)
        if not len(training) and not len(held_out):
            continue
        optimum = run.optimum(name)
        lines = plots.training_lines(training, slot) if len(training) else []
        lines.append(Line(thinned_mean(held_out), slot, points=True))
        told = (
            f"Loss of {name} over steps. Held-out loss {parts.from_to(held_out)}; "
            f"training loss {parts.from_to(training)}; optimum {text.number(optimum)}."
        )
        svg = plots.curves(
            f"{prefix}-loss-{slot}",
            told,
            lines,
            y_label="loss",
            levels=[] if optimum is None else [(optimum, slot)],
        )
        note = parts.averaging(training)
        if optimum is not None:
            note += f" Dashed: optimum {text.number(optimum)}."
        figures.append(parts.figure(name, svg, note, slot))
    if not figures:
        return ""
    intro = (
        "Light: the loss of each update. Line: its centred moving average. "
        "Marked points: held-out rows."
    )
    return f'<h2>Losses</h2><p class="note">{intro}</p>' + parts.grid(figures)


def _turns(run: Run, slots: dict[str, int], prefix: str) -> str:
    if not len(run.turns):
        return ""
    told = "; ".join(
        f"{name} {run.updates(name)} times ({text.percent(run.update_share(name))})"
        for name in slots
    )
    strip = plots.turns(f"{prefix}-turns", f"Updates over steps: {told}.", run, list(slots))
    figures = [
        parts.figure(
            "Which objective was updated when",
            strip,
            "Stronger colour: a larger weight, or a larger share of the updates of that stretch.",
        )
    ]
    if len(slots) > 1:
        counts = {name: cumulative_updates(run, name) for name in slots}
        svg = plots.curves(
            f"{prefix}-updates",
            f"Cumulative updates: {told}.",
            [Line(thinned_mean(counts[name]), slot) for name, slot in slots.items()],
            y_label="updates so far",
        )
        figures.append(parts.figure("Updates so far", svg, parts.keys(slots)))
    if run.gaps:
        told = "; ".join(f"{name} {parts.from_to(series)}" for name, series in run.gaps.items())
        svg = plots.curves(
            f"{prefix}-schedule",
            f"Weighted optimality gaps behind each turn: {told}.",
            [Line(thinned_mean(gaps), slots[name]) for name, gaps in run.gaps.items()],
            y_label="weighted gap",
        )
        shown = parts.keys({name: slots[name] for name in run.gaps})
        figures.append(parts.figure("Weighted gaps that the schedule saw", svg, shown))
    return "<h2>Updates</h2>" + parts.grid(figures)


DYNAMICS = {
    "reward": "Reward",
    "sampled_probability": "Probability of sampled tokens",
    "negative_share": "Share of the gradient from negative advantages",
    "entropy": "Entropy",
    "approx_kl": "KL to the policy that sampled",
    "kl": "KL to the policy before its first update",
    "logit_gap": "Gap of the logits to their target",
}
"""What shows whether policy optimisation is stable, in the order in which it is drawn."""


def _dynamics(run: Run, slots: dict[str, int], prefix: str) -> str:
    """Reward beside gradient norm, then what moves with them when a policy collapses."""
    present = [metric for metric in DYNAMICS if metric in run.training_metrics]
    if "sampled_probability" not in present:
        return ""
    figures = [_metric(run, slots, f"{prefix}-dynamics", metric) for metric in present]
    if len(run.grad_norm):
        told = f"Gradient norm over steps, {parts.from_to(run.grad_norm)}."
        lines = plots.training_lines(run.grad_norm, None)
        svg = plots.curves(f"{prefix}-dynamics-norm", told, lines, from_zero=True)
        figures.insert(1, parts.figure("Gradient norm", svg))
    return "<h2>Policy optimisation</h2>" + parts.grid(figures)


def _decisions(run: Run, slots: dict[str, int], prefix: str) -> str:
    """What tells how far values and rewards are, and the table that came out."""
    if not decisions.about_decisions(run):
        return ""
    recorded = {*run.training_metrics, *run.held_out_metrics}
    figures = [
        _metric(run, slots, f"{prefix}-decisions", name)
        for name in decisions.METRICS
        if name in recorded
    ]
    tables = decisions.value_tables(run, f"{prefix}-table")
    return "<h2>Values and rewards</h2>" + parts.grid(figures) + tables


def _metrics(run: Run, slots: dict[str, int], prefix: str) -> str:
    names = {*run.training_metrics, *run.held_out_metrics}
    if "sampled_probability" in run.training_metrics:
        names -= {*DYNAMICS}
    if about_robots(run):
        names -= ACTING
    if decisions.about_decisions(run):
        names -= {*decisions.METRICS}
    figures = [_metric(run, slots, f"{prefix}-metric", name) for name in sorted(names)]
    return "<h2>Metrics</h2>" + parts.grid(figures) if figures else ""


def _metric(run: Run, slots: dict[str, int], prefix: str, metric: str) -> str:
    key = "".join(c if c.isalnum() else "-" for c in metric)
    lines: list[Line] = []
    present: dict[str, int] = {}
    told = []
    for name, slot in slots.items():
        training = run.training_metrics.get(metric, {}).get(name, EMPTY)
        held_out = run.held_out_metrics.get(metric, {}).get(name, EMPTY)
        if not len(training) and not len(held_out):
            continue
        present[name] = slot
        told.append(
            f"{name}: held-out {parts.from_to(held_out)}, training {parts.from_to(training)}"
        )
        lines += plots.training_lines(training, slot) if len(training) else []
        lines.append(Line(thinned_mean(held_out), slot, points=True))
    svg = plots.curves(f"{prefix}-{key}", f"{metric}. {'; '.join(told)}.", lines)
    titles = DYNAMICS | (decisions.METRICS if decisions.about_decisions(run) else {})
    return parts.figure(titles.get(metric, metric), svg, parts.keys(present))


def _optimiser(run: Run, prefix: str) -> str:
    figures = []
    pace = step_seconds(run)
    for title, series, smooth in (
        ("Learning rate", run.learning_rate, False),
        ("Gradient norm", run.grad_norm, True),
        ("Clipped gradient norm", run.clipped_grad_norm, True),
        ("Seconds a step", pace, True),
    ):
        if not len(series):
            continue
        lines = plots.training_lines(series, None) if smooth else [Line(thinned_mean(series), None)]
        key = title.split()[0].lower()
        told = f"{title} over steps, {parts.from_to(series)}."
        svg = plots.curves(f"{prefix}-{key}", told, lines, from_zero=True)
        figures.append(parts.figure(title, svg, parts.averaging(series) if smooth else ""))
    return "<h2>Optimiser and time</h2>" + parts.grid(figures) if figures else ""


def _events(run: Run) -> str:
    if not run.events:
        return ""
    rows = [
        [text.count(event.step), escape(event.kind), escape(event.detail)]
        for event in run.events[:MAX_EVENTS]
    ]
    more = len(run.events) - MAX_EVENTS
    note = f'<p class="note">and {more} more in metrics.jsonl</p>' if more > 0 else ""
    return "<h2>Events</h2>" + parts.table(["step", "event", "detail"], rows, kind="words") + note


def recipe(run: Run, title: str) -> str:
    """The resolved recipe, folded; nothing if the run has none."""
    return parts.details(title, run.recipe)


def _circumstances(run: Run) -> str:
    shown = ("command", "world_size", "machine", "versions", "fingerprint")
    facts = flattened({key: run.facts[key] for key in shown if run.facts.get(key)})
    return parts.details(
        "Command, machine and versions", "\n".join(f"{k}: {v}" for k, v in facts.items())
    )
