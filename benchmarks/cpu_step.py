"""The gates of the native CPU backend on the suites' cases, 20 rounds: `python -m benchmarks.cpu_step [step|decode|operations]`.

A gate that is missed is printed as such; the script fails only where a provider disagrees with the truth. The gates of a bilevel
iteration are in cost.py.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Iterator

import torch

from .cases import REFERENCE, Case, DecodeCase, OperationCase, StepCase, layer_case, suite
from .operations import COPY_TO_NEW, NATIVE_INTO_KEPT
from .run import prepare
from .tables import times_as_long
from .timing import Ratio, distance, measure, ratio

OURS, LORA, DORA, PLAIN = "bidora (native)", "PEFT LoRA", "PEFT DoRA", "plain function"
Times = dict[str, list[float]]
Gate = tuple[str, Ratio, float | None]  # what, measured, the most that is allowed


def gates(case: Case, times: Times) -> Iterator[Gate]:
    """What was measured of a case, and what is allowed."""
    ours, floor = times[OURS], times[case.floor]
    if isinstance(case, StepCase):
        everything = case.targets == "all-linear"
        for name in (OURS, LORA, DORA, PLAIN):
            yield f"{name} / floor", ratio(times[name], floor), None
        yield "(ours - floor) / (PEFT DoRA - floor)", distance(ours, times[DORA], floor), 0.20 if everything else None
        yield "ours / PEFT LoRA", ratio(ours, times[LORA]), 1.0 if everything else 1.02
        yield "ours / plain function", ratio(ours, times[PLAIN]), 1.0
    elif isinstance(case, DecodeCase):
        if case.tokens == 1:
            yield "ours / merged linear", ratio(ours, times["merged linear"]), 1.10
            yield "ours / PEFT DoRA", ratio(ours, times[DORA]), 1 / 60
        yield "ours / PEFT LoRA", ratio(ours, times[LORA]), 1.0
        yield "ours / nn.Linear", ratio(ours, floor), None
    else:
        least = 1 / 0.70 if case.r <= 8 else None  # of the copy's bandwidth; at higher ranks arithmetic takes over
        if NATIVE_INTO_KEPT in times:
            yield "into kept memory / copy of the same bytes", ratio(times[NATIVE_INTO_KEPT], floor), least
            yield "ours / copy into a new tensor", ratio(ours, times[COPY_TO_NEW]), least
        else:
            yield "ours / copy of the same bytes", ratio(ours, floor), least


def cases(what: str) -> list[Case]:
    """The cases of one part of the gates: "step", "decode" or "operations". Raises ValueError for another name."""
    if what == "step":
        found: list[Case] = [case for case in suite("cpu", "step/") if case.min_rounds >= 20 and case.dtype == "fp32"]
    elif what == "decode":
        found = [layer_case("llama-2-7b", "q_proj", tokens, 16, "fp32", DecodeCase) for tokens in (1, 8, 128)]
    elif what == "operations":
        found = [OperationCase(operation=name, r=r) for name in ("weight_norm", "merged_weight") for r in (1, 8, 64)]
    else:
        raise ValueError(f"the part must be one of step, decode, operations, got {what!r}")
    return [dataclasses.replace(case, min_rounds=20, max_rounds=20, without=REFERENCE) for case in found]


def main() -> int:
    """Measure the parts named on the command line (all without one) and print each gate."""
    try:
        chosen = [case for what in sys.argv[1:] or ["step", "decode", "operations"] for case in cases(what)]
    except ValueError as error:
        print(f"benchmarks.cpu_step: {error}", file=sys.stderr)
        return 2
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
            print(f"  {name:40} {value.median:.4f}  ({times_as_long(value)}){verdict}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
