"""The merged weight of a DoRA layer (DoRA, arXiv:2402.09353, eq. 5), rounded to nearest or with a fixed dither.

    merged = c * (weight + scaling * lora_B @ lora_A),    c = magnitude / norm per row (1 where norm < 1e-18)

Rounding to nearest swallows a change smaller than half a unit in the last place; the dither rounds each element up or down by a
hash of its index and a seed, so that small changes survive on average and equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._arithmetic import bf16_pieces, dot, inverse_norm, low_rank_tile, pieces_tile, round_to, row_scale
from ._launch import Prepared, architecture_of, cdiv, geometry, precision, rows, splits_for
from .pieces import launch_pieces
from .tiles import tile_for
from .weight_norm import launch_weight_norm


@triton.jit
def _hash(index, seed):
    """32 well mixed bits of (index, seed): xor-shift-multiply with the constants of C. Wellons's lowbias32 (public domain)."""
    x = (index.to(tl.uint32) ^ seed).to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _dither_to(x, noise, dtype: tl.constexpr):
    """fp32 x in a 16-bit dtype, rounded away from zero with the probability of the part cut off; noise: 32 random bits.

    A NaN stays one: a GPU's, 0x7FFFFFFF, would else carry into the sign and become -0.
    """
    bits = x.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        dithered = ((bits + (noise & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(x == x, dithered, x).to(dtype)
    else:
        normal = ((bits + (noise & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        steps = tl.floor(
            tl.abs(x) * 16777216.0 + (noise >> 8).to(tl.float32) * (1.0 / 16777216.0)
        )  # fp16's subnormals: 2^-24 apart
        subnormal = tl.where(x < 0.0, -steps, steps) * (1.0 / 16777216.0)
        dithered = tl.where(tl.abs(x) < 6.103515625e-05, subnormal, normal)
        return tl.where(x == x, dithered, x).to(dtype)


@triton.jit
def _merged_weight_kernel(
    weight_ptr, lora_A_ptr, lora_B_ptr, magnitude_ptr, norm_ptr, merged_ptr,
    out_features, in_features, r, tiles_per_split, seed, scaling,
    stride_weight_out, stride_weight_in, stride_piece, stride_lora_A, stride_lora_B,
    UNIT: tl.constexpr, DITHER: tl.constexpr, PIECES: tl.constexpr, RANK_CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_OUT rows of one split of in_features; UNIT rows have length 1 (0 below NORM_FLOOR).

    With PIECES, lora_A is given by its three bf16 pieces.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_ok = row < out_features
    norm = tl.load(norm_ptr + row, mask=row_ok, other=0.0)
    if UNIT:  # noqa: SIM108
        scale = inverse_norm(norm)
    else:
        scale = row_scale(tl.load(magnitude_ptr + row, mask=row_ok, other=0.0), norm)
    ONE_TILE_OF_B: tl.constexpr = RANK_CHUNKS == 1
    if ONE_TILE_OF_B:
        rank = tl.arange(0, BLOCK_R).to(tl.int64)
        b = tl.load(lora_B_ptr + row[:, None] * stride_lora_B + rank[None, :], row_ok[:, None] & (rank < r)[None, :], 0.0)
    if PIECES:
        b_1, b_2, b_3 = bf16_pieces(b)
    for index in tl.range(0, tiles_per_split):
        col = (tl.program_id(1) * tiles_per_split + index).to(tl.int64) * BLOCK_IN + tl.arange(0, BLOCK_IN)
        col_ok = col < in_features
        mask = row_ok[:, None] & col_ok[None, :]
        w = tl.load(weight_ptr + row[:, None] * stride_weight_out + col[None, :] * stride_weight_in, mask=mask, other=0.0)
        if PIECES:
            low_rank = pieces_tile(
                b_1, b_2, b_3, lora_A_ptr, rank, col, col_ok, r, stride_piece, stride_lora_A, PRECISION, BLOCK_OUT, BLOCK_IN
            )
        elif ONE_TILE_OF_B:
            a = tl.load(lora_A_ptr + rank[:, None] * stride_lora_A + col[None, :], (rank < r)[:, None] & col_ok[None, :], 0.0)
            low_rank = dot(b, a, tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32), PRECISION)
        else:
            low_rank = low_rank_tile(
                lora_A_ptr, lora_B_ptr, row, row_ok, col, col_ok, r, stride_lora_A, stride_lora_B,
                RANK_CHUNKS, PRECISION, BLOCK_OUT, BLOCK_IN, BLOCK_R,
            )  # fmt: skip
        merged = scale[:, None] * (w.to(tl.float32) + scaling * low_rank)
        offset = row[:, None] * in_features + col[None, :]
        if DITHER:
            merged = _dither_to(merged, _hash(offset, seed), merged_ptr.dtype.element_ty)
        tl.store(merged_ptr + offset, round_to(merged, merged_ptr.dtype.element_ty), mask=mask)


def launch_merged_weight(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    scaling: float,
    norm: Tensor | None = None,
    dtype: torch.dtype | None = None,
    dither_seed: int | None = None,
    output: Tensor | None = None,
    pieces: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (merged [out, in] in `dtype`, the weight's by default, and the row norms, fp32 [out]).

    norm: the row norms where they are known, which saves a pass over weight. magnitude=None gives rows of length 1 (0 below
    NORM_FLOOR). dither_seed: round a 16-bit result with the fixed dither of that seed; fp32 results are never dithered.
    output: a contiguous [out, in] tensor to fill. pieces: those of lora_A, where the caller has them.
    """
    out_features, in_features = weight.shape
    r = lora_A.shape[0]
    lora_A, lora_B = rows(lora_A), rows(lora_B)
    magnitude = None if magnitude is None else magnitude.contiguous()
    norm = None if norm is None else norm.contiguous()
    pieces = launch_pieces(lora_A, lora_B) if pieces is None else pieces
    if norm is None:
        norm = launch_weight_norm(weight, lora_A, lora_B, scaling, pieces)
    if output is None:
        output = torch.empty(out_features, in_features, dtype=dtype or weight.dtype, device=weight.device)
    if output.numel() == 0:
        return output, norm
    widest = max(tensor.element_size() for tensor in (weight, lora_A, lora_B, output))
    if pieces is not None:
        lora_A = pieces
    launch = _prepared(
        architecture_of(weight.device), out_features, in_features, r, dither_seed or 0, float(scaling), widest,
        precision(lora_A, lora_B),
        (*weight.stride(), 0 if pieces is None else pieces.stride(0), lora_A.stride(-2), lora_B.stride(0)),
        magnitude is None, dither_seed is not None and output.element_size() == 2, pieces is not None,
    )  # fmt: skip
    launch(weight, lora_A, lora_B, norm if magnitude is None else magnitude, norm, output)
    return output, norm


@geometry
def _prepared(
    architecture: str, out_features: int, in_features: int, r: int, seed: int, scaling: float, widest: int, exact: str,
    strides: tuple[int, ...], unit: bool, dithered: bool, has_pieces: bool,
) -> Prepared:  # fmt: skip
    chosen = tile_for("merged_weight", r, widest, architecture)
    blocks, steps = cdiv(out_features, chosen["BLOCK_OUT"]), cdiv(in_features, chosen["BLOCK_IN"])
    tiles_per_split = cdiv(steps, splits_for(blocks, steps, least_steps=1))
    return Prepared(
        "merged_weight", _merged_weight_kernel, (blocks, cdiv(steps, tiles_per_split)),
        (out_features, in_features, r, tiles_per_split, seed, scaling, *strides),
        UNIT=unit, DITHER=dithered, PIECES=has_pieces, RANK_CHUNKS=cdiv(r, chosen["BLOCK_R"]), PRECISION=exact, **chosen,
    )  # fmt: skip
