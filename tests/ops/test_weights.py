"""Norms, merged weights, directions and the penalty on the native backend, with their gradients, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bidora_kernels as bk
from bidora_kernels import native
from bidora_kernels.ops import orthogonality

from .draws import Call, compare, draw, tail, usual_error

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))
OPERATIONS = ("weight_norm", "normalized_direction", "merged_weight", "orthogonality_penalty")


def upstream(value: Tensor) -> Tensor:
    """A gradient of the value, in fp64."""
    return torch.sin(torch.arange(value.numel(), dtype=torch.float64)).reshape(value.shape) + 0.5


def run(name: str, call: Call, backend: str) -> list[Tensor]:
    """The value and the gradients of one operation."""
    leaves = [t.detach().requires_grad_() for t in (call.lora_A, call.lora_B, call.magnitude)]
    leaves = leaves if name == "merged_weight" else leaves[:2]
    with bk.use_backend(backend):
        value = getattr(bk.functional, name)(call.weight, *leaves, call.scaling)
        return [value.detach(), *torch.autograd.grad(value, leaves, upstream(value).to(value.dtype))]


def gradient_sizes(name: str, call: Call) -> list[Tensor]:
    """For every gradient the root of the summed squares of its terms, in fp64: rounding errors are relative to it.

    With u = V / ||V||, the gradient of V is c (G - (G.u) u) for the upstream gradient G of c V; its two terms cancel along u.
    """
    c = call.double()
    updated = c.weight + c.scaling * (c.lora_B @ c.lora_A)
    norm = updated.norm(dim=1, keepdim=True)
    unit, per_row = updated / norm, c.magnitude[:, None] if name == "merged_weight" else torch.ones_like(norm)
    turned = torch.zeros_like(norm)
    if name == "weight_norm":
        terms = (upstream(norm[:, 0])[:, None] * unit).square()
        dense = terms
    else:
        G = upstream(updated)
        terms = G.square()
        # an error of G.u turns a whole row: what it adds does not average out
        turned = per_row / norm * (terms * unit.square()).sum(1, keepdim=True).sqrt()
        dense = (per_row / norm).square() * (terms + (G * unit).sum(1, keepdim=True).square() * unit.square())
    to_A = c.lora_B.square().T @ (dense + (turned * unit).square())
    to_B = dense @ c.lora_A.square().T + (turned * (unit @ c.lora_A.T)).square()
    sizes = [c.scaling * to_A.sqrt(), c.scaling * to_B.sqrt()]
    return [*sizes, (terms * unit.square()).sum(1).sqrt()] if name == "merged_weight" else sizes


def check(name: str, call: Call) -> None:
    ours, reference, truth = run(name, call, "native"), run(name, call, "reference"), run(name, call.double(), "reference")
    for value, own in zip(ours, reference, strict=True):
        assert value.dtype == own.dtype
        assert value.shape == own.shape
    scalar_rows = name in ("weight_norm", "orthogonality_penalty")
    assert within(call, ours[0], reference[0], truth[0], 1 if scalar_rows else max(1, truth[0].shape[-1]))
    if name == "orthogonality_penalty":
        # the rows of its gradients share the errors of one product: they are measured by the largest
        for value, own, exact in zip(ours[1:], reference[1:], truth[1:], strict=True):
            assert within(call, value, own, exact, max(1, exact.shape[-1]), by_largest=True)
        return
    names = ("lora_A", "lora_B", "magnitude")
    gradients = [dict(zip(names, values[1:], strict=False)) for values in (ours, reference, truth)]
    sizes = dict(zip(names, gradient_sizes(name, call), strict=False))
    assert compare(*gradients, sizes, gradients[0]["lora_A"].dtype, max(call.weight.shape)) == []


def within(call: Call, value: Tensor, own: Tensor, exact: Tensor, columns: int, by_largest: bool = False) -> bool:
    """Whether every row is as near to the truth as twice the reference and its own rounding."""
    eps = torch.finfo(value.dtype).eps
    # in fp64 the truth is the reference, whose own error, that of sums of random terms, then reads as 0
    of_truth = torch.finfo(torch.float64).eps * max(call.weight.shape) ** 0.5
    error, other = ((v.double() - exact).reshape(-1, columns).norm(dim=1) for v in (value, own))
    size = exact.reshape(-1, columns).norm(dim=1)
    numbers = call.weight.shape[0] ** 2 if by_largest or value.dim() == 0 else exact.numel()  # the penalty's are of one product
    other = torch.maximum(other, size * usual_error(torch.zeros(()), numbers, eps, max(call.weight.shape)))
    if by_largest and size.numel():
        size, other = size.clamp_min(size.max()), other.clamp_min(other.max())
    factor = tail(columns, max(1, len(error))) if by_largest else 2.0
    return bool((error <= factor * (other + (2 * eps + of_truth) * size)).all())


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["rows", "transposed", "sliced", "strided"])
@pytest.mark.parametrize(
    "shape", [(17, 33, 3), (130, 64, 8), (3, 1025, 1), (40, 600, 17), (24, 8, 9), (37, 2100, 4), (50, 70, 2)], ids=str
)
def test_against_fp64(name: str, dtype: torch.dtype, layout: str, shape: tuple[int, int, int]) -> None:
    check(name, draw(1, *shape, dtype=dtype, layout=layout))


def test_the_penalty_leans_to_no_side() -> None:
    """Row lengths from a library's product of the weight with itself made it too large by 1.7 eps (bf16 values, AVX2)."""
    errors = []
    for seed in range(60):
        call = draw(seed, 40, 600, 17, dtype=torch.bfloat16)
        with bk.use_backend("native"):
            value = bk.functional.orthogonality_penalty(call.weight, call.lora_A, call.lora_B, call.scaling)
        c = call.double()
        exact = bk.reference.orthogonality_penalty(c.weight, c.lora_A, c.lora_B, c.scaling)
        errors.append((value.double() - exact) / exact / torch.finfo(torch.float32).eps)
    mean, spread = torch.stack(errors).mean(), torch.stack(errors).std() / len(errors) ** 0.5
    assert abs(mean) <= 1.0 - 2 * spread  # one eps, with room for what sixty draws leave open


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(0, 5, 2), (5, 0, 2), (5, 7, 0)], ids=str)
def test_empty(name: str, shape: tuple[int, int, int]) -> None:
    call = draw(2, *shape)
    for ours, expected in zip(run(name, call, "native"), run(name, call, "reference"), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_zero_row(name: str) -> None:
    call = draw(3)
    call.weight[::3] = 0
    call.lora_B[::3] = 0
    for ours, expected in zip(run(name, call, "native"), run(name, call, "reference"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_merging_keeps_the_layout_of_a_transposed_weight() -> None:
    call = draw(5, layout="transposed")
    with bk.use_backend("native"):
        merged = bk.functional.merged_weight(call.weight, call.lora_A, call.lora_B, call.magnitude, call.scaling)
    assert merged.t().is_contiguous()


@pytest.mark.parametrize("layout", ["rows", "transposed"])
@pytest.mark.parametrize("norm_known", [False, True])
def test_fixed_dither(layout: str, norm_known: bool) -> None:
    """Every element is one of its two neighbours in bf16, the farther one as often as the nearer one is near."""
    call = draw(6, 200, 300, 5, layout=layout)
    norm = bk.reference.weight_norm(call.weight, call.lora_A, call.lora_B, call.scaling)
    exact, dithered, nearest = (torch.empty_like(call.weight, dtype=d) for d in (torch.float32, torch.bfloat16, torch.bfloat16))
    for out, dither in ((exact, False), (dithered, True), (nearest, False)):
        native.merged_weight(
            call.weight, call.lora_A, call.lora_B, call.magnitude, call.scaling, norm.clone(), out, norm_known, False, dither
        )
    assert torch.equal(nearest, exact.bfloat16())
    size = exact.double().abs()
    step = torch.exp2(size.log2().floor() - 7)  # bf16 has seven bits after the leading one
    cut_off = size / step - (size / step).floor()
    up = (dithered.double().abs() / step - (size / step).floor()).round()
    assert bool(((up == 0) | (up == 1)).all())
    assert torch.equal(dithered.sign(), exact.sign().bfloat16())
    error = up - cut_off  # of mean 0 and variance p (1 - p), one sixth
    assert abs(error.mean()) < 4 * (1 / 6 / error.numel()) ** 0.5
    for dim in (0, 1):  # nor does a row or a column lean to one side, as noise shared along it would make it
        means = error.mean(dim)
        assert means.square().mean() < 1.3 / 6 / error.shape[dim]
    again = torch.empty_like(dithered)
    native.merged_weight(
        call.weight, call.lora_A, call.lora_B, call.magnitude, call.scaling, norm.clone(), again, norm_known, False, True
    )
    assert torch.equal(again, dithered)


def test_dither_lets_a_small_change_through() -> None:
    """Of an update far below half a unit in the last place the share that survives in the product is one, not none."""
    call = draw(7, 96, 256, 8, dtype=torch.bfloat16)
    x, zero = (
        torch.randn(256, 400, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        torch.zeros_like(call.lora_B),
    )
    norm, small = call.weight.float().norm(dim=1), 1e-4 * call.lora_B

    def product(lora_B: Tensor, dither: bool) -> Tensor:
        out = torch.empty_like(call.weight)
        native.merged_weight(call.weight, call.lora_A, lora_B, norm, call.scaling, norm.clone(), out, True, False, dither)
        return out.double() @ x

    exact = (call.scaling * (small.double() @ call.lora_A.double())) @ x

    def surviving(dither: bool) -> float:
        change = product(small, dither) - product(zero, dither)
        return float((change * exact).sum() / exact.square().sum())

    assert surviving(False) < 0.2
    assert abs(surviving(True) - 1.0) < 0.3


def test_a_dither_does_not_lose_what_is_not_finite() -> None:
    weight = torch.ones(4, 8)
    weight[0, 0], weight[1, 1], weight[2, 2] = float("inf"), -float("inf"), float("nan")
    out, norm = torch.empty(4, 8, dtype=torch.bfloat16), torch.ones(4)
    native.merged_weight(weight, torch.zeros(1, 8), torch.zeros(4, 1), norm, 1.0, norm, out, True, False, True)
    assert torch.equal(out[0, :2], torch.tensor([torch.inf, 1.0], dtype=torch.bfloat16))
    assert out[1, 1] == -torch.inf
    assert bool(out[2, 2].isnan())


def test_the_gram_cache_follows_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    orthogonality.clear_gram_cache()
    call = draw(6)

    def penalty() -> Tensor:
        with bk.use_backend("native"):
            return bk.functional.orthogonality_penalty(call.weight, call.lora_A, call.lora_B, call.scaling)

    def expected() -> Tensor:
        return bk.reference.orthogonality_penalty(call.weight, call.lora_A, call.lora_B, call.scaling)

    torch.testing.assert_close(penalty(), expected(), rtol=1e-5, atol=1e-5)
    assert orthogonality.gram_cache_bytes() == 24 * 24 * 4
    call.weight.mul_(torch.linspace(1, 2, 40))
    torch.testing.assert_close(penalty(), expected(), rtol=1e-5, atol=1e-5)
    assert orthogonality.gram_cache_bytes() == 24 * 24 * 4
    call.weight = call.weight.clone()
    penalty()
    assert orthogonality.gram_cache_bytes() == 24 * 24 * 4  # the old weight is gone, and its product with it
    monkeypatch.setattr(orthogonality, "CACHE_BYTES", 0)
    orthogonality.clear_gram_cache()
    torch.testing.assert_close(penalty(), expected(), rtol=1e-5, atol=1e-5)
    assert orthogonality.gram_cache_bytes() == 0


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives_name_the_backend_that_has_them(name: str) -> None:
    call = draw(7)
    lora_A = call.lora_A.requires_grad_()
    rest = (call.lora_B, call.magnitude) if name == "merged_weight" else (call.lora_B,)
    with bk.use_backend("native"):
        value = getattr(bk.functional, name)(call.weight, lora_A, *rest, call.scaling)
    grad = torch.autograd.grad((value * torch.ones_like(value).requires_grad_()).sum(), lora_A, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
        torch.autograd.grad(grad.sum(), lora_A)


@pytest.mark.parametrize("name", ["weight_norm", "merged_weight", "orthogonality"])
@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_opcheck(name: str, layout: str) -> None:
    call = draw(8, layout=layout)
    down, up, magnitude = (t.detach().requires_grad_() for t in (call.lora_A, call.lora_B, call.magnitude))
    rest = {
        "weight_norm": (call.scaling, "native"),
        "merged_weight": (magnitude, call.scaling, torch.float32, "native"),
        "orthogonality": (call.scaling, True, "native"),
    }[name]
    torch.library.opcheck(getattr(torch.ops.bidora_kernels, name).default, (call.weight, down, up, *rest))


@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled_without_a_break(name: str) -> None:
    call = draw(9)

    def operation(down: Tensor, up: Tensor, magnitude: Tensor) -> Tensor:
        rest = (magnitude,) if name == "merged_weight" else ()
        return getattr(bk.functional, name)(call.weight, down, up, *rest, call.scaling)

    found = []
    for function in (operation, torch.compile(operation, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().requires_grad_() for t in (call.lora_A, call.lora_B, call.magnitude)]
        with bk.use_backend("native"):
            value = function(*leaves)
        found.append([value, *torch.autograd.grad(value.square().sum(), leaves[:2])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "weight",
    [torch.linspace(0.5, 1.5, 12)[:, None].expand(12, 40), torch.linspace(-1, 1, 80).reshape(40, 2)[:, :1].t()],
    ids=["expanded", "one row"],
)
def test_a_weight_that_only_looks_transposed(weight: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    out_features, in_features = weight.shape
    lora_A, lora_B = torch.randn(3, in_features, generator=generator), torch.randn(out_features, 3, generator=generator)
    magnitude, x = torch.rand(out_features, generator=generator) + 0.5, torch.randn(70, in_features, generator=generator)
    found = []
    for backend in ("native", "reference"):
        leaves = [t.detach().requires_grad_() for t in (x, lora_A, lora_B, magnitude)]
        with bk.use_backend(backend):
            y = bk.functional.dora_linear(leaves[0], weight, *leaves[1:], 2.0)
            merged = bk.functional.merged_weight(weight, lora_A, lora_B, magnitude, 2.0)
        found.append((y.detach(), merged, *torch.autograd.grad(y.square().sum(), leaves)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)
