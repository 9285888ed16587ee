"""n = ||weight + scaling * lora_B @ lora_A||_2 per row, and the gradients that every function of V shares (DoRA, eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _library as library


def factor(weight: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in the norm's dtype, contiguous."""
    return tensor.to(reference.norm_dtype(weight)).contiguous()


def _forward(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
    if backend == "native":
        from .. import native

        return native.weight_norm(weight, factor(weight, lora_A), factor(weight, lora_B), scaling)
    from ..kernels.weight_norm import launch_weight_norm

    return launch_weight_norm(weight, lora_A, lora_B, scaling)


def _forward_fake(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=reference.norm_dtype(weight))


_weight_norm = library.define(
    "weight_norm(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, str backend) -> Tensor", _forward, _forward_fake
)


def _backward(
    weight: Tensor, grad: Tensor | None, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor | None, scaling: float, norm: Tensor,
    grad_norm: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if backend == "native":
        from .. import native

        grad = None if grad is None else library.rows(grad)
        grad_A, grad_B, grad_m = native.direction_backward(
            weight, grad, factor(weight, lora_A), factor(weight, lora_B),
            None if magnitude is None else factor(weight, magnitude),
            scaling, norm, None if grad_norm is None else factor(weight, grad_norm),
        )  # fmt: skip
    else:
        grad_A, grad_B, grad_m = _triton_backward(weight, grad, lora_A, lora_B, magnitude, scaling, norm, grad_norm)
    if magnitude is None or grad is None or grad_m is None:
        return grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype), weight.new_empty(0)
    return grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype), grad_m.to(magnitude.dtype)


def _triton_backward(
    weight: Tensor, grad: Tensor | None, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor | None, scaling: float, norm: Tensor,
    grad_norm: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    from ..kernels import normalized_direction
    from ..kernels.weight_norm_backward import launch_weight_norm_backward
    from ..kernels.weight_norm_factors import launch_weight_norm_factors

    if grad is None:
        if grad_norm is None:
            raise ValueError("grad or grad_norm is needed")
        _, _, projection = launch_weight_norm_factors(weight, lora_A, lora_B, scaling)
        return (*launch_weight_norm_backward(grad_norm, norm, projection, weight, lora_A, lora_B, scaling), None)
    if magnitude is None:
        launch = normalized_direction.launch_normalized_direction_backward
        return (*launch(grad, norm, weight, lora_A, lora_B, scaling), None)
    return normalized_direction.launch_merged_weight_backward(grad, norm, weight, lora_A, lora_B, magnitude, scaling)


def _backward_fake(
    weight: Tensor, grad: Tensor | None, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor | None, scaling: float, norm: Tensor,
    grad_norm: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with_magnitude = magnitude is not None and grad is not None
    grad_m = magnitude.new_empty(magnitude.shape) if magnitude is not None and with_magnitude else weight.new_empty(0)
    return lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape), grad_m


direction_backward = library.define(
    "direction_backward(Tensor weight, Tensor? grad, Tensor lora_A, Tensor lora_B, Tensor? magnitude, float scaling, "
    "Tensor norm, Tensor? grad_norm, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
library.refuse_second_derivative("direction_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, lora_A, lora_B, ctx.scaling, ctx.backend = inputs
    ctx.save_for_backward(weight, lora_A, lora_B, output)


def _autograd_backward(ctx: Any, grad_norm: Tensor) -> tuple[Tensor | None, ...]:
    library.refuse_tangent(grad_norm)
    weight, lora_A, lora_B, norm = ctx.saved_tensors
    grad_A, grad_B, _ = direction_backward(weight, None, lora_A, lora_B, None, ctx.scaling, norm, grad_norm, ctx.backend)
    return None, grad_A, grad_B, None, None


torch.library.register_autograd(
    "bidora_kernels::weight_norm", _autograd_backward, setup_context=_setup_context, lib=library.LIBRARY
)


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
    """As `reference.weight_norm`, by one operator; arguments were checked in functional.py."""
    return _weight_norm(weight, lora_A, lora_B, scaling, backend)


def _forward_sets(weight: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: float, backend: str) -> Tensor:
    if backend == "native":
        return torch.stack([_forward(weight, a, b, scaling, backend) for a, b in zip(lora_A, lora_B, strict=True)])
    from ..kernels.weight_norm import launch_weight_norms

    return launch_weight_norms(weight, list(zip(lora_A, lora_B, strict=True)), scaling)


def _forward_sets_fake(
    weight: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: float, backend: str
) -> Tensor:
    return weight.new_empty((len(lora_A), weight.shape[0]), dtype=reference.norm_dtype(weight))


_weight_norms = library.define(
    "weight_norms(Tensor weight, Tensor[] lora_A, Tensor[] lora_B, float scaling, str backend) -> Tensor",
    _forward_sets,
    _forward_sets_fake,
)


def weight_norms(weight: Tensor, sets: Sequence[tuple[Tensor, Tensor]], scaling: float, backend: str) -> Tensor:
    """[len(sets), out] norms as constants; the triton backend reads weight once for all of them."""
    lora_A, lora_B = [a.detach() for a, _ in sets], [b.detach() for _, b in sets]
    return _weight_norms(weight, lora_A, lora_B, scaling, backend)
