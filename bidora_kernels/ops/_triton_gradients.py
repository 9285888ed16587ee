"""What the plans of the triton backend share: products into fp32, and the gradients around the library products."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.compose import launch_add_low_rank
from ..kernels.compose_backward import ComposeGradients, launch_compose_backward
from ..kernels.direction_backward import inverse_norms
from ..kernels.weight_norm_backward import launch_weight_norm_backward
from ..kernels.weight_norm_factors import launch_weight_norm_factors
from ._library import as_dtype, flatten
from .cost_model import LIBRARY_RANK

ADDING_RANK = 128  # from this rank on the library's product takes over the rank's share of grad_x


def flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., features] as [tokens, features] in a dtype."""
    return as_dtype(flatten(x), dtype)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in a dtype that is at least as wide as theirs, accumulated in fp32 and rounded once."""
    if a.dtype == dtype and b.dtype == dtype:
        return torch.mm(a, b)
    if a.is_cuda and a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


def narrow_factor(lora_A: Tensor, pieces: Tensor | None, dtype: torch.dtype) -> Tensor:
    """lora_A in a dtype; in bf16 it is the first of its pieces, where there are such."""
    return pieces[0] if pieces is not None and dtype == torch.bfloat16 else as_dtype(lora_A, dtype)


def add_low_rank(base: Tensor, hidden: Tensor, lora_A: Tensor) -> Tensor:
    """base + hidden @ lora_A, written over base: one kernel, at large ranks the library's product."""
    if hidden.shape[1] < ADDING_RANK:
        return launch_add_low_rank(base, hidden, lora_A)
    return base.addmm_(hidden, lora_A)


def operand_dtype(x: Tensor, weight: Tensor, product_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the operands of a product: a precise pass multiplies 16-bit operands as they are, into fp32.

    Under an autocast to another 16-bit dtype they are cast to it, as an nn.Linear's are.
    """
    precise = product_dtype == torch.float32 and x.dtype == weight.dtype and x.element_size() == 2
    return x.dtype if precise else product_dtype


def layer_gradients(
    grad_output: Tensor,
    hidden: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    norm: Tensor,
    scaling: float,
    *,
    base: Tensor | None = None,
    output: Tensor | None = None,
    magnitude: Tensor | None = None,
    dropped: bool = False,
    needs_base: bool,
    needs_hidden: bool,
    needs_lora_B: bool,
    needs_magnitude: bool,
    base_dtype: torch.dtype,
) -> ComposeGradients:
    """`launch_compose_backward`, its low-rank gradients by two library products at large ranks; arguments as there."""
    dtype = hidden.dtype
    from_base = needs_magnitude and output is None
    if hidden.shape[1] < LIBRARY_RANK or not (needs_hidden or needs_lora_B or from_base):
        return launch_compose_backward(
            grad_output, hidden, lora_B, scale, norm, scaling, base=base, output=output, magnitude=magnitude, dropped=dropped,
            needs_base=needs_base, needs_hidden=needs_hidden, needs_lora_B=needs_lora_B, needs_magnitude=needs_magnitude,
            base_dtype=base_dtype, hidden_dtype=dtype,
        )  # fmt: skip
    rest = launch_compose_backward(
        grad_output, hidden, lora_B, scale, norm, scaling, output=base if from_base else output, magnitude=magnitude,
        dropped=dropped, needs_base=needs_base, needs_hidden=False, needs_lora_B=False, needs_magnitude=needs_magnitude,
        base_dtype=base_dtype,
    )  # fmt: skip
    grad = grad_output.to(dtype)
    grad_hidden = grad_B = None
    if needs_hidden:
        grad_hidden = torch.mm(grad, (scaling * scale[:, None] * lora_B).to(dtype))
    if needs_lora_B or from_base:
        raw = product(grad.t(), hidden, torch.float32)
        grad_B = scaling * scale[:, None] * raw if needs_lora_B else None
        if from_base and rest.magnitude is not None:
            low_rank = scaling * (raw * lora_B).sum(1)
            return ComposeGradients(rest.base, grad_hidden, grad_B, (rest.magnitude + low_rank) * inverse_norms(norm))
    return ComposeGradients(rest.base, grad_hidden, grad_B, rest.magnitude)


def low_rank_input(inputs: Tensor, lora_A: Tensor, needed: bool, pieces: Tensor | None = None) -> Tensor:
    """x @ lora_A^T, computed again; where nobody reads it, a tensor of its shape. pieces: those of lora_A, where at hand."""
    if not needed:
        return inputs.new_empty(inputs.shape[0], lora_A.shape[0])
    return torch.mm(inputs, narrow_factor(lora_A, pieces, inputs.dtype).t())


def parameter_gradients(
    grads: ComposeGradients,
    inputs: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    norm: Tensor,
    scaling: float,
    *,
    needs_direction: bool,
    needs_magnitude: bool,
    through_norm: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(grad_lora_A, grad_lora_B, grad_magnitude) from `layer_gradients`, None for what is not needed.

    through_norm: add what a norm that is differentiated contributes; it needs the magnitude's gradient in any case.
    """
    grad_A, grad_B, grad_magnitude = None, grads.lora_B, grads.magnitude
    if needs_direction and grads.hidden is not None:
        grad_A = product(grads.hidden.t(), inputs, torch.float32)
    if through_norm and grad_A is not None and grad_B is not None and grad_magnitude is not None:
        _, _, projection = launch_weight_norm_factors(weight, lora_A, lora_B, scaling)
        norm_A, norm_B = launch_weight_norm_backward(-scale * grad_magnitude, norm, projection, weight, lora_A, lora_B, scaling)
        grad_A, grad_B = grad_A + norm_A, grad_B + norm_B
    return grad_A, grad_B, grad_magnitude if needs_magnitude else None
