"""Gradients with respect to lora_A and lora_B of a function of V = weight + scaling * lora_B @ lora_A, without storing V.

For a gradient dV = alpha * g + D V, with alpha [out] and D [out, out]:

    grad_lora_B = scaling * dV @ lora_A^T                    (`launch_row_projection` gives g @ lora_A^T, V @ lora_A^T and g . V)
    grad_lora_A = scaling * lora_B^T @ dV = scaling * (factor^T @ V + (alpha * lora_B)^T @ g),    factor = D^T @ lora_B

so that the norm, the normalized direction and the Gram penalty share kernels (chain rule through DoRA, arXiv:2402.09353, eq. 5).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._arithmetic import NORM_FLOOR, dot, updated_tile
from ._launch import cdiv, padded_ranks, precision, rows, run, splits_for, tile
from .reduce_partials import Segment, launch_reduce_partials


@triton.jit
def _down_gradient_kernel(
    weight_ptr, lora_A_ptr, lora_B_ptr, factor_ptr, grad_ptr, alpha_ptr, partial_ptr,
    out_features, in_features, r, tiles_per_split, scaling,
    stride_weight_out, stride_weight_in, stride_lora_A, stride_lora_B, stride_grad,
    HAS_GRAD: tl.constexpr, RANK_CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_IN columns of grad_lora_A over one split of the rows, for one chunk of ranks."""
    col = tl.program_id(0).to(tl.int64) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    rank = (tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    col_ok, rank_ok = col < in_features, rank < r
    gradient = tl.zeros((BLOCK_R, BLOCK_IN), tl.float32)
    for index in tl.range(0, tiles_per_split):
        row = (tl.program_id(1) * tiles_per_split + index).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        row_ok = row < out_features
        mask = row_ok[:, None] & col_ok[None, :]
        updated = updated_tile(
            weight_ptr, lora_A_ptr, lora_B_ptr, row, row_ok, col, col_ok, r, scaling,
            stride_weight_out, stride_weight_in, stride_lora_A, stride_lora_B,
            RANK_CHUNKS, PRECISION, BLOCK_OUT, BLOCK_IN, BLOCK_R,
        )  # fmt: skip
        factor = tl.load(factor_ptr + row[:, None] * r + rank[None, :], row_ok[:, None] & rank_ok[None, :], 0.0)
        gradient = dot(tl.trans(factor), updated, gradient, PRECISION)
        if HAS_GRAD:
            g = tl.load(grad_ptr + row[:, None] * stride_grad + col[None, :], mask=mask, other=0.0)
            alpha = tl.load(alpha_ptr + row, mask=row_ok, other=0.0)
            b = tl.load(lora_B_ptr + row[:, None] * stride_lora_B + rank[None, :], row_ok[:, None] & rank_ok[None, :], 0.0)
            gradient = dot(tl.trans(b.to(tl.float32) * alpha[:, None]), g.to(tl.float32), gradient, PRECISION)
    offset = (tl.program_id(1).to(tl.int64) * r + rank)[:, None] * in_features + col[None, :]
    tl.store(partial_ptr + offset, scaling * gradient, mask=rank_ok[:, None] & col_ok[None, :])


@triton.jit
def _row_projection_kernel(
    weight_ptr, lora_A_ptr, lora_B_ptr, grad_ptr, grad_projection_ptr, projection_ptr, product_ptr,
    out_features, in_features, r, scaling,
    stride_weight_out, stride_weight_in, stride_lora_A, stride_lora_B, stride_grad,
    RANK_CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program projects BLOCK_OUT rows of g and V on one chunk of ranks; the first chunk also stores g . V."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rank = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    row_ok, rank_ok = row < out_features, rank < r
    grad_projection = tl.zeros((BLOCK_OUT, BLOCK_R), tl.float32)
    projection = tl.zeros((BLOCK_OUT, BLOCK_R), tl.float32)
    product = tl.zeros((BLOCK_OUT,), tl.float32)
    for start in tl.range(0, in_features, BLOCK_IN):
        col = (start + tl.arange(0, BLOCK_IN)).to(tl.int64)
        col_ok = col < in_features
        mask = row_ok[:, None] & col_ok[None, :]
        g = tl.load(grad_ptr + row[:, None] * stride_grad + col[None, :], mask=mask, other=0.0).to(tl.float32)
        updated = updated_tile(
            weight_ptr, lora_A_ptr, lora_B_ptr, row, row_ok, col, col_ok, r, scaling,
            stride_weight_out, stride_weight_in, stride_lora_A, stride_lora_B,
            RANK_CHUNKS, PRECISION, BLOCK_OUT, BLOCK_IN, BLOCK_R,
        )  # fmt: skip
        a = tl.load(lora_A_ptr + rank[:, None] * stride_lora_A + col[None, :], rank_ok[:, None] & col_ok[None, :], 0.0)
        a = tl.trans(a.to(tl.float32))
        grad_projection = dot(g, a, grad_projection, PRECISION)
        projection = dot(updated, a, projection, PRECISION)
        product += tl.sum(g * updated, axis=1)
    mask = row_ok[:, None] & rank_ok[None, :]
    tl.store(grad_projection_ptr + row[:, None] * r + rank[None, :], grad_projection, mask=mask)
    tl.store(projection_ptr + row[:, None] * r + rank[None, :], projection, mask=mask)
    tl.store(product_ptr + row, product, mask=row < tl.where(tl.program_id(1) == 0, out_features, 0))


def launch_down_gradient(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    factor: Tensor,
    grad: Tensor | None = None,
    alpha: Tensor | None = None,
) -> Tensor:
    """Return scaling * (factor^T @ V + (alpha * lora_B)^T @ grad), fp32 [r, in].

    factor: fp32 [out, r]. grad [out, in] and alpha, fp32 [out], come together or not at all.
    """
    out_features, in_features = weight.shape
    lora_A, lora_B, factor = rows(lora_A), rows(lora_B), factor.contiguous()
    grad = None if grad is None else rows(grad)
    alpha = None if alpha is None else alpha.contiguous()
    r = lora_A.shape[0]
    chosen = tile("down_gradient", r, weight, lora_A, lora_B, grad)
    columns, steps = cdiv(in_features, chosen["BLOCK_IN"]), cdiv(out_features, chosen["BLOCK_OUT"])
    chunks = cdiv(r, chosen["BLOCK_R"])
    tiles_per_split = max(1, cdiv(steps, splits_for(columns * chunks, steps)))
    splits = cdiv(steps, tiles_per_split)
    partials = torch.empty(splits, r, in_features, dtype=torch.float32, device=weight.device)
    if partials.numel():
        run(
            "down_gradient", _down_gradient_kernel, (columns, splits, chunks), weight,
            weight, lora_A, lora_B, factor, factor if grad is None else grad, factor if alpha is None else alpha, partials,
            out_features, in_features, r, tiles_per_split, float(scaling),
            *weight.stride(), lora_A.stride(0), lora_B.stride(0), 0 if grad is None else grad.stride(0),
            HAS_GRAD=grad is not None, RANK_CHUNKS=chunks, PRECISION=precision(lora_A, lora_B, grad), **chosen,
        )  # fmt: skip
    if splits == 1:
        return partials[0]
    return launch_reduce_partials(Segment(partials.view(splits, r * in_features)))[0].view(r, in_features)


def launch_row_projection(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad @ lora_A^T [out, r], V @ lora_A^T [out, r], sum(grad * V) per row [out]), all fp32."""
    out_features, in_features = weight.shape
    ranks, grad = lora_A.shape[0], rows(grad)
    lora_A, lora_B = padded_ranks(rows(lora_A), rows(lora_B))
    r = lora_A.shape[0]
    options: dict[str, Any] = {"dtype": torch.float32, "device": weight.device}
    grad_projection, projection = torch.empty(out_features, r, **options), torch.empty(out_features, r, **options)
    product = torch.empty(out_features, **options)
    if out_features:
        chosen = tile("row_projection", r, weight, lora_A, lora_B, grad)
        chunks = cdiv(r, chosen["BLOCK_R"])
        run(
            "row_projection", _row_projection_kernel, (cdiv(out_features, chosen["BLOCK_OUT"]), chunks), weight,
            weight, lora_A, lora_B, grad, grad_projection, projection, product, out_features, in_features, r, float(scaling),
            *weight.stride(), lora_A.stride(0), lora_B.stride(0), grad.stride(0),
            RANK_CHUNKS=chunks, PRECISION=precision(lora_A, lora_B, grad), **chosen,
        )  # fmt: skip
    return grad_projection[:, :ranks], projection[:, :ranks], product


def inverse_norms(norm: Tensor) -> Tensor:
    """1 / norm where norm >= NORM_FLOOR, else 0, fp32 [out]."""
    above = norm >= NORM_FLOOR
    return torch.where(above, 1.0 / torch.where(above, norm, 1.0), 0.0)
