"""Row norms through U = weight @ lora_A^T, with the products that the norm's gradient and the Gram penalty need.

    n^2 = ||weight||^2 + scaling * sum(lora_B * (U + P)),   P = V @ lora_A^T = U + scaling * lora_B @ G,   G = lora_A @ lora_A^T

per row, with V = weight + scaling * lora_B @ lora_A (expanded from DoRA, arXiv:2402.09353, eq. 5). The expansion cancels where V
is much smaller than weight: a row with n^2 < 0.01 * ||weight||^2 takes n^2 and P from V itself instead.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._arithmetic import dot, updated_tile
from ._launch import cdiv, padded_ranks, precision, rows, run, tile

CANCELLATION = 1e-2
_CANCELLATION = tl.constexpr(CANCELLATION)


@triton.jit
def _weight_projection_kernel(
    weight_ptr, lora_A_ptr, weight_sq_ptr, projection_ptr, out_features, in_features, r,
    stride_weight_out, stride_weight_in, stride_lora_A,
    PRECISION: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_OUT rows of U for one chunk of ranks; the first chunk also sums the squares of weight."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rank = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    row_ok, rank_ok = row < out_features, rank < r
    projection = tl.zeros((BLOCK_OUT, BLOCK_R), tl.float32)
    weight_sq = tl.zeros((BLOCK_OUT,), tl.float32)
    for start in tl.range(0, in_features, BLOCK_IN):
        col = (start + tl.arange(0, BLOCK_IN)).to(tl.int64)
        col_ok = col < in_features
        w = tl.load(
            weight_ptr + row[:, None] * stride_weight_out + col[None, :] * stride_weight_in,
            mask=row_ok[:, None] & col_ok[None, :], other=0.0,
        )  # fmt: skip
        a = tl.load(lora_A_ptr + rank[:, None] * stride_lora_A + col[None, :], rank_ok[:, None] & col_ok[None, :], 0.0)
        projection = dot(w, tl.trans(a), projection, PRECISION)
        single = w.to(tl.float32)
        weight_sq += tl.sum(single * single, axis=1)
    tl.store(projection_ptr + row[:, None] * r + rank[None, :], projection, mask=row_ok[:, None] & rank_ok[None, :])
    tl.store(weight_sq_ptr + row, weight_sq, mask=row < tl.where(tl.program_id(1) == 0, out_features, 0))


@triton.jit
def _weight_norm_factors_kernel(
    weight_ptr, lora_A_ptr, lora_B_ptr, gram_ptr, weight_sq_ptr, weight_projection_ptr, norm_ptr, projection_ptr,
    out_features, in_features, r, scaling, stride_weight_out, stride_weight_in, stride_lora_A, stride_lora_B,
    RANK_CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program finishes BLOCK_OUT rows; it reads weight again only if one of them cancels."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_ok = row < out_features
    weight_sq = tl.load(weight_sq_ptr + row, mask=row_ok, other=0.0)
    norm_sq = weight_sq
    for chunk in tl.range(0, RANK_CHUNKS):
        rank = (chunk * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = row_ok[:, None] & (rank < r)[None, :]
        product = tl.zeros((BLOCK_OUT, BLOCK_R), tl.float32)
        for other in tl.range(0, RANK_CHUNKS):
            inner = (other * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
            b = tl.load(lora_B_ptr + row[:, None] * stride_lora_B + inner[None, :], row_ok[:, None] & (inner < r)[None, :], 0.0)
            gram = tl.load(gram_ptr + inner[:, None] * r + rank[None, :], (inner < r)[:, None] & (rank < r)[None, :], 0.0)
            product = dot(b, gram, product, PRECISION)
        u = tl.load(weight_projection_ptr + row[:, None] * r + rank[None, :], mask=mask, other=0.0)
        b = tl.load(lora_B_ptr + row[:, None] * stride_lora_B + rank[None, :], mask=mask, other=0.0).to(tl.float32)
        projection = u + scaling * product
        norm_sq += scaling * tl.sum(b * (u + projection), axis=1)
        tl.store(projection_ptr + row[:, None] * r + rank[None, :], projection, mask=mask)
    cancels = (norm_sq < _CANCELLATION * weight_sq) & row_ok
    if tl.max(cancels.to(tl.int32), axis=0) > 0:
        direct = tl.zeros((BLOCK_OUT,), tl.float32)
        for chunk in tl.range(0, RANK_CHUNKS):
            rank = (chunk * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
            projection = tl.zeros((BLOCK_OUT, BLOCK_R), tl.float32)
            direct = tl.zeros((BLOCK_OUT,), tl.float32)
            for start in tl.range(0, in_features, BLOCK_IN):
                col = (start + tl.arange(0, BLOCK_IN)).to(tl.int64)
                col_ok = col < in_features
                updated = updated_tile(
                    weight_ptr, lora_A_ptr, lora_B_ptr, row, row_ok, col, col_ok, r, scaling,
                    stride_weight_out, stride_weight_in, stride_lora_A, stride_lora_B,
                    RANK_CHUNKS, PRECISION, BLOCK_OUT, BLOCK_IN, BLOCK_R,
                )  # fmt: skip
                direct += tl.sum(updated * updated, axis=1)
                a = tl.load(lora_A_ptr + rank[:, None] * stride_lora_A + col[None, :], (rank < r)[:, None] & col_ok[None, :], 0.0)
                projection = dot(updated, tl.trans(a), projection, PRECISION)
            mask = (row_ok & cancels)[:, None] & (rank < r)[None, :]
            tl.store(projection_ptr + row[:, None] * r + rank[None, :], projection, mask=mask)
        norm_sq = tl.where(cancels, direct, norm_sq)
    tl.store(norm_ptr + row, tl.sqrt_rn(norm_sq), mask=row_ok)


def launch_weight_norm_factors(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (n [out], U = weight @ lora_A^T [out, r], P = V @ lora_A^T [out, r]), all fp32."""
    out_features, in_features = weight.shape
    ranks = lora_A.shape[0]
    lora_A, lora_B = padded_ranks(rows(lora_A), rows(lora_B))
    r = lora_A.shape[0]
    options: dict[str, Any] = {"dtype": torch.float32, "device": weight.device}
    norm, weight_sq = torch.empty(out_features, **options), torch.empty(out_features, **options)
    weight_projection, projection = torch.empty(out_features, r, **options), torch.empty(out_features, r, **options)
    if out_features == 0:
        return norm, weight_projection[:, :ranks], projection[:, :ranks]
    double = lora_A.double()  # a library product in fp32 may be allowed to run in tf32
    gram = (double @ double.t()).float()
    chosen = tile("weight_norm_factors", r, weight, lora_A)
    grid = (cdiv(out_features, chosen["BLOCK_OUT"]), cdiv(r, chosen["BLOCK_R"]))
    run(
        "weight_projection", _weight_projection_kernel, grid, weight,
        weight, lora_A, weight_sq, weight_projection, out_features, in_features, r, *weight.stride(), lora_A.stride(0),
        PRECISION=precision(weight, lora_A), **chosen,
    )  # fmt: skip
    tail = tile("weight_norm_factors_tail", r, weight, gram)
    run(
        "weight_norm_factors", _weight_norm_factors_kernel, (cdiv(out_features, tail["BLOCK_OUT"]),), weight,
        weight, lora_A, lora_B, gram, weight_sq, weight_projection, norm, projection,
        out_features, in_features, r, float(scaling), *weight.stride(), lora_A.stride(0), lora_B.stride(0),
        RANK_CHUNKS=cdiv(r, tail["BLOCK_R"]), PRECISION=precision(gram), **tail,
    )  # fmt: skip
    return norm, weight_projection[:, :ranks], projection[:, :ranks]
