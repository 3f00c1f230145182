"""Demonstrations: recorded, read from files, validated, inspected, cut into rows to clone from."""

from holdfast.control.demonstrations.controllers import load_controller
from holdfast.control.demonstrations.episodes import Demonstrations, Episode
from holdfast.control.demonstrations.files import (
    check_name,
    read_demonstrations,
    write_demonstrations,
)
from holdfast.control.demonstrations.inspection import Summary, summarize, summary_tables
from holdfast.control.demonstrations.recording import record
from holdfast.control.demonstrations.validation import validate
from holdfast.control.demonstrations.windows import Chunk, Chunks, stack

__all__ = [
    "Chunk",
    "Chunks",
    "Demonstrations",
    "Episode",
    "Summary",
    "check_name",
    "load_controller",
    "read_demonstrations",
    "record",
    "stack",
    "summarize",
    "summary_tables",
    "validate",
    "write_demonstrations",
]
