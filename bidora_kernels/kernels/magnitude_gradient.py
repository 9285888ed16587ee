"""The magnitude's gradient where the layer's output says nothing about it (DoRA, arXiv:2402.09353, eq. 5).

    grad_magnitude = sum over tokens of grad_output * output / magnitude = sum over tokens of grad_output * (x @ V^T) / norm

The first form costs no product, but is lost where magnitude / norm is near 0. Such rows take the second one,
((grad_output^T @ x) * V) summed over in features, divided by norm; where no row needs it, one read of magnitude and norm is all.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._arithmetic import NORM_FLOOR, dot, inverse_norm, updated_tile
from ._launch import Prepared, architecture_of, cdiv, geometry, precision, rows
from .tiles import tile_for

NEAR_ZERO = 2.0**-8  # of |magnitude| / norm: fp16 outputs below it may be subnormal
_NEAR_ZERO = tl.constexpr(NEAR_ZERO)
_FLOOR = tl.constexpr(NORM_FLOOR)


@triton.jit
def _magnitude_gradient_kernel(
    grad_output_ptr, x_ptr, weight_ptr, lora_A_ptr, lora_B_ptr, magnitude_ptr, norm_ptr, grad_magnitude_ptr,
    tokens, out_features, in_features, r, scaling,
    stride_grad_output, stride_x, stride_weight_out, stride_weight_in, stride_lora_A, stride_lora_B,
    RANK_CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program corrects BLOCK_OUT rows in place; it reads the matrices only if one of them needs it."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_ok = row < out_features
    norm = tl.load(norm_ptr + row, mask=row_ok, other=0.0)
    magnitude = tl.load(magnitude_ptr + row, mask=row_ok, other=0.0).to(tl.float32)
    lost = row_ok & ((tl.abs(magnitude) < _NEAR_ZERO * norm) | (norm < _FLOOR))
    if tl.max(lost.to(tl.int32), axis=0) > 0:
        total = tl.zeros((BLOCK_OUT,), tl.float32)
        for start in tl.range(0, in_features, BLOCK_IN):
            col = (start + tl.arange(0, BLOCK_IN)).to(tl.int64)
            col_ok = col < in_features
            product = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
            for first in tl.range(0, tokens, BLOCK_T):
                token = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
                token_ok = token < tokens
                grad = tl.load(
                    grad_output_ptr + token[:, None] * stride_grad_output + row[None, :], token_ok[:, None] & row_ok[None, :], 0.0
                )
                inputs = tl.load(x_ptr + token[:, None] * stride_x + col[None, :], token_ok[:, None] & col_ok[None, :], 0.0)
                product = dot(tl.trans(grad), inputs, product, PRECISION)
            updated = updated_tile(
                weight_ptr, lora_A_ptr, lora_B_ptr, row, row_ok, col, col_ok, r, scaling,
                stride_weight_out, stride_weight_in, stride_lora_A, stride_lora_B,
                RANK_CHUNKS, PRECISION, BLOCK_OUT, BLOCK_IN, BLOCK_R,
            )  # fmt: skip
            total += tl.sum(product * updated, axis=1)
        tl.store(grad_magnitude_ptr + row, total * inverse_norm(norm), mask=lost)


def launch_magnitude_gradient(
    grad_magnitude: Tensor,
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    scaling: float,
) -> Tensor:
    """Overwrite the lost rows of grad_magnitude, fp32 [out], and return it: |magnitude| < 2^-8 norm, and 0 where norm < 1e-18.

    grad_output [tokens, out], x [tokens, in], norm fp32 [out].
    """
    (tokens, in_features), out_features, r = x.shape, weight.shape[0], lora_A.shape[0]
    grad_output, x, lora_A, lora_B = rows(grad_output), rows(x), rows(lora_A), rows(lora_B)
    if out_features:
        operands = (grad_output, x, lora_A, lora_B)
        launch = _prepared(
            architecture_of(x.device), tokens, out_features, in_features, r, float(scaling),
            max(weight.element_size(), *[operand.element_size() for operand in operands]), precision(*operands),
            (grad_output.stride(0), x.stride(0), *weight.stride(), lora_A.stride(0), lora_B.stride(0)),
        )  # fmt: skip
        launch(grad_output, x, weight, lora_A, lora_B, magnitude.contiguous(), norm.contiguous(), grad_magnitude)
    return grad_magnitude


@geometry
def _prepared(
    architecture: str, tokens: int, out_features: int, in_features: int, r: int, scaling: float, widest: int, exact: str,
    strides: tuple[int, ...],
) -> Prepared:  # fmt: skip
    chosen = tile_for("magnitude_gradient", r, widest, architecture)
    return Prepared(
        "magnitude_gradient", _magnitude_gradient_kernel, (cdiv(out_features, chosen["BLOCK_OUT"]),),
        (tokens, out_features, in_features, r, scaling, *strides),
        RANK_CHUNKS=cdiv(r, chosen["BLOCK_R"]), PRECISION=exact, **chosen,
    )  # fmt: skip
