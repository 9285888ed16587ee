"""weight_norm_factors, weight_norm_backward, normalized_direction and merged_weight with their gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bidora_kernels import reference
from bidora_kernels.kernels.merged_weight import launch_merged_weight
from bidora_kernels.kernels.normalized_direction import (
    launch_merged_weight_backward,
    launch_normalized_direction,
    launch_normalized_direction_backward,
)
from bidora_kernels.kernels.weight_norm_backward import launch_weight_norm_backward
from bidora_kernels.kernels.weight_norm_factors import CANCELLATION, launch_weight_norm_factors

from .comparison import DTYPES, Layer, assert_mutation_fails, assert_rows_close, make_layer, ordinary_rows

SHAPES = [(72, 104, 1), (133, 150, 3), (104, 72, 16), (1, 200, 16), (40, 72, 64), (65, 90, 100)]
VANISHING, EXACT_ZERO, DROWNED = 5, 6, 7  # rows of make_cancelling_layer


def direction(layer: Layer) -> tuple[Tensor, Tensor, Tensor, float]:
    return layer.weight, layer.lora_A, layer.lora_B, layer.scaling


def gradients(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], layer: Layer, grad: Tensor) -> list[Tensor]:
    """Gradients of sum(grad * function) with respect to lora_A, lora_B and magnitude, in the norm's dtype."""
    dtype = reference.norm_dtype(layer.weight)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (layer.lora_A, layer.lora_B, layer.magnitude)]
    value = function(layer.weight.to(dtype), *leaves)
    results = torch.autograd.grad(value, leaves, grad.to(value.dtype), allow_unused=True)
    return [torch.zeros_like(leaf) if result is None else result for leaf, result in zip(leaves, results, strict=True)]


def norm_of(scaling: float) -> Callable[..., Tensor]:
    return lambda weight, lora_A, lora_B, magnitude: reference.weight_norm(weight, lora_A, lora_B, scaling)


def unit_of(scaling: float) -> Callable[..., Tensor]:
    return lambda weight, lora_A, lora_B, magnitude: reference.normalized_direction(weight, lora_A, lora_B, scaling)


def merged_of(scaling: float) -> Callable[..., Tensor]:
    return lambda weight, lora_A, lora_B, magnitude: reference.merged_weight(weight, lora_A, lora_B, magnitude, scaling)


def bounds(layer: Layer, dV: Tensor) -> tuple[Tensor, Tensor]:
    """What the rounding errors of grad_lora_A and grad_lora_B scale with, for terms of dV of this size [out, in]."""
    exact = layer.double().absolute()
    return layer.scaling * exact.lora_B.T @ dV, layer.scaling * dV @ exact.lora_A.T


def sizes(layer: Layer, grad: Tensor, magnitude: Tensor | None) -> Tensor:
    """|alpha g| + |beta V| per element, for the direction (magnitude None) or the merged weight."""
    exact = layer.double()
    norm = reference.weight_norm(*direction(exact))
    above = norm >= reference.NORM_FLOOR
    inverse = torch.where(above, 1.0 / norm, 0.0)
    updated = reference.direction(*direction(exact))
    alpha = inverse if magnitude is None else torch.where(above, magnitude.double().abs() * inverse, 1.0)
    beta = alpha * inverse**2 * (grad.double() * updated).abs().sum(1)
    return alpha[:, None] * grad.double().abs() + beta[:, None] * updated.abs()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    layer = make_layer(*shape, dtype)
    exact = layer.double()
    norm, weight_projection, projection = launch_weight_norm_factors(*direction(layer))
    absolute = exact.absolute()
    size = absolute.weight + layer.scaling * absolute.lora_B @ absolute.lora_A
    assert_rows_close(
        norm, reference.weight_norm(*direction(exact)), reference.weight_norm(*direction(layer)), bound=size.norm(dim=1)
    )
    single = [tensor.float() for tensor in (layer.weight, layer.lora_A)]
    assert_rows_close(
        weight_projection, exact.weight @ exact.lora_A.T, single[0] @ single[1].T, bound=absolute.weight @ absolute.lora_A.T
    )
    updated = reference.direction(*direction(layer))
    expected = reference.direction(*direction(exact)) @ exact.lora_A.T
    assert_rows_close(projection, expected, updated @ single[1].T, bound=size @ absolute.lora_A.T)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_term_of_the_factors_is_noticed(dtype: torch.dtype) -> None:
    layer = make_layer(72, 104, 16, dtype)
    exact, absolute, s = layer.double(), layer.double().absolute(), layer.scaling
    norm, weight_projection, projection = launch_weight_norm_factors(*direction(layer))
    u, b, gram = exact.weight @ exact.lora_A.T, exact.lora_B, exact.lora_A @ exact.lora_A.T
    terms = {
        "weight": exact.weight.square().sum(1), "cross": 2 * s * (b * u).sum(1), "low rank": s * s * ((b @ gram) * b).sum(1),
    }  # fmt: skip
    expected, same = reference.weight_norm(*direction(exact)), reference.weight_norm(*direction(layer))
    torch.testing.assert_close(sum(terms.values()).clamp_min(0).sqrt(), expected, rtol=1e-6, atol=1e-9)
    size = absolute.weight + s * absolute.lora_B @ absolute.lora_A
    rows = ordinary_rows(expected)
    for name in terms:
        for factor in (0.0, -1.0):
            squared = sum(terms.values()) + (factor - 1.0) * terms[name]
            mutated = squared.clamp_min(0).sqrt()
            # in a row whose cross term happens to be small the norm hardly depends on it
            assert_mutation_fails(mutated, norm, expected, same, rows, bound=size.norm(dim=1), share=0.8)
    want = u + s * b @ gram
    single = [tensor.float() for tensor in (layer.weight, layer.lora_A)]
    other = reference.direction(*direction(layer)) @ single[1].T
    for mutated in (u, s * b @ gram, u - s * b @ gram, s * b @ gram - u, u + b @ gram):
        assert_mutation_fails(mutated, projection, want, other, rows, bound=size @ absolute.lora_A.T)
    for mutated in (0 * u, -u, want):
        limit = absolute.weight @ absolute.lora_A.T
        assert_mutation_fails(mutated, weight_projection, u, single[0] @ single[1].T, rows, bound=limit)


def make_cancelling_layer(dtype: torch.dtype) -> Layer:
    """Rows where V is 0.1 % of weight, exactly 0, and where lora_B dominates."""
    layer = make_layer(72, 104, 16, torch.float32, degenerate_rows=False)
    layer.lora_A[0] = torch.eye(104)[3]
    layer.lora_A = layer.lora_A.to(dtype).float()
    layer.lora_B = layer.lora_B.to(dtype).float()
    layer.scaling = 0.5
    product = layer.scaling * layer.lora_B @ layer.lora_A
    layer.weight[VANISHING] = -product[VANISHING] * 1.001
    layer.lora_B[EXACT_ZERO] = torch.eye(16)[0] * 2.0
    layer.weight[EXACT_ZERO] = -torch.eye(104)[3]
    layer.weight[DROWNED] *= 1e-3
    layer.weight, layer.lora_A, layer.lora_B = (t.to(dtype) for t in (layer.weight, layer.lora_A, layer.lora_B))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_that_cancel_take_the_direct_sum(dtype: torch.dtype) -> None:
    layer = make_cancelling_layer(dtype)
    exact = layer.double()
    expected = reference.weight_norm(*direction(exact))
    norm, _, projection = launch_weight_norm_factors(*direction(layer))
    assert expected[VANISHING] < CANCELLATION**0.5 * exact.weight[VANISHING].norm()
    assert norm[EXACT_ZERO] == 0.0
    assert torch.equal(projection[EXACT_ZERO], torch.zeros(16))
    # V itself rounds relative to weight, which is all that the direct sum may lose
    absolute = exact.absolute()
    size = (absolute.weight + layer.scaling * absolute.lora_B @ absolute.lora_A).norm(dim=1)
    assert_rows_close(norm, expected, reference.weight_norm(*direction(layer)), bound=size)
    # and it is far better than the expansion, which loses relative to weight squared
    u = layer.weight.float() @ layer.lora_A.float().T
    gram = layer.lora_A.float() @ layer.lora_A.float().T
    b = layer.lora_B.float()
    expanded = layer.weight.float().square().sum(1) + layer.scaling * (b * (2 * u + layer.scaling * b @ gram)).sum(1)
    error = (expanded.clamp_min(0).sqrt().double() - expected).abs()
    if dtype == torch.float32:
        assert (norm[VANISHING].double() - expected[VANISHING]).abs() < 0.1 * error[VANISHING]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_norm_backward(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    layer, grad = make_layer(*shape, dtype), torch.randn(shape[0])
    exact = layer.double()
    norm, _, projection = launch_weight_norm_factors(*direction(layer))
    grad_A, grad_B = launch_weight_norm_backward(grad, norm, projection, *direction(layer))
    expected, same = gradients(norm_of(1.3), exact, grad), gradients(norm_of(1.3), layer, grad)
    row_norm = reference.weight_norm(*direction(exact))
    beta = torch.where(ordinary_rows(row_norm), grad.double().abs() / row_norm, 0.0)
    absolute = exact.absolute()
    size = beta[:, None] * (absolute.weight + layer.scaling * absolute.lora_B @ absolute.lora_A)
    bound_A, bound_B = bounds(layer, size)
    assert_rows_close(grad_A, expected[0], same[0], bound=bound_A)
    assert_rows_close(grad_B, expected[1], same[1], bound=bound_B)
    mutated = gradients(norm_of(-1.3), exact, grad)
    assert_mutation_fails(mutated[0], grad_A, expected[0], same[0], bound=bound_A)
    rows = ordinary_rows(row_norm)
    without_weight = Layer(0 * exact.weight, exact.lora_A, exact.lora_B, exact.magnitude, exact.bias, 1.3)
    no_weight = gradients(norm_of(1.3), without_weight, grad)
    assert_mutation_fails(no_weight[1], grad_B, expected[1], same[1], rows, bound=bound_B)
    assert_mutation_fails(no_weight[0], grad_A, expected[0], same[0], bound=bound_A)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normalized_direction(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    layer = make_layer(*shape, dtype)
    exact, grad = layer.double(), torch.randn(shape[0], shape[1])
    unit, norm = launch_normalized_direction(*direction(layer))
    assert_rows_close(unit, reference.normalized_direction(*direction(exact)), reference.normalized_direction(*direction(layer)))
    got = launch_normalized_direction_backward(grad, norm, *direction(layer))
    expected, same = gradients(unit_of(1.3), exact, grad), gradients(unit_of(1.3), layer, grad)
    limits = bounds(layer, sizes(layer, grad, None))
    for value, want, other, limit in zip(got, expected, same, limits, strict=False):
        assert_rows_close(value, want, other, bound=limit)
    updated = reference.direction(*direction(exact))
    rows = ordinary_rows(reference.weight_norm(*direction(exact)))
    truth, other = reference.normalized_direction(*direction(exact)), reference.normalized_direction(*direction(layer))
    for weight, scaling in ((0 * exact.weight, 1.3), (-exact.weight, 1.3), (exact.weight, 0.0), (exact.weight, -1.3)):
        mutated = reference.normalized_direction(weight, exact.lora_A, exact.lora_B, scaling)
        assert_mutation_fails(mutated, unit, truth, other, rows)
    assert_mutation_fails(updated, unit, truth, other, rows)
    # without the projection, and with its sign turned
    inverse = torch.where(rows, 1.0 / reference.weight_norm(*direction(exact)), 0.0)[:, None]
    along = (grad.double() * updated).sum(1, keepdim=True) * inverse**3 * updated
    for factor in (0.0, -1.0):
        dV = grad.double() * inverse - factor * along
        assert_mutation_fails(1.3 * dV @ exact.lora_A.T, got[1], expected[1], same[1], rows, bound=limits[1])
        assert_mutation_fails(1.3 * exact.lora_B.T @ dV, got[0], expected[0], same[0], bound=limits[0])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("r", [3, 16, 100])
def test_merged_weight_backward(r: int, dtype: torch.dtype) -> None:
    layer = make_layer(72, 104, r, dtype)
    exact, grad = layer.double(), torch.randn(72, 104)
    _, norm = launch_merged_weight(*direction(layer)[:3], layer.magnitude, layer.scaling)
    got = launch_merged_weight_backward(grad, norm, *direction(layer)[:3], layer.magnitude, layer.scaling)
    expected, same = gradients(merged_of(1.3), exact, grad), gradients(merged_of(1.3), layer, grad)
    limits = bounds(layer, sizes(layer, grad, layer.magnitude))
    for value, want, other, limit in zip(got[:2], expected, same, limits, strict=False):
        assert_rows_close(value, want, other, bound=limit)
    updated = reference.direction(*direction(exact))
    inverse = torch.where(norm >= reference.NORM_FLOOR, 1.0 / norm, 0.0)
    bound = (grad.double() * updated).abs().sum(1) * inverse
    assert_rows_close(got[2], expected[2], same[2], bound=bound)
    rows = ordinary_rows(norm)
    mutated = gradients(merged_of(-1.3), exact, grad)
    for value, want, other, limit, wrong in zip(got, expected, same, (*limits, bound), mutated, strict=True):
        assert_mutation_fails(wrong, value, want, other, rows if value.shape[0] == 72 else None, bound=limit)
    for mutated in (0 * expected[2], -expected[2], expected[2] * norm):
        assert_mutation_fails(mutated, got[2], expected[2], same[2], rows, bound=bound)
    along = inverse.double() ** 2 * (grad.double() * updated).sum(1)
    for without_magnitude, factor in ((True, 1.0), (False, 0.0), (False, -1.0)):
        alpha = inverse.double() * (1.0 if without_magnitude else exact.magnitude)
        dV = alpha[:, None] * (grad.double() - factor * along[:, None] * updated)
        assert_mutation_fails(1.3 * dV @ exact.lora_A.T, got[1], expected[1], same[1], rows, bound=limits[1])
        assert_mutation_fails(1.3 * exact.lora_B.T @ dV, got[0], expected[0], same[0], bound=limits[0])


def test_strided_weight_and_gradient() -> None:
    layer, grad = make_layer(72, 104, 16, torch.float32), torch.randn(72, 104)
    _, norm = launch_normalized_direction(*direction(layer))
    expected = launch_normalized_direction_backward(grad, norm, *direction(layer))
    layer.weight = layer.weight.t().contiguous().t()
    got = launch_normalized_direction_backward(grad.t().contiguous().t(), norm, *direction(layer))
    for value, want in zip(got, expected, strict=True):
        assert torch.equal(value, want)
