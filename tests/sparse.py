"""Matrices that span more than 2^31 elements without taking their memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def far_rows(values: Tensor, stride: int, path: Path) -> Tensor:
    """The same rows, `stride` elements apart in a sparse file, of which only they take memory."""
    rows, columns = values.shape
    storage = torch.from_file(str(path), shared=True, size=(rows - 1) * stride + columns, dtype=values.dtype)
    result = storage.as_strided((rows, columns), (stride, 1))
    result.copy_(values)
    assert (rows - 1) * stride > 2**31
    return result
