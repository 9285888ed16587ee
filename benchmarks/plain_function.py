"""DoRA in twenty lines of PyTorch: what a user could write in an afternoon, and the bar for everything that is fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _WriteMergedWeight(torch.autograd.Function):
    """DoRA in twenty lines of PyTorch: write W' once, one product each way. It keeps W' of every layer for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float, bias):
        updated = torch.addmm(weight, lora_B.to(weight.dtype), lora_A.to(weight.dtype), alpha=scaling)
        norm = torch.linalg.vector_norm(updated, dim=1, dtype=torch.float32)
        scale = magnitude / norm
        merged = updated.mul_(scale.to(updated.dtype)[:, None])
        x = x.to(merged.dtype)  # autocast's, where it is on
        y = torch.nn.functional.linear(x, merged, bias)
        ctx.save_for_backward(x, merged, lora_A, lora_B, magnitude, scale, y, bias)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (grad,) = grads
        x, merged, lora_A, lora_B, magnitude, scale, y, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = (grad @ merged) if needs[0] else None
        grad_A = grad_B = grad_magnitude = None
        if needs[2]:
            factor = (scale * ctx.scaling)[:, None] * lora_B
            grad_A = (flat_grad @ factor.to(grad.dtype)).T @ flat_x
            grad_B = (flat_grad.T @ (flat_x @ lora_A.to(grad.dtype).T)).float() * (scale * ctx.scaling)[:, None]
        if needs[4]:
            product = y if bias is None else y - bias
            grad_magnitude = (flat_grad * product.reshape(flat_grad.shape)).sum(0, dtype=torch.float32) / magnitude
        return grad_x, None, grad_A, grad_B, grad_magnitude, None, None


def plain_function(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float, bias) -> Tensor:
    """The twenty-line function as a call."""
    return _WriteMergedWeight.apply(x, weight, lora_A, lora_B, magnitude, scaling, bias)
