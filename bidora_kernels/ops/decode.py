"""A layer's forward for few tokens where nothing has changed since the last one: one look at its state, then one kernel.

Decoding a token reads the weight once; the Python around that read takes longer than it for a small layer, and a tenth of it for
a large one whose code has left the processor's cache. What a call finds out from the parameters alone is kept here instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import native, reference
from ._backend import resolve
from ._context import PassMode, parameter_epoch
from ._library import flatten, is_eager, rows
from ._native_plan import FEW_TOKENS, takes_few_tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Decode:
    """y = c * (x V^T) + bias without gradients, as the native backend takes it, while the parameters stay what they are.

    Its inputs are plain CPU tensors in fp32 or a 16-bit dtype.
    """

    __slots__ = ("_bias", "_epoch", "_factors", "_most", "_scale", "_scaling", "_seen", "_weight")

    def __init__(
        self,
        held: Mapping[str, Tensor | None],
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        bias: Tensor | None,
        scaling: float,
        norm: Tensor,
    ) -> None:
        """Keep the scale c, and where the tensors that a module holds stand; `held` are its parameters by name."""

        def constant(tensor: Tensor) -> Tensor:
            return tensor.detach().to(norm.dtype).contiguous()

        def state(tensor: Tensor | None) -> tuple[Any, ...]:
            # the alias keeps the storage: an address is not another tensor's while it is compared with
            return (None, None, 0, 0) if tensor is None else (tensor, tensor.detach(), tensor.data_ptr(), tensor._version)

        self._seen = [(name, *state(tensor)) for name, tensor in held.items()]
        self._epoch, self._scaling, self._weight = parameter_epoch(), scaling, weight.detach()
        served = (tokens for tokens in range(FEW_TOKENS, 0, -1) if takes_few_tokens(tokens, weight, norm.dtype, norm_known=True))
        self._most = next(served, 0) if norm.dtype is torch.float32 else 0
        if self._most:
            self._factors = constant(lora_A), constant(lora_B)
            self._bias = None if bias is None else constant(bias)
            self._scale = reference.row_scale(constant(magnitude), norm)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or unpickled module finds its own."""
        return type(None), ()

    def is_current(self, held: Mapping[str, Tensor | None], scaling: float) -> bool:
        """Whether the module that holds these parameters is as it was."""
        if scaling != self._scaling or parameter_epoch() != self._epoch or len(held) != len(self._seen):
            return False
        for name, tensor, _, address, version in self._seen:
            now = held.get(name)
            if now is not tensor or (now is not None and (now._version != version or now.data_ptr() != address)):
                return False
        return True

    def __call__(self, x: Tensor, held: Mapping[str, Tensor | None], scaling: float, mode: PassMode) -> Tensor | None:
        """y of the module that holds these parameters, or None where the call is another one than this can take."""
        columns, dtype = self._weight.shape[1], x.dtype
        if (
            torch.is_grad_enabled()
            or x.ndim == 0
            or x.shape[-1] != columns
            or not 0 < x.numel() <= self._most * columns
            or dtype not in DTYPES
            or not x.is_cpu
            or not is_eager(x)
            or mode.precise
            or mode.point is not None
            or torch.is_autocast_enabled("cpu")
            or torch.jit.is_tracing()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch.autograd.forward_ad._current_level >= 0
            or resolve("cpu") != "native"
            or not self.is_current(held, scaling)
        ):
            return None
        mode.saw(reference.matmul_dtype(x, self._weight))
        inputs = rows(flatten(x if dtype is torch.float32 else x.float()))
        y = native.few_tokens(inputs, self._weight, *self._factors, self._scale, self._bias, self._scaling)
        return (y if dtype is torch.float32 else y.to(dtype)).view(*x.shape[:-1], self._weight.shape[0])


def may_decode(held: Mapping[str, Tensor | None], *used: Tensor | None) -> bool:
    """Whether a module's tensors are those that it holds, plain ones on the CPU whose writes are counted."""
    tensors = [tensor for tensor in held.values() if tensor is not None]
    return (
        {id(tensor) for tensor in used if tensor is not None} == {id(tensor) for tensor in tensors}
        and all(tensor.is_cpu and not tensor.is_inference() for tensor in tensors)
        and is_eager(*tensors)
        and torch._C._functorch.peek_interpreter_stack() is None
    )
