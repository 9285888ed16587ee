"""What the kernels share: matrix products, rounding, the scale of a row and a tile of the low-rank product."""

from __future__ import annotations

import triton
import triton.language as tl

NORM_FLOOR = 1e-18  # as in reference.py: a row with a smaller norm keeps the scale 1
_FLOOR = tl.constexpr(NORM_FLOOR)
INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b: operands of one 16-bit dtype go to the tensor cores as they are, others as fp32 under PRECISION."""
    if (a.dtype == b.dtype) and (a.dtype == tl.bfloat16 or a.dtype == tl.float16) and not INTERPRETING:
        return tl.dot(a, b, acc)
    else:  # the interpreter multiplies bf16 operands as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x in another dtype, rounded to nearest even (the interpreter's own cast to bf16 truncates)."""
    if INTERPRETING and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # a NaN of a GPU, 0x7FFFFFFF, would become -0
    return x.to(dtype)


@triton.jit
def bf16_pieces(x):
    """fp32 x as the sum of three bf16 numbers, which hold its 24 bits."""
    first = round_to(x, tl.bfloat16)
    rest = x - first.to(tl.float32)
    second = round_to(rest, tl.bfloat16)
    return first, second, round_to(rest - second.to(tl.float32), tl.bfloat16)


@triton.jit
def pieces_tile(
    b_1, b_2, b_3, pieces_ptr, rank, col, col_ok, r, stride_piece, stride_rank,
    PRECISION: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """(lora_B @ lora_A)[rows of b, col] in fp32 from the pieces of both, small terms first; 2^-24 of the largest is left out."""
    mask = (rank < r)[:, None] & col_ok[None, :]
    at = pieces_ptr + rank[:, None] * stride_rank + col[None, :]
    a_1, a_2 = tl.load(at, mask, 0.0), tl.load(at + stride_piece, mask, 0.0)
    a_3 = tl.load(at + 2 * stride_piece, mask, 0.0)
    product = dot(b_3, a_1, tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32), PRECISION)
    product = dot(b_1, a_3, product, PRECISION)
    product = dot(b_2, a_2, product, PRECISION)
    product = dot(b_2, a_1, product, PRECISION)
    product = dot(b_1, a_2, product, PRECISION)
    return dot(b_1, a_1, product, PRECISION)


@triton.jit
def row_scale(magnitude, norm):
    """c = magnitude / norm where norm >= NORM_FLOOR, else 1."""
    above = norm >= _FLOOR
    return tl.where(above, tl.div_rn(magnitude.to(tl.float32), tl.where(above, norm, 1.0)), 1.0)


@triton.jit
def inverse_norm(norm):
    """1 / norm where norm >= NORM_FLOOR, else 0."""
    above = norm >= _FLOOR
    return tl.where(above, tl.div_rn(1.0, tl.where(above, norm, 1.0)), 0.0)


@triton.jit
def low_rank_tile(
    lora_A_ptr, lora_B_ptr, row, row_ok, col, col_ok, r, stride_lora_A, stride_lora_B,
    RANK_CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(lora_B @ lora_A)[row, col] in fp32; row and col are int64."""
    product = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for chunk in tl.range(0, RANK_CHUNKS):
        rank = chunk * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        rank_ok = rank < r
        b = tl.load(lora_B_ptr + row[:, None] * stride_lora_B + rank[None, :], row_ok[:, None] & rank_ok[None, :], 0.0)
        a = tl.load(lora_A_ptr + rank[:, None] * stride_lora_A + col[None, :], rank_ok[:, None] & col_ok[None, :], 0.0)
        product = dot(b, a, product, PRECISION)
    return product


@triton.jit
def updated_tile(
    weight_ptr, lora_A_ptr, lora_B_ptr, row, row_ok, col, col_ok, r, scaling,
    stride_weight_out, stride_weight_in, stride_lora_A, stride_lora_B,
    RANK_CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """V[row, col] in fp32; the weight is loaded first, since the compiler does not move it above the product."""
    offset = row[:, None] * stride_weight_out + col[None, :] * stride_weight_in
    w = tl.load(weight_ptr + offset, mask=row_ok[:, None] & col_ok[None, :], other=0.0)
    low_rank = low_rank_tile(
        lora_A_ptr, lora_B_ptr, row, row_ok, col, col_ok, r, stride_lora_A, stride_lora_B,
        RANK_CHUNKS, PRECISION, BLOCK_OUT, BLOCK_IN, BLOCK_R,
    )  # fmt: skip
    return w.to(tl.float32) + scaling * low_rank
