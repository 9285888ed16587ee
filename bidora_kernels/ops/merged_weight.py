"""magnitude * V / ||V|| per row, and V / ||V|| itself, with the weight read once (DoRA, arXiv:2402.09353, eq. 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _library as library
from .weight_norm import direction_backward, factor


def _forward(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor | None, scaling: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "native":
        from .. import native

        A, B, m = factor(weight, lora_A), factor(weight, lora_B), None if magnitude is None else factor(weight, magnitude)
        merged = library.like_weight(weight, dtype)
        norm = weight.new_empty(weight.shape[0], dtype=reference.norm_dtype(weight))
        native.merged_weight(weight, A, B, m, scaling, norm, merged)
        return merged, norm
    from ..kernels.merged_weight import launch_merged_weight

    return launch_merged_weight(weight, lora_A, lora_B, magnitude, scaling, dtype=dtype)


def _forward_fake(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor | None, scaling: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    norm = weight.new_empty(weight.shape[0], dtype=reference.norm_dtype(weight))
    merged = library.like_weight(weight, dtype) if backend == "native" else weight.new_empty(tuple(weight.shape), dtype=dtype)
    return merged, norm


_merged_weight = library.define(
    "merged_weight(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? magnitude, float scaling, ScalarType dtype, str backend)"
    " -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, lora_A, lora_B, magnitude, ctx.scaling, _, ctx.backend = inputs
    ctx.save_for_backward(weight, lora_A, lora_B, magnitude, output[1])


def _autograd_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    library.refuse_tangent(grad)
    weight, lora_A, lora_B, magnitude, norm = ctx.saved_tensors
    grad_A, grad_B, grad_m = direction_backward(weight, grad, lora_A, lora_B, magnitude, ctx.scaling, norm, None, ctx.backend)
    return None, grad_A, grad_B, None if magnitude is None else grad_m, None, None, None


torch.library.register_autograd(
    "bidora_kernels::merged_weight", _autograd_backward, setup_context=_setup_context, lib=library.LIBRARY
)


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float, backend: str) -> Tensor:
    """As `reference.merged_weight`, by one operator; the result has the weight's layout on the native backend."""
    return _merged_weight(weight, lora_A, lora_B, magnitude, scaling, weight.dtype, backend)[0]


def normalized_direction(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
    """As `reference.normalized_direction`, by one operator."""
    return _merged_weight(weight, lora_A, lora_B, None, scaling, reference.norm_dtype(weight), backend)[0]
