"""benchmarks/BILEVEL.md holds what its commands print for the committed results, line by line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cost, fidelity, quality, usefulness

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
PRINTED: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "usefulness": lambda found: usefulness.table(found["rows"]),
    "fidelity": lambda found: [*fidelity.table(found["rows"]), *fidelity.gates(found["rows"])],
    "cost": lambda found: [line for result in found["results"].values() for line in cost.lines(result)],
    "quality": quality.lines,
}


@pytest.mark.parametrize("name", list(PRINTED))
def test_the_page_is_what_the_command_prints(name: str) -> None:
    page = (FOLDER / "BILEVEL.md").read_text(encoding="utf-8").splitlines()
    results = FOLDER / "results" / "bilevel" / f"{name}.json"
    if name == "quality" and not results.exists():
        assert "Not complete yet: no table is shown before every seed has run." in page
        return
    printed = PRINTED[name](json.loads(results.read_text()))
    assert len(printed) > 5
    missing = [line for line in printed if line.rstrip() not in page]
    assert not missing, missing[:3]


def test_gates_are_told_as_they_are() -> None:
    rows = [
        {"compute": "fp32", "estimator": "central", "q_cosine": 0.9995},
        {"compute": "fp32", "estimator": "central", "q_cosine": 0.9989},
        {"compute": "bf16", "estimator": "one-sided", "q_cosine": 0.95},
    ]
    failed, held = fidelity.gates(rows)
    assert failed == "gate fp32, central: cosine of q >= 0.999: 0.99890, 2 states  FAILS"
    assert held == "gate bf16, one-sided: cosine of q >= 0.95: 0.95000, 1 states  holds"
