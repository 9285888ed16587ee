"""The magnitude's gradient, which the native backend reads off the layer's output where that holds it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import bidora_kernels as bk
from bidora_kernels import native

from .draws import Call, draw, run, violations

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))


@pytest.mark.parametrize("bias_size", [3.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_that_hides_the_rest_of_y(bias_size: float, dtype: torch.dtype) -> None:
    call = draw(6, dtype=dtype, tokens=(64,))
    unbiased = dataclasses.replace(call, bias=None)
    call.bias = torch.full_like(call.bias, bias_size)
    call.bias[::3] = 0
    ours = {"magnitude": run(call, "native")["magnitude"]}  # as accurate as if there were no bias
    assert violations(unbiased, ours) == []


def magnitude_error(call: Call, **options: Any) -> float:
    """The relative error of the magnitude's gradient, of all its numbers."""
    exact = run(call.double(), "reference")["magnitude"]
    return float((run(call, "native", **options)["magnitude"].double() - exact).norm() / exact.norm())


def test_a_bf16_pass_subtracts_the_bias_that_it_added() -> None:
    """The rounding of a bias is the same in every token: in a sum over tokens whose gradients have one sign it does not fade."""
    call = draw(15, 48, 256, 4, (256,))
    call.bias = torch.full_like(call.bias, 1 + 0.499 / 256)  # almost half a unit in the last place of bf16
    call.magnitude *= (256**0.5 / call.magnitude / 16) * 1.5  # rows whose rest is about as large
    call.grad = call.grad.abs()
    errors = []
    for bias in (call.bias, torch.ones_like(call.bias)):
        call.bias = bias
        with torch.autocast("cpu", torch.bfloat16):
            errors.append(magnitude_error(call))
    assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_large_token_without_a_gradient_does_not_hide_what_the_bias_hides(dtype: torch.dtype) -> None:
    call = draw(16, 24, 40, 3, (128,))
    call.bias = torch.ones_like(call.bias)
    call.x *= 1e-3
    call.x[0] *= 1e5
    call.grad[0] = 0
    alone = dataclasses.replace(call, x=call.x[1:], grad=call.grad[1:])
    for drawn in (call, alone):
        for name in ("x", "weight", "bias", "grad"):
            setattr(drawn, name, getattr(drawn, name).to(dtype))
    assert magnitude_error(call) < 2 * magnitude_error(alone) + 1e-6
    assert magnitude_error(alone) < 0.01


@pytest.mark.parametrize("scale", [1e-4, 1e-6, 1e-8, 1e-9])
def test_an_output_below_fp16s_normal_numbers(scale: float) -> None:
    call = draw(17, 24, 40, 3, (64,), torch.float16, bias=False)
    call.magnitude *= scale / 40**0.5
    assert magnitude_error(call) < 2e-3


@pytest.mark.parametrize("bias", [False, True])
def test_an_output_whose_memory_was_freed(bias: bool) -> None:
    call = draw(18, bias=bias)
    magnitude = call.magnitude.requires_grad_()
    found = []
    for frees in (False, True):
        with bk.use_backend("native"):
            y = bk.functional.dora_linear(call.x, call.weight, call.lora_A, call.lora_B, magnitude, call.scaling, call.bias)
        loss = (y * call.grad).sum()
        if frees:
            y.untyped_storage().resize_(0)
        found.append(torch.autograd.grad(loss, magnitude)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-25, -2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_a_magnitude_next_to_zero_keeps_its_gradient(value: float, bias: bool) -> None:
    call = draw(7, bias=bias)
    call.magnitude[::2] = value
    reference = run(call.double(), "reference")["magnitude"]
    torch.testing.assert_close(run(call, "native")["magnitude"].double(), reference, rtol=2e-5, atol=1e-5)
