"""A backward pass that is transformed itself: of many gradients at once it is right, and a tangent is refused, not lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import bidora_kernels as bk
from bidora_kernels import native

from .draws import Call, draw
from .quantized_rows import RowQuantized

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason="the native library is not there")
OPERATIONS: dict[str, Callable[[Call], Tensor]] = {
    "dora_linear": lambda c: bk.functional.dora_linear(
        c.x, c.weight, c.lora_A, c.lora_B, c.magnitude, c.scaling, c.bias, c.x_dropped, c.detach_norm
    ),
    "weight_norm": lambda c: bk.functional.weight_norm(c.weight, c.lora_A, c.lora_B, c.scaling),
    "normalized_direction": lambda c: bk.functional.normalized_direction(c.weight, c.lora_A, c.lora_B, c.scaling),
    "merged_weight": lambda c: bk.functional.merged_weight(c.weight, c.lora_A, c.lora_B, c.magnitude, c.scaling),
    "quantized dora_linear": lambda c: bk.functional.dora_linear(
        c.x, RowQuantized(c.weight), c.lora_A, c.lora_B, c.magnitude, c.scaling, c.bias, c.x_dropped, c.detach_norm
    ),
    "estimated penalty": lambda c: bk.functional.orthogonality_penalty(c.weight, c.lora_A, c.lora_B, c.scaling, probes=2),
    "orthogonality_penalty": lambda c: bk.functional.orthogonality_penalty(c.weight, c.lora_A, c.lora_B, c.scaling),
}


def value_of(name: str, backend: str, **settings: bool) -> tuple[Tensor, list[Tensor]]:
    """The value of an operation and the leaves that it has gradients of."""
    call = draw(0, dtype=torch.float64, **settings)  # type: ignore[arg-type]
    leaves = [call.x, call.lora_A, call.lora_B, call.magnitude]
    for leaf in leaves:
        leaf.requires_grad_()
    torch.manual_seed(0)  # of the probes
    with bk.use_backend(backend):
        value = OPERATIONS[name](call)
    used = torch.autograd.grad(value.sum(), leaves, retain_graph=True, allow_unused=True)
    return value, [leaf for leaf, grad in zip(leaves, used, strict=True) if grad is not None]


@pytest.mark.parametrize(("dropped", "detach_norm"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_many_gradients_at_once(name: str, dropped: bool, detach_norm: bool) -> None:
    found = []
    for backend in ("native", "reference"):
        value, leaves = value_of(name, backend, dropped=dropped, detach_norm=detach_norm)
        many = torch.sin(torch.arange(3.0 * value.numel(), dtype=torch.float64)).reshape(3, *value.shape)
        many[0].view(-1)[: value.numel() // 2] = 0  # tokens without a gradient, in one of them alone
        if name.startswith("quantized") and backend == "native":
            with pytest.raises(NotImplementedError, match=r'one gradient at a time: .*use_backend\("reference"\)'):
                torch.autograd.grad(value, leaves, many, is_grads_batched=True)
            return
        found.append(torch.autograd.grad(value, leaves, many, is_grads_batched=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_tangent_is_refused(name: str) -> None:
    value, leaves = value_of(name, "native")
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(value), torch.ones_like(value))
        with pytest.raises(
            NotImplementedError, match=r'forward-mode derivatives of a backward pass: .*use_backend\("reference"\)'
        ):
            torch.autograd.grad(value, leaves, grad)
    value, leaves = value_of(name, "reference")
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(value), torch.ones_like(value))
        assert forward_ad.unpack_dual(torch.autograd.grad(value, leaves, grad)[0]).tangent is not None
