"""How the triton backend runs a layer: library products with the frozen weight, one kernel for everything around them.

Activation plan: base = x W^T and hidden = x lora_A^T by the library, then `compose`; backward, `compose_backward` and one product
per gradient; at large ranks library products also take over the low-rank gradients. The products run in the input's (or
autocast's) dtype, the rest in fp32. A precise pass multiplies the same 16-bit operands, but keeps the base output in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.compose import launch_compose
from ..kernels.magnitude_gradient import launch_magnitude_gradient
from ..kernels.pieces import launch_pieces
from ..kernels.weight_norm import launch_row_scale, launch_weight_norm_and_scale
from ._library import as_dtype, flatten
from ._triton_gradients import (
    add_low_rank,
    flat,
    layer_gradients,
    low_rank_input,
    narrow_factor,
    operand_dtype,
    parameter_gradients,
    product,
)


def kept_dtype(
    weight: Tensor, dropped: bool, precise: bool, product_dtype: torch.dtype, out_dtype: torch.dtype, keeps: bool,
    has_bias: bool,
) -> torch.dtype | None:  # fmt: skip
    """The dtype of the base output where the backward needs it for the magnitude's gradient."""
    return product_dtype if keeps else None


def output_serves(dropped: bool, product_dtype: torch.dtype, out_dtype: torch.dtype, has_bias: bool) -> bool:
    """Whether y can stand in for the base output: y / magnitude does, but for rows near magnitude 0, which are computed again.

    Not with dropout, a bias, or a y of less precision.
    """
    return not dropped and not has_bias and product_dtype == out_dtype


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor | None,
    bias: Tensor | None,
    x_dropped: Tensor | None,
    scaling: float,
    precise: bool,
    product_dtype: torch.dtype,
    out_dtype: torch.dtype,
    keeps: bool,
    watches_output: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]:
    """(y [tokens, out] in `out_dtype`, norm, the base output of the low-rank branch's input where it is kept, `again`).

    watches_output: the caller keeps y for the backward, and notices where it is overwritten: then y serves where it can.
    again: (c, lora_A in the product's dtype, hidden), small tensors that spare the backward four kernels.
    """
    pieces = None
    if norm is None:
        pieces = launch_pieces(lora_A, lora_B)
        norm, scale = launch_weight_norm_and_scale(weight, lora_A, lora_B, magnitude, scaling, pieces)
    else:
        norm = as_dtype(norm, torch.float32)
        scale = launch_row_scale(magnitude, norm)
    operands = operand_dtype(x, weight, product_dtype)
    frozen = as_dtype(weight, operands)
    base = product(flat(x, operands), frozen.t(), product_dtype)
    inputs = flat(x if x_dropped is None else x_dropped, operands)
    base_dropped = None if x_dropped is None else product(inputs, frozen.t(), product_dtype)
    narrow_A = narrow_factor(lora_A, pieces, product_dtype)
    hidden = torch.mm(as_dtype(inputs, product_dtype), narrow_A.t())
    from_output = watches_output and output_serves(x_dropped is not None, product_dtype, out_dtype, bias is not None)
    keeps_base = keeps and not from_output
    in_place = base if (not keeps_base or x_dropped is not None) and base.dtype == out_dtype else None
    y = launch_compose(base, hidden, lora_B, scale, scaling, bias, base_dropped, output=in_place, dtype=out_dtype)
    kept = base if x_dropped is None else base_dropped
    return y, norm, kept if keeps_base else None, (scale, narrow_A, hidden)


def backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    kept: Tensor | None,
    scaling: float,
    dropped: bool,
    needs_x: bool,
    needs_dropped: bool,
    needs_direction: bool,
    needs_magnitude: bool,
    differentiate_norm: bool,
    product_dtype: torch.dtype,
    again: tuple[Tensor, ...] = (),
    watched_output: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(grad_x [tokens, in], grad_x_dropped, grad_lora_A, grad_lora_B, grad_magnitude), None for what is not needed.

    kept: the base output, or y where the forward had `watches_output` (`watched_output` here) and kept nothing else; None where
    that was overwritten since. again: what the forward left under this name; without it, it is computed again.
    """
    grad_output, kept = flatten(grad_output), None if kept is None else flatten(kept)
    norm = as_dtype(norm, torch.float32)
    operands = operand_dtype(x, weight, product_dtype)
    inputs, frozen = flat(x, product_dtype), as_dtype(weight, operands)
    if again:
        scale, narrow_A, hidden = again
    else:
        scale, narrow_A = launch_row_scale(magnitude, norm), as_dtype(lora_A, product_dtype)
        hidden = low_rank_input(inputs, narrow_A, needs_direction or needs_magnitude)
    through_norm = needs_direction and differentiate_norm
    needs_inner, needs_sum = needs_dropped if dropped else needs_x, needs_magnitude or through_norm
    from_output = watched_output and output_serves(dropped, product_dtype, grad_output.dtype, bias is not None)
    if needs_sum and kept is None:
        kept = product(flat(x, operands), frozen.t(), product_dtype)
        if from_output:
            launch_compose(kept, hidden, lora_B, scale, scaling, output=kept)
    grads = layer_gradients(
        grad_output, hidden, lora_B, scale, norm, scaling,
        base=None if from_output else kept, output=kept if from_output else None,
        magnitude=magnitude if from_output else None, dropped=dropped,
        needs_base=needs_inner, needs_hidden=needs_inner or needs_direction, needs_lora_B=needs_direction,
        needs_magnitude=needs_sum, base_dtype=operands,
    )  # fmt: skip
    if from_output and grads.magnitude is not None:
        launch_magnitude_gradient(grads.magnitude, grad_output, inputs, weight, lora_A, lora_B, magnitude, norm, scaling)
    grad_inner = None
    if grads.base is not None and grads.hidden is not None:
        grad_inner = add_low_rank(torch.mm(grads.base, frozen), as_dtype(grads.hidden, operands), as_dtype(narrow_A, operands))
    grad_x = grad_inner
    if dropped:
        grad_x = torch.mm(as_dtype(grad_output, operands), frozen) if needs_x else None
    parameters = parameter_gradients(
        grads, inputs, weight, lora_A, lora_B, scale, norm, scaling,
        needs_direction=needs_direction, needs_magnitude=needs_magnitude, through_norm=through_norm,
    )  # fmt: skip
    return grad_x, grad_inner if dropped else None, *parameters
