"""R = ||Vhat Vhat^T - I||_F^2 and its gradients from weight @ weight^T, which never changes (BiDoRA, arXiv:2410.09758, eq. 3).

With n = ||V|| per row, U = weight @ lora_A^T and P = V @ lora_A^T the entries of Vhat Vhat^T - I off the diagonal are

    M = (weight weight^T + scaling * (U lora_B^T + lora_B P^T)) / (n n^T),    diagonal and rows with n < 1e-18: 0

a tile of which is formed in registers from rank-2r factors. With q = row sums of M^2, R = sum(q) and dR/dV = D V,

    D X = 4 * (M (X / n) - q * X / n) / n,    grad_lora_B = scaling * D P,    grad_lora_A = scaling * (D lora_B)^T V

Between two rows in which V cancels most of the weight the update loses digits: such entries are multiplied out from V.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._arithmetic import dot, inverse_norm, updated_tile
from ._launch import cdiv, padded_ranks, precision, rows, run, splits_for, tile
from .direction_backward import inverse_norms, launch_down_gradient
from .reduce_partials import Segment, launch_reduce_partials
from .weight_norm_factors import CANCELLATION, launch_weight_norm_factors

_CANCELLATION = tl.constexpr(CANCELLATION)


@triton.jit
def _factor_tile(pointer, row, row_ok, rank, r):
    """factor[row, rank] of a contiguous fp32 [out, r] matrix."""
    return tl.load(pointer + row[:, None] * r + rank[None, :], row_ok[:, None] & (rank < r)[None, :], 0.0)


@triton.jit
def _orthogonality_kernel(
    gram_ptr, weight_ptr, lora_A_ptr, lora_B_ptr, weight_projection_ptr, projection_ptr, norm_ptr,
    square_partial_ptr, projection_partial_ptr, lora_B_partial_ptr,
    out_features, in_features, r, tiles_per_split, scaling, stride_weight_out, stride_weight_in, stride_lora_A,
    CANCELLING: tl.constexpr, GRADIENTS: tl.constexpr, RANK_CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program sums M^2, M (P / n) and M (lora_B / n) over one split of the columns: BLOCK_OUT rows, one chunk of ranks.

    One launch serves the rows that cancel, which are rare and need registers of their own, another one the rest.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    split, chunk = tl.program_id(1), tl.program_id(2)
    row_ok = row < out_features
    row_norm = tl.load(norm_ptr + row, mask=row_ok, other=0.0)
    row_square = tl.load(gram_ptr + row * (out_features + 1), mask=row_ok, other=0.0)
    row_cancels = (row_norm * row_norm < _CANCELLATION * row_square).to(tl.int32)
    row_ok &= row_cancels == CANCELLING
    row_inverse = inverse_norm(row_norm)
    tiles = tiles_per_split
    if CANCELLING:
        tiles = tl.where(tl.max(row_ok.to(tl.int32), axis=0) > 0, tiles_per_split, 0)
    rank = (chunk * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    square = tl.zeros((BLOCK_OUT,), tl.float32)
    if GRADIENTS:
        projection_sum = tl.zeros((BLOCK_OUT, BLOCK_R), tl.float32)
        lora_B_sum = tl.zeros((BLOCK_OUT, BLOCK_R), tl.float32)
    for index in tl.range(0, tiles):
        col = (split * tiles_per_split + index).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        col_ok = col < out_features
        gram = tl.load(gram_ptr + row[:, None] * out_features + col[None, :], row_ok[:, None] & col_ok[None, :], 0.0)
        col_norm = tl.load(norm_ptr + col, mask=col_ok, other=0.0)
        update = tl.zeros((BLOCK_OUT, BLOCK_OUT), tl.float32)
        for part in tl.range(0, RANK_CHUNKS):
            inner = (part * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
            u = _factor_tile(weight_projection_ptr, row, row_ok, inner, r)
            update = dot(u, tl.trans(_factor_tile(lora_B_ptr, col, col_ok, inner, r)), update, PRECISION)
            b = _factor_tile(lora_B_ptr, row, row_ok, inner, r)
            update = dot(b, tl.trans(_factor_tile(projection_ptr, col, col_ok, inner, r)), update, PRECISION)
        gram += scaling * update
        if CANCELLING:
            col_square = tl.load(gram_ptr + col * (out_features + 1), mask=col_ok, other=0.0)
            col_cancels = col_ok & (col_norm * col_norm < _CANCELLATION * col_square)
            direct = tl.zeros((BLOCK_OUT, BLOCK_OUT), tl.float32)
            features = tl.where(tl.max(col_cancels.to(tl.int32), axis=0) > 0, in_features, 0)
            for start in tl.range(0, features, BLOCK_IN):
                feature = (start + tl.arange(0, BLOCK_IN)).to(tl.int64)
                feature_ok = feature < in_features
                left = updated_tile(
                    weight_ptr, lora_A_ptr, lora_B_ptr, row, row_ok, feature, feature_ok, r, scaling,
                    stride_weight_out, stride_weight_in, stride_lora_A, r, RANK_CHUNKS, PRECISION, BLOCK_OUT, BLOCK_IN, BLOCK_R,
                )  # fmt: skip
                right = updated_tile(
                    weight_ptr, lora_A_ptr, lora_B_ptr, col, col_ok, feature, feature_ok, r, scaling,
                    stride_weight_out, stride_weight_in, stride_lora_A, r, RANK_CHUNKS, PRECISION, BLOCK_OUT, BLOCK_IN, BLOCK_R,
                )  # fmt: skip
                direct = dot(left, tl.trans(right), direct, PRECISION)
            gram = tl.where(col_cancels[None, :], direct, gram)
        col_inverse = inverse_norm(col_norm)
        gram = tl.where(row[:, None] == col[None, :], 0.0, gram * row_inverse[:, None] * col_inverse[None, :])
        square += tl.sum(gram * gram, axis=1)
        if GRADIENTS:
            gram *= col_inverse[None, :]
            projection_sum = dot(gram, _factor_tile(projection_ptr, col, col_ok, rank, r), projection_sum, PRECISION)
            lora_B_sum = dot(gram, _factor_tile(lora_B_ptr, col, col_ok, rank, r), lora_B_sum, PRECISION)
    first = row_ok & (row < tl.where(chunk == 0, out_features, 0))
    tl.store(square_partial_ptr + split.to(tl.int64) * out_features + row, square, mask=first)
    if GRADIENTS:
        offset = (split.to(tl.int64) * out_features + row)[:, None] * r + rank[None, :]
        mask = row_ok[:, None] & (rank < r)[None, :]
        tl.store(projection_partial_ptr + offset, projection_sum, mask=mask)
        tl.store(lora_B_partial_ptr + offset, lora_B_sum, mask=mask)


def launch_orthogonality(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, weight_gram: Tensor, needs_gradients: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (R, a scalar, grad_lora_A [r, in], grad_lora_B [out, r]) in fp32, the gradients None where they are not needed.

    weight_gram: weight @ weight^T, contiguous fp32 [out, out].
    """
    out_features, in_features = weight.shape
    ranks = lora_A.shape[0]
    lora_A, lora_B = padded_ranks(rows(lora_A), lora_B.float().contiguous())
    r = lora_A.shape[0]
    norm, weight_projection, projection = launch_weight_norm_factors(weight, lora_A, lora_B, scaling)
    chosen = tile("orthogonality", r, weight_gram)
    blocks, chunks = cdiv(out_features, chosen["BLOCK_OUT"]), cdiv(r, chosen["BLOCK_R"]) if needs_gradients else 1
    tiles_per_split = max(1, cdiv(blocks, splits_for(blocks * chunks, blocks)))
    splits = cdiv(blocks, tiles_per_split)
    options: dict[str, Any] = {"dtype": torch.float32, "device": weight.device}
    squares = torch.empty(splits, out_features, **options)
    partials = [torch.empty(splits, out_features * r, **options) for _ in range(2 if needs_gradients else 0)]
    small = tile("orthogonality_cancelling", r, weight_gram).copy()
    small["BLOCK_OUT"] = min(small["BLOCK_OUT"], chosen["BLOCK_OUT"])  # so that both cut the columns at the same places
    for cancelling, sizes in ((0, chosen), (1, small)):
        if out_features:
            block, rank_block = sizes["BLOCK_OUT"], sizes["BLOCK_R"]
            grid = (cdiv(out_features, block), splits, cdiv(r, rank_block) if needs_gradients else 1)
            run(
                "orthogonality", _orthogonality_kernel, grid, weight,
                weight_gram, weight, lora_A, lora_B, weight_projection, projection, norm, squares, *(partials or (norm, norm)),
                out_features, in_features, r, cdiv(tiles_per_split * chosen["BLOCK_OUT"], block), float(scaling),
                *weight.stride(), lora_A.stride(0), CANCELLING=cancelling, GRADIENTS=needs_gradients,
                RANK_CHUNKS=cdiv(r, rank_block), PRECISION=precision(weight_gram), **sizes,
            )  # fmt: skip
    row_squares, *sums = launch_reduce_partials(Segment(squares), *(Segment(partial) for partial in partials))
    penalty = row_squares.sum()
    if not needs_gradients:
        return penalty, None, None
    inverse = inverse_norms(norm)[:, None]
    excess = inverse * row_squares[:, None]
    derivative_P = 4.0 * inverse * (sums[0].view(out_features, r) - excess * projection)
    derivative_B = 4.0 * inverse * (sums[1].view(out_features, r) - excess * lora_B)
    grad_lora_A = launch_down_gradient(weight, lora_A, lora_B, scaling, derivative_B)
    return penalty, grad_lora_A[:ranks], scaling * derivative_P[:, :ranks]
