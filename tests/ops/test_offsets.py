"""The native operations beyond 2^31 elements: rows far apart in sparse files, and one weight of that size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bidora_kernels import native

from ..sparse import far_rows
from .draws import Call, draw

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))
STRIDE = 2**29 + 8
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def call(dtype: torch.dtype) -> Call:
    """A layer of 6 output features and 6 tokens: the fifth row lies beyond 2^31 elements."""
    return draw(seed=3, out_features=6, in_features=40, tokens=(6,), dtype=dtype)


@DTYPES
@pytest.mark.parametrize("operation", ["weight_norm", "merged_weight", "direction_backward", "few_tokens"])
def test_rows_of_a_weight(operation: str, dtype: torch.dtype, tmp_path: Path) -> None:
    c = call(dtype)
    lora_A, lora_B, magnitude = c.lora_A.float(), c.lora_B.float(), c.magnitude.float()
    grad = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    norm = native.weight_norm(c.weight, lora_A, lora_B, c.scaling)

    def results(weight: Tensor, grad: Tensor, out: Tensor) -> list[Any]:
        if operation == "weight_norm":
            return [native.weight_norm(weight, lora_A, lora_B, c.scaling)]
        if operation == "merged_weight":
            found = torch.empty_like(norm)
            native.merged_weight(weight, lora_A, lora_B, magnitude, c.scaling, found, out)
            return [found, out]
        if operation == "few_tokens":
            y = torch.empty(2, weight.shape[0])
            native.few_tokens(c.x[:2].float().contiguous(), weight, lora_A, lora_B, magnitude / norm, None, c.scaling, y)
            return [y]
        return list(native.direction_backward(weight, grad, lora_A, lora_B, magnitude, c.scaling, norm, magnitude))

    near = results(c.weight, grad, torch.empty_like(c.weight))
    rows = [far_rows(t, STRIDE, tmp_path / name) for name, t in {"w": c.weight, "g": grad, "o": c.weight}.items()]
    for got, want in zip(results(*rows), near, strict=True):
        assert got is not None
        assert torch.equal(got, want)


@DTYPES
def test_tokens_of_the_gradients(dtype: torch.dtype, tmp_path: Path) -> None:
    c = call(dtype)
    lora_A, lora_B, magnitude = c.lora_A.float(), c.lora_B.float(), c.magnitude.float()
    norm = native.weight_norm(c.weight, lora_A, lora_B, c.scaling)
    y = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)

    def results(x: Tensor, grad: Tensor, y: Tensor) -> tuple[Any, ...]:
        return native.adapter_gradients(x, grad, y, lora_A, lora_B, magnitude, norm, None, c.scaling, needs_direction=True)[:3]

    near = results(c.x, c.grad, y)
    rows = [far_rows(t, STRIDE, tmp_path / name) for name, t in {"x": c.x, "g": c.grad, "y": y}.items()]
    for got, want in zip(results(*rows), near, strict=True):
        assert bool(want.any())
        assert torch.equal(got, want)


@pytest.mark.parametrize("dropped", [False, True])
def test_tokens_of_compose(dropped: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    base, second, hidden = (torch.randn(6, size, generator=generator) for size in (40, 40, 3))
    lora_B, scale = torch.randn(40, 3, generator=generator), torch.rand(40, generator=generator) + 0.5

    def result(base: Tensor, second: Tensor, out: Tensor) -> Tensor:
        native.compose(base, hidden, lora_B, scale, None, 1.3, out, second if dropped else None)
        return out

    near = result(base, second.clone(), torch.empty_like(base))
    rows = [far_rows(t, STRIDE, tmp_path / name) for name, t in {"b": base, "d": second, "o": base}.items()]
    assert torch.equal(result(*rows), near)


@pytest.mark.slow  # 9 GB of memory
def test_a_weight_of_more_than_2_to_the_31_elements() -> None:
    """Its rows repeat, and so must its norms and the rows of the merged weight."""
    few, repeats, in_features, r = 8, 8193, 32776, 3
    assert few * repeats * in_features > 2**31
    generator = torch.Generator().manual_seed(0)
    weight, lora_A = (
        torch.randn(few, in_features, generator=generator).bfloat16(),
        torch.randn(r, in_features, generator=generator),
    )
    lora_B, magnitude = torch.randn(few, r, generator=generator), torch.rand(few, generator=generator) + 0.5
    norm, merged = torch.empty(few), torch.empty_like(weight)
    native.merged_weight(weight, lora_A, lora_B, magnitude, 0.7, norm, merged)
    large = weight.repeat(repeats, 1)
    lora_B, magnitude = lora_B.repeat(repeats, 1), magnitude.repeat(repeats)
    assert torch.equal(native.weight_norm(large, lora_A, lora_B, 0.7), norm.repeat(repeats))
    native.merged_weight(large, lora_A, lora_B, magnitude, 0.7, torch.empty(few * repeats), large)  # in place
    for start in range(0, few * repeats, few):
        assert torch.equal(large[start : start + few], merged)
