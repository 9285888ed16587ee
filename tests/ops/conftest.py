"""What tests of several operations share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bidora_kernels import native
from bidora_kernels.ops import _workspace


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every fp32 product of the native backend goes to oneDNN, whatever the processor."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(native, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(native, "ONEDNN_FROM", 1)
    yield
    _workspace.release_workspace()
