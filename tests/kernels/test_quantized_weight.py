"""A quantized weight on the kernels: block by block, equal to the dequantized one, of which no copy is kept."""

from __future__ import annotations

import pytest
import torch

import bidora_kernels as bk
from bidora_kernels.kernels._launch import LAUNCHES
from bidora_kernels.ops import quantized

from ..ops.quantized_rows import LIVE, outcome, plain_twin, quantized_linear, trained
from . import comparison  # noqa: F401 (skips this module without the interpreter)


@pytest.mark.parametrize("plan", ["activation", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("detach", [True, False])
def test_a_layer(plan: str, dtype: torch.dtype, detach: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "BLOCK_BYTES", 32 * 40 * dtype.itemsize)
    layer, x = trained(quantized_linear(72, 40, dtype), detach_norm=detach), torch.randn(2, 5, 40, dtype=dtype)
    twin = plain_twin(layer)
    layer.forced_plan = twin.forced_plan = plan
    LIVE.now = LIVE.peak = 0
    LAUNCHES.clear()
    with bk.use_backend("triton"):
        found = outcome(layer, x)
        assert LAUNCHES["merged_weight" if plan == "weight" else "compose"] == 3 * (2 if plan == "weight" else 1)
        assert LIVE.now == 0
        assert LIVE.peak == 32 * 40 * dtype.itemsize
        expected = outcome(twin, x)
    # grad_output depends on y, which is rounded; with the weight plan each block has a dither of its own
    allowed = (4 if plan == "activation" else 8) * torch.finfo(dtype).eps
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        assert (got - want).norm() < allowed * want.norm()
