"""The gates of the native CPU backend on the suites' cases: `python -m benchmarks.cpu_step [PART ...] [--rounds 20]`.

PART is step, decode or operations (all three without one), or deep: a step of twelve layers, for which no gate was set. A gate
that is missed is printed as such; the script fails only where a provider disagrees with the truth. The gates of a bilevel
iteration are in cost.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch

from .cases import REFERENCE, Case, DecodeCase, OperationCase, StepCase, layer_case, suite
from .models import Workbench, outputs_not_kept
from .operations import COPY_TO_NEW, NATIVE_INTO_KEPT
from .run import prepare
from .tables import times_as_long
from .timing import Ratio, distance, measure, ratio

PARTS = ("step", "decode", "operations", "deep")
OURS, LORA, DORA, PLAIN = "bidora (native)", "PEFT LoRA", "PEFT DoRA", "plain function"
CACHED = "PEFT DoRA, DoraCaching"
Times = dict[str, list[float]]
Gate = tuple[str, Ratio, float | None]  # what, measured, the most that is allowed


def gates(case: Case, times: Times) -> Iterator[Gate]:
    """What was measured of a case, and what is allowed."""
    ours, floor = times[OURS], times[case.floor]
    if isinstance(case, StepCase):
        everything, gated = case.targets == "all-linear", case.layers == 3 and not case.padding
        for name in (OURS, LORA, DORA, PLAIN):
            yield f"{name} / floor", ratio(times[name], floor), None
        yield "(ours - floor) / (PEFT DoRA - floor)", distance(ours, times[DORA], floor), 0.20 if everything and gated else None
        yield "ours / PEFT LoRA", ratio(ours, times[LORA]), (1.0 if everything else 1.02) if gated else None
        yield "ours / plain function", ratio(ours, times[PLAIN]), 1.0 if gated else None
    elif isinstance(case, DecodeCase):
        if case.tokens == 1:
            yield "ours / merged linear", ratio(ours, times["merged linear"]), 1.10
            yield "ours / PEFT DoRA", ratio(ours, times[DORA]), 1 / 60
        if CACHED in times:
            yield "ours / PEFT DoRA, DoraCaching", ratio(ours, times[CACHED]), None
        yield "ours / PEFT LoRA", ratio(ours, times[LORA]), None if case.tokens == 1 else 1.0
        yield "ours / nn.Linear", ratio(ours, floor), None
    else:
        most = 1 / 0.70 if case.r <= 8 else None  # of the copy's bandwidth; at higher ranks arithmetic takes over
        if NATIVE_INTO_KEPT in times:
            yield "into kept memory / copy of the same bytes", ratio(times[NATIVE_INTO_KEPT], floor), most
            yield "ours / copy into a new tensor", ratio(ours, times[COPY_TO_NEW]), most
        else:
            yield "ours / copy of the same bytes", ratio(ours, floor), most


def memory_gate(case: StepCase, entries: dict[str, Any]) -> str:
    """The peak of a step against what is allowed: PEFT LoRA's, one weight, and the outputs that only the magnitude needs."""
    bench = Workbench(case, "cpu")
    weights = [bench.base.get_submodule(name).weight for name in bench.values]
    parts = {
        "PEFT LoRA": entries[LORA]["peak_bytes"],
        "the largest weight": max(weight.nbytes for weight in weights),
        "outputs the model does not keep": outputs_not_kept(bench),
    }
    allowed = min(sum(parts.values()), entries[DORA]["peak_bytes"])
    ours = entries[OURS]["peak_bytes"]
    items = " + ".join(f"{name} {size / 2**20:.1f}" for name, size in parts.items())
    verdict = "ok" if ours <= allowed else "MISSED"
    dora = entries[DORA]["peak_bytes"] / 2**20
    return f"peak {ours / 2**20:.1f} MiB, allowed {allowed / 2**20:.1f}: {items}; PEFT DoRA {dora:.1f}   {verdict}"


def cases(part: str, rounds: int = 20) -> list[Case]:
    """The cases of one part of the gates. Raises ValueError for a name that is not in `PARTS`."""
    found: list[Case]
    if part in ("step", "deep"):
        found = [
            dataclasses.replace(case, layers=3 if part == "step" else 12)
            for case in suite("cpu", "step/")
            if isinstance(case, StepCase) and case.min_rounds >= 20 and (part == "step" or not case.padding)
        ]
    elif part == "decode":
        found = [layer_case("llama-2-7b", "q_proj", tokens, 16, "fp32", DecodeCase) for tokens in (1, 8, 128)]
    elif part == "operations":
        # without plain PyTorch: the 128 MiB it writes would leave the cache while the next provider is timed
        found = [
            OperationCase(operation=name, r=r, without=("PyTorch",))
            for name in ("weight_norm", "merged_weight")
            for r in (1, 8, 64)
        ]
    else:
        raise ValueError(f"PART must be one of {', '.join(PARTS)}, got {part!r}")
    return [
        dataclasses.replace(case, min_rounds=rounds, max_rounds=rounds, without=(*REFERENCE, *case.without)) for case in found
    ]


def main() -> int:
    """Measure the parts named on the command line and print each gate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    arguments = parser.parse_args()
    try:
        found = [case for part in arguments.parts or PARTS[:3] for case in cases(part, arguments.rounds)]
    except ValueError as error:
        parser.error(str(error))
    chosen = [case for case in found if arguments.only in case.id]
    for case in chosen:
        ready, entries = prepare(case, "cpu", print)
        times = measure(ready, "cpu", case.min_rounds, case.max_rounds, case.seconds)
        if OURS not in times:
            print(f"benchmarks.cpu_step: {case.id}: {entries[OURS]['reason']}", file=sys.stderr)
            return 1
        print(f"{case.id}  ({torch.get_num_threads()} threads, {len(times[OURS])} rounds)")
        for name, values in times.items():
            print(f"  {name:28} {statistics.median(values) * 1e3:10.3f} ms   peak {entries[name]['peak_bytes'] / 2**20:8.1f} MiB")
        for name, value, most in gates(case, times):
            verdict = "" if most is None else f"   gate {most:.4f}  {'ok' if value.median <= most else 'MISSED'}"
            print(f"  {name:44} {value.median:.4f}  ({times_as_long(value)}){verdict}", flush=True)
        if isinstance(case, StepCase):
            print(" ", memory_gate(case, entries), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
