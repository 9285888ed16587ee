"""The gradients of the row norms n = ||V|| (DoRA, arXiv:2402.09353, eq. 5; V = weight + scaling * lora_B @ lora_A).

dV = beta * V,  beta = grad_norm / n  (0 where n < 1e-18)
grad_lora_B = scaling * beta * (V @ lora_A^T),    grad_lora_A = scaling * (beta * lora_B)^T @ V
"""

from __future__ import annotations

from torch import Tensor

from .direction_backward import inverse_norms, launch_down_gradient


def launch_weight_norm_backward(
    grad_norm: Tensor,
    norm: Tensor,
    projection: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Return (grad_lora_A [r, in], grad_lora_B [out, r]) in fp32, with one pass over weight.

    norm [out] and projection = V @ lora_A^T [out, r] come from `launch_weight_norm_factors`.
    """
    beta = (grad_norm.float() * inverse_norms(norm))[:, None]
    grad_lora_A = launch_down_gradient(weight, lora_A, lora_B, scaling, beta * lora_B.float())
    return grad_lora_A, scaling * beta * projection
