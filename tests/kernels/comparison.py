"""Inputs on which every term matters, the tolerance derived from them, and what a mutation must do to it.

A row (or token) may differ from the fp64 value by 2 * (the same-dtype reference's error in that row + u * ||bound row||), u being
the unit roundoff of the dtype in which the result or an operand is rounded. The bound is the row itself; for a sum whose terms
cancel, it is the same sum over absolute values, which is what rounding errors scale with.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
from torch import Tensor

from bidora_kernels import reference

if not triton.knobs.runtime.interpret:
    pytest.skip(
        "needs the interpreter, in a process of its own: TRITON_INTERPRET=1 pytest tests/kernels", allow_module_level=True
    )

ZERO_ROW, TINY_ROW = 2, 3  # rows of V that are exactly 0 and of norm about 1e-21, in inputs of at least 5 rows
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass
class Layer:
    """One layer's tensors; ||scaling * B A|| is about ||weight|| per row, and magnitudes differ from norms."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    bias: Tensor
    scaling: float

    def double(self) -> Layer:
        return Layer(*(getattr(self, f.name).double() for f in dataclasses.fields(self) if f.name != "scaling"), self.scaling)

    def absolute(self) -> Layer:
        return Layer(*(getattr(self, f.name).abs() for f in dataclasses.fields(self) if f.name != "scaling"), self.scaling)


def make_layer(
    out_features: int,
    in_features: int,
    r: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    seed: int = 0,
    degenerate_rows: bool = True,
) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = normal(out_features, in_features) / in_features**0.5
    lora_A, lora_B = normal(r, in_features) / in_features**0.5, normal(out_features, r) / r**0.5
    if degenerate_rows and out_features > 4:
        weight[ZERO_ROW], lora_B[ZERO_ROW] = 0.0, 0.0
        weight[TINY_ROW], lora_B[TINY_ROW] = weight[TINY_ROW] * 1e-21, 0.0
    adapter_dtype = adapter_dtype or dtype
    weight, lora_A, lora_B = weight.to(dtype), lora_A.to(adapter_dtype), lora_B.to(adapter_dtype)
    norm = reference.weight_norm(weight.double(), lora_A.double(), lora_B.double(), 1.3)
    magnitude = (norm * (1.0 + 0.5 * torch.rand(out_features, generator=generator)) * torch.where(norm > 0, 1.0, 0.0)).float()
    return Layer(weight, lora_A, lora_B, magnitude, (0.3 * normal(out_features)).to(dtype), 1.3)


def ordinary_rows(norm: Tensor) -> Tensor:
    return norm >= reference.NORM_FLOOR


def resolution(dtype: torch.dtype) -> float:
    """eps for fp32, whose sums may run in another order; half of it for 16 bits, which one rounding from fp32 gives."""
    eps = torch.finfo(dtype).eps
    return eps if dtype == torch.float32 else eps / 2


def _row_norm(tensor: Tensor) -> Tensor:
    return tensor.double().abs() if tensor.dim() == 1 else tensor.double().norm(dim=-1)


def tolerance(expected: Tensor, same_dtype: Tensor, dtype: torch.dtype, bound: Tensor | None = None) -> Tensor:
    reference_error = _row_norm(same_dtype.double() - expected)
    return 2.0 * (reference_error + resolution(dtype) * _row_norm(expected if bound is None else bound))


def failing_rows(
    got: Tensor,
    expected: Tensor,
    same_dtype: Tensor,
    dtype: torch.dtype,
    bound: Tensor | None = None,
    mutated: Tensor | None = None,
) -> Tensor:
    """Which rows of `got` lie outside the tolerance around `expected`, or around a mutated value with the same tolerance."""
    error = _row_norm(got.double() - (expected if mutated is None else mutated))
    return ~(error <= tolerance(expected, same_dtype, dtype, bound))


def assert_rows_close(
    got: Tensor, expected: Tensor, same_dtype: Tensor, dtype: torch.dtype | None = None, bound: Tensor | None = None
) -> None:
    assert got.shape == expected.shape
    dtype = dtype or got.dtype
    bad = failing_rows(got, expected, same_dtype, dtype, bound)
    if bad.any():
        error, allowed = _row_norm(got.double() - expected), tolerance(expected, same_dtype, dtype, bound)
        worst = int((error / allowed.clamp_min(1e-300)).nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} rows are outside the tolerance; "
            f"row {worst}: error {error[worst]:.3e}, allowed {allowed[worst]:.3e}"
        )


def assert_mutation_fails(
    mutated: Tensor,
    got: Tensor,
    expected: Tensor,
    same_dtype: Tensor,
    rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
    bound: Tensor | None = None,
    share: float = 0.9,
) -> None:
    """At least `share` of the rows that the mutated term touches must leave the tolerance."""
    failing = failing_rows(got, expected, same_dtype, dtype or got.dtype, bound, mutated)
    failing = failing if rows is None else failing[rows]
    assert failing.numel() > 0
    assert failing.float().mean() >= share, f"only {failing.float().mean():.2f} of the rows notice"
