"""Quantized weights: the layer and every operation equal those over the dequantized weight, of which no copy is kept."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import bidora_kernels as bk
from bidora_kernels.ops import quantized

from .draws import draw, run, violations
from .quantized_rows import LIVE, RowQuantized, plain_twin, quantized_call, quantized_linear, trained

BACKENDS = ["reference", "auto"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dropped", "detach", "bias"), list(itertools.product([False, True], repeat=3)))
def test_a_call_against_fp64(
    backend: str, dtype: torch.dtype, dropped: bool, detach: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound of every other weight, from the values that the quantized one holds (draws.py)."""
    monkeypatch.setattr(quantized, "BLOCK_BYTES", 7 * 40 * dtype.itemsize)  # seven rows at a time
    call, values = quantized_call(dtype=dtype, dropped=dropped, detach_norm=detach, bias=bias)
    assert violations(values, run(call, backend)) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_term_of_a_call_is_noticed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "BLOCK_BYTES", 7 * 40 * dtype.itemsize)
    call, values = quantized_call(dtype=dtype)
    weight, touched = call.weight, {"y", "x", "lora_A", "lora_B", "magnitude"}
    mutations = {
        "another scale": (dataclasses.replace(call, weight=RowQuantized(2 * values.weight)), touched),
        "rows of the next block": (dataclasses.replace(call, weight=RowQuantized(values.weight.roll(7, 0))), touched),
        "no low rank": (dataclasses.replace(call, scaling=0.0), touched),
        "low rank turned": (dataclasses.replace(call, lora_B=-call.lora_B), touched),
        "no bias": (dataclasses.replace(call, bias=None), {"y"}),
        "scale turned": (dataclasses.replace(call, magnitude=-call.magnitude), touched - {"magnitude"}),
    }
    assert violations(values, run(call, "auto")) == []
    for name, (mutated, terms) in mutations.items():
        broken = {line.split(":")[0] for line in violations(values, run(mutated, "auto"))}
        assert terms <= broken, name
    assert call.weight is weight


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_is_its_call(dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "BLOCK_BYTES", 7 * 40 * dtype.itemsize)
    layer = trained(quantized_linear(24, 40, dtype), lora_dropout=dropout)
    x, leaves = torch.randn(2, 9, 40, dtype=dtype, requires_grad=True), [layer.lora_A, layer.lora_B, layer.magnitude]
    torch.manual_seed(5)
    found = [layer(x)]
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, dropout) if dropout else None
    found.append(bk.functional.dora_linear(x, layer.weight, *leaves, layer.scaling, layer.bias, dropped))
    grad = torch.randn_like(found[0])
    for got, want in zip(*([y.detach(), *torch.autograd.grad(y, [x, *leaves], grad)] for y in found), strict=True):
        assert torch.equal(got, want)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_runs_quantized_layers_as_eager_does(backend: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(trained(quantized_linear(24, 40)), nn.GELU(), nn.Linear(24, 8))
    x, leaves = torch.randn(5, 40, requires_grad=True), [p for p in model.parameters() if p.requires_grad]
    with bk.use_backend(backend):
        compiled = torch.compile(model, backend="aot_eager")
        found = [[y.detach(), *torch.autograd.grad(y.square().sum(), [x, *leaves])] for y in (compiled(x), model(x))]
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="a quantized weight is dequantized block by block"):
            torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        norm = torch.compile(bk.functional.weight_norm, backend="aot_eager")
        terms = (model[0].weight, model[0].lora_A, model[0].lora_B, model[0].scaling)
        assert torch.equal(norm(*terms), bk.functional.weight_norm(*terms))


def test_an_output_overwritten_in_place() -> None:
    layer = trained(quantized_linear(24, 40))
    found = []
    for in_place in (True, False):
        y = layer(torch.ones(3, 40))
        y = y.relu_() if in_place else y.relu()
        found.append(torch.autograd.grad(y.square().sum(), [layer.lora_A, layer.lora_B, layer.magnitude]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_checkpointed_segment_keeps_no_output() -> None:
    layer, alive = trained(quantized_linear(24, 40)), []

    def segment(x: torch.Tensor) -> torch.Tensor:
        y = layer(x)
        alive.append(StorageWeakRef(y.untyped_storage()))
        return y.square().sum()

    loss = checkpoint(segment, torch.ones(3, 40), use_reentrant=False)
    assert alive[0].expired()
    found = torch.autograd.grad(loss, [layer.lora_A, layer.lora_B, layer.magnitude])
    torch.testing.assert_close(
        found, torch.autograd.grad(segment(torch.ones(3, 40)), [layer.lora_A, layer.lora_B, layer.magnitude])
    )


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
    call = dataclasses.replace(draw(out_features=72, in_features=in_features), weight=kind.weight)
    assert violations(dataclasses.replace(call, weight=values), run(call, "auto")) == []
    layer, x = trained(kind), torch.randn(6, in_features)
    torch.testing.assert_close(layer(x), plain_twin(layer)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_torchao(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    monkeypatch.setattr(quantized, "BLOCK_BYTES", 5 * 128 * 4)
    model = nn.Sequential(nn.Linear(128, 72, dtype=torch.bfloat16))
    config = torchao.Int8WeightOnlyConfig() if kind == "int8" else torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)
    torchao.quantize_(model, config)
    weight = model[0].weight
    assert torch.equal(torch.cat([block for _, block in quantized.row_blocks(weight)]), weight.dequantize())
    call = dataclasses.replace(draw(out_features=72, in_features=128, dtype=torch.bfloat16), weight=weight)
    assert violations(dataclasses.replace(call, weight=weight.dequantize()), run(call, "auto")) == []
    trained(model[0])(torch.randn(6, 128, dtype=torch.bfloat16)).sum().backward()
