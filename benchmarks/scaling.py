"""How one bilevel iteration grows: time and peak memory against the number of layers, the rank and the batch, as a picture.

A small RoBERTa-shaped encoder on this machine, every linear layer adapted; each case's providers are interleaved round by round,
and times are medians over rounds.

    python -m benchmarks.scaling --json benchmarks/results/bilevel/scaling.json --chart benchmarks/results/bilevel/scaling.png
    python -m benchmarks.scaling --tiny
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

from . import machine, memory
from .cases import BilevelCase
from .cost import DORA, EQ8, ready
from .models import Workbench
from .timing import measure

BASE = BilevelCase(
    model="roberta-small", hidden=256, intermediate=1024, heads=4, layers=4, batch=4, sequence=64, r=16, targets="all-linear"
)
AXES: dict[str, tuple[int, ...]] = {"layers": (1, 2, 4, 8), "r": (4, 16, 64, 128), "batch": (1, 2, 4, 8, 16)}
PROVIDERS = (DORA, EQ8, "FirstOrder", "ForwardDifference", "balanced")
TITLES = {"layers": "layers", "r": "rank r", "batch": "batch, rows of 64 tokens"}


def measure_case(case: BilevelCase, rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Median milliseconds and peak MiB of an iteration, by provider."""
    candidates = ready(Workbench(case, device), case, PROVIDERS, print)
    peaks = {}
    for candidate in candidates:
        with candidate.around():
            candidate.run(1)
            peaks[candidate.name] = memory.peak_bytes(candidate.calls[0], device) / 2**20
    times = measure(candidates, device, rounds, rounds, 0.0)
    return {
        name: {"ms": float(f"{1e3 * statistics.median(taken):.4g}"), "mib": float(f"{peaks[name]:.4g}")}
        for name, taken in times.items()
    }


def draw(document: dict[str, Any], path: Path) -> None:
    """Two rows, time and memory, and one column per axis."""
    from matplotlib.figure import Figure

    axes_names = list(document["axes"])
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    axes = figure.subplots(2, len(axes_names), squeeze=False)
    for column, axis_name in enumerate(axes_names):
        points = document["axes"][axis_name]
        for row, (field, label) in enumerate((("ms", "milliseconds per iteration"), ("mib", "peak MiB above the model"))):
            axis = axes[row, column]
            for provider in PROVIDERS:
                known = [(int(value), found[provider][field]) for value, found in points.items() if provider in found]
                if known:
                    axis.plot(*zip(*known, strict=True), "o-", markersize=3, linewidth=1.2, label=provider)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.set_xticks([int(value) for value in points])
            axis.set_xlabel(TITLES[axis_name])
            if column == 0:
                axis.set_ylabel(label)
    axes[0, 0].legend(fontsize=8)
    case = document["base"]
    figure.suptitle(
        f"one bilevel iteration, every linear adapted: hidden {case['hidden']}, {case['layers']} layers, r = {case['r']}, batch "
        f"{case['batch']} x {case['sequence']} unless the axis says otherwise\n{machine.label(document['machine'])}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--chart", type=Path, help="draw them here (PNG)")
    arguments = parser.parse_args(argv)
    toy: dict[str, Any] = {"hidden": 32, "intermediate": 64, "sequence": 8} if arguments.tiny else {}
    base = dataclasses.replace(BASE, **toy)
    document: dict[str, Any] = {"schema_version": 1, "machine": machine.describe(arguments.device), "base": base.describe(),
                                "axes": {}, "rounds": arguments.rounds}  # fmt: skip
    for axis, values in AXES.items():
        document["axes"][axis] = {}
        for value in values[:2] if arguments.tiny else values:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                change: dict[str, Any] = {axis: value}
                found = measure_case(dataclasses.replace(base, **change), arguments.rounds, arguments.device)
            document["axes"][axis][str(value)] = found
            cells = "  ".join(f"{name} {point['ms']:.0f} ms {point['mib']:.0f} MiB" for name, point in found.items())
            print(f"{axis} {value}: {cells}", flush=True)
    document["piece"] = machine.piece(arguments.device, quick=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.chart:
        draw(document, arguments.chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
