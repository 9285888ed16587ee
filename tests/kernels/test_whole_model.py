"""What torch does around the kernels: compile, checkpoint, autocast, opcheck, derivatives that do not exist."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bidora_kernels as bk
from bidora_kernels.kernels._launch import LAUNCHES
from bidora_kernels.ops._triton_weight_plan import merge

from ..gpu.stress import FIXED, check_fixed, check_random, stress
from ..ops.draws import draw
from . import comparison  # noqa: F401 (skips this module without the interpreter)


def make_model(plan: str, dropout: float = 0.0) -> nn.Module:
    model = nn.Sequential(nn.Linear(40, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 16))
    bk.apply_dora(model, bk.DoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=["0", "3"]))
    for layer in (model[0], model[3]):
        nn.init.normal_(layer.lora_B, std=0.3)
        layer.forced_plan = plan
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(("plan", "dynamic"), [("activation", False), ("weight", False), ("auto", True)])
def test_a_model_compiles_without_a_break(plan: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    model, sizes = make_model(plan), (6, 9) if dynamic else (6,)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic or None)
    with bk.use_backend("triton"):
        for tokens in sizes:
            x = torch.randn(2, tokens, 40)
            LAUNCHES.clear()
            found = [torch.autograd.grad(compiled(x).square().sum(), trained(model))]
            assert LAUNCHES["merged_weight" if plan == "weight" else "compose"] > 0
            if plan == "auto":  # eager chooses by size, a compiled call does not
                model[0].forced_plan = model[3].forced_plan = "activation"
            found.append(torch.autograd.grad(model(x).square().sum(), trained(model)))
            model[0].forced_plan = model[3].forced_plan = plan
            for got, want in zip(*found, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("plan", ["activation", "weight"])
def test_checkpointing(plan: str, reentrant: bool) -> None:
    model, x = make_model(plan), torch.randn(5, 40, requires_grad=True)
    found = []
    with bk.use_backend("triton"):
        for y in (model(x), checkpoint(model, x, use_reentrant=reentrant)):
            model.zero_grad()
            y.square().sum().backward()
            found.append([p.grad.clone() for p in trained(model)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("plan", ["activation", "weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(plan: str, dtype: torch.dtype) -> None:
    model, x = make_model(plan), torch.randn(50, 40)
    found = []
    for backend in ("triton", "reference"):
        with bk.use_backend(backend), torch.autocast("cpu", dtype=dtype):
            y = model(x)
        assert y.dtype == dtype
        found.append([y, *torch.autograd.grad(y.float().square().sum(), trained(model))])
    eps = torch.finfo(dtype).eps
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype
        assert (got - want).norm() < 6 * eps * want.norm()


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("plan", ["activation", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_opcheck_of_the_layer(plan: str, kept: bool, dtype: torch.dtype) -> None:
    call = draw(1, dtype=dtype)
    leaves = [t.detach().requires_grad_() for t in (call.x, call.lora_A, call.lora_B, call.magnitude)]
    merged = norm = None
    if kept and plan == "weight":
        merged, norm = merge(call.weight, call.lora_A, call.lora_B, call.magnitude, call.scaling, dtype)
    torch.library.opcheck(
        torch.ops.bidora_kernels.dora_linear.default,
        (
            leaves[0], call.weight, *leaves[1:], norm, call.bias, None, call.scaling, False, False, dtype, dtype, True, "triton",
            plan, merged,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["weight_norm", "merged_weight", "orthogonality"])
def test_opcheck(name: str) -> None:
    call = draw(2)
    down, up, magnitude = (t.detach().requires_grad_() for t in (call.lora_A, call.lora_B, call.magnitude))
    rest = {
        "weight_norm": (call.scaling, "triton"),
        "merged_weight": (magnitude, call.scaling, torch.float32, "triton"),
        "orthogonality": (call.scaling, True, "triton"),
    }[name]
    torch.library.opcheck(getattr(torch.ops.bidora_kernels, name).default, (call.weight, down, up, *rest))


def test_opcheck_of_several_sets() -> None:
    call = draw(2)
    arguments = (call.weight, [call.lora_A, -call.lora_A], [call.lora_B, call.lora_B], call.scaling, "triton")
    torch.library.opcheck(torch.ops.bidora_kernels.weight_norms.default, arguments)


@pytest.mark.parametrize("plan", ["activation", "weight"])
def test_derivatives_without_a_rule_name_the_alternative(plan: str) -> None:
    call = draw(3)
    lora_A, magnitude = call.lora_A.requires_grad_(), call.magnitude.requires_grad_()

    def layer(down: Tensor) -> Tensor:
        return bk.functional.dora_linear(
            call.x, call.weight, down, call.lora_B, magnitude, call.scaling, detach_norm=False, plan=plan
        )

    with bk.use_backend("triton"):
        grad = torch.autograd.grad(layer(lora_A).square().sum(), magnitude, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
            torch.autograd.grad(grad.sum(), lora_A)
        with pytest.raises(NotImplementedError, match='use backend "reference"'):
            torch.func.jvp(layer, (lora_A,), (lora_A,))
        with pytest.raises(NotImplementedError, match='use backend "reference"'):
            torch.func.vmap(layer)(torch.stack([lora_A, lora_A]))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            layer(torch.autograd.forward_ad.make_dual(lora_A.detach(), lora_A.detach()))


@pytest.mark.parametrize("name", ["weight_norm", "normalized_direction", "merged_weight", "orthogonality_penalty"])
def test_second_derivatives_of_the_operations(name: str) -> None:
    call = draw(4)
    lora_A = call.lora_A.requires_grad_()
    rest = (call.lora_B, call.magnitude) if name == "merged_weight" else (call.lora_B,)
    with bk.use_backend("triton"):
        value = getattr(bk.functional, name)(call.weight, lora_A, *rest, call.scaling)
    grad = torch.autograd.grad((value * torch.ones_like(value).requires_grad_()).sum(), lora_A, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
        torch.autograd.grad(grad.sum(), lora_A)


@pytest.mark.parametrize("index", range(len(FIXED)), ids=lambda index: str(FIXED[index][:3]))
def test_the_shapes_of_the_sanitizer(index: int) -> None:
    assert check_fixed(index, "cpu") == []


@pytest.mark.parametrize("seed", range(6))
def test_random_layers(seed: int) -> None:
    """The stress test of a GPU at toy sizes."""
    text, found = check_random(seed, "cpu", 64)
    assert found == [], text


def test_the_stress_of_a_gpu_runs() -> None:
    layers, wrong = stress(1.0, "cpu", 32, first=50)
    assert layers > 0
    assert wrong == []


@pytest.mark.slow
def test_many_random_layers() -> None:
    wrong = []
    for seed in range(100, 400):
        text, found = check_random(seed, "cpu", 128)
        wrong += [f"{text}: {line}" for line in found]
    assert wrong == []
