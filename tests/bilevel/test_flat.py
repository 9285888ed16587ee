"""Flat buffers: views that stay ordinary parameters, one kernel per operation, values put back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bidora_kernels.bilevel.flat import ALIGNMENT, FlatParameters, add, scaled

SHAPES = [(3, 5), (7,), (), (2, 1, 4), (16,)]


def parameters(dtype: torch.dtype = torch.float32, count: int = 1) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for _ in range(count) for shape in SHAPES]


class Kernels(TorchDispatchMode):
    """Counts the operations that read or write a tensor of `size` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        touched = [*args, *(kwargs or {}).values()]
        if any(isinstance(value, Tensor) and value.numel() == self.size for value in touched):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_parameters_become_aligned_views_and_keep_their_values(dtype: torch.dtype) -> None:
    given = parameters(dtype)
    values = [p.detach().clone() for p in given]
    flat = FlatParameters(given)
    (buffer,) = flat.buffers
    for parameter, value in zip(given, values, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.data_ptr() % ALIGNMENT == buffer.data_ptr() % ALIGNMENT
        assert buffer.data_ptr() <= parameter.data_ptr() < buffer.data_ptr() + buffer.numel() * buffer.element_size()
    assert sum(int((buffer != 0).sum()) for buffer in flat.buffers) == sum(int((value != 0).sum()) for value in values)


def test_dtypes_have_buffers_of_their_own() -> None:
    mixed = [*parameters(torch.float32), *parameters(torch.bfloat16)]
    values = [p.detach().clone() for p in mixed]
    flat = FlatParameters(mixed)
    assert [buffer.dtype for buffer in flat.buffers] == [torch.float32, torch.bfloat16]
    flat.set(scaled(flat.clone(), 2.0))
    assert all(torch.equal(parameter, 2 * value) for parameter, value in zip(mixed, values, strict=True))


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("perturb", lambda flat, a, b: flat.set(a, b, 0.5)),
        ("restore", lambda flat, a, b: flat.set(a)),
        ("norm", lambda flat, a, b: flat.norm(a)),
        ("axpy", lambda flat, a, b: add(a, b, 0.5)),
    ],
    ids=["perturb", "restore", "norm", "axpy"],
)
@pytest.mark.parametrize("count", [1, 40])
def test_one_kernel_whatever_the_number_of_parameters(name: str, operation: Callable[..., Any], count: int) -> None:
    flat = FlatParameters(parameters(count=count))
    one, other = flat.clone(), flat.clone()
    with Kernels(flat.buffers[0].numel()) as kernels:
        operation(flat, one, other)
    assert len(kernels.names) == 1, f"{name}: {kernels.names}"


def test_perturbing_and_restoring_is_exact() -> None:
    given = parameters()
    flat = FlatParameters(given)
    start, vector = flat.clone(), [torch.randn_like(buffer) for buffer in flat.buffers]
    values = [p.detach().clone() for p in given]
    flat.set(start, vector, 1e-3)
    for parameter, value, part in zip(given, values, flat.views(vector), strict=True):
        assert torch.equal(parameter, value + 1e-3 * part)
    flat.set(start)
    assert all(torch.equal(parameter, value) for parameter, value in zip(given, values, strict=True))


def test_vectors() -> None:
    flat = FlatParameters(parameters())
    tensors = [torch.randn(shape) for shape in SHAPES]
    vector = flat.gather([*tensors[:2], None, *tensors[3:]])
    tensors[2] = torch.zeros(())
    assert all(torch.equal(view, tensor) for view, tensor in zip(flat.views(vector), tensors, strict=True))
    whole = torch.cat([tensor.flatten() for tensor in tensors]).double()
    assert float(flat.norm(vector)) == pytest.approx(float(whole.norm()), rel=1e-14)
    assert float(flat.dot(vector, flat.clone())) == pytest.approx(
        float(whole @ torch.cat([p.detach().flatten() for p in flat.parameters]).double()), rel=1e-14
    )


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adagrad], ids=lambda make: make.__name__)
def test_optimizers_and_state_dict_work_on_the_views(make: Any) -> None:
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    flattened = copy.deepcopy(plain)
    FlatParameters(flattened.parameters())
    x = torch.randn(4, 5)
    for model in (plain, flattened):
        optimizer = make(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for key, value in plain.state_dict().items():
        assert torch.equal(flattened.state_dict()[key], value)
    state = {key: value + 1 for key, value in plain.state_dict().items()}
    flat = FlatParameters(flattened.parameters())
    flattened.load_state_dict(state)
    assert flat.refresh() is False
    for parameter, view in zip(flattened.parameters(), flat.views(flat.buffers), strict=True):
        assert torch.equal(parameter, view)
    for key, value in state.items():
        assert torch.equal(flattened.state_dict()[key], value)


def replaced(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.detach() + 1


@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.bfloat16, replaced])
def test_a_replaced_storage_is_taken_in_with_its_values(change: Callable[[nn.Module], None]) -> None:
    model = nn.Linear(5, 7)
    flat = FlatParameters(model.parameters())
    change(model)
    values = [p.detach().clone() for p in model.parameters()]
    assert flat.refresh() is True
    assert flat.refresh() is False
    assert all(buffer.dtype == values[0].dtype for buffer in flat.buffers)
    flat.set(flat.clone())
    assert all(torch.equal(parameter, value) for parameter, value in zip(model.parameters(), values, strict=True))


def test_what_cannot_be_flattened_raises() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="needs at least one parameter"):
        FlatParameters([])
    with pytest.raises(ValueError, match="occurs twice"):
        FlatParameters([parameter, parameter])
    with pytest.raises(TypeError, match="must be dense and floating-point, got Tensor of dtype int64"):
        FlatParameters([nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)])
    flat = FlatParameters([parameter])
    parameter.data = torch.zeros(3)
    with pytest.raises(ValueError, match=r"must be \[2\]"):
        flat.refresh()
