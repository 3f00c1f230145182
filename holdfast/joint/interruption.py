"""Ctrl-C and SIGTERM, turned into a stop that loses nothing."""

from __future__ import annotations

import signal
from typing import Any

import torch
from accelerate import Accelerator


class Interruption:
    """Within it, Ctrl-C and SIGTERM ask for a stop at the next step, with a checkpoint.

    Asked twice, the process stops at once.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> None:
        def note(number: int, frame: Any) -> None:
            if self._number is not None:
                raise KeyboardInterrupt
            self._number = number

        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, note)
        except ValueError:
            pass  # not in the main thread, where signals cannot be handled

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def name(self, accelerator: Accelerator) -> str | None:
        """The signal that any rank was sent: all ranks must stop at the same step."""
        number = self._number or 0
        if accelerator.num_processes > 1:
            seen = torch.tensor([number], device=accelerator.device)
            number = int(accelerator.gather(seen).max())
        return signal.Signals(number).name if number else None
