"""A quantized weight on the kernels: block by block, equal to the dequantized one, of which no copy is kept."""

from __future__ import annotations

import pytest
import torch

from bidora_kernels.kernels._launch import LAUNCHES
from bidora_kernels.ops import quantized

from ..gpu.stress import run_plan
from ..ops.draws import violations
from ..ops.quantized_rows import LIVE, quantized_call
from . import comparison  # noqa: F401 (skips this module without the interpreter)


@pytest.mark.parametrize("plan", ["activation", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("detach", [True, False])
def test_a_call(plan: str, dtype: torch.dtype, detach: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "BLOCK_BYTES", 32 * 40 * dtype.itemsize)
    call, values = quantized_call(out_features=72, dtype=dtype, detach_norm=detach)
    LIVE.now = LIVE.peak = 0
    LAUNCHES.clear()
    found = run_plan(call, plan)
    assert LAUNCHES["merged_weight" if plan == "weight" else "compose"] == 3 * (2 if plan == "weight" else 1)
    assert LIVE.now == 0
    assert LIVE.peak == 32 * 40 * dtype.itemsize
    assert violations(values, found) == []
