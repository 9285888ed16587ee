"""Norms, merged weights, directions and the penalty on the native backend, with their gradients, against fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bidora_kernels as bk
from bidora_kernels import native
from bidora_kernels.ops import orthogonality

from .draws import Call, draw

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))
OPERATIONS = ("weight_norm", "normalized_direction", "merged_weight", "orthogonality_penalty")


def run(name: str, call: Call, backend: str, grad: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """The value and the gradients of one operation."""
    leaves = [t.detach().requires_grad_() for t in (call.lora_A, call.lora_B, call.magnitude)]
    leaves = leaves if name == "merged_weight" else leaves[:2]
    with bk.use_backend(backend):
        value = getattr(bk.functional, name)(call.weight, *leaves, call.scaling)
        weights = torch.sin(torch.arange(value.numel(), dtype=torch.float64)).reshape(value.shape) + 0.5
        return [value.detach(), *torch.autograd.grad(value, leaves, weights.to(value.dtype))]


def check(name: str, call: Call) -> None:
    ours, reference, truth = run(name, call, "native"), run(name, call, "reference"), run(name, call.double(), "reference")
    flat = name in ("weight_norm", "orthogonality_penalty")
    for index, (value, own, exact) in enumerate(zip(ours, reference, truth, strict=True)):
        assert value.dtype == own.dtype
        assert value.shape == own.shape
        eps = torch.finfo(value.dtype).eps
        # in fp64 the truth is the reference, whose own error, that of sums of random terms, then reads as 0
        of_truth = torch.finfo(torch.float64).eps * max(call.weight.shape) ** 0.5
        rows = (-1, 1 if flat and index == 0 else max(1, exact.shape[-1] if exact.dim() > 1 else 1))
        error, other = ((v.double() - exact).reshape(rows).norm(dim=1) for v in (value, own))
        # a gradient's terms cancel (it has no part along V), so its rows are measured by the largest
        size = exact.reshape(rows).norm(dim=1)
        size = size if index == 0 else size.clamp_min(size.max() if size.numel() else 0.0)
        other = other if index == 0 else other.clamp_min(other.max() if other.numel() else 0.0)
        bound = 2 * (other + (2 * eps + of_truth) * size)
        assert (error <= bound).all(), (name, index, (error / bound).max())


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["rows", "transposed", "sliced", "strided"])
@pytest.mark.parametrize("shape", [(17, 33, 3), (130, 64, 8), (3, 1025, 1), (40, 600, 17), (24, 8, 9)], ids=str)
def test_against_fp64(name: str, dtype: torch.dtype, layout: str, shape: tuple[int, int, int]) -> None:
    check(name, draw(1, *shape, dtype=dtype, layout=layout))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(0, 5, 2), (5, 0, 2), (5, 7, 0)], ids=str)
def test_empty(name: str, shape: tuple[int, int, int]) -> None:
    call = draw(2, *shape)
    for ours, expected in zip(run(name, call, "native"), run(name, call, "reference"), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_zero_row(name: str) -> None:
    call = draw(3)
    call.weight[::3] = 0
    call.lora_B[::3] = 0
    for ours, expected in zip(run(name, call, "native"), run(name, call, "reference"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_merging_keeps_the_layout_of_a_transposed_weight() -> None:
    call = draw(5, layout="transposed")
    with bk.use_backend("native"):
        merged = bk.functional.merged_weight(call.weight, call.lora_A, call.lora_B, call.magnitude, call.scaling)
    assert merged.t().is_contiguous()


def test_the_gram_cache_follows_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    orthogonality.clear_gram_cache()
    call = draw(6)

    def penalty() -> Tensor:
        with bk.use_backend("native"):
            return bk.functional.orthogonality_penalty(call.weight, call.lora_A, call.lora_B, call.scaling)

    def expected() -> Tensor:
        return bk.reference.orthogonality_penalty(call.weight, call.lora_A, call.lora_B, call.scaling)

    torch.testing.assert_close(penalty(), expected(), rtol=1e-5, atol=1e-5)
    assert orthogonality.gram_cache_bytes() == 24 * 24 * 4
    call.weight.mul_(torch.linspace(1, 2, 40))
    torch.testing.assert_close(penalty(), expected(), rtol=1e-5, atol=1e-5)
    assert orthogonality.gram_cache_bytes() == 24 * 24 * 4
    call.weight = call.weight.clone()
    penalty()
    assert orthogonality.gram_cache_bytes() == 24 * 24 * 4  # the old weight is gone, and its product with it
    monkeypatch.setattr(orthogonality, "CACHE_BYTES", 0)
    orthogonality.clear_gram_cache()
    torch.testing.assert_close(penalty(), expected(), rtol=1e-5, atol=1e-5)
    assert orthogonality.gram_cache_bytes() == 0


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives_name_the_backend_that_has_them(name: str) -> None:
    call = draw(7)
    lora_A = call.lora_A.requires_grad_()
    rest = (call.lora_B, call.magnitude) if name == "merged_weight" else (call.lora_B,)
    with bk.use_backend("native"):
        value = getattr(bk.functional, name)(call.weight, lora_A, *rest, call.scaling)
    grad = torch.autograd.grad((value * torch.ones_like(value).requires_grad_()).sum(), lora_A, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
        torch.autograd.grad(grad.sum(), lora_A)


@pytest.mark.parametrize("name", ["weight_norm", "merged_weight", "orthogonality"])
@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_opcheck(name: str, layout: str) -> None:
    call = draw(8, layout=layout)
    down, up, magnitude = (t.detach().requires_grad_() for t in (call.lora_A, call.lora_B, call.magnitude))
    rest = {
        "weight_norm": (call.scaling, "native"),
        "merged_weight": (magnitude, call.scaling, torch.float32, "native"),
        "orthogonality": (call.scaling, True, "native"),
    }[name]
    torch.library.opcheck(getattr(torch.ops.bidora_kernels, name).default, (call.weight, down, up, *rest))


@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled_without_a_break(name: str) -> None:
    call = draw(9)

    def operation(down: Tensor, up: Tensor, magnitude: Tensor) -> Tensor:
        rest = (magnitude,) if name == "merged_weight" else ()
        return getattr(bk.functional, name)(call.weight, down, up, *rest, call.scaling)

    found = []
    for function in (operation, torch.compile(operation, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().requires_grad_() for t in (call.lora_A, call.lora_B, call.magnitude)]
        with bk.use_backend("native"):
            value = function(*leaves)
        found.append([value, *torch.autograd.grad(value.square().sum(), leaves[:2])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
