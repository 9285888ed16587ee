"""The gradients of `compose` in one pass over the gradient of its output (DoRA, arXiv:2402.09353, section 4.3).

    grad_base      = c * grad_output                       (with dropout: (c - 1) * grad_output, for base_dropped)
    grad_hidden    = scaling * grad_output @ (c * lora_B)
    grad_lora_B    = scaling * c * (grad_output^T @ hidden)
    grad_magnitude = sum over tokens of grad_output * (base + scaling * hidden @ lora_B^T) / norm    (0 where norm < 1e-18)
                   = (sum of grad_output * base + scaling * row sum of lora_B * (grad_output^T @ hidden)) / norm

With dropout the base of grad_magnitude is base_dropped. Where the layer's output is kept anyway and there is no dropout,
grad_magnitude can come from it: the sum of grad_output * (output - bias) / magnitude, lost where magnitude is 0.
Sums over splits of the tokens and over tiles of out features go through fp32 partials, which `reduce_partials` adds in a fixed
order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._arithmetic import dot, round_to
from ._launch import Prepared, architecture_of, cdiv, geometry, precision, rows, splits_for
from .reduce_partials import Segment, launch_reduce_partials
from .tiles import tile_for


@triton.jit
def _compose_backward_kernel(
    grad_output_ptr, saved_ptr, hidden_ptr, lora_B_ptr, scale_ptr, bias_ptr,
    grad_base_ptr, hidden_partial_ptr, lora_B_partial_ptr, magnitude_partial_ptr,
    tokens, out_features, r, tiles_per_split, scaling,
    stride_grad_output, stride_saved, stride_hidden, stride_lora_B, stride_grad_base,
    GRAD_BASE: tl.constexpr, GRAD_HIDDEN: tl.constexpr, GRAD_LORA_B: tl.constexpr, GRAD_MAGNITUDE: tl.constexpr,
    FROM_OUTPUT: tl.constexpr, HAS_BIAS: tl.constexpr, DROPPED: tl.constexpr,
    RANK_CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK_OUT out features and one split of the tokens: what sums over tokens stays in registers.

    With a low-rank gradient it handles one chunk of ranks, else (grad_magnitude alone) all RANK_CHUNKS of them.
    Partials: hidden [out tiles, tokens, r], lora_B [splits, out, r], magnitude [rank programs, splits, out].
    """
    out_tiles = tl.cdiv(out_features, BLOCK_OUT)
    out_tile = tl.program_id(0) % out_tiles
    split = tl.program_id(0) // out_tiles
    chunk = tl.program_id(1)
    col, rank = out_tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT), chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    col_ok, rank_ok = col < out_features, rank < r
    hidden_partial_ptr += out_tile.to(tl.int64) * tokens * r
    lora_B_partial_ptr += split.to(tl.int64) * out_features * r
    magnitude_partial_ptr += (chunk * (tl.num_programs(0) // out_tiles) + split).to(tl.int64) * out_features
    LOW_RANK: tl.constexpr = GRAD_HIDDEN or GRAD_LORA_B
    FROM_BASE: tl.constexpr = GRAD_MAGNITUDE and not FROM_OUTPUT
    ALL_RANKS: tl.constexpr = LOW_RANK or RANK_CHUNKS == 1  # of this program, in one tile of lora_B
    GRAD_TIMES_HIDDEN: tl.constexpr = GRAD_LORA_B or (FROM_BASE and ALL_RANKS)
    scale = tl.load(scale_ptr + col, mask=col_ok, other=0.0)
    if GRAD_HIDDEN:
        b = tl.load(lora_B_ptr + col[:, None] * stride_lora_B + rank[None, :], col_ok[:, None] & rank_ok[None, :], 0.0)
        scaled_b = round_to(b.to(tl.float32) * scale[:, None], hidden_ptr.dtype.element_ty)
    if GRAD_TIMES_HIDDEN:
        product = tl.zeros((BLOCK_OUT, BLOCK_R), tl.float32)
    if GRAD_MAGNITUDE:
        # of grad and saved: tokens that lie so far apart share a thread, the rest is summed at the end
        GROUPS: tl.constexpr = 4
        products = tl.zeros((BLOCK_T // GROUPS, BLOCK_OUT), tl.float32)
    if FROM_BASE and not ALL_RANKS:
        low_rank_sum = tl.zeros((BLOCK_OUT,), tl.float32)
    if FROM_OUTPUT and HAS_BIAS:
        bias = tl.load(bias_ptr + col, mask=col < tl.where(chunk == 0, out_features, 0), other=0.0).to(tl.float32)
    for index in tl.range(0, tiles_per_split):
        # pointers to the tile's first token are 64-bit, offsets inside a tile 32-bit: wide offsets per element cost registers
        first_token = (split * tiles_per_split + index).to(tl.int64) * BLOCK_T
        token = tl.arange(0, BLOCK_T)
        token_ok = first_token + token < tokens
        mask = token_ok[:, None] & col_ok[None, :]
        # what does not depend on the chunk is read and written by the first one alone
        first_mask = (first_token + token < tl.where(chunk == 0, tokens, 0))[:, None] & col_ok[None, :]
        grad_tile = grad_output_ptr + first_token * stride_grad_output
        grad = tl.load(grad_tile + token[:, None] * stride_grad_output + col[None, :], mask=mask, other=0.0)
        if GRAD_MAGNITUDE:
            saved_tile = saved_ptr + first_token * stride_saved
            saved = tl.load(saved_tile + token[:, None] * stride_saved + col[None, :], mask=first_mask, other=0.0)
        hidden_tile = hidden_ptr + first_token * stride_hidden
        if GRAD_TIMES_HIDDEN:
            h = tl.load(hidden_tile + token[:, None] * stride_hidden + rank[None, :], token_ok[:, None] & rank_ok[None, :], 0.0)
        if GRAD_BASE:
            grad_base = grad.to(tl.float32) * (scale - 1.0 if DROPPED else scale)[None, :]
            grad_base = round_to(grad_base, grad_base_ptr.dtype.element_ty)
            base_tile = grad_base_ptr + first_token * stride_grad_base
            tl.store(base_tile + token[:, None] * stride_grad_base + col[None, :], grad_base, mask=first_mask)
        if GRAD_MAGNITUDE:
            saved = saved.to(tl.float32)
            if FROM_OUTPUT and HAS_BIAS:
                saved -= bias[None, :]
            products += tl.sum(tl.reshape(grad.to(tl.float32) * saved, (GROUPS, BLOCK_T // GROUPS, BLOCK_OUT)), axis=0)
        if LOW_RANK or FROM_BASE:
            narrow = round_to(grad, hidden_ptr.dtype.element_ty)
        if GRAD_HIDDEN:
            grad_hidden = dot(narrow, scaled_b, tl.zeros((BLOCK_T, BLOCK_R), tl.float32), PRECISION)
            partial_tile = hidden_partial_ptr + first_token * r
            offset = token[:, None] * r + rank[None, :]
            tl.store(partial_tile + offset, grad_hidden * scaling, mask=token_ok[:, None] & rank_ok[None, :])
        if GRAD_TIMES_HIDDEN:
            product = dot(tl.trans(narrow), h, product, PRECISION)
        if FROM_BASE and not ALL_RANKS:
            for part in tl.range(0, RANK_CHUNKS):
                inner = part * BLOCK_R + tl.arange(0, BLOCK_R)
                inner_ok = inner < r
                h = tl.load(
                    hidden_tile + token[:, None] * stride_hidden + inner[None, :], token_ok[:, None] & inner_ok[None, :], 0.0
                )
                b = tl.load(lora_B_ptr + col[:, None] * stride_lora_B + inner[None, :], col_ok[:, None] & inner_ok[None, :], 0.0)
                part_product = dot(tl.trans(narrow), h, tl.zeros((BLOCK_OUT, BLOCK_R), tl.float32), PRECISION)
                low_rank_sum += tl.sum(round_to(b, h.dtype).to(tl.float32) * part_product, axis=1)
    if GRAD_LORA_B:
        partial = product * (scaling * scale)[:, None]
        tl.store(lora_B_partial_ptr + col[:, None] * r + rank[None, :], partial, mask=col_ok[:, None] & rank_ok[None, :])
    if GRAD_MAGNITUDE:
        magnitude_sum = tl.sum(products, axis=0)
        if FROM_BASE:  # sum over tokens of grad * (hidden @ lora_B^T), without that product
            if ALL_RANKS:
                b = tl.load(lora_B_ptr + col[:, None] * stride_lora_B + rank[None, :], col_ok[:, None] & rank_ok[None, :], 0.0)
                magnitude_sum += scaling * tl.sum(round_to(b, hidden_ptr.dtype.element_ty).to(tl.float32) * product, axis=1)
            else:
                magnitude_sum += scaling * low_rank_sum
        tl.store(magnitude_partial_ptr + col, magnitude_sum, mask=col_ok)


class ComposeGradients(NamedTuple):
    """What a pass asked for: grad_base [tokens, out], grad_hidden [tokens, r], grad_lora_B [out, r], grad_magnitude [out]."""

    base: Tensor | None = None
    hidden: Tensor | None = None
    lora_B: Tensor | None = None
    magnitude: Tensor | None = None


def launch_compose_backward(
    grad_output: Tensor,
    hidden: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    norm: Tensor,
    scaling: float,
    *,
    base: Tensor | None = None,
    output: Tensor | None = None,
    magnitude: Tensor | None = None,
    bias: Tensor | None = None,
    dropped: bool = False,
    needs_base: bool = True,
    needs_hidden: bool = True,
    needs_lora_B: bool = True,
    needs_magnitude: bool = True,
    base_dtype: torch.dtype | None = None,
    hidden_dtype: torch.dtype | None = None,
) -> ComposeGradients:
    """Return the gradients that are needed; nothing is read or written for the others.

    grad_output [tokens, out], scale = c and norm fp32 [out]. grad_magnitude is taken from `base` (with dropout: base_dropped), or
    from `output`, `magnitude` and `bias`; without `magnitude` it is then the sum of grad_output * (output - bias), undivided.
    grad_base has `base_dtype` (grad_output's by default), grad_hidden `hidden_dtype` (hidden's by default), the others fp32.
    A 16-bit hidden rounds the operands of the products to its dtype. With `dropped`, grad_base is (c - 1) * grad_output.
    """
    tokens, out_features = grad_output.shape
    r, device = hidden.shape[1], grad_output.device
    grad_output, hidden, lora_B = rows(grad_output), rows(hidden), rows(lora_B)
    scale, norm = scale.contiguous(), norm.contiguous()
    bias = None if bias is None else bias.contiguous()
    magnitude = None if magnitude is None else magnitude.contiguous()
    saved = output if output is not None else base
    if needs_magnitude and saved is None:
        raise ValueError("grad_magnitude needs base or output")
    saved = grad_output if saved is None else rows(saved)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    grad_base = empty(tokens, out_features, dtype=base_dtype or grad_output.dtype) if needs_base else None
    widest = max(grad_output.element_size(), hidden.element_size(), saved.element_size() if needs_magnitude else 0)
    launch, out_tiles, splits, rank_programs = _prepared(
        architecture_of(device), tokens, out_features, r, float(scaling), widest, precision(hidden),
        (grad_output.stride(0), saved.stride(0), hidden.stride(0), lora_B.stride(0), out_features),
        needs_base, needs_hidden, needs_lora_B, needs_magnitude, output is not None, bias is not None, dropped,
    )  # fmt: skip
    hidden_partials = empty(out_tiles, tokens * r) if needs_hidden else None
    lora_B_partials = empty(splits, out_features * r) if needs_lora_B else None
    magnitude_partials = empty(rank_programs * splits, out_features) if needs_magnitude else None
    buffers = (grad_base, hidden_partials, lora_B_partials, magnitude_partials)
    if tokens and out_features and (needs_base or needs_hidden or needs_lora_B or needs_magnitude):
        # what a flag leaves out is never dereferenced; norm stands in for its pointer
        written = [norm if buffer is None else buffer for buffer in buffers]
        launch(grad_output, saved, hidden, lora_B, scale, norm if bias is None else bias, *written)

    segments = []
    if hidden_partials is not None:
        segments.append(Segment(hidden_partials, dtype=hidden_dtype or hidden.dtype, shape=(tokens, r)))
    if lora_B_partials is not None:
        segments.append(Segment(lora_B_partials, shape=(out_features, r)))
    if magnitude_partials is not None:
        from_output = output is not None
        segments.append(
            Segment(magnitude_partials, norm=None if from_output else norm, divisor=magnitude if from_output else None)
        )
    reduced = iter(launch_reduce_partials(*segments)) if segments else iter(())
    return ComposeGradients(
        base=grad_base,
        hidden=None if hidden_partials is None else next(reduced),
        lora_B=None if lora_B_partials is None else next(reduced),
        magnitude=None if magnitude_partials is None else next(reduced),
    )


@geometry
def _prepared(
    architecture: str, tokens: int, out_features: int, r: int, scaling: float, widest: int, exact: str, strides: tuple[int, ...],
    needs_base: bool, needs_hidden: bool, needs_lora_B: bool, needs_magnitude: bool, from_output: bool, has_bias: bool,
    dropped: bool,
) -> tuple[Prepared, int, int, int]:  # fmt: skip
    """(the launch, tiles of out features, splits of the tokens, programs for the ranks)."""
    chosen = tile_for("compose_backward", r, widest, architecture)
    token_tiles, out_tiles = cdiv(tokens, chosen["BLOCK_T"]), cdiv(out_features, chosen["BLOCK_OUT"])
    tiles_per_split = max(1, cdiv(token_tiles, splits_for(out_tiles, token_tiles, least_steps=1)))
    splits, chunks = cdiv(token_tiles, tiles_per_split), cdiv(r, chosen["BLOCK_R"])
    rank_programs = chunks if needs_hidden or needs_lora_B else 1
    launch = Prepared(
        "compose_backward", _compose_backward_kernel, (out_tiles * splits, rank_programs),
        (tokens, out_features, r, tiles_per_split, scaling, *strides),
        GRAD_BASE=needs_base, GRAD_HIDDEN=needs_hidden, GRAD_LORA_B=needs_lora_B, GRAD_MAGNITUDE=needs_magnitude,
        FROM_OUTPUT=from_output, HAS_BIAS=has_bias, DROPPED=dropped, RANK_CHUNKS=chunks, PRECISION=exact, **chosen,
    )  # fmt: skip
    return launch, out_tiles, splits, rank_programs
