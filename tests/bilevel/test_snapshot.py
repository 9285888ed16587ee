"""The copies that undo a step: exact, in the same memory from step to step, and never taken for made where they were not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bidora_kernels.bilevel import snapshot
from bidora_kernels.bilevel.snapshot import Copies, OptimizerState


def trained(steps: int = 2) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4, dtype=torch.float64))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, amsgrad=True)
    for _ in range(steps):
        step(parameters, optimizer)
    return parameters, optimizer


def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def values(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value.clone() for state in optimizer.state.values() for value in state.values()]


def assert_put_back(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, copies: Copies) -> None:
    before = values(optimizer)
    state = OptimizerState(optimizer, copies)
    step(parameters, optimizer)
    assert not all(map(torch.equal, values(optimizer), before))
    state.restore()
    for now, then in zip(values(optimizer), before, strict=True):
        assert torch.equal(now, then)
        assert now.dtype == then.dtype


def test_a_state_is_put_back_from_the_same_memory() -> None:
    (parameters, optimizer), copies = trained(), Copies()
    assert_put_back(parameters, optimizer, copies)
    places = [tensor.data_ptr() for _, kept in copies._pairs for tensor in kept]
    for _ in range(3):
        step(parameters, optimizer)
        assert_put_back(parameters, optimizer, copies)
    assert [tensor.data_ptr() for _, kept in copies._pairs for tensor in kept] == places
    optimizer.load_state_dict(optimizer.state_dict())  # other tensors
    step(parameters, optimizer)
    assert_put_back(parameters, optimizer, copies)


def test_copies_that_memory_ran_out_for_are_made_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    (parameters, optimizer), copies = trained(), Copies()
    calls = 0

    def scarce(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("full")
        return empty_like(*args, **kwargs)

    empty_like = torch.empty_like
    monkeypatch.setattr(snapshot.torch, "empty_like", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        OptimizerState(optimizer, copies)
    assert_put_back(parameters, optimizer, copies)
