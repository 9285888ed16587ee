"""Signals: the first one lets the step finish and the checkpoint be saved, a second one acts at once."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A signal ended the run after a step; its checkpoint is saved. `number` is the signal's."""

    def __init__(self, number: int, run: Path) -> None:
        """Say how to go on."""
        super().__init__(f"stopped by {signal.Signals(number).name}; go on with: bidora train --resume {run}")
        self.number = number


class StopSignals:
    """Notes the first SIGINT or SIGTERM inside the block; a second one acts as if the block were not there."""

    def __init__(self) -> None:
        """Nothing received yet."""
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Take over both signals, on the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *error: object) -> None:
        """Give both signals back."""
        self._restore()
