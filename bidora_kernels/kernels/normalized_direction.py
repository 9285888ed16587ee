"""V / ||V|| per row and its gradients, also of the merged weight, which is a scaled direction (DoRA, arXiv:2402.09353, eq. 5).

    dV = (m * g - m * (g . Vhat) * Vhat) / n,    dm = g . Vhat,    Vhat = V / n

with m = 1 for the direction itself. A row with n < 1e-18 has direction 0 and no gradient; merged, it is the row of V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._arithmetic import NORM_FLOOR
from .direction_backward import inverse_norms, launch_down_gradient, launch_row_projection
from .merged_weight import launch_merged_weight


def launch_normalized_direction(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return (V / ||V||, fp32 [out, in], and the row norms, fp32 [out])."""
    return launch_merged_weight(weight, lora_A, lora_B, None, scaling, dtype=torch.float32)


def launch_normalized_direction_backward(
    grad: Tensor, norm: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return (grad_lora_A [r, in], grad_lora_B [out, r]) in fp32, with two passes over weight and grad [out, in]."""
    inverse = inverse_norms(norm)
    grad_projection, projection, product = launch_row_projection(weight, lora_A, lora_B, scaling, grad)
    return _gradients(
        grad, weight, lora_A, lora_B, scaling, grad_projection, projection, inverse, -product * inverse**2 * inverse
    )


def launch_merged_weight_backward(
    grad: Tensor, norm: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_lora_A [r, in], grad_lora_B [out, r], grad_magnitude [out]) in fp32."""
    inverse = inverse_norms(norm)
    grad_projection, projection, product = launch_row_projection(weight, lora_A, lora_B, scaling, grad)
    alpha = torch.where(norm >= NORM_FLOOR, magnitude.float() * inverse, 1.0)
    grad_magnitude = product * inverse
    beta = -alpha * grad_magnitude * inverse
    grads = _gradients(grad, weight, lora_A, lora_B, scaling, grad_projection, projection, alpha, beta)
    return (*grads, grad_magnitude)


def _gradients(
    grad: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    grad_projection: Tensor,
    projection: Tensor,
    alpha: Tensor,
    beta: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients for dV = alpha * grad + beta * V."""
    grad_lora_B = scaling * (alpha[:, None] * grad_projection + beta[:, None] * projection)
    factor = beta[:, None] * lora_B.float()
    return launch_down_gradient(weight, lora_A, lora_B, scaling, factor, grad, alpha), grad_lora_B
