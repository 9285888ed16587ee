"""Scratch memory for the merged weight of one layer: one buffer per thread, kept between calls, bounded and visible.

Writing the merged weight into memory that is mapped already saves the page faults of a fresh allocation at every layer and
pass. A layer that does not fit is processed in blocks of output features.
"""

from __future__ import annotations

import functools
import threading
import weakref

import torch
from torch import Tensor

LIMIT_BYTES = 64 << 20  # holds a 4096 x 4096 fp32 layer whole

SETTLING_BYTES = (32 << 20) - (64 << 10)  # glibc learns from freed blocks of up to 32 MiB, its header included

_local = threading.local()
_buffers: weakref.WeakSet[Tensor] = weakref.WeakSet()
_buffers_change = threading.Lock()


def rows_per_block(columns: int, dtype: torch.dtype) -> int:
    """How many rows of a merged weight fit the workspace, a multiple of 64 where that is possible."""
    fit = LIMIT_BYTES // max(1, columns * dtype.itemsize)
    return max(1, fit - fit % 64 if fit >= 64 else fit)


@functools.cache
def settle_allocator() -> None:
    """Let glibc keep what a training step frees, for the next step.

    It hands the top of its heap back to the system when more is free there than twice the largest block it has seen freed; a
    step of a mid-sized model then faults tens of thousands of pages in again. One block of the largest size it learns from,
    never touched, raises that limit for good. Other allocators are not affected.
    """
    torch.empty(SETTLING_BYTES, dtype=torch.uint8, device="cpu")


def workspace(rows: int, columns: int, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """[rows, columns] of this thread's buffer, uninitialized; valid until the next call on this thread."""
    views: dict[tuple[int, int, torch.dtype, bool], Tensor] = _local.__dict__.setdefault("views", {})
    found = views.get((rows, columns, dtype, transposed))
    if found is not None:
        return found
    size = rows * columns * dtype.itemsize
    with torch.inference_mode(False), torch.no_grad():  # what is made here outlives the caller's modes and default device
        buffer = getattr(_local, "buffer", None)
        if buffer is None or buffer.numel() < size:
            settle_allocator()
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
            _local.buffer = buffer
            with _buffers_change:
                _buffers.add(buffer)
            views.clear()
        values = buffer[:size].view(dtype)
        values = values.view(columns, rows).t() if transposed else values.view(rows, columns)
    views[(rows, columns, dtype, transposed)] = values
    return values


def workspace_bytes() -> int:
    """Bytes that the workspaces of all threads hold at present."""
    with _buffers_change:
        return sum(buffer.numel() for buffer in _buffers)


def release_workspace() -> None:
    """Free this thread's workspace; the next call makes a new one."""
    _local.__dict__.clear()
