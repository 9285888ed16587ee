"""y = c * (x V^T) + bias with c = magnitude / ||V||, one operator forward and one backward (DoRA, arXiv:2402.09353, eq. 5).

The backward reads the magnitude's gradient off y where it can, so that nothing else of its size stays between the passes but x;
where y is not enough (dropout, a 16-bit y of a precise pass, on the triton backend a bias) the forward returns what it needs in
`kept`. `plan` says how the triton backend runs the layer ("activation" or "weight"); the native backend decides for itself.
`merged` is the merged weight where it is known already; then `norm_given` is known too, and not a constant.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _library as library
from ._context import eager_mode


@functools.cache
def _implementation(backend: str, plan: str) -> Any:
    """The module of a plan; the kernels are imported where a backend serves a call, and once."""
    if backend == "native":
        from . import _native_plan as module
    elif plan == "weight":
        from . import _triton_weight_plan as module  # type: ignore[no-redef]
    else:
        from . import _triton_plan as module  # type: ignore[no-redef]
    return module


def _planned_forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, norm_given: Tensor | None, bias: Tensor | None,
    x_dropped: Tensor | None, scaling: float, detach_norm: bool, precise: bool, product_dtype: torch.dtype,
    out_dtype: torch.dtype, keeps: bool, backend: str, plan: str, merged: Tensor | None, watches_output: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]:  # fmt: skip
    """(y, the norms, what the backward needs beyond y or None, what it could compute again) by the plan of the backend.

    watches_output: the caller keeps y and notices where it is overwritten.
    """
    implementation = _implementation(backend, plan)
    with library.without_autocast(x.device.type):
        if plan == "weight":
            y, norm, kept, again = implementation.forward(
                x, weight, lora_A, lora_B, magnitude, norm_given, bias, scaling, product_dtype, out_dtype, keeps, merged
            )
        else:
            y, norm, kept, again = implementation.forward(
                x, weight, lora_A, lora_B, magnitude, norm_given, bias, x_dropped, scaling, precise, product_dtype, out_dtype,
                keeps, watches_output,
            )  # fmt: skip
    if norm is None:
        raise RuntimeError("a merged weight came without its norms")
    return library.shaped(y, (*x.shape[:-1], weight.shape[0])), norm, kept, again


def _forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, norm_given: Tensor | None, bias: Tensor | None,
    x_dropped: Tensor | None, scaling: float, detach_norm: bool, precise: bool, product_dtype: torch.dtype,
    out_dtype: torch.dtype, keeps: bool, backend: str, plan: str = "activation", merged: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, norm, kept, _ = _planned_forward(
        x, weight, lora_A, lora_B, magnitude, norm_given, bias, x_dropped, scaling, detach_norm, precise, product_dtype,
        out_dtype, keeps, backend, plan, merged,
    )  # fmt: skip
    eager_mode().saw(product_dtype)  # functional.py, which says so for eager calls, is only traced where a model is compiled
    # an operator may not return one of its inputs, nor the same memory twice
    return y, norm if norm_given is None else x.new_empty(0), x.new_empty(0) if kept is None else kept


def _forward_fake(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, norm_given: Tensor | None, bias: Tensor | None,
    x_dropped: Tensor | None, scaling: float, detach_norm: bool, precise: bool, product_dtype: torch.dtype,
    out_dtype: torch.dtype, keeps: bool, backend: str, plan: str = "activation", merged: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)
    kept_dtype = _implementation(backend, plan).kept_dtype(
        weight, x_dropped is not None, precise, product_dtype, out_dtype, keeps, bias is not None
    )
    kept = x.new_empty(0) if kept_dtype is None else y.new_empty(library.flatten(y).shape, dtype=kept_dtype)
    norm = x.new_empty(0) if norm_given is not None else weight.new_empty(weight.shape[0], dtype=reference.norm_dtype(weight))
    return y, norm, kept


_dora_linear = library.define(
    "dora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor? norm_given, Tensor? bias, "
    "Tensor? x_dropped, float scaling, bool detach_norm, bool precise, ScalarType product_dtype, "
    "ScalarType out_dtype, bool keeps, str backend, str plan='activation', Tensor? merged=None)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)  # fmt: skip


def _planned_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, norm: Tensor,
    bias: Tensor | None, kept: Tensor | None, scaling: float, dropped: bool, needs_x: bool, needs_dropped: bool,
    needs_direction: bool, needs_magnitude: bool, differentiate_norm: bool, product_dtype: torch.dtype, backend: str,
    plan: str, merged: Tensor | None, again: tuple[Tensor, ...] = (), watched_output: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of x, x_dropped, lora_A, lora_B and magnitude in their dtypes and shapes, None for what is not needed."""
    implementation = _implementation(backend, plan)
    with library.without_autocast(x.device.type):
        if plan == "weight":
            grads = implementation.backward(
                grad_output, x, weight, lora_A, lora_B, magnitude, norm, kept, scaling, needs_x, needs_direction,
                needs_magnitude, differentiate_norm, product_dtype, merged, again,
            )  # fmt: skip
        else:
            grads = implementation.backward(
                grad_output, x, weight, lora_A, lora_B, magnitude, norm, bias, kept, scaling, dropped, needs_x, needs_dropped,
                needs_direction, needs_magnitude, differentiate_norm, product_dtype, again, watched_output,
            )  # fmt: skip
    return tuple([
        grad if grad is None else library.shaped(library.as_dtype(grad, target.dtype), target.shape)
        for grad, target in zip(grads, (x, x, lora_A, lora_B, magnitude), strict=True)
    ])  # fmt: skip


def _backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, norm: Tensor,
    bias: Tensor | None, kept: Tensor | None, scaling: float, dropped: bool, needs_x: bool, needs_dropped: bool,
    needs_direction: bool, needs_magnitude: bool, differentiate_norm: bool, product_dtype: torch.dtype, backend: str,
    plan: str = "activation", merged: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _planned_backward(
        grad_output, x, weight, lora_A, lora_B, magnitude, norm, bias, kept, scaling, dropped, needs_x, needs_dropped,
        needs_direction, needs_magnitude, differentiate_norm, product_dtype, backend, plan, merged,
    )  # fmt: skip
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore[return-value]


def _backward_fake(
    grad_output: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, norm: Tensor,
    bias: Tensor | None, kept: Tensor | None, scaling: float, dropped: bool, needs_x: bool, needs_dropped: bool,
    needs_direction: bool, needs_magnitude: bool, differentiate_norm: bool, product_dtype: torch.dtype, backend: str,
    plan: str = "activation", merged: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    needed = (needs_x, needs_dropped, needs_direction, needs_direction, needs_magnitude)
    return tuple(  # type: ignore[return-value]
        target.new_empty(target.shape) if need else x.new_empty(0)
        for need, target in zip(needed, (x, x, lora_A, lora_B, magnitude), strict=True)
    )


_dora_linear_backward = library.define(
    "dora_linear_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, "
    "Tensor norm, Tensor? bias, Tensor? kept, float scaling, bool dropped, bool needs_x, bool needs_dropped, "
    "bool needs_direction, bool needs_magnitude, bool differentiate_norm, ScalarType product_dtype, "
    "str backend, str plan='activation', Tensor? merged=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
library.refuse_second_derivative("dora_linear_backward")


class _Keep(torch.autograd.Function):
    """Saves a tensor in a node of its own, so that a failed look at it leaves the others readable."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, kept: Tensor) -> Tensor:
        """Save `kept`; the result only carries the node."""
        ctx.save_for_backward(kept)
        return anchor.view_as(anchor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        """Nothing flows back."""
        return None, None


def kept_output(y: Tensor) -> Any:
    """y for `saved_output`. The caller may overwrite it (an activation in place): then the backward computes it again."""
    if not library.saves_through_hooks():  # an alias, or a copy where a write would not show in its version
        alias = y.detach() if library.output_is_watched() else y.detach().clone()
        return alias, alias._version
    with torch.enable_grad():
        # a copy: hooks that keep the tensor itself would hand back what the caller has overwritten, unnoticed
        return _Keep.apply(torch.empty(0, requires_grad=True, device="cpu"), y.detach().clone()).grad_fn


def _save(
    ctx: Any, inputs: tuple[Any, ...], y: Tensor, norm: Tensor, kept: Tensor | None, again: tuple[Tensor, ...] = ()
) -> None:
    """Keep for the backward what the needed gradients ask for."""
    x, weight, lora_A, lora_B, magnitude, norm_given, bias, x_dropped, scaling, detach_norm, *others = inputs
    _, product_dtype, _, _, backend, ctx.plan, merged = others
    needs = ctx.needs_input_grad
    ctx.direction, ctx.magnitude = needs[2] or needs[3], needs[4]
    ctx.differentiate_norm = not detach_norm and (norm_given is None or merged is not None)
    ctx.scaling, ctx.backend, ctx.dropped, ctx.product_dtype = scaling, backend, x_dropped is not None, product_dtype
    ctx.output, ctx.watched = None, False
    if not (ctx.magnitude or (ctx.direction and ctx.differentiate_norm)):
        kept = None
    elif kept is not None:
        pass
    elif torch.compiler.is_compiling():
        kept = y
    else:
        ctx.output = kept_output(y)
    low_rank_input = x if x_dropped is None else x_dropped
    ctx.save_for_backward(low_rank_input, weight, lora_A, lora_B, magnitude, norm, bias, merged, kept, *again)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    y, norm, kept = output
    norm_given = inputs[5]
    _save(ctx, inputs, y, norm if norm_given is None else norm_given, kept if kept.numel() > 0 else None)


def saved_output(ctx: Any) -> Tensor | None:
    """y where it was kept and is still what the forward returned."""
    output, ctx.output = ctx.output, None  # freed with the pass; a second backward through a retained graph computes y again
    if output is None:
        return None
    if isinstance(output, tuple):
        y, version = output
        freed = y.untyped_storage().nbytes() == 0 and y.numel() > 0
        return y if y._version == version and not freed else None
    try:
        return output.saved_tensors[0]
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        return None


def _gradients(ctx: Any, grad_output: Tensor, bypass: bool) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs that need one, by the operator or, where `bypass` allows it, its implementation."""
    library.refuse_tangent(grad_output)
    x, weight, lora_A, lora_B, magnitude, norm, bias, merged, kept, *again = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if kept is None:
        kept = saved_output(ctx)
        kept = None if ctx.watched and not bypass else kept  # the operator would take y for the base output
    arguments = (
        grad_output, x, weight, lora_A, lora_B, magnitude, norm, bias, kept, ctx.scaling, ctx.dropped, needs[0], needs[7],
        ctx.direction, ctx.magnitude, ctx.differentiate_norm, ctx.product_dtype, ctx.backend, ctx.plan, merged,
    )  # fmt: skip
    found = _planned_backward(*arguments, tuple(again), ctx.watched) if bypass else _dora_linear_backward(*arguments)
    grad_x, grad_dropped, grad_A, grad_B, grad_magnitude = found
    return (
        grad_x if needs[0] else None, None, grad_A if needs[2] else None, grad_B if needs[3] else None,
        grad_magnitude if needs[4] else None, None, None, grad_dropped if needs[7] else None, *(None,) * 9,
    )  # fmt: skip


def _operator_gradients(ctx: Any, grad_output: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad_output, bypass=False)


torch.library.register_autograd(
    "bidora_kernels::dora_linear", _operator_gradients, setup_context=_setup_context, lib=library.LIBRARY
)


class _DoraLinear(torch.autograd.Function):
    """The operator without the dispatcher, which costs an eager call of a small layer more time than its kernels."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """y, as the operator's first output."""
        watched = not library.saves_through_hooks() and library.output_is_watched()
        y, norm, kept, again = _planned_forward(*(*inputs, watched))
        _save(ctx, inputs, y, norm, kept, again)
        ctx.watched = watched and kept is None and ctx.backend == "triton" and ctx.plan == "activation"
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """As the operator's; by it for many gradients at once, and under create_graph, where it says what is missing."""
        return _gradients(ctx, grad_output, bypass=library.is_plain_gradient(grad_output))


def reads_output(lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, detach_norm: bool) -> bool:
    """Whether a backward will ask for what the output holds: the magnitude's gradient, or that of a differentiated norm."""
    return torch.is_grad_enabled() and (
        magnitude.requires_grad or (not detach_norm and (lora_A.requires_grad or lora_B.requires_grad))
    )


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None,
    x_dropped: Tensor | None,
    detach_norm: bool,
    norm: Tensor | None,
    precise: bool,
    product_dtype: torch.dtype,
    backend: str,
    plan: str = "activation",
    merged: Tensor | None = None,
) -> Tensor:
    """As `reference.dora_linear`, by one operator; arguments were checked in functional.py, which knows the product's dtype."""
    keeps = reads_output(lora_A, lora_B, magnitude, detach_norm)
    arguments = (
        x, weight, lora_A, lora_B, magnitude, norm, bias, x_dropped, scaling, detach_norm, precise,
        product_dtype, reference.output_dtype(x), keeps, backend, plan, merged,
    )  # fmt: skip
    if library.is_eager(x, weight, lora_A, lora_B, magnitude):
        if not torch.is_grad_enabled():
            return _planned_forward(*arguments)[0]
        # past Function.apply, which looks for functional transforms: functional.py has sent those to the reference
        return super(torch.autograd.Function, _DoraLinear).apply(*arguments)  # type: ignore[no-any-return,misc]
    return _dora_linear(*arguments)[0]  # type: ignore[no-any-return]
