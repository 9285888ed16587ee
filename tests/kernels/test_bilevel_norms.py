"""A bilevel step on the kernels reads a weight for its norms once per state of the directions, once for two sides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidora_kernels as bk
from bidora_kernels.bilevel.flat import FlatParameters
from bidora_kernels.kernels._launch import LAUNCHES
from bidora_kernels.ops._backend import interpreting

if not interpreting():
    pytest.skip("runs the kernels: needs TRITON_INTERPRET=1, in a process of its own", allow_module_level=True)

BATCHES = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def optimizer(**options: Any) -> bk.BilevelOptimizer:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    bk.apply_dora(model, bk.DoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"]))
    with torch.no_grad():
        for parameter in bk.split_parameters(model)[0]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    direction, magnitude = bk.split_parameters(model)
    return bk.BilevelOptimizer(
        model.train(), lower=torch.optim.AdamW(direction, lr=1e-2), upper=torch.optim.AdamW(magnitude, lr=1e-2), **options
    )


def steps(count: int = 2, **options: Any) -> tuple[Tensor, int]:
    """(what was trained after some steps, reads of a weight for norms in the last)."""
    made = optimizer(**options)
    with bk.use_backend("triton"):
        for _ in range(count):
            LAUNCHES.clear()
            made.step(loss_fn, *BATCHES)
    return torch.cat([p.detach().flatten() for group in bk.split_parameters(made.model) for p in group]), LAUNCHES["weight_norm"]


@pytest.mark.parametrize(
    ("estimator", "reads", "unshared"), [(bk.FirstOrder(), 1, 2), (bk.Sama(), 2, 3), (bk.CentralDifference(), 2, 4)], ids=repr
)
def test_reads_of_a_step(estimator: Any, reads: int, unshared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    got, launches = steps(estimator=estimator)
    monkeypatch.setattr(FlatParameters, "point", lambda self, *arguments: None)
    wanted, before = steps(estimator=estimator)
    assert (launches, before) == (reads * 2, unshared * 2)
    assert torch.equal(got, wanted)
