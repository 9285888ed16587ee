"""The equations of DoRA in plain PyTorch: the oracle of every test, and the path that works everywhere.

    V  = weight + scaling * lora_B @ lora_A                     [out, in]
    n  = ||V||_2 per row                                        [out]
    y  = x @ (magnitude * V / n)^T + bias                       (DoRA, arXiv:2402.09353, eq. 5)

One magnitude per output feature, so a norm runs over a row of `nn.Linear.weight`. Nothing here dispatches to a kernel; every
function is differentiable any number of times, in reverse and forward mode. Norms and scales are computed in fp32, or in fp64
where the weight is fp64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_FLOOR = 1e-18  # below it the sum of squares leaves fp32's normal range; such a row keeps the scale 1


def norm_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of norms and scales: fp64 for an fp64 weight, else fp32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def direction(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """V = weight + scaling * lora_B @ lora_A, [out, in], in the norm's dtype."""
    dtype = norm_dtype(weight)
    with torch.autocast(weight.device.type, enabled=False):
        return weight.to(dtype) + scaling * (lora_B.to(dtype) @ lora_A.to(dtype))


def _row_norm(updated: Tensor) -> Tensor:
    sum_sq = updated.square().sum(dim=1)
    above = sum_sq >= NORM_FLOOR**2
    # the masked branch never sees sqrt(0), whose derivative is infinite
    return torch.where(above, torch.where(above, sum_sq, 1.0).sqrt(), sum_sq.detach().sqrt())


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """n = ||V||_2 per row, [out]. Rows below NORM_FLOOR have no gradient."""
    return _row_norm(direction(weight, lora_A, lora_B, scaling))


def row_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """c = magnitude / n where n >= NORM_FLOOR, else 1, [out], in n's dtype. Where c is fixed at 1 nothing has a gradient."""
    above = norm >= NORM_FLOOR
    return torch.where(above, magnitude.to(norm.dtype) / torch.where(above, norm, 1.0), 1.0)


def normalized_direction(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """V / n, [out, in], in the norm's dtype; a row below NORM_FLOOR is 0 and has no gradient."""
    updated = direction(weight, lora_A, lora_B, scaling)
    norm = _row_norm(updated)
    above = norm >= NORM_FLOOR
    return torch.where(above[:, None], updated, 0.0) / torch.where(above, norm, 1.0)[:, None]


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float) -> Tensor:
    """magnitude * V / n, [out, in], in the weight's dtype; a row below NORM_FLOOR is the row of V."""
    updated = direction(weight, lora_A, lora_B, scaling)
    return (row_scale(magnitude, _row_norm(updated))[:, None] * updated).to(weight.dtype)


def orthogonality_penalty(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """R = ||Vhat Vhat^T - I||_F^2 with Vhat = V / n (BiDoRA, arXiv:2410.09758, eq. 3); rows below NORM_FLOOR are left out."""
    unit = normalized_direction(weight, lora_A, lora_B, scaling)
    with torch.autocast(weight.device.type, enabled=False):
        gram = unit @ unit.mT
    kept = (gram.detach().diagonal() > 0.5).to(gram.dtype)  # a kept row has length 1, a left-out one 0
    return (gram - torch.diag(kept)).square().sum()


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a layer's output: autocast's where it is on (it leaves fp64 alone), else x's."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def matmul_dtype(x: Tensor, weight: Tensor, precise: bool = False) -> torch.dtype:
    """The dtype of the product x @ weight^T: autocast's, else the wider of both; with `precise` at least fp32."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    else:
        dtype = x.dtype if x.dtype is weight.dtype else torch.promote_types(x.dtype, weight.dtype)
    return torch.promote_types(dtype, torch.float32) if precise else dtype


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    x_dropped: Tensor | None = None,
    detach_norm: bool = True,
    norm: Tensor | None = None,
    precise: bool = False,
) -> Tensor:
    """y = c * (x weight^T + scaling * (x lora_A^T) lora_B^T) + bias with c = row_scale(magnitude, n), [..., out].

    With `x_dropped` (dropout applied to x by the caller; PEFT's semantics):
    y = x weight^T + (c - 1) * x_dropped weight^T + c * scaling * (x_dropped lora_A^T) lora_B^T + bias.
    `detach_norm` treats n as a constant (DoRA, section 4.3); `norm` gives n where it is known already (it is then a constant).
    The product with `weight` runs in the input's (or autocast's) dtype, everything else in fp32 (fp64 for an fp64 weight).
    """
    out_dtype, product_dtype = output_dtype(x), matmul_dtype(x, weight, precise)
    with torch.autocast(x.device.type, enabled=False):
        if norm is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_norm):
                norm = weight_norm(weight, lora_A, lora_B, scaling)
        if detach_norm:
            norm = norm.detach()  # a constant of forward-mode derivatives too, which do not ask whether gradients are on
        scale = row_scale(magnitude, norm)
        product_weight = weight.to(product_dtype)

        def base_output(inputs: Tensor) -> Tensor:
            return F.linear(inputs.to(product_dtype), product_weight).to(scale.dtype)

        def low_rank_output(inputs: Tensor) -> Tensor:
            hidden = F.linear(inputs.to(product_dtype).to(scale.dtype), lora_A.to(scale.dtype))
            return scaling * F.linear(hidden, lora_B.to(scale.dtype))

        if x_dropped is None:
            y = scale * (base_output(x) + low_rank_output(x))
        else:
            y = base_output(x) + (scale - 1.0) * base_output(x_dropped) + scale * low_rank_output(x_dropped)
        if bias is not None:
            y = y + bias.to(y.dtype)
        return y.to(out_dtype)
