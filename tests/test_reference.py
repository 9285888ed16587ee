"""The reference equations: gradients against finite differences, zero rows, and the whole layer against real PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from bidora_kernels import reference

OUT, IN, R, SCALING = 7, 5, 3, 1.7


def problem(dtype: torch.dtype = torch.float64, zero_row: bool = False) -> dict[str, Tensor]:
    """A layer whose low-rank update is as large as its weight and whose magnitudes differ from its norms."""
    weight = torch.randn(OUT, IN, dtype=dtype)
    if zero_row:
        weight[2] = 0.0
    lora_A, lora_B = torch.randn(R, IN, dtype=dtype), torch.randn(OUT, R, dtype=dtype) * 0.3
    if zero_row:
        lora_B[2] = 0.0
    magnitude = weight.norm(dim=1) * torch.linspace(0.5, 1.5, OUT, dtype=dtype)
    return {
        "weight": weight,
        "lora_A": lora_A.requires_grad_(),
        "lora_B": lora_B.requires_grad_(),
        "magnitude": magnitude.requires_grad_(),
    }


def explicit_layer(x: Tensor, p: dict[str, Tensor], bias: Tensor | None, norm: Tensor) -> Tensor:
    """The equation written out with the adapted weight at full size."""
    adapted = p["magnitude"][:, None] * (p["weight"] + SCALING * p["lora_B"] @ p["lora_A"]) / norm[:, None]
    return x @ adapted.T + (0 if bias is None else bias)


def true_norm(p: dict[str, Tensor]) -> Tensor:
    return torch.linalg.vector_norm(p["weight"] + SCALING * p["lora_B"] @ p["lora_A"], dim=1)


@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_dora_linear_is_the_equation(detach_norm: bool, with_bias: bool) -> None:
    p, x = problem(), torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(OUT, dtype=torch.float64) if with_bias else None
    norm = true_norm(p)
    expected = explicit_layer(x, p, bias, norm.detach() if detach_norm else norm)
    actual = reference.dora_linear(x, **p, scaling=SCALING, bias=bias, detach_norm=detach_norm)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    inputs = [x, p["lora_A"], p["lora_B"], p["magnitude"]]
    seed = torch.randn_like(expected)
    for ours, theirs in zip(torch.autograd.grad(actual, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dropped", [True, False])
def test_gradcheck_with_the_norm_differentiated(dropped: bool) -> None:
    p, x = problem(), torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(OUT, dtype=torch.float64)
    mask = (torch.rand(3, IN) > 0.3).to(torch.float64) / 0.7

    def layer(x: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
        x_dropped = x * mask if dropped else None
        return reference.dora_linear(x, p["weight"], lora_A, lora_B, magnitude, SCALING, bias, x_dropped, detach_norm=False)

    inputs = (x, p["lora_A"], p["lora_B"], p["magnitude"])
    assert gradcheck(layer, inputs, check_forward_ad=True)
    assert gradgradcheck(layer, inputs)


def test_gradcheck_with_the_norm_detached() -> None:
    p, x = problem(), torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    norm = true_norm(p).detach()  # finite differences must not move what the backward pass holds fixed

    def layer(x: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
        return reference.dora_linear(x, p["weight"], lora_A, lora_B, magnitude, SCALING, norm=norm)

    inputs = (x, p["lora_A"], p["lora_B"], p["magnitude"])
    assert gradcheck(layer, inputs, check_forward_ad=True)
    seed = torch.randn(3, OUT, dtype=torch.float64)
    detached = torch.autograd.grad(reference.dora_linear(x, **p, scaling=SCALING), inputs, seed)
    given = torch.autograd.grad(layer(*inputs), inputs, seed)
    for ours, theirs in zip(detached, given, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["weight_norm", "normalized_direction", "orthogonality_penalty", "merged_weight"])
@pytest.mark.parametrize("zero_row", [True, False])
def test_gradcheck_of_the_weight_operations(name: str, zero_row: bool) -> None:
    p = problem(zero_row=False)
    function = getattr(reference, name)
    with_magnitude = name == "merged_weight"

    def operation(lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
        weight = p["weight"]
        if zero_row:  # a row that is 0 whatever the adapter is
            weight = torch.cat([weight, torch.zeros(1, IN, dtype=weight.dtype)])
            lora_B = torch.cat([lora_B, torch.zeros(1, R, dtype=weight.dtype)])
            magnitude = torch.cat([magnitude, torch.zeros(1, dtype=weight.dtype)])
        return function(weight, lora_A, lora_B, *([magnitude] if with_magnitude else []), SCALING)

    inputs = (p["lora_A"], p["lora_B"], p["magnitude"] if with_magnitude else p["magnitude"].detach())
    assert gradcheck(operation, inputs, check_forward_ad=True)
    assert gradgradcheck(operation, inputs)


def test_weight_operations_are_their_equations() -> None:
    p = problem()
    norm = true_norm(p)
    updated = p["weight"] + SCALING * p["lora_B"] @ p["lora_A"]
    unit = updated / norm[:, None]
    args = (p["weight"], p["lora_A"], p["lora_B"])
    torch.testing.assert_close(reference.weight_norm(*args, SCALING), norm)
    torch.testing.assert_close(reference.normalized_direction(*args, SCALING), unit)
    torch.testing.assert_close(reference.merged_weight(*args, p["magnitude"], SCALING), p["magnitude"][:, None] * unit)
    penalty = (unit @ unit.T - torch.eye(OUT, dtype=unit.dtype)).square().sum()
    torch.testing.assert_close(reference.orthogonality_penalty(*args, SCALING), penalty)
    other_side = (unit.T @ unit - torch.eye(IN, dtype=unit.dtype)).square().sum() + (OUT - IN)
    torch.testing.assert_close(penalty, other_side)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("detach_norm", [True, False])
def test_a_zero_row_starts_at_zero_and_can_leave(dtype: torch.dtype, detach_norm: bool) -> None:
    p = problem(torch.float64, zero_row=True)
    p = {name: tensor.detach().to(dtype).requires_grad_(name != "weight") for name, tensor in p.items()}
    p["magnitude"] = true_norm(p).detach().requires_grad_()
    assert p["magnitude"][2] == 0
    x = torch.randn(4, IN, dtype=dtype)
    y = reference.dora_linear(x, **p, scaling=SCALING, detach_norm=detach_norm)
    assert torch.equal(y[:, 2], torch.zeros(4, dtype=dtype))
    grads = torch.autograd.grad(y.float().square().sum() + y[:, 2].sum(), [p["lora_A"], p["lora_B"], p["magnitude"]])
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert grads[1][2].abs().sum() > 0  # lora_B can leave
    assert grads[2][2] == 0  # c is fixed at 1: no gradient for the magnitude

    with torch.no_grad():
        p["lora_B"][2] = 0.5
    y = reference.dora_linear(x, **p, scaling=SCALING, detach_norm=detach_norm)
    assert torch.equal(y[:, 2], torch.zeros(4, dtype=dtype))  # magnitude 0 keeps the output at 0
    (grad,) = torch.autograd.grad(y[:, 2].float().sum(), p["magnitude"])
    assert torch.isfinite(grad).all()
    assert grad[2] != 0  # and its gradient is not lost


def test_zero_row_of_the_weight_operations() -> None:
    p = problem(zero_row=True)
    args = (p["weight"], p["lora_A"], p["lora_B"])
    assert torch.equal(reference.normalized_direction(*args, SCALING)[2], torch.zeros(IN, dtype=torch.float64))
    with torch.no_grad():
        p["lora_B"][2] = 1e-20
    expected = SCALING * p["lora_B"][2] @ p["lora_A"]  # far below the floor: the row of V itself
    torch.testing.assert_close(reference.merged_weight(*args, p["magnitude"], SCALING)[2], expected, rtol=1e-12, atol=0.0)
    direction = reference.normalized_direction(*args, SCALING)
    (grad,) = torch.autograd.grad(direction[2].sum(), p["lora_B"])
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("shape", [(0, IN), (1, IN), (2, 3, IN), (IN,)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    p, x = problem(), torch.randn(shape, dtype=torch.float64)
    y = reference.dora_linear(x, **p, scaling=SCALING)
    assert y.shape == (*shape[:-1], OUT)
    torch.testing.assert_close(y, explicit_layer(x, p, None, true_norm(p)))


def test_precise_keeps_what_a_bf16_product_rounds_away() -> None:
    p = {name: tensor.detach().to(torch.float32) for name, tensor in problem().items()}
    p["weight"] = p["weight"].to(torch.bfloat16)
    x = torch.randn(64, IN, dtype=torch.bfloat16)
    truth = explicit_layer(
        x.double(), {k: t.double() for k, t in p.items()}, None, true_norm({k: t.double() for k, t in p.items()})
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = reference.dora_linear(x.float(), **p, scaling=SCALING)
        precise = reference.dora_linear(x.float(), **p, scaling=SCALING, precise=True)
    assert plain.dtype == precise.dtype == torch.bfloat16
    rounding = truth.abs() * torch.finfo(torch.bfloat16).eps / 2  # one rounding of the output is all that is left
    assert ((precise.double() - truth).abs() <= rounding * 1.01 + 1e-6).all()
    assert not ((plain.double() - truth).abs() <= rounding * 1.01 + 1e-6).all()


class TestAgainstPeft:
    """The same weights in PEFT's DoRA layer and here: outputs and every gradient."""

    @staticmethod
    def peft_layer(base: nn.Module, rslora: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
        peft = pytest.importorskip("peft")
        holder = nn.Sequential(base.to(dtype))
        config = peft.LoraConfig(
            r=R, lora_alpha=6, use_dora=True, use_rslora=rslora, lora_dropout=dropout, target_modules=["0"],
            fan_in_fan_out=type(base).__name__ == "Conv1D",
        )  # fmt: skip
        layer = peft.get_peft_model(holder, config).base_model.model[0]
        with torch.no_grad():
            layer.lora_B["default"].weight.normal_(0.0, 0.3)
            layer.lora_magnitude_vector["default"].weight.mul_(torch.linspace(0.5, 1.5, layer.out_features))
        return layer

    @staticmethod
    def adapter(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_magnitude_vector["default"].weight

    def compare(self, layer: nn.Module, x: Tensor, weight: Tensor, rtol: float, autocast: bool = False) -> None:
        lora_A, lora_B, magnitude = self.adapter(layer)
        scaling, p = layer.scaling["default"], layer.lora_dropout["default"]
        bias = layer.base_layer.bias
        layer.train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            torch.manual_seed(3)
            theirs = layer(x)
            torch.manual_seed(3)
            x_dropped = nn.functional.dropout(x, p.p) if isinstance(p, nn.Dropout) else None
            ours = reference.dora_linear(x, weight, lora_A, lora_B, magnitude, scaling, bias, x_dropped)
        assert ours.dtype == theirs.dtype
        inputs = [x, lora_A, lora_B, magnitude]
        seed = torch.randn_like(theirs)
        pairs = [
            (ours, theirs),
            *zip(torch.autograd.grad(ours, inputs, seed), torch.autograd.grad(theirs, inputs, seed), strict=True),
        ]
        for mine, peft in pairs:
            error = (mine.double() - peft.double()).norm() / peft.double().norm()
            assert error <= rtol, f"relative difference {error:.1e}"

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("rslora", [True, False])
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    def test_linear(self, bias: bool, rslora: bool, dropout: float) -> None:
        layer = self.peft_layer(nn.Linear(24, 40, bias=bias), rslora, dropout)
        x = torch.randn(2, 9, 24, requires_grad=True)
        self.compare(layer, x, layer.base_layer.weight, 2e-6)

    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    def test_conv1d(self, dropout: float) -> None:
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(40, 24)
        layer = self.peft_layer(conv1d, dropout=dropout)
        x = torch.randn(2, 9, 24, requires_grad=True)
        self.compare(layer, x, layer.base_layer.weight.t(), 2e-6)

    @pytest.mark.parametrize("autocast", [True, False])
    def test_bf16_base(self, autocast: bool) -> None:
        layer = self.peft_layer(nn.Linear(24, 40), dtype=torch.bfloat16)
        lora_A, _, _ = self.adapter(layer)
        assert lora_A.dtype == torch.float32
        x = torch.randn(2, 9, 24, dtype=torch.bfloat16).requires_grad_()
        self.compare(layer, x, layer.base_layer.weight, 1.5e-2, autocast)  # four roundings to bf16 (eps 2^-8) in PEFT's way


def test_norms_are_in_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    weight, lora_A, lora_B = torch.randn(8, 16), torch.randn(2, 16), torch.randn(8, 2)
    for operation in (reference.weight_norm, reference.normalized_direction, reference.orthogonality_penalty):
        wanted = operation(weight, lora_A, lora_B, 0.5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(operation(weight, lora_A, lora_B, 0.5), wanted)
