"""pytest-benchmark entries of the operations: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

import pytest
import torch

import bidora_kernels as bk

pytest.importorskip("pytest_benchmark")
SHAPES = [(768, 768, 4), (1024, 1024, 16), (4096, 4096, 16)]
IDS = [f"{out}x{inner}-r{r}" for out, inner, r in SHAPES]


def _layer(out_features: int, in_features: int, r: int) -> bk.FusedDoraLinear:
    torch.manual_seed(0)
    linear = torch.nn.Linear(in_features, out_features)
    layer = bk.FusedDoraLinear.from_linear(linear, r=r, lora_alpha=2 * r)
    torch.nn.init.normal_(layer.lora_B, std=0.01)
    return layer


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("operation", ["weight_norm", "merged_weight", "normalized_direction"])
def test_weight_operation(benchmark, operation: str, shape: tuple[int, int, int]) -> None:
    layer = _layer(*shape)
    weight, lora_A, lora_B, scaling = layer.direction_terms()
    extra = (layer.magnitude,) if operation == "merged_weight" else ()
    with torch.no_grad():
        result = benchmark(getattr(bk.functional, operation), weight, lora_A, lora_B, *extra, scaling)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("tokens", [1, 128])
def test_layer_eval(benchmark, tokens: int, shape: tuple[int, int, int]) -> None:
    layer, x = _layer(*shape).eval(), torch.randn(tokens, shape[1])
    with torch.no_grad():
        assert torch.isfinite(benchmark(layer, x)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_layer_forward_and_backward(benchmark, shape: tuple[int, int, int]) -> None:
    layer, x, grad = _layer(*shape), torch.randn(128, shape[1], requires_grad=True), torch.randn(128, shape[0])
    inputs = (x, layer.lora_A, layer.lora_B, layer.magnitude)

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer(x), inputs, grad)

    assert all(torch.isfinite(gradient).all() for gradient in benchmark(both))
