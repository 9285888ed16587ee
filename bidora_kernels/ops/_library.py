"""The operator namespace `torch.ops.bidora_kernels`, and what its definitions share."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..native import is_transposed

LIBRARY = torch.library.Library("bidora_kernels", "DEF")
NAMESPACE = "bidora_kernels"


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define one operator with its implementation for CPU and CUDA tensors and its shape function; return the overload."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.bidora_kernels, name).default


def refuse_second_derivative(name: str) -> None:
    """Register a backward of an operator that already is a backward: it raises, naming the backend that has one."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{name} of the native and triton backends is differentiable once: run the forward under "
            'use_backend("reference") for second derivatives'
        )

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, lib=LIBRARY)


def flatten(x: Tensor) -> Tensor:
    """[..., features] as [tokens, features]; also where there are no features."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


_unsafe_view = torch.ops.aten._unsafe_view.default


def shaped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The same values in another shape, not counted as a view: an operator's output may then be overwritten in place."""
    return tensor if tensor.shape == shape else _unsafe_view(tensor, shape)


_NOTHING = contextlib.nullcontext()


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast; where there is none, one that does nothing."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else _NOTHING


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; where it has it, without a call into torch."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def rows(tensor: Tensor) -> Tensor:
    """The matrix itself where its rows are contiguous and do not overlap, else a contiguous copy."""
    if (tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]) or tensor.numel() == 0:
        return tensor
    return tensor.contiguous()


def like_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A new [out, in] tensor; it is a transposed view where the weight is one."""
    if is_transposed(weight):
        return weight.new_empty(weight.shape[1], weight.shape[0], dtype=dtype).t()
    return weight.new_empty(weight.shape, dtype=dtype)


PLAIN = (Tensor, torch.nn.Parameter)


def is_eager(*tensors: Tensor) -> bool:
    """Whether a call may bypass the dispatcher: nothing traces or intercepts operators, and every tensor is a plain one."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(type(tensor) in PLAIN for tensor in tensors)
    )


def has_tangent(*tensors: Tensor) -> bool:
    """Whether a tensor carries a forward-mode tangent."""
    forward_ad = torch.autograd.forward_ad
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a functional transform is active or a tensor carries a forward-mode tangent."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or has_tangent(*tensors)


def is_plain_gradient(grad: Tensor) -> bool:
    """Whether a backward pass may bypass the dispatcher: it is not differentiated itself, nor taken of many gradients at once."""
    if torch.is_grad_enabled() or not is_eager(grad) or is_many(grad):
        return False
    return not is_transformed(grad)


def is_many(grad: Tensor) -> bool:
    """Whether a backward pass is taken of many gradients at once (`is_grads_batched=True`)."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)


def refuse_tangent(grad: Tensor) -> None:
    """Raise where a kernel's backward pass would lose the tangent of its gradient without a word."""
    if not is_many(grad) and has_tangent(grad):
        raise NotImplementedError(
            "the native and triton backends do not serve forward-mode derivatives of a backward pass: run the forward under "
            'use_backend("reference")'
        )


# packages whose kernels write over a layer's output (SwiGLU's backward, rotary embeddings) past PyTorch's version counters: how
# the names of their modules begin, to which Hugging Face's `kernels` adds a hash
UNSEEN_WRITERS = ("liger_kernel", "unsloth", "flash_attn.layers.rotary", "flash_attn.ops.triton.rotary")
_looked_through = (0, False)  # how many modules there were, and whether one of them is such a package


def output_is_watched() -> bool:
    """Whether a write to a tensor that the caller was given shows in its version, so that it may be kept without a copy."""
    global _looked_through
    seen, found = _looked_through
    if seen != len(sys.modules):
        names = list(sys.modules)  # another thread may import meanwhile
        found = any(name.startswith(UNSEEN_WRITERS) for name in names)
        _looked_through = len(names), found
    return not found


def is_captured(tensor: Tensor) -> bool:
    """Whether a call with this tensor is being recorded into a CUDA graph, which would replay with what a cache holds now."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


_default_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def saves_through_hooks() -> bool:
    """Whether saved tensors pass through hooks (checkpointing, offloading), which a tensor kept by other means would escape."""
    return _default_hooks is None or _default_hooks(True) is not None
