"""What a run's hypergradient did, read from its metrics: numbers, and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import UserError
from .plots import draw_hypergradient
from .results import table
from .runs import RunFolder, write_atomically

PICTURES = (".png", ".pdf", ".svg")


def analyze_hypergradient(path: str | Path, output: str | Path | None = None) -> dict[str, Any]:
    """Draw the hypergradient of a run, finished or not, into a PNG (hypergradient.png in its folder), and summarize it.

    Returns the number of upper steps, medians of both terms' lengths, of their ratio and cosine, of the radius, the passes of an
    upper step, seconds per pass by kind, the share of capped steps, and the picture's path. Raises UserError where the folder
    holds no run, or one without upper steps.
    """
    run = RunFolder(path)
    lines = _metrics(run)
    picture = Path(output) if output is not None else run.path / "hypergradient.png"
    if not picture.parent.is_dir():
        raise UserError(f"{picture.parent} is not a folder")
    if picture.is_dir() or picture.suffix.lower() not in PICTURES:
        raise UserError(f"a picture must be a file ending in {', '.join(PICTURES)}, got {picture}")
    steps = [line for line in lines if line.get("direct_norm") is not None]
    if not steps:
        raise UserError(
            f"{run.path} has no step with a hypergradient: its method has no upper level, or an older version recorded it"
        )
    found = {
        "run": str(run.path),
        "upper_steps": len(steps),
        "direct_norm": _median(line["direct_norm"] for line in steps),
        "second_order_norm": _median(line["second_order_norm"] for line in steps),
        "second_over_direct": _median(ratio(line) for line in steps),
        "cosine": _median(line["cosine"] for line in steps),
        "capped": sum(bool(line["ratio_capped"]) for line in steps) / len(steps),
        "radius": _median(line["radius"] for line in steps),
        "passes": _median(line["passes"] for line in steps),
        "pass_seconds": {kind: _median(seconds_per_kind(steps, kind)) for kind in kinds(steps)},
        "picture": str(picture),
    }
    write_atomically(picture, lambda temporary: draw_hypergradient(steps, found, temporary))
    return found


def ratio(line: Mapping[str, Any]) -> float | None:
    """The second-order term's length over the first-order one's; None where that is zero."""
    return line["second_order_norm"] / line["direct_norm"] if line["direct_norm"] else None


def kinds(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """The kinds of passes that occur, in order of their appearance."""
    return list(dict.fromkeys(kind for line in steps for kind in line["pass_seconds"]))


def seconds_per_kind(steps: Sequence[Mapping[str, Any]], kind: str) -> list[float | None]:
    """The seconds of all passes of a kind in each step, None where it had none."""
    return [line["pass_seconds"].get(kind) for line in steps]


def _metrics(run: RunFolder) -> list[dict[str, Any]]:
    try:
        text = run.metrics.read_text(encoding="utf-8")
    except OSError:
        raise UserError(f"{run.path} holds no run") from None
    lines = []
    for number, line in enumerate(text.split("\n")[:-1], 1):  # a killed run may have left half a line at the end
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise UserError(f"{run.metrics} line {number} cannot be read") from None
    return lines


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def analysis_lines(found: Mapping[str, Any]) -> list[str]:
    """The summary as text."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    rows = [
        ("first-order term, length", number(found["direct_norm"])),
        ("second-order term, length", number(found["second_order_norm"])),
        ("second over first", number(found["second_over_direct"])),
        ("cosine between them", number(found["cosine"])),
        ("steps that max_ratio capped", f"{found['capped']:.0%}"),
        ("radius of the difference", number(found["radius"])),
        ("passes of an upper step", number(found["passes"])),
        *((f"seconds, {kind} passes", number(seconds)) for kind, seconds in found["pass_seconds"].items()),
    ]
    return [*table((f"{found['upper_steps']} upper steps", "median"), rows), f"picture: {found['picture']}"]
