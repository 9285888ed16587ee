from __future__ import annotations

import pytest
import torch

from bidora_kernels import reference
from bidora_kernels.kernels._launch import LAUNCHES
from bidora_kernels.kernels.compose import launch_compose
from bidora_kernels.kernels.weight_norm import launch_row_scale

from .comparison import DTYPES, TINY_ROW, ZERO_ROW, assert_mutation_fails, assert_rows_close
from .compose_cases import Case, make_case, reference_results

SHAPES = [(77, 133, 1), (64, 72, 3), (1, 104, 16), (65, 1000, 16), (33, 90, 64), (40, 130, 100), (3, 1, 2)]


def launch(case: Case, **options: object) -> torch.Tensor:
    scale = launch_row_scale(case.magnitude, case.norm)
    return launch_compose(case.base, case.hidden, case.lora_B, scale, case.scaling, case.bias, case.base_dropped, **options)


def size(case: Case) -> torch.Tensor:
    """The output as a sum over absolute values."""
    exact = case.to(torch.float64).absolute()
    scale = reference.row_scale(exact.magnitude, exact.norm)
    base = scale * exact.base if exact.base_dropped is None else exact.base + (scale + 1.0) * exact.base_dropped
    return base + scale * exact.scaling * exact.hidden @ exact.lora_B.T + (0.0 if exact.bias is None else exact.bias)


def check(case: Case) -> None:
    got = launch(case)
    expected, same = reference_results(case.to(torch.float64)).output, reference_results(case).output
    # a row of one number, in which the terms may cancel
    assert_rows_close(got, expected, same, bound=size(case) if case.base.shape[1] == 1 else None)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(make_case(*shape, dtype, bias=shape[2] != 16))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dropout(dtype: torch.dtype) -> None:
    check(make_case(65, 104, 16, dtype, dropped=True))
    check(make_case(3, 70, 100, dtype, dropped=True, bias=False))


def test_rank_512() -> None:
    check(make_case(20, 72, 512, torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dropped", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("r", [1, 3, 16, 64, 100])
@pytest.mark.parametrize("out_features", [1, 72, 104, 1000, 77])
@pytest.mark.parametrize("tokens", [1, 64, 77])
def test_cross_product(tokens: int, out_features: int, r: int, dropped: bool, dtype: torch.dtype) -> None:
    check(make_case(tokens, out_features, r, dtype, dropped=dropped, bias=r % 2 == 0))


def test_the_precise_path_rounds_nothing() -> None:
    case = make_case(65, 104, 16, torch.bfloat16, base_dtype=torch.float32, hidden_dtype=torch.float32)
    check(case)
    assert launch(case).dtype == torch.float32


def test_fp32_adapters_meet_a_16_bit_hidden() -> None:
    case = make_case(65, 104, 16, torch.bfloat16, adapter_dtype=torch.float32)
    check(case)
    rounded = case.replace(lora_B=case.lora_B.bfloat16())
    assert torch.equal(launch(case), launch(rounded))


def test_in_place_and_into_a_given_output() -> None:
    case = make_case(65, 104, 3, torch.bfloat16)
    expected = launch(case)
    wide = torch.full((65, 200), torch.nan, dtype=torch.bfloat16)
    launch(case, output=wide[:, 8:112])
    assert torch.equal(wide[:, 8:112], expected)
    assert wide[:, :8].isnan().all()
    assert wide[:, 112:].isnan().all()
    assert launch(case, output=case.base) is case.base
    assert torch.equal(case.base, expected)


def test_strided_inputs() -> None:
    case = make_case(65, 104, 16, torch.float32)
    expected = launch(case)
    joined = torch.cat([case.base, case.hidden], dim=1)
    views = case.replace(base=joined[:, :104], hidden=joined[:, 104:], lora_B=case.lora_B.t().contiguous().t())
    assert torch.equal(launch(views), expected)
    every_second = torch.stack([case.bias, case.bias], dim=1)[:, 0]
    assert torch.equal(launch(case.replace(bias=every_second)), expected)


def test_no_tokens() -> None:
    before = LAUNCHES["compose"]
    assert launch(make_case(0, 72, 4, torch.float32)).shape == (0, 72)
    assert LAUNCHES["compose"] == before


def test_degenerate_rows_keep_scale_one() -> None:
    case = make_case(9, 20, 4, torch.float32, bias=False)
    unscaled = case.base + case.scaling * case.hidden @ case.lora_B.T
    torch.testing.assert_close(launch(case)[:, [ZERO_ROW, TINY_ROW]], unscaled[:, [ZERO_ROW, TINY_ROW]])


MUTATIONS = {
    "no base": lambda case: case.replace(base=0 * case.base),
    "base turned": lambda case: case.replace(base=-case.base),
    "no low rank": lambda case: case.replace(scaling=0.0),
    "low rank turned": lambda case: case.replace(scaling=-case.scaling),
    "no bias": lambda case: case.replace(bias=None),
    "bias turned": lambda case: case.replace(bias=-case.bias),
    "no scale": lambda case: case.replace(magnitude=case.norm),
    "scale turned": lambda case: case.replace(magnitude=-case.magnitude),
    "scale rounded": lambda case: case.replace(magnitude=case.magnitude * (1 + 2.0**-6)),
}
DROPOUT_MUTATIONS = {
    **{name: MUTATIONS[name] for name in ("no base", "base turned", "no low rank", "low rank turned", "no bias", "no scale")},
    "no dropped base": lambda case: case.replace(base_dropped=0 * case.base),
    "dropped base turned": lambda case: case.replace(base_dropped=-case.base_dropped),
    "bases exchanged": lambda case: case.replace(base=case.base_dropped, base_dropped=case.base),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dropped", [False, True], ids=["plain", "dropout"])
def test_every_term_is_noticed(dropped: bool, dtype: torch.dtype) -> None:
    case = make_case(33, 104, 16, dtype, dropped=dropped)
    got, exact = launch(case), case.to(torch.float64)
    expected, same = reference_results(exact).output, reference_results(case).output
    for name, mutate in (DROPOUT_MUTATIONS if dropped else MUTATIONS).items():
        try:
            assert_mutation_fails(reference_results(mutate(exact)).output, got, expected, same)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
