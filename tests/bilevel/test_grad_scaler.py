"""A step under a GradScaler: the same numbers, and skipped where a pass is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidora_kernels as bk

from .problems import TRAIN, VALIDATION, assert_same, bert_loss, bert_optimizer, everything, scheduled, small_bert
from .test_step import Broken


@pytest.mark.parametrize(
    "estimator",
    [
        bk.FirstOrder(), bk.CentralDifference(), bk.CentralDifference(at="after"), bk.ForwardDifference(), bk.ForwardMode(),
        bk.DoubleBackward(), bk.Sama(), bk.Sama(bk.DoubleBackward()), bk.Neumann(terms=2, step=1e-3),
        bk.Neumann(terms=2, step=1e-3, difference=bk.DoubleBackward()), bk.ConjugateGradient(iterations=2, damping=1.0),
    ],
    ids=repr,
)  # fmt: skip
def test_a_grad_scaler_changes_no_number_and_skips_non_finite_steps(estimator: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain, scaled = (bert_optimizer(small_bert(), estimator=estimator, grad_scaler=s) for s in (None, scaler))
    for optimizer in (plain, scaled):
        for _ in range(2):
            optimizer.step(bert_loss, TRAIN, VALIDATION)
    assert_same(
        [p.detach() for group in bk.split_parameters(plain.model) for p in group],
        [p.detach() for group in bk.split_parameters(scaled.model) for p in group],
    )
    for failing_pass in range(2 if isinstance(estimator, bk.FirstOrder) else 3):
        before, scale, calls = everything(scaled)[:-1], scaler.get_scale(), 0

        def overflowing(model: nn.Module, batch: Any, failing: int = failing_pass) -> Tensor:
            nonlocal calls
            calls += 1
            loss = bert_loss(model, batch)
            return loss * float("inf") if calls == failing + 1 else loss

        stats = scaled.step(overflowing, TRAIN, VALIDATION)
        assert stats.skipped is not None
        assert "not finite" in stats.skipped
        assert scaler.get_scale() == scale / 2
        assert_same(everything(scaled)[:-1], before)
    assert scaled.step(bert_loss, TRAIN, VALIDATION).skipped is None


@pytest.mark.parametrize("failing", range(4))
def test_a_skipped_step_keeps_its_random_numbers_and_no_schedule(failing: int) -> None:
    """Random numbers stay where the finished passes left them; schedules, counts and parameters are as before."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    optimizer = scheduled(small_bert(dropout=0.1), estimator=bk.CentralDifference(), grad_scaler=scaler, upper_every=2)
    before, random, calls = everything(optimizer)[:-1], torch.get_rng_state(), 0

    def overflowing(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return bert_loss(model, batch) * (float("inf") if calls == failing + 1 else 1.0)

    assert optimizer.step(overflowing, TRAIN, VALIDATION).skipped is not None
    assert calls == failing + 1
    assert torch.equal(torch.get_rng_state(), random) == (failing == 0)  # the passes that were finished have moved them
    torch.set_rng_state(random)
    assert_same(everything(optimizer)[:-1], before)
    assert optimizer.needs_validation
    assert scaler.get_scale() == 2.0**9
    for _ in range(2):
        assert optimizer.step(bert_loss, TRAIN, VALIDATION).skipped is None
    assert scaler.get_scale() == 2.0**10


def test_what_fails_at_the_end_of_a_step_leaves_the_scaler_alone() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    optimizer = scheduled(small_bert(), grad_scaler=scaler)
    before = everything(optimizer)
    optimizer.upper_scheduler.step = lambda: (_ for _ in ()).throw(Broken)
    with pytest.raises(Broken):
        optimizer.step(bert_loss, TRAIN, VALIDATION)
    del optimizer.upper_scheduler.step
    assert_same(everything(optimizer), before)
