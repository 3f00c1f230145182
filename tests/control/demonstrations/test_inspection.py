"""The summary counts what is there."""

from dataclasses import replace

import numpy as np
from rich.console import Console

from holdfast.control.demonstrations import Demonstrations, Episode, summarize, summary_tables


def episode(steps, reward, **fields):
    values = {"terminated": True, "truncated": False, "success": True, **fields}
    return Episode(
        observations=np.stack([np.arange(steps + 1), np.full(steps + 1, 0.1)], axis=1).astype("f4"),
        actions=np.linspace(-1, 1, steps, dtype=np.float32)[:, None],
        rewards=np.full(steps, reward, dtype=np.float32),
        **values,
    )


FOUND = Demonstrations(
    (
        episode(2, 1.0),
        episode(4, 0.5, success=False, terminated=False, truncated=True),
        episode(6, 0.0, success=None, terminated=False),
    ),
    "some.npz",
    "metaworld/push",
    {"clipped": 0.25, "noise": 0.1},
)


def test_a_return_without_rewards_is_not_known():
    found = replace(FOUND, episodes=(FOUND.episodes[0], replace(FOUND.episodes[1], rewards=None)))
    assert summarize(found).returns is None
    console = Console(width=120, record=True)
    console.print(summary_tables(found))
    row = next(line for line in console.export_text().splitlines() if " return " in line)
    assert "not known" in row


def test_the_numbers_are_those_of_the_episodes():
    summary = summarize(FOUND)
    assert (summary.episodes, summary.steps) == (3, 12)
    assert summary.lengths == (2, 4, 6) and summary.returns == (0, 4 / 3, 2)
    assert (summary.successes, summary.known) == (1, 2)
    assert (summary.terminated, summary.truncated, summary.cut) == (1, 1, 1)
    seen = np.concatenate([np.arange(2), np.arange(4), np.arange(6)])
    np.testing.assert_allclose(
        summary.observations[0], [seen.min(), seen.mean(), seen.std(), seen.max()]
    )
    assert summary.observations[1, 2] == 0  # a constant, although 0.1 cannot be written exactly
    # Each of the three begins at -1 and ends at 1.
    assert summary.at_bound == 6 / 12
    assert summary.clipped == 0.25


def test_actions_that_never_repeat_a_bound_are_not_at_it():
    draw = np.random.default_rng(0).normal(size=(50, 1)).astype(np.float32)
    one = replace(episode(50, 0.0), actions=draw)
    assert summarize(Demonstrations((one,), "here")).at_bound == 0


def test_the_tables_show_them(capsys):
    Console(width=120).print(summary_tables(FOUND))
    shown = capsys.readouterr().out
    for text in (
        "some.npz",
        "metaworld/push",
        "1 of 2",
        "1 terminated, 1 truncated, 1 cut short",
        "25.0%",
        "noise 0.1",
        "observations[1] (constant)",
        "actions[0]",
    ):
        assert text in shown
