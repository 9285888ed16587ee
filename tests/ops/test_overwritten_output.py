"""An output that the caller overwrites in place: the magnitude's gradient must not be read off what is there then."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bidora_kernels as bk
from bidora_kernels import native


def layer(bias: bool) -> bk.FusedDoraLinear:
    made = bk.FusedDoraLinear.from_linear(torch.nn.Linear(24, 16, bias=bias), r=4)
    torch.nn.init.normal_(made.lora_B, std=0.3)
    return made


def trained(made: bk.FusedDoraLinear) -> list[Tensor]:
    return [made.lora_A, made.lora_B, made.magnitude]


def in_place(y: Tensor) -> Tensor:
    return y.mul_(3.0).add_(1.0).tanh()


def apart(y: Tensor) -> Tensor:
    return (y * 3.0 + 1.0).tanh()


def plainly(made: bk.FusedDoraLinear, x: Tensor, after: Callable[[Tensor], Tensor]) -> Tensor:
    return after(made(x))


def under_checkpoint(made: bk.FusedDoraLinear, x: Tensor, after: Callable[[Tensor], Tensor]) -> Tensor:
    return checkpoint(lambda inputs: after(made(inputs)), x, use_reentrant=False)  # type: ignore[no-any-return]


def under_hooks(made: bk.FusedDoraLinear, x: Tensor, after: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        return after(made(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", [plainly, under_checkpoint, under_hooks])
def test_gradients_are_those_of_an_output_left_alone(way: Callable[..., Tensor], bias: bool) -> None:
    made, x = layer(bias), torch.randn(7, 24)
    expected = torch.autograd.grad(plainly(made, x, apart).square().sum(), trained(made))
    got = torch.autograd.grad(way(made, x, in_place).square().sum(), trained(made))
    with bk.use_backend("reference"):
        reference = torch.autograd.grad(plainly(made, x, apart).square().sum(), trained(made))
    for value, want, known in zip(got, expected, reference, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(value, known, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hooks", [False, True])
def test_a_second_backward_gives_the_same(hooks: bool) -> None:
    made, x = layer(False), torch.randn(7, 24)
    none = contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor) if hooks else none:
        loss = made(x).tanh().square().sum()
    first = torch.autograd.grad(loss, trained(made), retain_graph=True)
    for value, want in zip(torch.autograd.grad(loss, trained(made)), first, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)


class _PastTheCounter(torch.autograd.Function):
    """silu(gate) * up, whose backward writes over both of its inputs as a kernel does: no version counter moves."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaves = gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
            grads = torch.autograd.grad(torch.nn.functional.silu(leaves[0]) * leaves[1], leaves, grad)
        for tensor, value in zip((gate, up), grads, strict=True):
            tensor.detach().numpy()[...] = value.numpy()
        return gate.detach().clone(), up.detach().clone()


@pytest.mark.parametrize("package", ["liger_kernel", "unsloth", "liger_kernels_4f1c0a", "flash_attn.layers.rotary"])
@pytest.mark.parametrize("way", [plainly, under_checkpoint, under_hooks])
def test_kernels_that_write_past_the_version_counter(
    way: Callable[..., Tensor], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With such a package in the process the layer keeps a copy; the control shows what it would take for its output."""
    made, other, x = layer(bias=False), layer(bias=False), torch.randn(7, 24)

    def gradients(after: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        loss = way(made, x, lambda gate: after(gate, other(x))).square().sum()
        return list(torch.autograd.grad(loss, trained(made)))

    expected = gradients(lambda gate, up: torch.nn.functional.silu(gate) * up)
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for got, want in zip(gradients(_PastTheCounter.apply), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    monkeypatch.delitem(sys.modules, package)
    if way is plainly and native.why_unavailable() is None:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(gradients(_PastTheCounter.apply)[2], expected[2], rtol=1e-4, atol=1e-5)
