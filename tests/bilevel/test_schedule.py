"""The two phases: their steps, their learning rates, and where the retraining starts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from bidora_kernels.bilevel.schedule import TwoPhases, linear_schedule


def test_learning_rates_warm_up_and_fall() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler, rates = linear_schedule(optimizer, 50), []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert rates[3] == pytest.approx(2.0)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[3:]))
    assert rates[-1] == pytest.approx(2.0 / 47)


def test_phases() -> None:
    phases = TwoPhases(5, 3)
    assert [phases.phase(step) for step in range(phases.steps)] == ["search"] * 5 + ["retrain"] * 3
    assert [phases.upper_steps(every) for every in (1, 2, 5)] == [5, 3, 1]
    for wrong in ((0, 0), (-1, 2), (1, 1, "middle")):
        with pytest.raises(ValueError, match=r"steps must be|retrain_from must be"):
            TwoPhases(*wrong)


@pytest.mark.parametrize("start", ["search", "init"])
def test_retraining_freezes_magnitudes_and_may_start_afresh(start: str) -> None:
    direction, magnitude = [nn.Parameter(torch.ones(2))], [nn.Parameter(torch.ones(3))]
    TwoPhases(1, 1, start).begin_retraining(direction, magnitude, [torch.zeros(2)])
    assert not magnitude[0].requires_grad
    assert direction[0].requires_grad
    assert direction[0].tolist() == ([0.0, 0.0] if start == "init" else [1.0, 1.0])
    with pytest.raises(ValueError, match="one value per direction"):
        TwoPhases(1, 1, "init").begin_retraining(direction, magnitude, [torch.zeros(3)])
