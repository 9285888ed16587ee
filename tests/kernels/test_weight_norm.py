from __future__ import annotations

import pytest
import torch

from bidora_kernels import reference
from bidora_kernels.kernels import _arithmetic
from bidora_kernels.kernels._launch import LAUNCHES
from bidora_kernels.kernels.weight_norm import (
    launch_row_scale,
    launch_weight_norm,
    launch_weight_norm_and_scale,
    launch_weight_norms,
)

from .comparison import DTYPES, TINY_ROW, ZERO_ROW, Layer, assert_mutation_fails, assert_rows_close, make_layer, ordinary_rows

SHAPES = [(72, 104, 1), (133, 150, 3), (104, 72, 16), (65, 257, 64), (90, 130, 100), (1, 1000, 16), (70, 1, 5)]


def check(layer: Layer) -> None:
    got = launch_weight_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
    exact = layer.double()
    expected = reference.weight_norm(exact.weight, exact.lora_A, exact.lora_B, layer.scaling)
    same = reference.weight_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
    bound = None
    if layer.weight.shape[1] == 1:  # a row is one number, in which weight and low rank may cancel
        absolute = exact.absolute()
        bound = reference.weight_norm(absolute.weight, absolute.lora_A, absolute.lora_B, layer.scaling)
    assert got.dtype == torch.float32
    assert_rows_close(got, expected, same, bound=bound)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(make_layer(*shape, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_fp32_adapters_are_not_rounded(dtype: torch.dtype) -> None:
    check(make_layer(72, 200, 16, dtype, torch.float32))


def test_looped_rank_and_split_sum() -> None:
    check(make_layer(40, 1000, 512, torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("r", [1, 3, 16, 64, 100])
@pytest.mark.parametrize("in_features", [72, 104, 1000, 333])
@pytest.mark.parametrize("out_features", [1, 72, 104, 1000, 77])
def test_cross_product(out_features: int, in_features: int, r: int, dtype: torch.dtype) -> None:
    check(make_layer(out_features, in_features, r, dtype))


def test_strided_inputs() -> None:
    layer = make_layer(72, 104, 16, torch.float32)
    expected = launch_weight_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
    wide = torch.randn(72, 300)
    wide[:, 100:204] = layer.weight
    transposed = layer.weight.t().contiguous().t()  # how Conv1D stores it
    for weight in (wide[:, 100:204], transposed):
        for lora_A in (layer.lora_A, layer.lora_A.t().contiguous().t()):
            assert torch.equal(launch_weight_norm(weight, lora_A, layer.lora_B, layer.scaling), expected)


def test_degenerate_rows() -> None:
    layer = make_layer(10, 64, 4, torch.float32)
    norm = launch_weight_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
    assert norm[ZERO_ROW] == 0.0
    assert norm[TINY_ROW] < reference.NORM_FLOOR
    assert _arithmetic.NORM_FLOOR == reference.NORM_FLOOR


@pytest.mark.parametrize("sets", [2, 3])
@pytest.mark.parametrize("r", [3, 100])
def test_several_sets_in_one_pass(sets: int, r: int) -> None:
    layers = [make_layer(90, 130, r, torch.float32, seed=seed) for seed in range(sets)]
    weight, scaling = layers[0].weight, layers[0].scaling
    before = LAUNCHES["weight_norm"]
    got = launch_weight_norms(weight, [(layer.lora_A, layer.lora_B) for layer in layers], scaling)
    assert LAUNCHES["weight_norm"] == before + 1
    for index, layer in enumerate(layers):
        a, b = layer.lora_A, layer.lora_B
        expected = reference.weight_norm(weight.double(), a.double(), b.double(), scaling)
        assert_rows_close(got[index], expected, reference.weight_norm(weight, a, b, scaling))


@pytest.mark.parametrize("out_features", [0, 5])
def test_empty(out_features: int) -> None:
    in_features = 7 if out_features == 0 else 0
    norm = launch_weight_norm(torch.ones(out_features, in_features), torch.ones(2, in_features), torch.ones(out_features, 2), 1.0)
    assert torch.equal(norm, torch.zeros(out_features))


@pytest.mark.parametrize(
    ("weight_factor", "low_rank_factor"), [(0, 1), (-1, 1), (1, 0), (1, -1), (1, 0.999)], ids=lambda value: f"{value:g}"
)
def test_every_term_is_noticed(weight_factor: float, low_rank_factor: float) -> None:
    layer = make_layer(72, 104, 16, torch.bfloat16)
    exact = layer.double()
    got = launch_weight_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
    same = reference.weight_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
    expected = reference.weight_norm(exact.weight, exact.lora_A, exact.lora_B, layer.scaling)
    mutated = reference.weight_norm(weight_factor * exact.weight, exact.lora_A, exact.lora_B, low_rank_factor * layer.scaling)
    assert_mutation_fails(mutated, got, expected, same, ordinary_rows(expected))


def test_row_scale_and_its_mutations() -> None:
    norm = torch.cat([torch.rand(300) + 0.5, torch.tensor([0.0, 0.9e-18, 1.1e-18])])
    magnitude = torch.cat([torch.randn(300) + 2.0, torch.tensor([3.0, 3.0, 3e-18])])
    got, expected = launch_row_scale(magnitude, norm), reference.row_scale(magnitude.double(), norm.double())
    allowed = 2.0**-24 * expected.abs()
    assert ((got - expected).abs() <= allowed).all()
    assert torch.equal(got[300:302], torch.ones(2))
    mutations = [norm / magnitude, magnitude * norm, magnitude, 1.0 / norm, -magnitude / norm, magnitude * 1.00001 / norm]
    for mutated in mutations:
        assert not ((got - mutated.double()).abs() <= allowed)[:300].any()
    below = magnitude.double() / norm.double()  # without the floor
    assert not ((got - below).abs() <= allowed)[300:302].any()


def test_the_scale_beside_the_norm() -> None:
    layer = make_layer(72, 104, 16, torch.float32)
    norm, scale = launch_weight_norm_and_scale(layer.weight, layer.lora_A, layer.lora_B, layer.magnitude, layer.scaling)
    assert torch.equal(scale, launch_row_scale(layer.magnitude, norm))
