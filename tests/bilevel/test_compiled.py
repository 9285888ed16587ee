"""A bilevel step of a model under torch.compile: the same numbers, the same radius."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidora_kernels as bk

from .problems import TRAIN, VALIDATION, bert_loss, bert_optimizer, error, flat, small_bert


def both(dtype: torch.dtype, loss: Any, **options: Any) -> list[tuple[Any, list[Tensor]]]:
    """The statistics of three steps and the parameters after them, eager and compiled."""
    results = []
    for compiles in (False, True):
        torch.compiler.reset()
        model = small_bert(dtype=dtype)
        optimizer = bert_optimizer(model, **options)
        called = torch.compile(model, backend="aot_eager") if compiles else model
        stats = [optimizer.step(lambda _, batch: loss(called, batch), TRAIN, VALIDATION) for _ in range(3)]  # noqa: B023
        direction, magnitude = bk.split_parameters(model)
        results.append((stats, [flat(list(direction)), flat(list(magnitude))]))
    return results


@pytest.mark.parametrize(
    ("estimator", "backend"),
    [(bk.FirstOrder(), "auto"), (bk.Sama(), "auto"), (bk.CentralDifference(), "auto"), (bk.Sama(), "reference")],
    ids=repr,
)
def test_a_compiled_model_takes_the_same_steps(estimator: Any, backend: str) -> None:
    with bk.use_backend(backend):
        (eager, wanted), (compiled, got) = both(torch.float64, bert_loss, estimator=estimator)
    for left, right in zip(eager, compiled, strict=True):
        assert right.passes == left.passes
        assert right.hypergradient_norm == pytest.approx(left.hypergradient_norm, rel=1e-6)
        assert right.radius == (None if left.radius is None else pytest.approx(left.radius, rel=1e-9))
    for left, right in zip(wanted, got, strict=True):
        assert error(right, left) < 1e-6


def under_bf16(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return bert_loss(model, batch)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_compiled_pass_says_what_it_computes_in(backend: str) -> None:
    """Its radius is that of bf16, not that of the fp32 parameters, which would leave nothing but rounding."""
    with bk.use_backend(backend):
        (eager, _), (compiled, _) = both(torch.float32, under_bf16, estimator=bk.ForwardDifference(), xi=1.0)
    assert compiled[0].radius == pytest.approx(eager[0].radius, rel=1e-3)
    assert eager[0].radius > 0.0
