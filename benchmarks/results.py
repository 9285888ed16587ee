"""The results file: what one machine measured, piece by piece. Times are stored round by round; everything else is derived.

{"schema_version": 1, "suite": "cpu", "tiny": false, "selected": [ids], "machine": {...},
 "pieces": [{"started", "commit", "modified", "backends", "clock_mhz", "load", "ceilings"}],
 "cases": {id: {"case": {...}, "floor": name, "elapsed": seconds in all, "pieces": [piece of each round],
                "providers": {name: {"status": "ok", "errors", "peak_bytes", "iterations", "seconds": [per round]}
                                  | {"status": "unavailable" | "refused" | "failed", "reason"}}}}}
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
FOLDER = Path(__file__).parent / "results"
STATUSES = ("ok", "unavailable", "refused", "failed")
Document = dict[str, Any]


class InvalidResults(ValueError):
    """A results file that does not fit the schema."""


def new(suite: str, tiny: bool, machine: dict[str, Any]) -> Document:
    """An empty results file."""
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": suite,
        "tiny": tiny,
        "selected": [],
        "machine": machine,
        "pieces": [],
        "cases": {},
    }


class _Problems(list[str]):
    def need(self, value: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
        """Return value[key], noting where it is missing or of another type."""
        if not isinstance(value, dict) or key not in value:
            self.append(f"{where}: {key} is missing")
            return None
        found = value[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(found, kind) or (isinstance(found, bool) and bool not in kinds):
            self.append(f"{where}: {key} must be {' or '.join(k.__name__ for k in kinds)}, got {found!r}")
            return None
        return found


def _check_piece(problems: _Problems, piece: Any, where: str) -> None:
    commit = problems.need(piece, "commit", str, where)
    if commit is not None and not re.fullmatch(r"[0-9a-f]{40}", commit):
        problems.append(f"{where}: commit must be 40 hexadecimal digits, got {commit!r}")
    problems.need(piece, "modified", bool, where)
    problems.need(piece, "started", str, where)
    problems.need(piece, "backends", dict, where)
    for name, value in (problems.need(piece, "ceilings", dict, where) or {}).items():
        if not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            problems.append(f"{where}: ceiling {name} must be positive and finite, got {value!r}")


def _check_provider(problems: _Problems, provider: Any, rounds: int, where: str) -> None:
    status = problems.need(provider, "status", str, where)
    if status is None:
        return
    if status not in STATUSES:
        problems.append(f"{where}: status must be one of {', '.join(STATUSES)}, got {status!r}")
    elif status != "ok":
        problems.need(provider, "reason", str, where)
        if "seconds" in provider:
            problems.append(f"{where}: a provider with status {status} has no times")
    else:
        problems.need(provider, "iterations", int, where)
        problems.need(provider, "peak_bytes", int, where)
        for name, error in (problems.need(provider, "errors", dict, where) or {}).items():
            if not isinstance(error, int | float) or not math.isfinite(error):
                problems.append(f"{where}: error {name} must be finite, got {error!r}")
        seconds = problems.need(provider, "seconds", list, where)
        if seconds is not None:
            if len(seconds) != rounds:
                problems.append(f"{where}: {len(seconds)} times in {rounds} rounds")
            if not all(isinstance(value, int | float) and math.isfinite(value) and value > 0 for value in seconds):
                problems.append(f"{where}: every time must be positive and finite")


def problems(document: Any, complete: bool = False) -> list[str]:
    """What is wrong with a results file, one line each. With `complete`, a selected case without all its rounds is wrong too."""
    found = _Problems()
    if found.need(document, "schema_version", int, "results") not in (SCHEMA_VERSION, None):
        found.append(f"results: schema_version must be {SCHEMA_VERSION}, got {document['schema_version']!r}")
    found.need(document, "suite", str, "results")
    found.need(document, "tiny", bool, "results")
    machine = found.need(document, "machine", dict, "results")
    if machine is not None:
        found.need(machine, "device", str, "machine")
        found.need(machine, "cpu", str, "machine")
        found.need(machine, "threads", int, "machine")
        found.need(machine, "versions", dict, "machine")
        if machine.get("device") == "cuda":
            found.need(machine, "gpu", str, "machine")
    pieces = found.need(document, "pieces", list, "results") or []
    for index, piece in enumerate(pieces):
        _check_piece(found, piece, f"piece {index}")
    selected = found.need(document, "selected", list, "results") or []
    cases = found.need(document, "cases", dict, "results") or {}
    found.extend(f"{name}: not among the selected cases" for name in cases if name not in selected)
    for name, entry in cases.items():
        case = found.need(entry, "case", dict, name)
        rounds = found.need(entry, "pieces", list, name)
        floor = found.need(entry, "floor", str, name)
        providers = found.need(entry, "providers", dict, name)
        found.need(entry, "elapsed", (int, float), name)
        if None in (case, rounds, providers, floor):
            continue
        if not all(isinstance(index, int) and 0 <= index < len(pieces) for index in rounds):
            found.append(f"{name}: every round must name one of the {len(pieces)} pieces")
        if floor not in providers:
            found.append(f"{name}: the floor {floor!r} is not among the providers")
        for provider, value in providers.items():
            _check_provider(found, value, len(rounds), f"{name}, {provider}")
        if complete and len(rounds) < case.get("min_rounds", 1):
            found.append(f"{name}: {len(rounds)} rounds, at least {case.get('min_rounds')} are needed")
    if complete:
        found.extend(f"{name}: selected, not measured" for name in selected if name not in cases)
    return list(found)


def load(path: str | Path) -> Document:
    """Read and check a results file. Raises InvalidResults with the first problems, or OSError."""
    try:
        document = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise InvalidResults(f"{path} is not JSON: {error}") from None
    wrong = problems(document)
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise InvalidResults(f"{path}: " + "; ".join(wrong[:3]) + more)
    return document


def save(document: Document, path: str | Path) -> None:
    """Check and write a results file; an interruption leaves the old one."""
    wrong = problems(document)
    if wrong:
        raise InvalidResults("; ".join(wrong[:3]))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1)
    # one line per list of numbers
    text = re.sub(r"\[\s+([-\d][^\[\]{}\"]*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m.group(1)) + "]", text)
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n")
    os.replace(part, path)


# files of the experiments, each in a format of its own
EXPERIMENTS = ("bilevel-cost", "scaling", "quality", "usefulness", "fidelity")


def committed() -> list[Path]:
    """The suites' results files of this checkout; those of EXPERIMENTS are not among them."""
    return sorted(path for path in FOLDER.glob("*.json") if path.stem not in EXPERIMENTS)
