from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bidora_kernels import reference
from bidora_kernels.kernels._launch import LAUNCHES
from bidora_kernels.kernels.merged_weight import launch_merged_weight

from .comparison import DTYPES, ZERO_ROW, Layer, assert_mutation_fails, assert_rows_close, make_layer, ordinary_rows

SHAPES = [(72, 104, 1), (133, 150, 3), (104, 72, 16), (65, 257, 64), (90, 130, 100), (1, 1000, 16)]


def launch(layer: Layer, **options: object) -> Tensor:
    return launch_merged_weight(layer.weight, layer.lora_A, layer.lora_B, layer.magnitude, layer.scaling, **options)[0]


def merged(layer: Layer) -> Tensor:
    return reference.merged_weight(layer.weight, layer.lora_A, layer.lora_B, layer.magnitude, layer.scaling)


def check(layer: Layer) -> None:
    exact = layer.double()
    got, norm = launch_merged_weight(layer.weight, layer.lora_A, layer.lora_B, layer.magnitude, layer.scaling)
    assert_rows_close(got, merged(exact), merged(layer))
    expected_norm = reference.weight_norm(exact.weight, exact.lora_A, exact.lora_B, layer.scaling)
    assert_rows_close(norm, expected_norm, reference.weight_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(make_layer(*shape, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("r", [1, 3, 16, 64, 100, 512])
@pytest.mark.parametrize("in_features", [72, 104, 1000, 333])
@pytest.mark.parametrize("out_features", [1, 72, 104, 77])
def test_cross_product(out_features: int, in_features: int, r: int, dtype: torch.dtype) -> None:
    check(make_layer(out_features, in_features, r, dtype))


def test_fp32_result_of_a_16_bit_layer_is_not_rounded() -> None:
    layer = make_layer(72, 104, 16, torch.bfloat16, torch.float32)
    exact = layer.double()
    single = Layer(*(getattr(layer, name).float() for name in ("weight", "lora_A", "lora_B", "magnitude", "bias")), layer.scaling)
    got = launch(layer, dtype=torch.float32)
    assert_rows_close(got, merged(exact), merged(single))


def test_a_known_norm_saves_the_pass() -> None:
    layer = make_layer(72, 104, 16, torch.bfloat16)
    expected, norm = launch_merged_weight(layer.weight, layer.lora_A, layer.lora_B, layer.magnitude, layer.scaling)
    before = LAUNCHES["weight_norm"]
    workspace = torch.empty(72, 104, dtype=torch.bfloat16)
    assert torch.equal(launch(layer, norm=norm, output=workspace), expected)
    assert torch.equal(workspace, expected)
    assert LAUNCHES["weight_norm"] == before


def test_strided_weight() -> None:
    layer = make_layer(72, 104, 16, torch.float32)
    expected = launch(layer)
    layer.weight = layer.weight.t().contiguous().t()
    assert torch.equal(launch(layer), expected)


def test_a_zero_row_stays_the_row_of_the_sum() -> None:
    layer = make_layer(72, 104, 16, torch.float32)
    layer.magnitude[ZERO_ROW] = 3.0
    assert torch.equal(launch(layer)[ZERO_ROW], torch.zeros(104))


def hash_bits(count: int, seed: int) -> Tensor:
    mask = 0xFFFFFFFF
    x = torch.arange(count) ^ seed
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_fixed_dither(dtype: torch.dtype, seed: int) -> None:
    layer = make_layer(72, 136, 16, dtype, torch.float32)
    layer.magnitude *= torch.logspace(-6, 1, 72)  # reaches fp16's subnormals
    exact = launch(layer, dtype=torch.float32)
    got = launch(layer, dither_seed=seed)
    assert torch.equal(got, launch(layer, dither_seed=seed))
    mantissa, least = {torch.bfloat16: (7, -133), torch.float16: (10, -24)}[dtype]
    exponent = exact.double().abs().clamp_min(1e-300).log2().floor()
    step = torch.exp2((exponent - mantissa).clamp_min(least))
    uniform = hash_bits(exact.numel(), seed).view_as(exact).double()
    uniform = torch.where(
        (exponent < -14) & (dtype == torch.float16), uniform / 2.0**32, (uniform % 2 ** (23 - mantissa)) / 2 ** (23 - mantissa)
    )

    def share(noise: Tensor | float, sign: float = 1.0) -> float:
        """Of elements that rounding with this noise explains, among those that are not representable."""
        expected = exact.sign() * ((exact.double().abs() / step + noise).floor() * step) * sign
        inexact = exact.double() % step != 0
        return float((got.double() == expected)[inexact].double().mean())

    assert share(uniform) > 0.999  # the uniform's last bits round differently near a boundary
    by_columns = hash_bits(exact.numel(), seed).view(exact.shape[1], exact.shape[0]).t().double()
    mutations = {
        "cut off": 0.0,
        "to nearest": 0.5,
        "another seed": uniform.roll(1, 0),
        "turned": 1.0 - uniform,
        "indexed by columns": (by_columns % 2 ** (23 - mantissa)) / 2 ** (23 - mantissa),
    }
    for name, noise in mutations.items():
        assert share(noise) < 0.9, name
    assert share(uniform, sign=-1.0) < 0.1  # a zero has no sign
    assert ((got.double() - exact.double()).abs() <= step).all()
    assert not torch.equal(got, launch(layer, dither_seed=seed + 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dither_seed", [None, 3])
def test_a_nan_of_a_gpu_stays_one(dtype: torch.dtype, dither_seed: int | None) -> None:
    """All of its 31 lower bits are set: adding to them carries into the sign."""
    layer = make_layer(32, 64, 4, torch.float32)
    layer.weight.view(torch.int32)[3, 5] = 0x7FFFFFFF
    layer.weight[4, 6], layer.weight[5, 7] = torch.inf, -torch.inf
    norm = torch.ones(32)
    got = launch(layer, norm=norm, dtype=dtype, dither_seed=dither_seed)
    assert bool(got[3, 5].isnan())
    assert int(got.isnan().sum()) == 1
    assert (got[4, 6] * layer.magnitude[4].sign(), got[5, 7] * layer.magnitude[5].sign()) == (torch.inf, -torch.inf)


def test_dither_lets_a_small_change_through() -> None:
    layer = make_layer(64, 256, 16, torch.bfloat16, torch.float32, degenerate_rows=False)
    layer.lora_B *= 1e-5
    layer.magnitude = reference.weight_norm(layer.weight.double(), layer.lora_A, layer.lora_B, layer.scaling).float()
    x = torch.randn(256, 512).double()
    changed = merged(layer.double())
    unchanged = layer.weight.double()
    true_change = (changed - unchanged) @ x
    zero = Layer(
        layer.weight,
        layer.lora_A,
        0 * layer.lora_B,
        reference.weight_norm(layer.weight, layer.lora_A, 0 * layer.lora_B, 1.3),
        layer.bias,
        1.3,
    )

    def surviving(**options: object) -> float:
        change = (launch(layer, **options).double() - launch(zero, **options).double()) @ x
        return float((change * true_change).sum() / true_change.square().sum())

    assert surviving() < 0.5
    assert abs(surviving(dither_seed=3) - 1.0) < 0.5
    assert surviving(dtype=torch.float32) == pytest.approx(1.0, abs=0.01)


MUTATIONS = {
    "no weight": lambda layer: Layer(0 * layer.weight, layer.lora_A, layer.lora_B, layer.magnitude, layer.bias, layer.scaling),
    "no low rank": lambda layer: Layer(layer.weight, layer.lora_A, layer.lora_B, layer.magnitude, layer.bias, 0.0),
    "low rank turned": lambda layer: Layer(layer.weight, layer.lora_A, -layer.lora_B, layer.magnitude, layer.bias, layer.scaling),
    "magnitude turned": lambda layer: Layer(
        layer.weight, layer.lora_A, layer.lora_B, -layer.magnitude, layer.bias, layer.scaling
    ),
    "magnitude off by 2^-6": lambda layer: Layer(
        layer.weight, layer.lora_A, layer.lora_B, layer.magnitude * (1 + 2.0**-6), layer.bias, layer.scaling
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_term_is_noticed(mutation: str, dtype: torch.dtype) -> None:
    layer = make_layer(72, 104, 16, dtype)
    exact = layer.double()
    rows = ordinary_rows(reference.weight_norm(exact.weight, exact.lora_A, exact.lora_B, layer.scaling))
    assert_mutation_fails(merged(MUTATIONS[mutation](exact)), launch(layer), merged(exact), merged(layer), rows)


def test_no_norm_is_noticed() -> None:
    layer = make_layer(72, 104, 16, torch.bfloat16)
    exact = layer.double()
    norm = reference.weight_norm(exact.weight, exact.lora_A, exact.lora_B, layer.scaling)
    without = exact.magnitude[:, None] * reference.direction(exact.weight, exact.lora_A, exact.lora_B, layer.scaling)
    assert_mutation_fails(without, launch(layer), merged(exact), merged(layer), ordinary_rows(norm))
