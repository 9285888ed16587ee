"""The gates of the native CPU backend, measured with the harness: `python -m benchmarks.cpu_step [step|decode|operations]`.

Providers are interleaved round by round in one process; a ratio is the median of the per-round ratios. A gate that is missed is
printed as such; the script fails only where a provider disagrees with the truth.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator

import torch

from .cases import Case, DecodeCase, OperationCase, StepCase
from .run import prepare
from .timing import measure

OURS, LORA, DORA = "bidora (native)", "PEFT LoRA", "PEFT DoRA"
Times = dict[str, list[float]]


def ratio(times: Times, over: str, under: str, floor: str | None = None) -> float:
    """Median over rounds of over / under, or of (over - floor) / (under - floor)."""
    base = times[floor] if floor else [0.0] * len(times[over])
    return statistics.median((a - f) / (b - f) for a, b, f in zip(times[over], times[under], base, strict=True))


def gates(case: Case, times: Times) -> Iterator[tuple[str, float, float]]:
    """(what, measured, the most that is allowed)."""
    if isinstance(case, StepCase):
        floor, share = case.floor, ratio(times, OURS, DORA, case.floor)
        yield "ours / floor", ratio(times, OURS, floor), float("nan")
        yield "PEFT LoRA / floor", ratio(times, LORA, floor), float("nan")
        yield "PEFT DoRA / floor", ratio(times, DORA, floor), float("nan")
        yield "plain function / floor", ratio(times, "plain function", floor), float("nan")
        yield "(ours - floor) / (PEFT DoRA - floor)", share, 0.20 if case.targets == "all-linear" else float("nan")
        yield "ours / PEFT LoRA", ratio(times, OURS, LORA), 1.0 if case.targets == "all-linear" else 1.02
        yield "ours / plain function", ratio(times, OURS, "plain function"), 1.0
    elif isinstance(case, DecodeCase):
        if case.tokens == 1:
            yield "ours / merged linear", ratio(times, OURS, "merged linear"), 1.10
            yield "ours / PEFT DoRA", ratio(times, OURS, DORA), 1 / 60
        yield "ours / PEFT LoRA", ratio(times, OURS, LORA), 1.0
        yield "ours / nn.Linear", ratio(times, OURS, "frozen linear"), float("nan")
    else:
        yield "share of copy bandwidth", -ratio(times, case.floor, OURS), -0.70


def cases(what: str) -> list[Case]:
    """The cases of one part of the gates."""
    if what == "step":
        return [StepCase(targets="all-linear"), StepCase(targets="q+v")]
    if what == "decode":
        sizes = {"model": "llama-2-7b", "layer": "q_proj", "out_features": 4096, "in_features": 4096, "bias": False}
        return [DecodeCase(**sizes, tokens=tokens, seconds=15.0, min_rounds=20, max_rounds=20) for tokens in (1, 8, 128)]
    return [
        OperationCase(operation=operation, r=r, min_rounds=20, max_rounds=20, seconds=0.0)
        for operation in ("weight_norm", "merged_weight")
        for r in (1, 8, 64)
    ]


def main() -> None:
    """Measure the parts named on the command line (all without one) and print each gate."""
    for what in sys.argv[1:] or ["step", "decode", "operations"]:
        for case in cases(what):
            ready, entries = prepare(case, "cpu", print)
            ready = [candidate for candidate in ready if "reference" not in candidate.name]
            times = measure(ready, "cpu", case.min_rounds, case.max_rounds, case.seconds)
            print(f"{case.id}  ({torch.get_num_threads()} threads, {len(times[OURS])} rounds)")
            for name, values in times.items():
                peak = entries[name]["peak_bytes"] / 2**20
                print(f"  {name:28} {statistics.median(values) * 1e3:10.3f} ms   peak {peak:8.1f} MiB")
            for name, value, most in gates(case, times):
                verdict = "" if most != most else "  ok" if value <= most else "  MISSED"
                print(f"  {name:40} {abs(value):8.4f}{'' if most != most else f'   gate {abs(most):.4f}'}{verdict}", flush=True)


if __name__ == "__main__":
    main()
