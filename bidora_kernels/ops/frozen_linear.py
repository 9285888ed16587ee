"""y = x weight^T + bias of a plain linear layer that is not trained, beside DoRA layers.

F.linear's own backward pass multiplies the gradient of every token with the weight. Here the tokens without one are left out, and
both products go to the library that is faster on this processor, as those of a DoRA layer on the native backend do. Products so
small that Python would eat the gain stay with F.linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from . import _library as library
from ._skipped_tokens import picked, put_back, tokens_with_gradient

WORTH_FROM = 1 << 26  # multiply-adds of a product from which the way through here costs less than the products gain
HALVES = (torch.bfloat16, torch.float16)


def is_served(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `frozen_linear` takes a call: large enough, of plain CPU tensors of one dtype, nothing but x with a gradient.

    Under autocast they may have different dtypes, as long as it casts all of them.
    """
    if type(x) is not Tensor or not x.is_cpu or x.is_nested or torch._C._get_tracing_state() is not None:
        return False
    if x.dim() < 2 or x.numel() * weight.shape[0] < WORTH_FROM:
        return False
    if weight.requires_grad or not weight.is_cpu or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return False
    if x.layout is not torch.strided or weight.layout is not torch.strided:
        return False
    operands: tuple[Tensor, ...] = (x, weight)
    if bias is not None:
        operands = (x, weight, bias)
        if bias.requires_grad or not bias.is_cpu or bias.shape != weight.shape[:1]:
            return False
        if not bias.is_contiguous():  # oneDNN does not look at its stride
            return False
    if not library.is_eager(*operands) or library.is_transformed(*operands):
        return False
    dtypes = {operand.dtype for operand in operands}
    if torch.is_autocast_enabled("cpu"):
        return dtypes <= {torch.float32, *HALVES}
    return len(dtypes) == 1 and dtypes <= {torch.float64, torch.float32, *HALVES}


def _gradient(grad_output: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradient of x, in its shape."""
    if not grad_output.is_contiguous():
        grad_output = library.rows(library.flatten(grad_output))
    tokens = grad_output.numel() // weight.shape[0]
    chosen = tokens_with_gradient(grad_output, weight)
    g = library.flatten(grad_output) if chosen is None else picked(grad_output, chosen)
    grad = put_back(native.product(g, weight.t()), chosen, tokens)
    return library.shaped(grad, shape)  # type: ignore[arg-type]


class _FrozenLinear(torch.autograd.Function):
    """Keeps the weight alone for the backward pass, as F.linear does for a frozen one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x weight^T + bias, no view of another tensor: what follows may overwrite it."""
        ctx.save_for_backward(weight.t())  # as F.linear's, which a checkpoint's recomputation may take instead
        ctx.shape = x.shape
        return _output(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x; by a plain product where it is differentiated itself, or taken of many gradients at once."""
        (transposed,) = ctx.saved_tensors
        weight = transposed.t()
        with library.without_autocast("cpu"):
            if not library.is_plain_gradient(grad_output):
                return grad_output @ weight, None, None
            return _gradient(grad_output, weight, ctx.shape), None, None


def _output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = native.product(library.flatten(x), weight, bias)
    return library.shaped(y, (*x.shape[:-1], weight.shape[0]))


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As F.linear, for a call that `is_served`."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = library.as_dtype(x, dtype), library.as_dtype(weight, dtype)
        bias = None if bias is None else library.as_dtype(bias, dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        # past Function.apply, which looks for functional transforms: those are not served
        return super(torch.autograd.Function, _FrozenLinear).apply(x, weight, bias)  # type: ignore[no-any-return,misc]
    return _output(x, weight, bias)
