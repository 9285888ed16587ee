"""Run a suite: build and check every provider of a case, time all of them interleaved, keep the rounds; behind `bidora bench`."""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bidora_kernels.cli import add_bench_arguments

from . import bilevel, machine, memory, models, operations, peers, report, results
from .cases import BilevelCase, Case, LayerCase, OperationCase, StepCase, suite
from .timing import Candidate, Disagreement, measure

Log = Callable[[str], None]


def providers(case: Case) -> dict[str, Callable[[Any], Candidate]]:
    """Every provider of a case by name, but for those that it leaves out."""
    found: dict[str, Callable[[Any], Candidate]]
    if isinstance(case, BilevelCase):
        found = bilevel.bilevel_providers(case)
    elif isinstance(case, StepCase):
        found = models.step_providers(case)
    elif isinstance(case, OperationCase):
        found = operations.operation_providers(case)
    elif isinstance(case, LayerCase):
        found = peers.layer_providers(case)
    else:
        raise TypeError(f"no providers for a {type(case).__name__}")
    return {name: build for name, build in found.items() if not name.startswith(case.without)}


def material(case: Case, device: str) -> Any:
    """The tensors that the providers of a case share."""
    if isinstance(case, StepCase):
        return models.Workbench(case, device)
    if isinstance(case, OperationCase):
        return operations.Operands(case, device)
    if isinstance(case, LayerCase):
        return peers.Material(case, device)
    raise TypeError(f"no tensors for a {type(case).__name__}")


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


def prepare(case: Case, device: str, log: Log) -> tuple[list[Candidate], dict[str, Any]]:
    """Build and check every provider; return those that may be timed, and an entry for each."""
    shared = material(case, device)
    ready: list[Candidate] = []
    entries: dict[str, dict[str, Any]] = {}
    for name, build in providers(case).items():
        try:
            candidate = build(shared)
            candidate.name = name
            errors = candidate.verify()
            with candidate.around():
                peak = memory.peak_bytes(candidate.calls[0], device)
        except peers.Unavailable as error:
            entries[name] = {"status": "unavailable", "reason": str(error)}
        except Disagreement as error:
            entries[name] = {"status": "refused", "reason": str(error)}
            log(f"  {name}: refused, {error}")
        except Exception as error:  # a provider that cannot run is a row of the table, not the end of the suite
            entries[name] = {"status": "failed", "reason": _reason(error)}
            log(f"  {name}: failed, {_reason(error)} ({traceback.extract_tb(error.__traceback__)[-1].name})")
        else:
            ready.append(candidate)
            entries[name] = {"status": "ok", "errors": errors, "peak_bytes": peak, "iterations": candidate.iterations}
    return ready, entries


def _round(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def run_case(case: Case, device: str, piece: int, old: dict[str, Any] | None, deadline: float, log: Log) -> dict[str, Any]:
    """Measure a case, or go on with the rounds that an earlier piece measured."""
    started = time.monotonic()
    ready, entries = prepare(case, device, log)
    names = {candidate.name for candidate in ready}
    if old is not None:
        usable = {name for name, entry in old["providers"].items() if entry["status"] == "ok"}
        old = old if usable == names and old["case"] == _as_json(case) else None
    done = 0 if old is None else len(old["pieces"])
    remaining = max(1, case.max_rounds - done)
    seconds = max(case.seconds, 0.0)
    times = measure(ready, device, max(1, case.min_rounds - done), remaining, seconds, done, deadline) if ready else {}
    rounds = len(next(iter(times.values()), []))
    for name, values in times.items():
        before = [] if old is None else old["providers"][name]["seconds"]
        entries[name]["seconds"] = before + _round(values)
    pieces = ([] if old is None else old["pieces"]) + [piece] * rounds
    elapsed = round(time.monotonic() - started + (0.0 if old is None else old["elapsed"]), 1)
    return {"case": _as_json(case), "floor": case.floor, "elapsed": elapsed, "pieces": pieces, "providers": entries}


def _as_json(case: Case) -> dict[str, Any]:
    return case.describe()


def is_complete(case: Case, entry: dict[str, Any] | None) -> bool:
    """Whether an entry holds enough rounds of just this case."""
    return entry is not None and entry["case"] == _as_json(case) and len(entry["pieces"]) >= case.min_rounds


def run(
    name: str,
    pattern: str | None = None,
    budget: float | None = None,
    output: Path | None = None,
    device: str = "cpu",
    tiny: bool = False,
    log: Log = print,
) -> results.Document:
    """Run the cases of a suite that `output` does not hold yet, for about `budget` seconds, and return the results.

    Raises ValueError for a suite or pattern that names nothing, and where `output` comes from another machine or suite.
    """
    cases = suite(name, pattern, tiny)
    here = machine.describe(device)
    document = results.new(name, tiny, here)
    if output is not None and output.exists():
        document = results.load(output)
        for key, value in (("suite", name), ("tiny", tiny), ("machine", here)):
            if document[key] != value:
                raise ValueError(f"{output} holds results of another {key}: continue it there, or give --json another file")
    document["selected"] += [case.id for case in cases if case.id not in document["selected"]]
    left = [case for case in cases if not is_complete(case, document["cases"].get(case.id))]
    if not left:
        log(f"all {len(cases)} cases are measured; give --json another file to measure again")
        return document
    started = time.monotonic()
    deadline = started + (float("inf") if budget is None else budget)
    document["pieces"].append(machine.piece(device, quick=tiny or name == "smoke"))
    piece = len(document["pieces"]) - 1
    for index, case in enumerate(left):
        if time.monotonic() >= deadline:
            log(f"budget used: {len(left) - index} cases are left; the same command goes on")
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            entry = run_case(case, device, piece, document["cases"].get(case.id), deadline, log)
        document["cases"][case.id] = entry
        log(f"[{index + 1}/{len(left)}] {case.id}  ({entry['elapsed']:.0f} s, {time.monotonic() - started:.0f} s in all)")
        for line in report.case_lines(entry):
            log("  " + line)
        if output is not None:
            results.save(document, output)
        torch._dynamo.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return document


def default_output(name: str, device: str) -> Path:
    """Where a whole suite's results belong in the checkout."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine.label(machine.describe(device)).lower()).strip("-")
    return results.FOLDER / (f"{slug}.json" if name in ("cpu", "gpu") else f"{slug}-{name}.json")


def main(arguments: argparse.Namespace) -> int:
    """Run the command; 1 where a provider was refused or failed or a comparison found a regression, 2 for a user's mistake."""
    try:
        if arguments.compare:
            lines, regressions = report.compare(*(results.load(path) for path in arguments.compare))
            print("\n".join(lines))
            return 1 if regressions else 0
        if arguments.list:
            print("\n".join(case.id for case in suite(arguments.suite, arguments.filter, arguments.tiny)))
            return 0
        cuda = torch.cuda.is_available()
        device = arguments.device or ("cuda" if cuda and arguments.suite in ("gpu", "smoke") else "cpu")
        if device == "cuda" and not cuda:
            raise ValueError("--device cuda: torch finds no GPU here")
        if arguments.suite == "gpu" and device == "cpu" and not arguments.tiny:
            raise ValueError("--suite gpu needs a GPU; with --tiny it runs at toy sizes on the CPU")
        if arguments.tune:
            from . import tune

            tune.main(device, arguments.filter, arguments.tiny, arguments.budget)
            return 0
        output = Path(arguments.json) if arguments.json else None
        if output is None and not (arguments.tiny or arguments.filter or arguments.suite == "smoke"):
            output = default_output(arguments.suite, device)
        document = run(
            arguments.suite,
            arguments.filter,
            arguments.budget,
            output,
            device,
            arguments.tiny,
            lambda text: print(text, flush=True),
        )
    except (ValueError, OSError) as error:
        print(f"bidora bench: {error}", file=sys.stderr)
        return 2
    if output is not None:
        print(f"results: {output}")
    bad = [
        f"{name}, {provider}: {value['reason']}"
        for name, entry in document["cases"].items()
        for provider, value in entry["providers"].items()
        if value["status"] in ("refused", "failed")
    ]
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    options = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    add_bench_arguments(options)
    sys.exit(main(options.parse_args()))
