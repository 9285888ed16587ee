"""The weight plan of the triton backend: write the merged weight W' = c * V once, then multiply with it alone.

W' is in the product's dtype; 16-bit values are rounded with a fixed dither, so that small changes of the adapter survive. It is
rebuilt, bit for bit, in the backward, or comes from outside where it serves several passes. The magnitude's gradient is read off
the output without its bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.magnitude_gradient import launch_magnitude_gradient
from ..kernels.merged_weight import launch_merged_weight
from ..kernels.pieces import launch_pieces
from ..kernels.weight_norm import launch_row_scale
from ._library import as_dtype, flatten
from ._triton_gradients import flat, layer_gradients, low_rank_input, parameter_gradients

DITHER_SEED = 0x5EED


def kept_dtype(
    weight: Tensor, dropped: bool, precise: bool, product_dtype: torch.dtype, out_dtype: torch.dtype, keeps: bool,
    has_bias: bool,
) -> torch.dtype | None:  # fmt: skip
    """The dtype of the output without bias, where the backward needs it and y is something else."""
    return product_dtype if keeps and (has_bias or product_dtype != out_dtype) else None


def merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dtype: torch.dtype,
    norm: Tensor | None = None,
    pieces: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(W' [out, in] in `dtype`, the row norms in fp32). pieces: those of lora_A, where they are at hand."""
    norm = None if norm is None else as_dtype(norm, torch.float32)
    return launch_merged_weight(weight, lora_A, lora_B, magnitude, scaling, norm, dtype, DITHER_SEED, pieces=pieces)


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    product_dtype: torch.dtype,
    out_dtype: torch.dtype,
    keeps: bool,
    merged: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, ...]]:
    """(y [tokens, out] in `out_dtype`, norm, the output without bias where the backward needs it and it is not y, `again`).

    again: the pieces of lora_A where it is split, for the backward.
    """
    pieces = None
    if merged is None:
        pieces = launch_pieces(lora_A, lora_B)
        merged, norm = merge(weight, lora_A, lora_B, magnitude, scaling, product_dtype, norm, pieces)
    inputs = flat(x, product_dtype)
    if bias is None or keeps:
        unbiased = torch.mm(inputs, merged.t())
        y = as_dtype(unbiased if bias is None else unbiased + as_dtype(bias, product_dtype), out_dtype)
    else:
        y = unbiased = as_dtype(torch.addmm(as_dtype(bias, product_dtype), inputs, merged.t()), out_dtype)
    again = () if pieces is None else (pieces,)
    kept_as = kept_dtype(weight, False, False, product_dtype, out_dtype, keeps, bias is not None)
    return y, norm, None if kept_as is None else unbiased, again


def backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    kept: Tensor | None,
    scaling: float,
    needs_x: bool,
    needs_direction: bool,
    needs_magnitude: bool,
    differentiate_norm: bool,
    product_dtype: torch.dtype,
    merged: Tensor | None,
    again: tuple[Tensor, ...] = (),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(grad_x [tokens, in], None, grad_lora_A, grad_lora_B, grad_magnitude), None for what is not needed.

    again: what the forward left under this name; without it, it is computed again.
    """
    grad_output, kept = flatten(grad_output), None if kept is None else flatten(kept)
    pieces = again[0] if again else None
    norm = as_dtype(norm, torch.float32)
    scale = launch_row_scale(magnitude, norm)
    inputs = flat(x, product_dtype)
    through_norm = needs_direction and differentiate_norm
    needs_sum = needs_magnitude or through_norm
    if merged is None and (needs_x or (needs_sum and kept is None)):
        merged, _ = merge(weight, lora_A, lora_B, magnitude, scaling, product_dtype, norm, pieces)
    if needs_sum and kept is None and merged is not None:
        kept = torch.mm(inputs, merged.t())
    grad_x = torch.mm(as_dtype(grad_output, product_dtype), merged) if needs_x and merged is not None else None
    if not (needs_direction or needs_sum):
        return grad_x, None, None, None, None
    hidden = low_rank_input(inputs, lora_A, needs_direction, pieces)
    grads = layer_gradients(
        grad_output, hidden, lora_B, scale, norm, scaling,
        output=kept, magnitude=magnitude, needs_base=False, needs_hidden=needs_direction, needs_lora_B=needs_direction,
        needs_magnitude=needs_sum, base_dtype=product_dtype,
    )  # fmt: skip
    if grads.magnitude is not None:
        launch_magnitude_gradient(grads.magnitude, grad_output, inputs, weight, lora_A, lora_B, magnitude, norm, scaling)
    parameters = parameter_gradients(
        grads, inputs, weight, lora_A, lora_B, scale, norm, scaling,
        needs_direction=needs_direction, needs_magnitude=needs_magnitude, through_norm=through_norm,
    )  # fmt: skip
    return grad_x, None, *parameters
