"""The layer and `functional.*` reach the kernels under the interpreter, and agree with the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bidora_kernels as bk
from bidora_kernels.kernels._launch import LAUNCHES
from bidora_kernels.ops._triton_gradients import operand_dtype

from .comparison import make_layer


def make_dora(out_features: int, in_features: int, dropout: float = 0.0, detach_norm: bool = True) -> bk.FusedDoraLinear:
    linear = torch.nn.Linear(in_features, out_features)
    dora = bk.FusedDoraLinear.from_linear(linear, r=4, lora_alpha=8, lora_dropout=dropout, detach_norm=detach_norm)
    torch.nn.init.normal_(dora.lora_B, std=0.3)
    with torch.no_grad():
        dora.magnitude *= 1.5
    return dora


def run(dora: bk.FusedDoraLinear, x: Tensor, backend: str) -> list[Tensor]:
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    with bk.use_backend(backend):
        y = dora(x)
        grads = torch.autograd.grad((y * torch.linspace(-1, 1, y.shape[-1])).square().sum(), [x, *dora_parameters(dora)])
    return [y.detach(), *grads]


def dora_parameters(dora: bk.FusedDoraLinear) -> list[Tensor]:
    return [dora.lora_A, dora.lora_B, dora.magnitude]


@pytest.mark.parametrize("detach_norm", [True, False], ids=["detached", "through the norm"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(72, 104), (33, 50)], ids=str)
@pytest.mark.parametrize("plan", ["activation", "weight"])
def test_a_layer_trains_on_the_kernels(plan: str, shape: tuple[int, int], dropout: float, detach_norm: bool) -> None:
    dora = make_dora(*shape, dropout, detach_norm)
    dora.forced_plan = plan
    x = torch.randn(2, 7, shape[1])
    expected = run(dora, x, "reference")
    LAUNCHES.clear()
    got = run(dora, x, "triton")
    weight_plan = plan == "weight" and dropout == 0.0
    for name in ("weight_norm", "compose_backward", "reduce_partials"):
        assert LAUNCHES[name] == 1, name
    assert LAUNCHES["compose"] == (not weight_plan)
    assert LAUNCHES["merged_weight"] == 2 * weight_plan
    assert (LAUNCHES["down_gradient"] > 0) == (not detach_norm)
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value, want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0, 2), (67,)], ids=str)
@pytest.mark.parametrize("plan", ["activation", "weight"])
def test_any_number_of_tokens_in_any_layout(plan: str, shape: tuple[int, ...]) -> None:
    dora = make_dora(72, 104)
    dora.forced_plan = plan
    x = torch.randn(104, *shape).movedim(0, -1)  # features are the slowest dimension
    assert x.numel() <= 104 or not x.is_contiguous()
    LAUNCHES.clear()
    got, expected = run(dora, x, "triton"), run(dora, x, "reference")
    assert LAUNCHES["weight_norm"] == 1
    for value, want in zip(got, expected, strict=True):
        assert value.shape == want.shape
        torch.testing.assert_close(value, want, rtol=2e-5, atol=2e-5 * float(want.abs().max()) if want.numel() else 0.0)


def test_a_pass_launches_only_what_it_needs() -> None:
    dora, x = make_dora(72, 104), torch.randn(5, 104)
    dora.forced_plan = "activation"
    LAUNCHES.clear()
    with torch.no_grad(), bk.use_backend("triton"):
        dora(x)
    assert LAUNCHES["compose"] == 1
    assert LAUNCHES["compose_backward"] == 0
    dora.eval()
    with torch.no_grad(), bk.use_backend("triton"):
        for _ in range(3):
            dora(x)
    assert LAUNCHES["weight_norm"] == 2  # one before, one for the cache


def test_functions_reach_the_kernels() -> None:
    layer = make_layer(72, 104, 4, torch.float32, degenerate_rows=False)
    arguments = (layer.weight, layer.lora_A.requires_grad_(), layer.lora_B.requires_grad_())
    calls = {
        "weight_norm": lambda source: source.weight_norm(*arguments, layer.scaling),
        "normalized_direction": lambda source: source.normalized_direction(*arguments, layer.scaling),
        "merged_weight": lambda source: source.merged_weight(*arguments, layer.magnitude, layer.scaling),
    }
    for name, call in calls.items():
        LAUNCHES.clear()
        with bk.use_backend("triton"):
            value = call(bk.functional)
            weights = torch.randn_like(value)
            grads = torch.autograd.grad((value * weights).sum(), arguments[1:])
        assert LAUNCHES["weight_norm"] == 1, name
        assert LAUNCHES["down_gradient"] == 1, name
        expected = call(bk.reference)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        for grad, want in zip(grads, torch.autograd.grad((expected * weights).sum(), arguments[1:]), strict=True):
            torch.testing.assert_close(grad, want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_several_sets_are_normed_in_one_pass(backend: str) -> None:
    layers = [make_layer(72, 104, 4, torch.float32, seed=seed) for seed in range(3)]
    weight, sets = layers[0].weight, [(layer.lora_A.requires_grad_(), layer.lora_B) for layer in layers]
    LAUNCHES.clear()
    with bk.use_backend(backend):
        norms = bk.functional.weight_norms(weight, sets, 1.3)
        assert LAUNCHES["weight_norm"] == (backend == "triton")
        with pytest.raises(ValueError, match=r"one rank and one dtype, got ranks \[4\]"):
            bk.functional.weight_norms(weight, [sets[0], (sets[0][0].double(), sets[0][1].double())], 1.3)
        with pytest.raises(ValueError, match="at least one"):
            bk.functional.weight_norms(weight, [], 1.3)
    assert not norms.requires_grad
    expected = torch.stack([bk.reference.weight_norm(weight, *pair, 1.3) for pair in sets])
    torch.testing.assert_close(norms, expected.detach(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_penalty_reaches_its_kernel(dtype: torch.dtype) -> None:
    layer = make_layer(72, 104, 4, dtype, torch.float32)
    leaves = [layer.lora_A.requires_grad_(), layer.lora_B.requires_grad_()]
    found = []
    for backend in ("triton", "reference"):
        LAUNCHES.clear()
        with bk.use_backend(backend):
            value = bk.functional.orthogonality_penalty(layer.weight, *leaves, layer.scaling)
            found.append([value.detach(), *torch.autograd.grad(3.0 * value, leaves)])
        assert LAUNCHES["orthogonality"] == (2 if backend == "triton" else 0)
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))


def test_no_other_backend_launches() -> None:
    dora, x = make_dora(72, 104), torch.randn(5, 104)
    LAUNCHES.clear()
    run(dora, x, "reference")
    assert not LAUNCHES


def test_fp64_is_refused_by_name() -> None:
    dora = bk.FusedDoraLinear.from_linear(torch.nn.Linear(8, 8).double(), r=2)
    with bk.use_backend("triton"), pytest.raises(NotImplementedError, match="fp64"):
        dora(torch.randn(3, 8).double())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", ["activation", "weight"])
def test_an_autocast_to_the_other_16_bit_dtype(plan: str, stored: torch.dtype) -> None:
    """Operands are cast to it, as nn.Linear's are; a GPU's library has no product from one into the other."""
    other = torch.float16 if stored is torch.bfloat16 else torch.bfloat16
    dora, x = make_dora(72, 104).to(stored), torch.randn(5, 104, dtype=stored)
    dora.forced_plan = plan
    with torch.autocast("cpu", other):
        got, expected = run(dora, x, "triton"), run(dora, x, "reference")
    assert got[0].dtype is other
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value, want, rtol=0.05, atol=0.05 * float(want.abs().max()))
    assert operand_dtype(x, dora.weight, other) is other
    assert operand_dtype(x, dora.weight, torch.float32) is stored  # a precise pass
