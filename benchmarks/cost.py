"""What one bilevel iteration costs: the paper's Table 10 with its cheaper successors, and this library's gates.

One interleaved run per set of targets, each round in an order of its own; every ratio is taken within a round, then its median
over rounds and a 95 % bootstrap interval. A RoBERTa-base-shaped encoder with random weights, batches of equal size, an upper
step every iteration but for presets that say otherwise (their iterations are averaged); "1/2" takes the difference on half of
the train batch, "whole" on all of it where the preset takes a part. The estimators that a user would rarely take are timed in a
shorter run of their own, beside the same peers.

    python -m benchmarks.cost --json benchmarks/results/bilevel/cost.json
    python -m benchmarks.cost --targets q+v --layers 12 --rounds 5 --only ForwardDifference balanced
    python -m benchmarks.cost --targets q+v --rounds 0 --json cost.json     # the dear ones beside a run that is there already
    python -m benchmarks.cost --tiny                   # proves that it runs; its times mean nothing
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from . import machine, memory
from .bilevel import bilevel_providers
from .cases import BilevelCase
from .models import Workbench
from .peers import Unavailable
from .timing import Candidate, measure, ratio

TARGETS = ("all-linear", "q+v")
FLOOR, LORA, DORA, EQ8 = "frozen model", "PEFT LoRA", "PEFT DoRA", "Eq. 8 on PEFT DoRA"
PEERS = (FLOOR, LORA, DORA, EQ8)
USUAL = (
    "FirstOrder", "ForwardDifference", "ForwardDifference, 1/2", "CentralDifference", "Sama", "balanced", "balanced, whole",
    "paper-code",
)  # fmt: skip
DEAR = ("ForwardMode", "DoubleBackward", "Neumann", "ConjugateGradient")
SETS = 2  # of batches, taken in turn: one iteration reads more than any cache holds
# passes of an iteration: what it would take if each cost no more than the frozen model's
PASSES = {
    "ForwardDifference": 3.0,
    "ForwardDifference, 1/2": 2.5,
    "balanced": (2 + 0.625 + 0.25) / 2,  # of 8 rows: 5 are nearest to two thirds
    "balanced, whole": (2 + 1 + 0.25) / 2,
}
# (numerator, denominator) -> the most it may be, by targets, at 3 layers on a CPU
GATES = {
    ("ForwardDifference", EQ8): {"all-linear": 0.50, "q+v": 0.70},
    ("ForwardDifference, 1/2", EQ8): {"all-linear": 0.50, "q+v": 0.70},
    ("balanced", DORA): {"all-linear": 1.2, "q+v": 1.5},
    ("balanced, whole", DORA): {"all-linear": 1.2, "q+v": 1.5},
}


def _chosen(case: BilevelCase, labels: tuple[str, ...]) -> dict[str, Callable[[Workbench], Candidate]]:
    """The providers by label, this library's without the name of its backend."""
    found = bilevel_providers(case, variants=True)
    return {label: build for label in labels for name, build in found.items() if name.split(", bidora")[0] == label}


def ready(bench: Workbench, case: BilevelCase, labels: tuple[str, ...], log: Callable[[str], None]) -> list[Candidate]:
    """Build and check the providers of these labels; those that cannot be had here are said and left out."""
    candidates = []
    for label, build in _chosen(case, labels).items():
        try:
            candidate = build(bench)
            candidate.verify()
        except Unavailable as error:
            log(f"{label}: {error}")
            continue
        candidate.name = label
        candidate.calls = candidate.calls[:SETS]
        candidates.append(candidate)
    return candidates


def measure_targets(
    case: BilevelCase, device: str, rounds: int, dear_rounds: int, usual: tuple[str, ...], log: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds of every provider by round, and peak bytes; the dear ones and the peers once more in a run of their own."""
    bench = Workbench(case, device)
    found: dict[str, Any] = {"case": case.describe(), "runs": []}
    for labels, count in ((PEERS + usual, rounds), (PEERS + DEAR, dear_rounds)):
        if count:
            piece = machine.piece(device, quick=True)
            candidates = ready(bench, case, labels, log)
            peaks = {}
            for candidate in candidates:
                with candidate.around():
                    candidate.run(1)
                    peaks[candidate.name] = memory.peak_bytes(candidate.calls[0], device)
            times = measure(candidates, device, count, count, 0.0)
            found["runs"].append({"seconds": {name: [float(f"{s:.5g}") for s in taken] for name, taken in times.items()},
                                  "peak_bytes": peaks, "piece": piece})  # fmt: skip
    return found


def gates(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each gate with the ratio measured and that of bare floor passes; it holds where the median is at or below the limit."""
    targets, seconds = found["case"]["targets"], found["runs"][0]["seconds"]
    held = []
    for (name, other), limits in GATES.items():
        if name in seconds and other in seconds:
            got = ratio(seconds[name], seconds[other])
            bare = ratio([PASSES[name] * floor for floor in seconds[FLOOR]], seconds[other])
            held.append({"what": f"{name} / {other}", "limit": limits[targets], "median": got.median, "low": got.low,
                         "high": got.high, "holds": got.median <= limits[targets], "floor_passes": PASSES[name],
                         "bare": bare.median})  # fmt: skip
    return held


def lines(found: dict[str, Any]) -> list[str]:
    """The tables of one set of targets."""
    case, out = found["case"], []
    out.append(f"{case['targets']}, {case['layers']} layers, batch {case['batch']} x {case['sequence']}, r = {case['r']}")
    for run in found["runs"]:
        seconds = run["seconds"]
        count = f"{len(next(iter(seconds.values())))} rounds"
        out.append(f"{'':22s}  {'ms':>7s}  {'/ PEFT LoRA':>18s}  {'/ floor':>7s}  {'/ Eq. 8':>18s}  {'MiB':>6s}  {count}")
        for name, taken in seconds.items():
            lora, floor, eq8 = (ratio(taken, seconds[peer]) for peer in (LORA, FLOOR, EQ8))
            out.append(
                f"{name:22s}  {1e3 * statistics.median(taken):7.0f}  {lora.median:6.2f} {lora.low:5.2f}-{lora.high:5.2f}  "
                f"{floor.median:7.2f}  {eq8.median:6.2f} {eq8.low:5.2f}-{eq8.high:5.2f}  {run['peak_bytes'][name] / 2**20:6.0f}"
            )
    for gate in found["gates"]:
        verdict = "holds" if gate["holds"] else "FAILS"
        spread = f"[{gate['low']:.3f}, {gate['high']:.3f}]"
        bare = f"{gate['floor_passes']:g} floor passes: {gate['bare']:.3f}"
        out.append(f"gate {gate['what']:38s} <= {gate['limit']:.2f}: {gate['median']:.3f} {spread}  {verdict}  ({bare})")
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dear-rounds", type=int, default=3, help="of the estimators that a user would rarely take; 0: none")
    parser.add_argument("--only", nargs="+", choices=USUAL, default=list(USUAL), help="beside the peers")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the results here; sets of targets that are there already are kept")
    arguments = parser.parse_args(argv)
    document: dict[str, Any] = {"schema_version": 1, "machine": machine.describe(arguments.device), "results": {}}
    if arguments.json and arguments.json.exists():
        document = json.loads(arguments.json.read_text())
        if document["machine"] != machine.describe(arguments.device):
            raise SystemExit(f"{arguments.json} holds results of another machine")
    failed = False
    for targets in arguments.targets:
        case = BilevelCase(targets=targets, layers=arguments.layers, r=4)
        if arguments.tiny:
            case = cast(BilevelCase, case.tiny())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dear_rounds, usual = arguments.dear_rounds if arguments.layers == 3 else 0, tuple(arguments.only)
            found = measure_targets(case, arguments.device, arguments.rounds, dear_rounds, usual, print)
        name = f"{targets}, {case.layers} layers"
        if not arguments.rounds:
            if name not in document["results"]:
                raise SystemExit(f"--rounds 0 adds to a run of {name}, and there is none in --json")
            found["runs"] = [document["results"][name]["runs"][0], *found["runs"]]
        found["gates"] = gates(found) if arguments.layers == 3 and not arguments.tiny else []
        failed |= not all(gate["holds"] for gate in found["gates"])
        document["results"][name] = found
        print("\n".join([*lines(found), ""]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
