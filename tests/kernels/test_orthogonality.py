"""The penalty ||Vhat Vhat^T - I||_F^2 and its gradients from the cached Gram matrix, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bidora_kernels import reference
from bidora_kernels.kernels._launch import LAUNCHES
from bidora_kernels.kernels.orthogonality import launch_orthogonality

from .comparison import DTYPES, Layer, assert_mutation_fails, assert_rows_close, make_layer, ordinary_rows
from .test_direction_gradients import EXACT_ZERO, VANISHING, direction, make_cancelling_layer

SHAPES = [(72, 104, 1), (133, 150, 3), (104, 72, 16), (1, 200, 16), (40, 72, 64), (65, 90, 100), (3, 1, 2)]


def launch(layer: Layer, needs_gradients: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
    full = layer.weight.float()
    return launch_orthogonality(*direction(layer), full @ full.T, needs_gradients)


def expected_of(layer: Layer, exact: bool) -> list[Tensor]:
    dtype = torch.float64 if exact else torch.float32
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (layer.lora_A, layer.lora_B)]
    value = reference.orthogonality_penalty(layer.weight.to(dtype), *leaves, layer.scaling)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def bounds_of(layer: Layer) -> list[Tensor]:
    """The three results with the absolute values of all terms: what rounding errors scale with."""
    exact = layer.double().absolute()
    size = exact.weight + layer.scaling * exact.lora_B @ exact.lora_A
    norm = reference.weight_norm(*direction(layer.double()))
    inverse = torch.where(ordinary_rows(norm), 1.0 / norm, 0.0)[:, None]
    unit = reference.normalized_direction(*direction(layer.double()))
    gram = (unit @ unit.T).abs().fill_diagonal_(0.0)
    terms = (size * inverse) @ (size * inverse).T  # an entry's rounding error is eps times this
    through = (gram + terms).square().sum(1, keepdim=True)
    derivative = 4 * inverse * ((gram + terms) @ (size * inverse) + through * inverse * size)
    value = 2 * (gram * terms).sum() + gram.square().sum()
    return [value, layer.scaling * exact.lora_B.T @ derivative, layer.scaling * derivative @ exact.lora_A.T]


def check(layer: Layer) -> None:
    got, exact, same, bounds = launch(layer), expected_of(layer, True), expected_of(layer, False), bounds_of(layer)
    for value, want, other, bound in zip(got, exact, same, bounds, strict=True):
        shape = (1,) if want.dim() == 0 else want.shape
        assert_rows_close(value.reshape(shape), want.reshape(shape), other.reshape(shape), bound=bound.reshape(shape))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(make_layer(*shape, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("r", [1, 3, 16, 64, 100])
@pytest.mark.parametrize("in_features", [72, 104, 333])
@pytest.mark.parametrize("out_features", [1, 72, 200])
def test_cross_product(out_features: int, in_features: int, r: int, dtype: torch.dtype) -> None:
    check(make_layer(out_features, in_features, r, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_that_cancel(dtype: torch.dtype) -> None:
    layer = make_cancelling_layer(dtype)
    check(layer)
    assert reference.normalized_direction(*direction(layer.double()))[EXACT_ZERO].norm() == 0.0


def test_entries_between_rows_that_cancel_are_multiplied_out() -> None:
    layer, pair = make_cancelling_layer(torch.float32), [VANISHING, 40]
    low_rank = layer.scaling * layer.lora_B @ layer.lora_A
    layer.weight[pair] = -low_rank[pair] * 1.0003
    value, grad_A, grad_B = launch(layer)
    want, want_A, want_B = expected_of(layer, True)
    unit = reference.normalized_direction(*direction(layer.double()))
    entry = float(unit[pair[0]] @ unit[pair[1]])
    gram = layer.weight @ layer.weight.T
    u, p = layer.weight @ layer.lora_A.T, (layer.weight + low_rank) @ layer.lora_A.T
    gram += layer.scaling * (u @ layer.lora_B.T + layer.lora_B @ p.T)
    norm = reference.weight_norm(*direction(layer.double()))
    updated = float(gram[pair[0], pair[1]].double() / norm[pair[0]] / norm[pair[1]])
    lost = abs(updated**2 - entry**2)  # what the update alone loses; V itself rounds by about 3e-4 of such a row
    assert lost > 1e-2
    assert (value - want).abs() < 0.05 * lost
    for grad, exact in ((grad_A, want_A), (grad_B, want_B)):
        assert (grad - exact).norm() < 1e-3 * exact.norm()


def test_value_alone() -> None:
    layer = make_layer(72, 104, 16, torch.float32)
    value, grad_A, grad_B = launch(layer, needs_gradients=False)
    assert grad_A is None
    assert grad_B is None
    assert torch.equal(value, launch(layer)[0])


def test_strided_inputs() -> None:
    layer = make_layer(72, 104, 16, torch.float32)
    expected = launch(layer)
    for name in ("weight", "lora_A", "lora_B"):
        setattr(layer, name, getattr(layer, name).t().contiguous().t())
    for value, want in zip(launch(layer), expected, strict=True):
        assert torch.equal(value, want)


def test_no_rows() -> None:
    before = LAUNCHES["orthogonality"]
    value, grad_A, grad_B = launch_orthogonality(torch.ones(0, 7), torch.ones(2, 7), torch.ones(0, 2), 1.0, torch.ones(0, 0))
    assert value == 0.0
    assert torch.equal(grad_A, torch.zeros(2, 7))
    assert grad_B.shape == (0, 2)
    assert LAUNCHES["orthogonality"] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_term_is_noticed(dtype: torch.dtype) -> None:
    layer = make_layer(72, 104, 16, dtype)
    got, exact, same, bounds = launch(layer), expected_of(layer, True), expected_of(layer, False), bounds_of(layer)
    wide = layer.double()
    norm = reference.weight_norm(*direction(wide))
    rows = ordinary_rows(norm)
    inverse = torch.where(rows, 1.0 / norm, 0.0)[:, None]
    u, s = wide.weight @ wide.lora_A.T, layer.scaling
    updated = reference.direction(*direction(wide))
    p = updated @ wide.lora_A.T
    terms = {"K0": wide.weight @ wide.weight.T, "U": s * u @ wide.lora_B.T, "P": s * wide.lora_B @ p.T}

    def results(factors: dict[str, float], rows_of_squares: float = 1.0, scaled: bool = True) -> list[Tensor]:
        gram = sum(factors.get(name, 1.0) * term for name, term in terms.items())
        unit = (gram * inverse * inverse.T if scaled else gram * rows[:, None] * rows).fill_diagonal_(0.0)
        squares = unit.square().sum(1)
        derivative = 4 * inverse * (unit - rows_of_squares * torch.diag(squares)) * inverse.T
        return [squares.sum()[None], s * (derivative @ wide.lora_B).T @ updated, s * derivative @ p]

    for value, want in zip(results({}), exact, strict=True):
        torch.testing.assert_close(value, want.reshape(value.shape))  # the equation itself
    cases = [results({name: factor}) for name in terms for factor in (0.0, -1.0)] + [results({}, scaled=False)]
    for mutated in cases:
        for index, value in enumerate(got):
            assert_mutation_fails(
                mutated[index], value.reshape(mutated[index].shape), exact[index].reshape(mutated[index].shape),
                same[index].reshape(mutated[index].shape), rows if index == 2 else None,
                bound=bounds[index].reshape(mutated[index].shape),
            )  # fmt: skip
    for factor in (0.0, -1.0):
        mutated = results({}, rows_of_squares=factor)
        for index in (1, 2):
            assert_mutation_fails(
                mutated[index], got[index], exact[index], same[index], rows if index == 2 else None, bound=bounds[index]
            )
