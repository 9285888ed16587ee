"""Row norms of a DoRA-updated weight, without storing that weight (DoRA, arXiv:2402.09353, eq. 5).

weight_norm[i] = || weight[i, :] + scaling * (lora_B @ lora_A)[i, :] ||_2
scale[i] = magnitude[i] / weight_norm[i]    (1 where weight_norm < 1e-18)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._arithmetic import bf16_pieces, dot, low_rank_tile, pieces_tile, row_scale
from ._launch import Prepared, architecture_of, cdiv, geometry, padded_ranks, precision, rows, splits_for
from .pieces import launch_pieces
from .tiles import tile_for


@triton.jit
def _weight_norm_kernel(
    weight_ptr, lora_A_ptr, lora_B_ptr, sum_ptr, out_features, in_features, r, split_size, scaling,
    stride_weight_out, stride_weight_in, stride_set_A, stride_lora_A, stride_set_B, stride_lora_B,
    SETS: tl.constexpr, SETS_PADDED: tl.constexpr, PIECES: tl.constexpr, RANK_CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program sums the squares of BLOCK_OUT rows over one split of in_features, for every (lora_A, lora_B) set.

    With PIECES there is one set, and the three bf16 pieces of lora_A lie where the sets would.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_ok = row < out_features
    split = tl.program_id(1)
    set_index = tl.arange(0, SETS_PADDED)
    sum_sq = tl.zeros((BLOCK_OUT, SETS_PADDED), tl.float32)
    ONE_TILE_OF_B: tl.constexpr = SETS == 1 and RANK_CHUNKS == 1
    if ONE_TILE_OF_B:
        rank = tl.arange(0, BLOCK_R).to(tl.int64)
        b = tl.load(lora_B_ptr + row[:, None] * stride_lora_B + rank[None, :], row_ok[:, None] & (rank < r)[None, :], 0.0)
    if PIECES:
        b_1, b_2, b_3 = bf16_pieces(b)
    for start in tl.range(split * split_size, tl.minimum((split + 1) * split_size, in_features), BLOCK_IN):
        col = (start + tl.arange(0, BLOCK_IN)).to(tl.int64)
        col_ok = col < in_features
        w = tl.load(
            weight_ptr + row[:, None] * stride_weight_out + col[None, :] * stride_weight_in,
            mask=row_ok[:, None] & col_ok[None, :], other=0.0,
        )  # fmt: skip
        for index in tl.static_range(SETS):
            if PIECES:
                low_rank = pieces_tile(
                    b_1, b_2, b_3, lora_A_ptr, rank, col, col_ok, r, stride_set_A, stride_lora_A, PRECISION, BLOCK_OUT, BLOCK_IN
                )
            elif ONE_TILE_OF_B:
                a = tl.load(lora_A_ptr + rank[:, None] * stride_lora_A + col[None, :], (rank < r)[:, None] & col_ok[None, :], 0.0)
                low_rank = dot(b, a, tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32), PRECISION)
            else:
                low_rank = low_rank_tile(
                    lora_A_ptr + index * stride_set_A, lora_B_ptr + index * stride_set_B, row, row_ok, col, col_ok, r,
                    stride_lora_A, stride_lora_B, RANK_CHUNKS, PRECISION, BLOCK_OUT, BLOCK_IN, BLOCK_R,
                )  # fmt: skip
            updated = w.to(tl.float32) + scaling * low_rank
            sum_sq += tl.where(set_index[None, :] == index, tl.sum(updated * updated, axis=1)[:, None], 0.0)
    offset = (split * SETS + set_index)[None, :].to(tl.int64) * out_features + row[:, None]
    tl.store(sum_ptr + offset, sum_sq, mask=row_ok[:, None] & (set_index < SETS)[None, :])


@triton.jit
def _row_scale_kernel(
    sum_ptr, magnitude_ptr, norm_ptr, scale_ptr, splits, length,
    FROM_SUMS: tl.constexpr, HAS_MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the splits' sums in order and takes the root, or reads the norm; then the scale."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    element_ok = element < length
    if FROM_SUMS:
        total = tl.zeros((BLOCK,), tl.float32)
        for split in tl.range(0, splits):
            total += tl.load(sum_ptr + split * length + element, mask=element_ok, other=0.0)
        norm = tl.sqrt_rn(total)
        tl.store(norm_ptr + element, norm, mask=element_ok)
    else:
        norm = tl.load(norm_ptr + element, mask=element_ok, other=0.0)
    if HAS_MAGNITUDE:
        tl.store(
            scale_ptr + element, row_scale(tl.load(magnitude_ptr + element, mask=element_ok, other=0.0), norm), mask=element_ok
        )


def launch_row_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return c = magnitude / norm (1 where norm < NORM_FLOOR), fp32 [out]."""
    magnitude, norm = magnitude.contiguous(), norm.contiguous()
    scale = torch.empty_like(norm)
    _finish(norm, norm, scale, 0, magnitude)
    return scale


def _finish(sums: Tensor, norm: Tensor, scale: Tensor | None, splits: int, magnitude: Tensor | None) -> None:
    if norm.numel():
        launch = _finishing(norm.numel(), splits, magnitude is not None)
        launch(sums, norm if magnitude is None else magnitude, norm, norm if scale is None else scale)


@geometry
def _finishing(length: int, splits: int, has_magnitude: bool) -> Prepared:
    return Prepared(
        "row_scale", _row_scale_kernel, (cdiv(length, 256),), (splits, length),
        FROM_SUMS=splits > 0, HAS_MAGNITUDE=has_magnitude, BLOCK=256, num_warps=4,
    )  # fmt: skip


def launch_weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, pieces: Tensor | None = None) -> Tensor:
    """Return fp32 [out]; arguments were checked in ops/weight_norm.py. pieces: those of lora_A, where the caller has them."""
    return launch_weight_norms(weight, [(lora_A, lora_B)], scaling, pieces)[0]


def launch_weight_norm_and_scale(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float, pieces: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (norm, c = magnitude / norm), fp32 [out] each. pieces: those of lora_A, where the caller has them."""
    sums = _sums(weight, rows(lora_A), rows(lora_B), scaling, pieces)
    norm, scale = (torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device) for _ in range(2))
    _finish(sums, norm, scale, sums.shape[0], magnitude.contiguous())
    return norm, scale


def launch_weight_norms(
    weight: Tensor, sets: Sequence[tuple[Tensor, Tensor]], scaling: float, pieces: Tensor | None = None
) -> Tensor:
    """Return fp32 [len(sets), out]: the norms for several (lora_A, lora_B) of one rank and dtype, in one pass over weight."""
    if len(sets) == 1:
        lora_A, lora_B = (rows(factor) for factor in sets[0])
    else:
        padded = [padded_ranks(a, b) for a, b in sets]
        lora_A, lora_B = torch.stack([a for a, _ in padded]), torch.stack([b for _, b in padded])
    sums = _sums(weight, lora_A, lora_B, scaling, pieces)
    norms = torch.empty(len(sets), weight.shape[0], dtype=torch.float32, device=weight.device)
    _finish(sums, norms, None, sums.shape[0], None)
    return norms


def _sums(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, pieces: Tensor | None = None) -> Tensor:
    """[splits, sets, out] sums of squares for lora_A [sets, r, in] and lora_B [sets, out, r], or one set without `sets`."""
    out_features, in_features = weight.shape
    sets, r = (lora_A.shape[0] if lora_A.dim() == 3 else 1), lora_A.shape[-2]
    widest = max(weight.element_size(), lora_A.element_size(), lora_B.element_size())
    if lora_A.dim() == 3:
        strides = lora_A.stride(0), lora_A.stride(1), lora_B.stride(0), lora_B.stride(1)
    else:
        pieces = launch_pieces(lora_A, lora_B) if pieces is None else pieces
        lora_A = lora_A if pieces is None else pieces
        strides = 0 if pieces is None else pieces.stride(0), lora_A.stride(-2), 0, lora_B.stride(0)
    launch, splits = _summing(
        architecture_of(weight.device), out_features, in_features, r, sets, float(scaling), widest, precision(lora_A, lora_B),
        (*weight.stride(), *strides), pieces is not None,
    )  # fmt: skip
    sums = torch.empty(splits, sets, out_features, dtype=torch.float32, device=weight.device)
    if out_features:
        launch(weight, lora_A, lora_B, sums)
    return sums


@geometry
def _summing(
    architecture: str, out_features: int, in_features: int, r: int, sets: int, scaling: float, widest: int, exact: str,
    strides: tuple[int, ...], has_pieces: bool,
) -> tuple[Prepared, int]:  # fmt: skip
    """(the launch, splits of in_features)."""
    chosen = tile_for("weight_norm" if sets == 1 else "weight_norms", r, widest, architecture)
    blocks, steps = cdiv(out_features, chosen["BLOCK_OUT"]), cdiv(in_features, chosen["BLOCK_IN"])
    splits = splits_for(blocks, steps, least_steps=1)
    launch = Prepared(
        "weight_norm", _weight_norm_kernel, (blocks, splits),
        (out_features, in_features, r, cdiv(steps, splits) * chosen["BLOCK_IN"], scaling, *strides),
        SETS=sets, SETS_PADDED=triton.next_power_of_2(sets), PIECES=has_pieces,
        RANK_CHUNKS=cdiv(r, chosen["BLOCK_R"]), PRECISION=exact, **chosen,
    )  # fmt: skip
    return launch, splits
