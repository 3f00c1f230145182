"""Runs that look as if they had been stopped in the middle."""

import json
import shutil


def stopped_after(run, step):
    """Take away what a finished run did after ``step``: its later checkpoints, and its end."""
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    described = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(described | {"status": "stopped"}))
