"""The output of a DoRA layer from its two library products (DoRA, arXiv:2402.09353, eq. 5; dropout as in PEFT).

    output = c * (base + scaling * hidden @ lora_B^T) + bias,    c = magnitude / norm per out feature (1 where norm < 1e-18)
    output = base + (c - 1) * base_dropped + c * scaling * hidden @ lora_B^T + bias    with dropout

base = x @ weight^T and hidden = x @ lora_A^T, with dropout base_dropped = x_dropped @ weight^T and hidden = x_dropped @ lora_A^T.
Everything is computed in fp32 and rounded once, so no form with a rounded delta is needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._arithmetic import dot, round_to
from ._launch import Prepared, architecture_of, cdiv, geometry, precision, rows
from .tiles import tile_for


@triton.jit
def _compose_kernel(
    base_ptr, dropped_ptr, hidden_ptr, lora_B_ptr, scale_ptr, bias_ptr, output_ptr,
    tokens, out_features, r, scaling, stride_base, stride_dropped, stride_hidden, stride_lora_B, stride_rank, stride_output,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPPED: tl.constexpr,
    RANK_CHUNKS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program writes one BLOCK_T x BLOCK_OUT tile; output may be base."""
    out_tiles = tl.cdiv(out_features, BLOCK_OUT)
    # pointers to the tile's first token are 64-bit, offsets inside a tile 32-bit: wide offsets per element cost registers
    first_token = (tl.program_id(0) // out_tiles).to(tl.int64) * BLOCK_T
    base_ptr += first_token * stride_base
    dropped_ptr += first_token * stride_dropped
    hidden_ptr += first_token * stride_hidden
    output_ptr += first_token * stride_output
    token = tl.arange(0, BLOCK_T)
    col = (tl.program_id(0) % out_tiles) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    token_ok, col_ok = first_token + token < tokens, col < out_features
    mask = token_ok[:, None] & col_ok[None, :]
    # the large loads come first: the compiler does not move them above the product
    base = tl.load(base_ptr + token[:, None] * stride_base + col[None, :], mask=mask, other=0.0)
    if HAS_DROPPED:
        dropped = tl.load(dropped_ptr + token[:, None] * stride_dropped + col[None, :], mask=mask, other=0.0)
    low_rank = tl.zeros((BLOCK_T, BLOCK_OUT), tl.float32)
    for chunk in tl.range(0, RANK_CHUNKS):
        rank = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
        rank_ok = rank < r
        h = tl.load(hidden_ptr + token[:, None] * stride_hidden + rank[None, :], token_ok[:, None] & rank_ok[None, :], 0.0)
        b_tile = lora_B_ptr + col[:, None] * stride_lora_B + rank[None, :] * stride_rank
        b = tl.load(b_tile, col_ok[:, None] & rank_ok[None, :], 0.0)
        low_rank = dot(h, tl.trans(round_to(b, h.dtype)), low_rank, PRECISION)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + col, mask=col_ok, other=0.0)
    if HAS_DROPPED:
        delta = (scale - 1.0)[None, :] * dropped.to(tl.float32) + (scale * scaling)[None, :] * low_rank
        output = base.to(tl.float32) + delta
    else:
        output = base.to(tl.float32) + scaling * low_rank
        if HAS_SCALE:
            output *= scale[None, :]
    if HAS_BIAS:
        output += tl.load(bias_ptr + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    output = round_to(output, output_ptr.dtype.element_ty)
    tl.store(output_ptr + token[:, None] * stride_output + col[None, :], output, mask=mask)


def launch_compose(
    base: Tensor,
    hidden: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    base_dropped: Tensor | None = None,
    output: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return [tokens, out] in `dtype` (base's by default), or fill `output`, which may be base.

    base [tokens, out], hidden [tokens, r], lora_B [out, r], scale = c, fp32 [out], bias [out]. A 16-bit hidden rounds lora_B
    to its dtype for the product; an fp32 hidden keeps it exact. Arguments were checked in ops/compose.py.
    """
    base, hidden, lora_B, scale = rows(base), rows(hidden), rows(lora_B), scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    base_dropped = None if base_dropped is None else rows(base_dropped)
    if output is None:
        output = torch.empty(base.shape, dtype=dtype or base.dtype, device=base.device)
    _launch("compose", base, base_dropped, hidden, lora_B, scale, bias, output, scaling)
    return output


def launch_add_low_rank(base: Tensor, hidden: Tensor, lora_A: Tensor) -> Tensor:
    """Return base + hidden @ lora_A, written over base: [tokens, in], hidden [tokens, r], lora_A [r, in].

    The sum is taken in fp32 and rounded once; a 16-bit hidden rounds lora_A to its dtype for the product.
    """
    _launch("add_low_rank", base, None, rows(hidden), lora_A.t(), None, None, base, 1.0)
    return base


def _launch(
    name: str, base: Tensor, base_dropped: Tensor | None, hidden: Tensor, lora_B: Tensor, scale: Tensor | None,
    bias: Tensor | None, output: Tensor, scaling: float,
) -> None:  # fmt: skip
    (tokens, out_features), r = output.shape, hidden.shape[1]
    if tokens == 0 or out_features == 0:
        return
    dropped = base if base_dropped is None else base_dropped
    launch = _prepared(
        name, architecture_of(base.device), tokens, out_features, r, float(scaling),
        max(base.element_size(), hidden.element_size(), output.element_size()), precision(hidden),
        (base.stride(0), dropped.stride(0), hidden.stride(0), *lora_B.stride(), output.stride(0)),
        scale is not None, bias is not None, base_dropped is not None,
    )  # fmt: skip
    launch(base, dropped, hidden, lora_B, base if scale is None else scale, base if bias is None else bias, output)


@geometry
def _prepared(
    name: str, architecture: str, tokens: int, out_features: int, r: int, scaling: float, widest: int, exact: str,
    strides: tuple[int, ...], has_scale: bool, has_bias: bool, has_dropped: bool,
) -> Prepared:  # fmt: skip
    chosen = tile_for("compose", r, widest, architecture)
    return Prepared(
        name, _compose_kernel, (cdiv(tokens, chosen["BLOCK_T"]) * cdiv(out_features, chosen["BLOCK_OUT"]),),
        (tokens, out_features, r, scaling, *strides),
        HAS_SCALE=has_scale, HAS_BIAS=has_bias, HAS_DROPPED=has_dropped,
        RANK_CHUNKS=cdiv(r, chosen["BLOCK_R"]), PRECISION=exact, **chosen,
    )  # fmt: skip
