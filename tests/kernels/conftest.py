"""Kernel tests run under Triton's interpreter, in a process of their own; compile-only tests run without it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _nan_filled_outputs() -> Iterator[None]:
    """torch.empty fills with NaN, so that an element which no program writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
