"""Offsets beyond 2^31 elements, in a sparse file of which only the rows that are used take memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bidora_kernels.kernels.compose import launch_compose
from bidora_kernels.kernels.compose_backward import launch_compose_backward
from bidora_kernels.kernels.direction_backward import launch_down_gradient, launch_row_projection
from bidora_kernels.kernels.merged_weight import launch_merged_weight
from bidora_kernels.kernels.weight_norm import launch_weight_norm
from bidora_kernels.kernels.weight_norm_factors import launch_weight_norm_factors

from ..sparse import far_rows
from .comparison import make_layer
from .compose_cases import make_case


@pytest.mark.parametrize("name", ["weight_norm", "merged_weight", "weight_norm_factors", "down_gradient", "row_projection"])
def test_rows_of_a_weight(name: str, tmp_path: Path) -> None:
    layer, grad = make_layer(5, 40, 3, torch.bfloat16, degenerate_rows=False), torch.randn(5, 40).bfloat16()
    adapter = (layer.lora_A, layer.lora_B)

    def results(weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        if name == "weight_norm":
            return (launch_weight_norm(weight, *adapter, 1.3),)
        if name == "merged_weight":
            return launch_merged_weight(weight, *adapter, layer.magnitude, 1.3)
        if name == "weight_norm_factors":
            return launch_weight_norm_factors(weight, *adapter, 1.3)
        if name == "row_projection":
            return launch_row_projection(weight, *adapter, 1.3, grad)
        return (launch_down_gradient(weight, *adapter, 1.3, layer.lora_B.float(), grad, layer.magnitude),)

    stride = 2**29 + 8
    found = results(far_rows(layer.weight, stride, tmp_path / "weight"), far_rows(grad, stride, tmp_path / "grad"))
    for got, want in zip(found, results(layer.weight, grad), strict=True):
        assert torch.equal(got, want)


def test_tokens_of_an_activation(tmp_path: Path) -> None:
    """Several tiles of tokens: the offset of the last one needs 64 bits."""
    case, stride = make_case(70, 40, 3, torch.bfloat16), 2**25
    base, grad = far_rows(case.base, stride, tmp_path / "base"), far_rows(case.grad_output, stride, tmp_path / "grad")
    scale = case.magnitude / case.norm.clamp_min(1e-3)
    expected = launch_compose(case.base, case.hidden, case.lora_B, scale, 0.8, case.bias)
    near, distant = (
        launch_compose_backward(g, case.hidden, case.lora_B, scale, case.norm, 0.8, base=b)
        for g, b in ((case.grad_output, case.base), (grad, base))
    )
    for name in ("base", "hidden", "lora_B", "magnitude"):
        assert torch.equal(getattr(distant, name), getattr(near, name)), name
    assert launch_compose(base, case.hidden, case.lora_B, scale, 0.8, case.bias, output=base) is base
    assert torch.equal(base, expected)
