"""fp32 factors for the 16-bit tensor cores: lora_A = piece 1 + piece 2 + piece 3, each in bf16 (8 + 8 + 8 bits).

A pass over the weight multiplies with lora_A once per tile. Split beforehand, its pieces go from memory to the tensor cores as
they are; an fp32 tile would have to be split in every program, which takes longer than reading the weight. Six products of pieces
give lora_B @ lora_A to fp32's precision. The first piece is lora_A rounded to bf16, which a layer's own product needs anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._arithmetic import bf16_pieces
from ._launch import Prepared, cdiv, geometry

LARGEST_RANK = 16  # beyond it six products cost more than they spare


@triton.jit
def _pieces_kernel(source_ptr, pieces_ptr, length, BLOCK: tl.constexpr):
    """Writes the three pieces of BLOCK elements, `length` apart."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    element_ok = element < length
    first, second, third = bf16_pieces(tl.load(source_ptr + element, mask=element_ok, other=0.0))
    tl.store(pieces_ptr + element, first, mask=element_ok)
    tl.store(pieces_ptr + length + element, second, mask=element_ok)
    tl.store(pieces_ptr + 2 * length + element, third, mask=element_ok)


def launch_pieces(lora_A: Tensor, lora_B: Tensor) -> Tensor | None:
    """Return [3, r, in] in bf16, or None where the factors are multiplied as they are: 16-bit ones, and large ranks."""
    r, in_features = lora_A.shape
    if r > LARGEST_RANK or lora_A.dtype != torch.float32 or lora_B.dtype != torch.float32:
        return None
    lora_A = lora_A.contiguous()
    pieces = torch.empty(3, r, in_features, dtype=torch.bfloat16, device=lora_A.device)
    if lora_A.numel():
        _prepared(lora_A.numel())(lora_A, pieces)
    return pieces


@geometry
def _prepared(length: int) -> Prepared:
    return Prepared("pieces", _pieces_kernel, (cdiv(length, 512),), (length,), BLOCK=512, num_warps=4)
