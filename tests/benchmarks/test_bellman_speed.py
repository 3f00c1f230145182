"""Peers in environments of their own, and how times become rates."""

import sys

import pytest

from benchmarks.bellman import peers
from benchmarks.bellman.run import growth, read_coupled, read_race


@pytest.fixture
def environments(tmp_path, monkeypatch):
    """A peer whose interpreter is this one."""
    binaries = tmp_path / "numpy" / "bin"
    binaries.mkdir(parents=True)
    python = binaries / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("HOLDFAST_PEERS", str(tmp_path))
    peers.peer_versions.cache_clear()
    yield tmp_path
    peers.peer_versions.cache_clear()


def test_a_peer_answers_what_its_script_writes(environments, tmp_path):
    import numpy

    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "asked = json.load(open(sys.argv[1]))\n"
        "json.dump(asked['x'] * 2, open(sys.argv[2], 'w'))\n"
    )
    assert peers.ask_peer("numpy", script, {"x": 21}) == 42
    assert peers.peer_versions("numpy") == {"numpy": numpy.__version__}
    script.write_text("raise SystemExit('no such thing')")
    with pytest.raises(RuntimeError, match="no such thing"):
        peers.ask_peer("numpy", script, {})


def test_a_peer_that_is_not_installed_has_no_answer(environments, tmp_path, monkeypatch):
    assert peers.ask_peer("econirl", tmp_path / "script.py", {}) is None
    assert peers.peer_versions("econirl") == {}
    monkeypatch.delenv("HOLDFAST_PEERS")
    assert peers.interpreter("numpy") is None


def test_a_race_counts_transitions_and_compares_blocks_of_the_same_turn():
    def blocks(seconds):
        return {"wall": seconds, "cpu": seconds}

    cell = {
        "versions": {},
        "holdfast, sampled": blocks([1.0, 2.0, 4.0]),
        "DQN, sampled": blocks([3.0, 6.0, 12.0]),
    }
    found = read_race(cell, batch=32)
    assert found["holdfast, sampled"] == {"transitions per second": 1600}
    assert found["DQN, sampled"]["times as many, cpu"]["ratio"] == pytest.approx(3.0)


def test_replicas_are_compared_with_one_run():
    found = read_coupled({"1": [1.0, 2.0, 1.0], "200": [3.0, 6.0, 3.0]})
    assert found["200"]["ratio"] == pytest.approx(3.0) and found["seconds of one"] == 1.0


def test_growth_is_an_exponent_over_the_three_largest():
    cells = {n: {"vi": {"seconds": n**1.5 if n > 10 else 1e9}} for n in (10, 100, 1000, 10_000)}
    assert growth(cells, "vi") == 1.5
