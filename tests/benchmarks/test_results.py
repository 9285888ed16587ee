"""The schema: what it accepts, what it refuses, and that every committed file fits it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results

CASE_ID = "layer/x"


def document() -> dict[str, Any]:
    machine = {"device": "cpu", "cpu": "some", "threads": 2, "versions": {"torch": "2"}, "gpu": None}
    ceilings = {"copy_gb_s": 10.0, "matmul_fp32_gflop_s": 100.0, "matmul_bf16_gflop_s": 50.0, "operator_us": 1.0}
    sizes = {"dtype": "fp32", "tokens": 4, "out_features": 8, "in_features": 16, "r": 2}
    made = results.new("cpu", False, machine)
    made["selected"] = [CASE_ID]
    made["pieces"] = [
        {"started": "2026-01-01T00:00:00+00:00", "commit": "0" * 40, "modified": False, "backends": {}, "ceilings": ceilings}
    ]
    ok = {"status": "ok", "errors": {"y": 1e-7}, "peak_bytes": 10, "iterations": 1}
    made["cases"][CASE_ID] = {
        "case": {"kind": "layer", "min_rounds": 2, **sizes},
        "floor": "floor",
        "elapsed": 7.5,
        "pieces": [0, 0],
        "providers": {
            "floor": {**ok, "seconds": [1.0, 1.5]},
            "ours": {**ok, "seconds": [2.0, 2.5]},
            "none": {"status": "unavailable", "reason": "no GPU"},
        },
    }
    return made


def test_a_sound_document_has_no_problems_and_survives_a_file(tmp_path: Path) -> None:
    sound = document()
    assert results.problems(sound, complete=True) == []
    results.save(sound, tmp_path / "r.json")
    assert results.load(tmp_path / "r.json") == sound
    assert "[1.0, 1.5]" in (tmp_path / "r.json").read_text()


BREAKS = {
    "schema_version must be 1": lambda d: d.update(schema_version=2),
    "suite is missing": lambda d: d.pop("suite"),
    "device is missing": lambda d: d["machine"].pop("device"),
    "commit must be 40 hexadecimal digits": lambda d: d["pieces"][0].update(commit="unknown"),
    "ceiling copy_gb_s must be positive": lambda d: d["pieces"][0]["ceilings"].update(copy_gb_s=0.0),
    "1 times in 2 rounds": lambda d: d["cases"][CASE_ID]["providers"]["ours"].update(seconds=[1.0]),
    "every time must be positive and finite": lambda d: d["cases"][CASE_ID]["providers"]["ours"].update(
        seconds=[1.0, float("nan")]
    ),
    "error y must be finite": lambda d: d["cases"][CASE_ID]["providers"]["ours"]["errors"].update(y=float("inf")),
    "status must be one of": lambda d: d["cases"][CASE_ID]["providers"]["ours"].update(status="fine"),
    "reason is missing": lambda d: d["cases"][CASE_ID]["providers"]["none"].pop("reason"),
    "has no times": lambda d: d["cases"][CASE_ID]["providers"]["none"].update(seconds=[1.0, 1.0]),
    "every round must name one of the 1 pieces": lambda d: d["cases"][CASE_ID].update(pieces=[0, 1]),
    "the floor 'floor' is not among": lambda d: d["cases"][CASE_ID]["providers"].pop("floor"),
    "not among the selected": lambda d: d.update(selected=[]),
    "elapsed is missing": lambda d: d["cases"][CASE_ID].pop("elapsed"),
    "gpu must be str": lambda d: d["machine"].update(device="cuda"),
}


@pytest.mark.parametrize("problem", BREAKS)
def test_each_break_is_named(problem: str, tmp_path: Path) -> None:
    broken = copy.deepcopy(document())
    BREAKS[problem](broken)
    found = results.problems(broken)
    assert any(problem in line for line in found), found
    with pytest.raises(results.InvalidResults):
        results.save(broken, tmp_path / "r.json")
    (tmp_path / "r.json").write_text(json.dumps(broken))
    with pytest.raises(results.InvalidResults):
        results.load(tmp_path / "r.json")


def test_completeness() -> None:
    short = document()
    short["cases"][CASE_ID]["case"]["min_rounds"] = 3
    short["selected"].append("layer/other")
    assert results.problems(short) == []
    found = results.problems(short, complete=True)
    assert [line for line in found if "2 rounds, at least 3" in line]
    assert [line for line in found if "not measured" in line]


@pytest.mark.parametrize("path", results.committed() or [None], ids=lambda path: path.name if path else "none committed")
def test_committed_results(path: Path | None) -> None:
    if path is None:
        pytest.skip("no results are committed yet")
    committed = json.loads(path.read_text())
    assert results.problems(committed, complete=True) == []
    assert not committed["tiny"]
    from benchmarks.cases import suite

    assert len(committed["cases"]) == len(committed["selected"])
    ids = {case.id for case in suite(committed["suite"])}
    selected = set(committed["selected"])
    if committed["suite"] == "gpu":  # GPU time comes in short stretches; benchmarks/README.md says what is missing
        assert selected <= ids, "the suite has changed since: measure again"
        return
    bf16_cpu = {name for name in ids ^ selected if name.endswith("bf16") and "step/" in name}
    assert ids ^ selected <= bf16_cpu, "the suite has changed since: measure again"
