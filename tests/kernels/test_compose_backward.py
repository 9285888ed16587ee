from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from bidora_kernels.kernels._launch import LAUNCHES
from bidora_kernels.kernels.compose_backward import ComposeGradients, launch_compose_backward
from bidora_kernels.kernels.weight_norm import launch_row_scale

from .comparison import DTYPES, assert_mutation_fails, assert_rows_close
from .compose_cases import Case, make_case, reference_results

SHAPES = [(77, 133, 1), (64, 72, 3), (1, 104, 16), (70, 1000, 16), (33, 90, 64), (65, 130, 100), (3, 1, 2)]


def launch(case: Case, **options: object) -> ComposeGradients:
    """The gradients with fp32 results, so that only the arithmetic is compared; grad_base keeps grad_output's dtype."""
    options.setdefault("base", case.base if case.base_dropped is None else case.base_dropped)
    options.setdefault("hidden_dtype", torch.float32)
    return launch_compose_backward(
        case.grad_output, case.hidden, case.lora_B, launch_row_scale(case.magnitude, case.norm), case.norm, case.scaling,
        dropped=case.base_dropped is not None, **options,
    )  # fmt: skip


def check(case: Case, operand: torch.dtype | None = None) -> None:
    """operand: the dtype to which the operands of grad_hidden's product are rounded."""
    got = launch(case)
    exact = case.to(torch.float64)
    expected, same, bound = reference_results(exact), reference_results(case), reference_results(exact.absolute())
    if case.base_dropped is None:
        assert_rows_close(got.base, expected.base, same.base)
    else:
        assert_rows_close(got.base, expected.dropped, same.dropped)
    assert_rows_close(got.hidden, expected.hidden, same.hidden, operand or case.hidden.dtype, bound.hidden)
    assert_rows_close(got.lora_B, expected.lora_B, same.lora_B, bound=bound.lora_B)
    rounded = torch.float32 if case.lora_B.dtype == case.hidden.dtype else case.hidden.dtype
    assert_rows_close(got.magnitude, expected.magnitude, same.magnitude, rounded, bound.magnitude)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(make_case(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("r", [3, 100])
def test_dropout(r: int, dtype: torch.dtype) -> None:
    check(make_case(65, 104, r, dtype, dropped=True))


def test_mixed_dtypes() -> None:
    check(make_case(65, 104, 16, torch.bfloat16, adapter_dtype=torch.float32))
    check(make_case(65, 104, 16, torch.bfloat16, base_dtype=torch.float32, hidden_dtype=torch.float32))


def test_a_small_scaling_does_not_underflow_in_fp16() -> None:
    """What is rounded to fp16 is c * lora_B without scaling: a low-rank product that starts near 0 keeps its gradient."""
    case = make_case(65, 104, 16, torch.float16)
    case = dataclasses.replace(case, lora_B=torch.randn(104, 16) * 1e-4, scaling=0.01, magnitude=case.norm.clone())
    exact = reference_results(case.to(torch.float64)).hidden
    got = launch(case).hidden
    assert got is not None
    assert (got.double() - exact).norm() < 2e-3 * exact.norm()


def test_rank_512() -> None:
    check(make_case(20, 72, 512, torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dropped", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("r", [1, 3, 16, 64, 100])
@pytest.mark.parametrize("out_features", [1, 72, 104, 1000, 77])
@pytest.mark.parametrize("tokens", [1, 64, 77, 200])
def test_cross_product(tokens: int, out_features: int, r: int, dropped: bool, dtype: torch.dtype) -> None:
    check(make_case(tokens, out_features, r, dtype, dropped=dropped))


@pytest.mark.parametrize("r", [3, 100])
def test_each_flag_skips_its_work(r: int) -> None:
    case = make_case(70, 90, r, torch.float32)
    full = launch(case)
    for wanted in itertools.product([False, True], repeat=4):
        names = ("base", "hidden", "lora_B", "magnitude")
        flags = {f"needs_{name}": want for name, want in zip(names, wanted, strict=True)}
        before = LAUNCHES["compose_backward"]
        got = launch(case, base=case.base if flags["needs_magnitude"] else None, **flags)
        for name, want in zip(names, wanted, strict=True):
            value = getattr(got, name)
            assert (value is not None) == want
            if want:
                torch.testing.assert_close(value, getattr(full, name), rtol=2e-6, atol=1e-6)
        if not any(wanted):
            assert LAUNCHES["compose_backward"] == before


@pytest.mark.parametrize("bias", [False, True])
def test_magnitude_gradient_from_the_output(bias: bool) -> None:
    case = make_case(70, 90, 16, torch.float32, bias=bias)
    exact = case.to(torch.float64)
    expected, same, bound = reference_results(exact), reference_results(case), reference_results(exact.absolute())
    got = launch(case, base=None, output=same.output, magnitude=case.magnitude, bias=case.bias).magnitude
    # the subtraction of the bias rounds relative to |output| + |bias|, and the quotient divides that by the scale
    scale = (exact.magnitude / exact.norm).abs()
    extra = (exact.grad_output.abs() * (same.output.double().abs() + (case.bias.double().abs() if bias else 0))).sum(0)
    rows = exact.norm >= 1e-18
    assert_rows_close(
        got[rows], expected.magnitude[rows], same.magnitude[rows], bound=(bound.magnitude + extra / scale / exact.norm)[rows]
    )


def test_strided_and_expanded_inputs() -> None:
    case = make_case(65, 104, 16, torch.float32)
    case = case.replace(grad_output=torch.ones(1, 1).expand(65, 104))
    expected = launch(case.replace(grad_output=torch.ones(65, 104)))
    joined = torch.cat([case.base, case.hidden], dim=1)
    got = launch(case.replace(base=joined[:, :104], hidden=joined[:, 104:], lora_B=case.lora_B.t().contiguous().t()))
    for name in ("base", "hidden", "lora_B", "magnitude"):
        assert torch.equal(getattr(got, name), getattr(expected, name))


def test_no_tokens_gives_zero_parameter_gradients() -> None:
    got = launch(make_case(0, 72, 4, torch.float32))
    assert got.base.shape == (0, 72)
    assert got.hidden.shape == (0, 4)
    assert torch.equal(got.lora_B, torch.zeros(72, 4))
    assert torch.equal(got.magnitude, torch.zeros(72))


MUTATIONS = {
    "no grad_output": ("base", "hidden", "lora_B", "magnitude", lambda case: case.replace(grad_output=0 * case.grad_output)),
    "no scale": ("base", "hidden", "lora_B", lambda case: case.replace(magnitude=case.norm)),
    "scale turned": ("base", "hidden", "lora_B", lambda case: case.replace(magnitude=-case.magnitude)),
    "no scaling": ("hidden", "lora_B", lambda case: case.replace(scaling=1.0)),
    "scaling turned": ("hidden", "lora_B", lambda case: case.replace(scaling=-case.scaling)),
    "no low rank": ("magnitude", lambda case: case.replace(scaling=0.0)),
    "low rank turned": ("magnitude", lambda case: case.replace(hidden=-case.hidden)),
    "no base": ("magnitude", lambda case: case.replace(base=0 * case.base)),
    "no norm": ("magnitude", lambda case: case.replace(norm=torch.ones_like(case.norm))),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_term_is_noticed(dtype: torch.dtype) -> None:
    case = make_case(33, 104, 16, dtype)
    got, exact = launch(case), case.to(torch.float64)
    expected, same, bound = reference_results(exact), reference_results(case), reference_results(exact.absolute())
    ordinary = exact.norm >= 1e-18
    for mutation, (*touched, mutate) in MUTATIONS.items():
        mutated = reference_results(mutate(exact))
        for name in touched:
            rounded = {"base": None, "hidden": dtype}.get(name, torch.float32)
            limits = None if name == "base" else getattr(bound, name)
            rows = ordinary if name in ("lora_B", "magnitude") else None
            values = [getattr(results, name) for results in (mutated, got, expected, same)]
            try:
                assert_mutation_fails(*values, rows=rows, dtype=rounded, bound=limits)
            except AssertionError as error:
                raise AssertionError(f"{mutation}, grad_{name}: {error}") from error


def test_the_dropout_form_is_noticed() -> None:
    case = make_case(33, 104, 16, torch.bfloat16, dropped=True)
    got, exact = launch(case), case.to(torch.float64)
    expected, same, bound = reference_results(exact), reference_results(case), reference_results(exact.absolute())
    without = reference_results(exact.replace(base_dropped=None))
    assert_mutation_fails(without.base, got.base, expected.dropped, same.dropped)
    assert_mutation_fails(
        without.magnitude, got.magnitude, expected.magnitude, same.magnitude, exact.norm >= 1e-18, bound=bound.magnitude
    )
