"""Quantized weights: the layer and every operation equal those over the dequantized weight, of which no copy is kept."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import bidora_kernels as bk
from bidora_kernels.ops import quantized

from .quantized_rows import LIVE, outcome, plain_twin, quantized_linear, trained

BACKENDS = ["reference", "auto"]


def assert_equal_outcomes(layer: bk.FusedDoraLinear, x: torch.Tensor, backend: str) -> None:
    twin = plain_twin(layer)
    with bk.use_backend(backend):
        for got, want in zip(outcome(layer, x), outcome(twin, x), strict=True):
            assert got.dtype == want.dtype
            eps = torch.finfo(want.dtype).eps
            torch.testing.assert_close(got, want, rtol=8 * eps, atol=32 * eps * float(want.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dropout", "detach", "bias"), list(itertools.product([0.0, 0.4], [True, False], [True, False])))
def test_a_layer(
    backend: str, dtype: torch.dtype, dropout: float, detach: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "BLOCK_BYTES", 7 * 40 * dtype.itemsize)  # seven rows at a time
    layer = trained(quantized_linear(24, 40, dtype, bias), lora_dropout=dropout, detach_norm=detach)
    assert_equal_outcomes(layer, torch.randn(2, 9, 40, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["weight_norm", "normalized_direction", "merged_weight", "orthogonality_penalty"])
def test_operations(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "BLOCK_BYTES", 7 * 40 * 4)
    layer = trained(quantized_linear(24, 40))
    leaves = [layer.lora_A, layer.lora_B] + ([layer.magnitude] if name == "merged_weight" else [])
    found = []
    with bk.use_backend(backend):
        for weight in (layer.weight, layer.direction_terms()[0]):
            value = getattr(bk.functional, name)(weight, *leaves, layer.scaling)
            torch.manual_seed(1)
            found.append([value.detach(), *torch.autograd.grad((value * torch.randn_like(value)).sum(), leaves)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_one_block_at_a_time_is_alive(training: bool, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    block = 7 * 40 * 4
    monkeypatch.setattr(quantized, "BLOCK_BYTES", block)
    LIVE.now = LIVE.peak = 0
    layer = trained(quantized_linear(70, 40), lora_dropout=dropout).train(training)
    for _ in range(2):
        y = layer(torch.randn(8, 40, requires_grad=True))
        assert LIVE.now == 0  # nothing is kept for the backward
        y.sum().backward()
    layer.merged_weight()
    layer.to_linear()
    with torch.no_grad():
        layer(torch.randn(3, 40))
    assert LIVE.peak == block
    assert LIVE.now == 0


def test_an_output_overwritten_in_place() -> None:
    layer = trained(quantized_linear(24, 40))
    found = []
    for in_place in (True, False):
        y = layer(torch.ones(3, 40))
        y = y.relu_() if in_place else y.relu()
        found.append(torch.autograd.grad(y.square().sum(), [layer.lora_A, layer.lora_B, layer.magnitude]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_a_quantized_layer_can_and_cannot_do() -> None:
    layer = trained(quantized_linear(24, 40))
    linear, x = layer.to_linear(), torch.randn(3, 40)
    torch.testing.assert_close(linear(x), layer(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="int8 rows of a test cannot hold the merged weight"):
        layer.merge()
    lora_A = layer.lora_A
    if layer.plan(3).name != "reference":
        grad = torch.autograd.grad(layer(x).square().sum(), lora_A, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
            torch.autograd.grad(grad.sum(), lora_A)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 40\]"):
        layer(torch.randn(3, 41))


def test_the_norm_cache_follows_a_quantized_layer() -> None:
    layer = trained(quantized_linear(24, 40)).eval()
    x = torch.randn(3, 40)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
        layer.lora_B.mul_(2.0)
        torch.testing.assert_close(layer(x), plain_twin(layer)(x), rtol=1e-5, atol=1e-5)


def test_apply_dora_takes_quantized_layers() -> None:
    model = nn.Sequential(quantized_linear(24, 40), nn.ReLU(), nn.Linear(24, 8))
    report = bk.apply_dora(model, bk.DoraConfig(r=2, target_modules=["0", "2"]))
    assert report.replaced == ["0", "2"]
    model(torch.randn(2, 40)).sum().backward()
    merged = bk.merge_and_unload(model)
    assert type(merged[0]) is nn.Linear


@pytest.mark.parametrize("double", [False, True], ids=["", "double quantization"])
@pytest.mark.parametrize("in_features", [128, 96])
def test_bitsandbytes(in_features: int, double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(quantized, "BLOCK_BYTES", 5 * 128 * 4)
    kind = library.nn.Linear4bit(in_features, 72, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=double)
    kind = kind.to("cpu")
    values = library.functional.dequantize_4bit(kind.weight.data, kind.weight.quant_state).reshape(72, in_features)
    pieces = torch.cat([block for _, block in quantized.row_blocks(kind.weight)])
    assert torch.equal(pieces, values)
    assert torch.equal(quantized.dequantized(kind.weight), values)
    assert_equal_outcomes(trained(kind), torch.randn(6, in_features), "auto")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_torchao(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    monkeypatch.setattr(quantized, "BLOCK_BYTES", 5 * 128 * 4)
    model = nn.Sequential(nn.Linear(128, 72, dtype=torch.bfloat16))
    config = torchao.Int8WeightOnlyConfig() if kind == "int8" else torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)
    torchao.quantize_(model, config)
    weight = model[0].weight
    assert torch.equal(torch.cat([block for _, block in quantized.row_blocks(weight)]), weight.dequantize())
    assert_equal_outcomes(trained(model[0]), torch.randn(6, 128, dtype=torch.bfloat16), "auto")
