"""pytest-benchmark entries of a bilevel step, per estimator: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

import pytest
import torch

import bidora_kernels as bk

pytest.importorskip("pytest_benchmark")
ESTIMATORS = ["FirstOrder", "ForwardDifference", "CentralDifference", "Sama"]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_bilevel_step(benchmark, name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Tanh(), torch.nn.Linear(256, 256))
    bk.apply_dora(model, bk.DoraConfig(r=8, target_modules=["0", "2"]))
    direction, magnitude = bk.split_parameters(model)
    optimizer = bk.BilevelOptimizer(
        model,
        lower=torch.optim.AdamW(direction, lr=1e-3),
        upper=torch.optim.AdamW(magnitude, lr=1e-3),
        estimator=getattr(bk, name)(),
    )
    train, validation = ((torch.randn(64, 256), torch.randn(64, 256)) for _ in range(2))

    def loss_fn(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    stats = benchmark(optimizer.step, loss_fn, train, validation)
    assert stats.skipped is None
