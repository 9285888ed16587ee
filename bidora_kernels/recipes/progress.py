"""What a run shows while it trains: a live display on a terminal, plain lines on a pipe, nothing when asked for JSON."""

from __future__ import annotations

import time
from typing import Any, TextIO

from . import require


def duration(seconds: float | None) -> str:
    """`m:ss` or `h:mm:ss`; a dash where nothing is known yet."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Estimate:
    """The time left, from the work done since this process started; a step of a phase counts `cost` units of work."""

    def __init__(self) -> None:
        """Start with nothing done."""
        self._started = time.monotonic()
        self._done = 0.0

    def after(self, cost: float, left: float) -> float | None:
        """Count a step of `cost`; return the seconds that `left` more units should take."""
        self._done += cost
        return (time.monotonic() - self._started) / self._done * left if self._done else None


class Silent:
    """Shows nothing. The base of the other displays: the calls that a run makes, in their order."""

    def begin(self, phases: list[tuple[str, int, int]]) -> None:
        """The phases to come: name, steps, steps already done."""

    def step(
        self, phase: str, step: int, train_loss: float, validation_loss: float | None, norm: float | None, eta: float | None
    ) -> None:
        """One step has been taken."""

    def evaluating(self, done: int, total: int) -> None:
        """So many test examples have been predicted."""

    def message(self, text: str) -> None:
        """A line for the user."""

    def end(self) -> None:
        """The run is over, or broke off."""


def _numbers(train_loss: float, validation_loss: float | None, norm: float | None) -> str:
    text = f"train loss {train_loss:.4f}"
    if validation_loss is not None:
        text += f"  validation loss {validation_loss:.4f}"
    if norm is not None:
        text += f"  hypergradient {norm:.2e}"
    return text


class PlainLines(Silent):
    """About twenty lines per phase, for pipes and log files."""

    def __init__(self, stream: TextIO) -> None:
        """Write to `stream`."""
        self._stream = stream
        self._totals: dict[str, int] = {}

    def begin(self, phases: list[tuple[str, int, int]]) -> None:
        """Remember the totals."""
        self._totals = {name: steps for name, steps, _ in phases}

    def step(
        self, phase: str, step: int, train_loss: float, validation_loss: float | None, norm: float | None, eta: float | None
    ) -> None:
        """Print the first step, the last one and every twentieth part."""
        total = self._totals[phase]
        if step == 1 or step == total or step % max(1, total // 20) == 0:
            self.message(f"{phase} {step}/{total}  {_numbers(train_loss, validation_loss, norm)}  ETA {duration(eta)}")

    def message(self, text: str) -> None:
        """Print at once."""
        print(text, file=self._stream, flush=True)


class Live(Silent):
    """A bar per phase with the last step's numbers, and one for the test set, drawn by rich."""

    def __init__(self, stream: TextIO) -> None:
        """Draw on the terminal behind `stream`."""
        require("rich")
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("{task.fields[eta]}"),
            console=Console(file=stream),
        )
        self._tasks: dict[str, Any] = {}

    def _task(self, name: str, total: int, done: int = 0) -> Any:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, completed=done, numbers="", eta="")
        return self._tasks[name]

    def begin(self, phases: list[tuple[str, int, int]]) -> None:
        """Show every phase from the start."""
        for name, steps, done in phases:
            self._task(name, steps, done)
        self._progress.start()

    def step(
        self, phase: str, step: int, train_loss: float, validation_loss: float | None, norm: float | None, eta: float | None
    ) -> None:
        """Move the phase's bar."""
        numbers = _numbers(train_loss, validation_loss, norm)
        self._progress.update(self._tasks[phase], completed=step, numbers=numbers, eta=f"ETA {duration(eta)}")

    def evaluating(self, done: int, total: int) -> None:
        """Move the test set's bar."""
        self._progress.update(self._task("test", total), completed=done)

    def message(self, text: str) -> None:
        """Print above the bars."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def end(self) -> None:
        """Leave the bars as they are."""
        self._progress.stop()


def display(stream: TextIO) -> Silent:
    """The live display on a terminal, plain lines elsewhere."""
    return Live(stream) if stream.isatty() else PlainLines(stream)
