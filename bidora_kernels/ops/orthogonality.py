"""R = ||Vhat Vhat^T - I||_F^2 and its gradients from W0 W0^T, which never changes (BiDoRA, arXiv:2410.09758, eq. 3).

With P = V lora_A^T and U = weight lora_A^T the Gram matrix of V = weight + scaling * lora_B @ lora_A is a rank-2r update,

    V V^T = weight weight^T + scaling * (U lora_B^T + lora_B P^T),

so a step costs out^2 * r, not out^2 * in. With M = Vhat Vhat^T - I (diagonal 0) and q = 4 * row sums of M^2 the gradient with
respect to V is D V, D = (4 M - diag q) / (n n^T), and D is symmetric:

    grad_lora_B = scaling * D P,    grad_lora_A = scaling * (D lora_B)^T V

Where V cancels most of a row of the weight the update loses digits: then the Gram matrix is multiplied out.

A layer whose weight @ weight^T does not fit the budget is multiplied out at every call, or estimated from `probes` pairs of
random vectors z, w ~ N(0, I): E[(z^T Vhat Vhat^T w - z^T w)^2] = R, components of rows that are left out being zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import reference
from . import _library as library
from .weight_norm import weight_norm

DEFAULT_PROBES = 16  # of "auto" where weight @ weight^T does not fit; the spread of R falls with the root of their number
CACHE_BYTES = 256 << 20  # W0 W0^T of all layers together on a CPU; on a GPU a sixteenth of its memory where that is more
_CANCELLED = 1e-2  # of a row's squared norm

_grams: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def gram_cache_bytes() -> int:
    """Bytes that the cached products weight @ weight^T hold at present."""
    return sum(gram.numel() * gram.element_size() for _, gram in _grams.values())


def clear_gram_cache() -> None:
    """Drop the cached products; needed after a write to a frozen weight through `.data`."""
    _grams.clear()


def gram_budget(device: torch.device) -> int:
    """Bytes that the cached products of all layers may take on a device."""
    if device.type == "cuda" and CACHE_BYTES > 0:
        return max(CACHE_BYTES, torch.cuda.get_device_properties(device).total_memory // 16)
    return CACHE_BYTES


def _product(weight: Tensor) -> Tensor:
    """weight @ weight^T in the norm's dtype."""
    if weight.is_cuda and weight.element_size() == 2:
        return torch.mm(weight, weight.t(), out_dtype=torch.float32)
    full = weight.to(reference.norm_dtype(weight))
    return full @ full.t()


def _owner(weight: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """The tensor that a product is kept for, a quantized one where weight holds its values, and the state that it was made in."""
    base = weight if weight._base is None else weight._base
    stored: Tensor | None = getattr(weight, "dequantized_from", getattr(base, "dequantized_from", None))
    if stored is not None:
        return stored, (() if stored.is_inference() else (stored._version, weight.shape, weight.stride()))
    return base, (() if base.is_inference() else (base._version, weight.data_ptr(), weight.shape, weight.stride()))


def _fits(weight: Tensor) -> bool:
    """Whether weight @ weight^T is cached, or would be."""
    owner, key = _owner(weight)
    if owner.is_inference():
        return False
    known = _grams.get(owner)
    if known is not None and known[0] == key:
        return True
    size = weight.shape[0] ** 2 * reference.norm_dtype(weight).itemsize
    held = sum(gram.numel() * gram.element_size() for _, gram in _grams.values() if gram.device == weight.device)
    return held + size <= gram_budget(weight.device)


def probes_for(weight: Tensor, probes: int | str) -> int:
    """How many probe pairs serve a weight [out, in]: the number given, for "auto" 0 (exact) where its product fits the budget.

    Raises ValueError for anything else.
    """
    if probes == "auto":
        return 0 if _fits(weight) else DEFAULT_PROBES
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 0:
        raise ValueError(f'probes must be 0 (exact), a number of probe pairs or "auto", got {probes!r}')
    return probes


def penalty_plan(weight: Tensor, probes: int | str = 0) -> str:
    """In words, how `orthogonality_penalty` works for this weight [out, in] with the native and triton backends."""
    pairs = probes_for(weight, probes)
    if pairs:
        return f"estimated from {pairs} pairs of random probes"
    size = weight.shape[0] ** 2 * reference.norm_dtype(weight).itemsize / 2**20
    budget = gram_budget(weight.device) / 2**20
    if _fits(weight):
        return f"exact, from weight @ weight^T cached once ({size:.0f} MiB of a budget of {budget:.0f} MiB)"
    return f"exact, weight @ weight^T multiplied out at every call ({size:.0f} MiB do not fit a budget of {budget:.0f} MiB)"


def _weight_gram(weight: Tensor) -> Tensor:
    owner, key = _owner(weight)
    if owner.is_inference():
        return _product(weight)
    if library.is_captured(weight):  # a replay would read what is kept now, and a call outside find what is not computed yet
        return _product(weight)
    known = _grams.get(owner)
    if known is not None and known[0] == key:
        return known[1]
    _grams.pop(owner, None)
    fits = _fits(weight)
    gram = _product(weight)
    if fits:
        _grams[owner] = (key, gram)
    return gram


def _forward(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, needs_gradients: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.norm_dtype(weight)
    if backend == "triton":
        from ..kernels.orthogonality import launch_orthogonality

        with torch.autocast(weight.device.type, enabled=False):
            penalty, grad_A, grad_B = launch_orthogonality(weight, lora_A, lora_B, scaling, _weight_gram(weight), needs_gradients)
        if grad_A is None or grad_B is None:
            return penalty, weight.new_empty(0), weight.new_empty(0)
        return penalty, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)
    A, B, frozen = lora_A.to(dtype), lora_B.to(dtype), weight.to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        weight_gram = _weight_gram(weight)
        projection = frozen @ A.t()  # U, then P
        left = torch.cat([projection, B], 1)
        projection = torch.addmm(projection, B, A @ A.t(), alpha=scaling)
        gram = torch.addmm(weight_gram, left, torch.cat([B, projection], 1).t(), alpha=scaling)
        # not the diagonal of gram: a library's product rounds those sums, all of one sign, to one side
        square = weight_norm(weight, lora_A, lora_B, scaling, backend).square()
        if bool((square < _CANCELLED * weight_gram.diagonal()).any()):
            updated = reference.direction(weight, lora_A, lora_B, scaling)
            gram, projection = updated @ updated.t(), updated @ A.t()
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
    library.refuse_tangent(grad)
    grad_A, grad_B = ctx.saved_tensors
    return None, _scaled(grad, grad_A), _scaled(grad, grad_B), None, None, None


torch.library.register_autograd(
    "bidora_kernels::orthogonality", _autograd_backward, setup_context=_setup_context, lib=library.LIBRARY
)


def orthogonality_penalty(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
    """As `reference.orthogonality_penalty`, by one operator; the gradients are computed with the value."""
    needs = torch.is_grad_enabled() and (lora_A.requires_grad or lora_B.requires_grad)
    return _orthogonality(weight, lora_A, lora_B, scaling, needs, backend)[0]


def estimated_penalty(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, probes: int, backend: str) -> Tensor:
    """An unbiased estimate of `reference.orthogonality_penalty`, differentiable, from one pass over weight for all probes.

    The probes come from the device's default generator.
    """
    dtype = reference.norm_dtype(weight)
    out_features = weight.shape[0]
    if backend == "reference":
        norm = reference.weight_norm(weight, lora_A, lora_B, scaling)
    else:
        norm = weight_norm(weight, lora_A, lora_B, scaling, backend)
    above = (norm >= reference.NORM_FLOOR)[:, None]
    draws = torch.randn(out_features, 2 * probes, dtype=dtype, device=weight.device) * above
    with torch.autocast(weight.device.type, enabled=False):
        divided = draws / torch.where(above, norm[:, None], 1.0)
        operand = weight.dtype if weight.is_cuda and weight.element_size() == 2 else dtype
        through = (weight.to(operand).t() @ divided.to(operand)).to(dtype)
        through = through + scaling * lora_A.to(dtype).t() @ (lora_B.to(dtype).t() @ divided)
        left, right = through.split(probes, dim=1)
        z, w = draws.split(probes, dim=1)
        return ((left * right).sum(0) - (z * w).sum(0)).square().mean()
