"""R = ||Vhat Vhat^T - I||_F^2 and its gradients from W0 W0^T, which never changes (BiDoRA, arXiv:2410.09758, eq. 3).

With P = V lora_A^T and U = weight lora_A^T the Gram matrix of V = weight + scaling * lora_B @ lora_A is a rank-2r update,

    V V^T = weight weight^T + scaling * (U lora_B^T + lora_B P^T),

so a step costs out^2 * r, not out^2 * in. With M = Vhat Vhat^T - I (diagonal 0) and q = 4 * row sums of M^2 the gradient with
respect to V is D V, D = (4 M - diag q) / (n n^T), and D is symmetric:

    grad_lora_B = scaling * D P,    grad_lora_A = scaling * (D lora_B)^T V

Where V cancels most of a row of the weight the update loses digits: then the Gram matrix is multiplied out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import reference
from . import _library as library

CACHE_BYTES = 256 << 20  # W0 W0^T of all layers together; a layer beyond it is multiplied out at every call
_CANCELLED = 1e-2  # of a row's squared norm

_grams: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def gram_cache_bytes() -> int:
    """Bytes that the cached products weight @ weight^T hold at present."""
    return sum(gram.numel() * gram.element_size() for _, gram in _grams.values())


def clear_gram_cache() -> None:
    """Drop the cached products; needed after a write to a frozen weight through `.data`."""
    _grams.clear()


def _weight_gram(weight: Tensor) -> Tensor:
    owner = weight if weight._base is None else weight._base
    if owner.is_inference():
        full = weight.to(reference.norm_dtype(weight))
        return full @ full.t()
    key = (owner._version, weight.data_ptr(), weight.shape, weight.stride())
    known = _grams.get(owner)
    if known is not None and known[0] == key:
        return known[1]
    _grams.pop(owner, None)
    full = weight.to(reference.norm_dtype(weight))
    gram = full @ full.t()
    if gram_cache_bytes() + gram.numel() * gram.element_size() <= CACHE_BYTES:
        _grams[owner] = (key, gram)
    return gram


def _forward(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, needs_gradients: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.norm_dtype(weight)
    A, B, frozen = lora_A.to(dtype), lora_B.to(dtype), weight.to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        weight_gram = _weight_gram(weight)
        projection = frozen @ A.t()  # U, then P
        left = torch.cat([projection, B], 1)
        projection = torch.addmm(projection, B, A @ A.t(), alpha=scaling)
        gram = torch.addmm(weight_gram, left, torch.cat([B, projection], 1).t(), alpha=scaling)
        square = gram.diagonal().clone()
        if bool((square < _CANCELLED * weight_gram.diagonal()).any()):
            updated = reference.direction(weight, lora_A, lora_B, scaling)
            gram, projection = updated @ updated.t(), updated @ A.t()
            square = gram.diagonal().clone()
        kept = square >= reference.NORM_FLOOR**2
        inverse = torch.where(kept, torch.where(kept, square, 1.0).rsqrt(), 0.0)
        unit = gram.mul_(inverse[:, None]).mul_(inverse)
        unit.diagonal().zero_()  # a row's length is 1 by construction: what rounding left there is no part of R
        row_squares = torch.linalg.vector_norm(unit, dim=1).square()
        penalty = row_squares.sum()
        if not needs_gradients:
            return penalty, weight.new_empty(0), weight.new_empty(0)
        unit.diagonal().copy_(-row_squares)
        derivative = unit.mul_(4.0 * inverse[:, None]).mul_(inverse)
        grad_B = scaling * (derivative @ projection)
        factor = derivative @ B
        grad_A = scaling * torch.addmm(factor.t() @ frozen, factor.t() @ B, A, alpha=scaling)
    return penalty, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)


def _forward_fake(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, needs_gradients: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    penalty = weight.new_empty((), dtype=reference.norm_dtype(weight))
    if not needs_gradients:
        return penalty, weight.new_empty(0), weight.new_empty(0)
    return penalty, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


_orthogonality = library.define(
    "orthogonality(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, bool needs_gradients, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def _scale(grad: Tensor, unscaled: Tensor) -> Tensor:
    return grad.to(unscaled.dtype) * unscaled


_scaled = library.define("scaled_gradient(Tensor grad, Tensor unscaled) -> Tensor", _scale, _scale)
library.refuse_second_derivative("scaled_gradient")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], output[2])


def _autograd_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_A, grad_B = ctx.saved_tensors
    return None, _scaled(grad, grad_A), _scaled(grad, grad_B), None, None, None


torch.library.register_autograd(
    "bidora_kernels::orthogonality", _autograd_backward, setup_context=_setup_context, lib=library.LIBRARY
)


def orthogonality_penalty(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
    """As `reference.orthogonality_penalty`, by one operator; the gradients are computed with the value."""
    needs = torch.is_grad_enabled() and (lora_A.requires_grad or lora_B.requires_grad)
    return _orthogonality(weight, lora_A, lora_B, scaling, needs, backend)[0]
