"""Sums of per-tile partial results in a fixed order, so that every gradient is bitwise reproducible.

output[j] = sum_p partials[p, j], optionally divided by the row norm (DoRA, arXiv:2402.09353, eq. 5)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._arithmetic import inverse_norm, round_to
from ._launch import Prepared, cdiv, geometry


class Segment(NamedTuple):
    """One reduction: partials [parts, length] fp32 to `shape`, of `length` elements.

    norm: [length] fp32; the sum is divided by it, and is 0 where it lies below NORM_FLOOR. divisor: [length] of any dtype, for a
    plain quotient that is 0 where the divisor is 0. dtype: of the result. shape: [length] by default.
    """

    partials: Tensor
    norm: Tensor | None = None
    divisor: Tensor | None = None
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] | None = None


@triton.jit
def _reduce_segment(
    block, partials_ptr, divisor_ptr, output_ptr, parts, length,
    FINISH: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    element = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    element_ok = element < length
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, parts, BLOCK_PARTS):
        part = (start + tl.arange(0, BLOCK_PARTS)).to(tl.int64)
        mask = (part < parts)[:, None] & element_ok[None, :]
        total += tl.sum(tl.load(partials_ptr + part[:, None] * length + element[None, :], mask=mask, other=0.0), axis=0)
    if FINISH == 1:
        total *= inverse_norm(tl.load(divisor_ptr + element, mask=element_ok, other=1.0))
    if FINISH == 2:
        divisor = tl.load(divisor_ptr + element, mask=element_ok, other=1.0).to(tl.float32)
        total = tl.where(divisor == 0.0, 0.0, tl.div_rn(total, tl.where(divisor == 0.0, 1.0, divisor)))
    tl.store(output_ptr + element, round_to(total, output_ptr.dtype.element_ty), mask=element_ok)


@triton.jit
def _reduce_partials_kernel(
    partials_0_ptr, divisor_0_ptr, output_0_ptr, partials_1_ptr, divisor_1_ptr, output_1_ptr,
    partials_2_ptr, divisor_2_ptr, output_2_ptr, parts_0, length_0, blocks_0, parts_1, length_1, blocks_1, parts_2, length_2,
    SEGMENTS: tl.constexpr, FINISH_0: tl.constexpr, FINISH_1: tl.constexpr, FINISH_2: tl.constexpr,
    PARTS_AT_ONCE_0: tl.constexpr, PARTS_AT_ONCE_1: tl.constexpr, PARTS_AT_ONCE_2: tl.constexpr,
    BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr,
):  # fmt: skip
    """One program sums a block of columns of one of up to three segments."""
    block = tl.program_id(0)
    if block < blocks_0:
        _reduce_segment(block, partials_0_ptr, divisor_0_ptr, output_0_ptr, parts_0, length_0, FINISH_0, PARTS_AT_ONCE_0, BLOCK_0)
    if SEGMENTS > 1:
        block -= blocks_0
        if (block >= 0) & (block < blocks_1):
            _reduce_segment(
                block, partials_1_ptr, divisor_1_ptr, output_1_ptr, parts_1, length_1, FINISH_1, PARTS_AT_ONCE_1, BLOCK_1
            )
    if SEGMENTS > 2:
        block -= blocks_1
        if block >= 0:
            _reduce_segment(
                block, partials_2_ptr, divisor_2_ptr, output_2_ptr, parts_2, length_2, FINISH_2, PARTS_AT_ONCE_2, BLOCK_2
            )


def _shape(length: int) -> tuple[int, int]:
    """(columns, parts at a time) of a program: wide rows of memory where there are enough of them to fill a GPU.

    By a segment's own length: the order of its sum must not depend on its neighbours.
    """
    return (512, 8) if length >= 512 * 64 else (64, 32)


def launch_reduce_partials(*segments: Segment) -> list[Tensor]:
    """Return one tensor per segment; up to three segments share one launch."""
    outputs: list[Tensor] = []
    tensors: list[Tensor] = []
    sizes: list[tuple[int, int, int]] = []
    for segment in segments:
        parts, length = segment.partials.shape
        output = torch.empty(segment.shape or (length,), dtype=segment.dtype, device=segment.partials.device)
        divisor = segment.norm if segment.norm is not None else segment.divisor
        tensors += (segment.partials, output if divisor is None else divisor, output)
        sizes.append((parts, length, 1 if segment.norm is not None else 2 if segment.divisor is not None else 0))
        outputs.append(output)
    launch = _prepared(*sizes)
    if launch is not None:
        launch(*tensors, *tensors[:3] * (3 - len(segments)))
    return outputs


@geometry
def _prepared(*sizes: tuple[int, int, int]) -> Prepared | None:
    """From (parts, length, finish) of each segment; None where there is nothing to add."""
    numbers: list[int] = []
    options: dict[str, int] = {"SEGMENTS": len(sizes), "num_warps": 4}
    blocks = 0
    for index, (parts, length, finish) in enumerate((*sizes, *((0, 0, 0),) * (3 - len(sizes)))):
        options[f"BLOCK_{index}"], options[f"PARTS_AT_ONCE_{index}"] = block, _ = _shape(length)
        options[f"FINISH_{index}"] = finish
        numbers += [parts, length, cdiv(length, block)]
        blocks += numbers[-1]
    if not blocks:
        return None
    return Prepared("reduce_partials", _reduce_partials_kernel, (blocks,), tuple(numbers[:-1]), **options)
