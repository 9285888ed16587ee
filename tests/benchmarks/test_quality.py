"""The quality table: equal passes, paired intervals, and runs that are made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bidora_kernels as bk
from benchmarks import quality
from bidora_kernels.bilevel.schedule import TwoPhases
from tests.bilevel.problems import TRAIN, VALIDATION, bert_loss, bert_optimizer, small_bert


def test_the_interval_is_students() -> None:
    scores = dict(enumerate((0.9, 0.8, 0.85, 0.95, 0.9)))
    baseline = dict(enumerate((0.8, 0.8, 0.8, 0.9, 0.8)))
    found = quality.paired(scores, baseline)
    assert found is not None
    differences = torch.tensor(found["differences"])
    assert found["mean"] == pytest.approx(float(differences.mean()))
    half = 2.776445 * float(differences.std()) / 5**0.5
    assert (found["low"], found["high"]) == pytest.approx((found["mean"] - half, found["mean"] + half))
    assert quality.paired({0: 1.0, 1: 0.0}, {1: 0.0, 2: 1.0}) is None


@pytest.mark.parametrize("name", ["first-order", "balanced", "paper-code"])
def test_passes_are_counted_as_the_optimizer_counts_them(name: str) -> None:
    optimizer = bert_optimizer(small_bert(), **bk.preset(name).optimizer)
    taken = sum(optimizer.step(bert_loss, TRAIN, VALIDATION).passes for _ in range(4))
    assert quality.passes_per_step(name) == taken / 4


@pytest.mark.parametrize("method", list(quality.METHODS))
def test_all_methods_take_the_same_passes(method: str) -> None:
    for passes in (100, 120, 200):
        settings = quality.settings_for("reuters-r8", method, 1e-3, 0, passes, choosing=False)
        taken = float(settings.steps)
        if settings.method == "bidora":
            options = bk.preset(settings.bilevel).optimizer
            upper = TwoPhases(settings.steps, settings.retrain_steps).upper_steps(options.get("upper_every", 1))
            taken += upper * (quality.passes_per_step(settings.bilevel) - 1) * options.get("upper_every", 1)
        assert abs(taken + settings.retrain_steps - passes) < 4


def test_runs_are_made_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[Path, dict[str, Any]] = {}
    monkeypatch.setattr(quality, "finished", lambda folder: made.get(folder))
    plan = quality.Plan(tmp_path, ["reuters-r8"], [0, 1], 120)
    order = []
    for folder, settings in plan.missing():
        order.append(folder.name)
        made[folder] = {"score": {3e-3: 0.2, 1e-2: 0.4, 3e-2: 0.4}[settings.lr], "hold_out": settings.hold_out}
    assert len(order) == len(set(order)) == 2 * 3 + 5 * 2
    assert list(plan.missing()) == []
    assert all(made[tmp_path / "trials" / name]["hold_out"] > 0 for name in order[:6])
    assert all(plan.rate("reuters-r8", method) == 1e-2 for method in quality.METHODS)  # the smaller of equal ones
    with pytest.raises(SystemExit, match="other settings"):
        quality.Plan(tmp_path, ["reuters-r8"], [0, 1], 100)
