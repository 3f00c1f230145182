"""Other packages, each in an environment of its own, asked through files of JSON.

Their dependencies do not go together. ``HOLDFAST_PEERS`` names a folder with a virtual environment
for each::

    python -m venv $HOLDFAST_PEERS/econirl
    $HOLDFAST_PEERS/econirl/bin/pip install econirl==0.1.1

Without it, what needs a peer is left out and says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

VERSIONS = "from importlib.metadata import version as v; import json, sys; "
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ""}


def interpreter(peer: str) -> Path | None:
    """The Python of a peer's environment, if there is one."""
    folder = os.environ.get("HOLDFAST_PEERS")
    found = Path(folder).expanduser() / peer / "bin" / "python" if folder else None
    return found if found and found.exists() else None


@cache
def peer_versions(peer: str, *beside: str) -> dict[str, str]:
    """Versions of the peer and of packages beside it; empty if it is not installed."""
    python = interpreter(peer)
    if python is None:
        return {}
    code = VERSIONS + "print(json.dumps({n: v(n) for n in sys.argv[1:]}))"
    done = subprocess.run(
        [python, "-c", code, peer, *beside], capture_output=True, text=True, env=environment()
    )
    return json.loads(done.stdout) if done.returncode == 0 else {}


def ask_peer(peer: str, script: Path, question: Any) -> Any:
    """What ``script QUESTION ANSWER`` writes; ``None`` if the peer is not installed.

    Raises
    ------
    RuntimeError
        If it failed, with the end of what it printed.
    """
    python = interpreter(peer)
    if python is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "question.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(question), encoding="utf-8")
        done = subprocess.run(
            [python, script, asked, answered], capture_output=True, text=True, env=environment()
        )
        if done.returncode:
            raise RuntimeError(f"{peer} failed: {done.stderr[-2000:]}")
        return json.loads(answered.read_text(encoding="utf-8"))


def environment() -> dict[str, str]:
    """What a peer's process sees: one thread, and nothing of this process's packages."""
    return {**os.environ, **ENVIRONMENT}
