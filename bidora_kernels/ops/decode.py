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
from ._context import PassMode
from ._library import is_eager
from ._native_plan import FEW_TOKENS, Layer, takes_few_tokens
from .parameter_state import ParameterState, is_counted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Decode:
    """y = c * (x V^T) + bias without gradients, as the native backend takes it, while the parameters stay what they are.

    Its inputs are plain CPU tensors in fp32 or a 16-bit dtype.
    """

    __slots__ = ("_layer", "_most", "_scale", "_state")

    def __init__(
        self, held: Mapping[str, Tensor | None], weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor,
        bias: Tensor | None, scaling: float, norm: Tensor,
    ) -> None:  # fmt: skip
        """Keep the layer's constants and its scale c, and where the parameters that the module holds stand, `held` by name."""
        self._state = ParameterState(held.values(), scaling)
        terms = (lora_A.detach(), lora_B.detach(), magnitude.detach(), None if bias is None else bias.detach())
        self._layer = Layer(weight.detach(), *terms, scaling, in_bf16=False)
        served = (tokens for tokens in range(FEW_TOKENS, 0, -1) if takes_few_tokens(tokens, weight, norm.dtype, norm_known=True))
        self._most = next(served, 0) if norm.dtype is torch.float32 else 0
        self._scale = reference.row_scale(self._layer.magnitude, norm)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or unpickled module finds its own."""
        return type(None), ()

    def is_current(self, held: Mapping[str, Tensor | None], scaling: float) -> bool:
        """Whether the module that holds these parameters is as it was."""
        return self._state.is_current(held.values(), scaling)

    def __call__(self, x: Tensor, held: Mapping[str, Tensor | None], scaling: float, mode: PassMode) -> Tensor | None:
        """y of the module that holds these parameters, or None where the call is another one than this can take."""
        layer, dtype = self._layer, x.dtype
        columns = layer.weight.shape[1]
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
        mode.saw(reference.matmul_dtype(x, layer.weight))
        y = native.few_tokens(layer.flat(x), layer.weight, layer.lora_A, layer.lora_B, self._scale, layer.bias, layer.scaling)
        return (y if y.dtype is dtype else y.to(dtype)).view(*x.shape[:-1], layer.weight.shape[0])


def may_decode(held: Mapping[str, Tensor | None], *used: Tensor | None) -> bool:
    """Whether a module's tensors are those that it holds, plain ones on the CPU whose writes are counted."""
    tensors = [tensor for tensor in held.values() if tensor is not None]
    return (
        {id(tensor) for tensor in used if tensor is not None} == {id(tensor) for tensor in tensors}
        and all(tensor.is_cpu for tensor in tensors)
        and is_counted(tensors)
        and is_eager(*tensors)
        and torch._C._functorch.peek_interpreter_stack() is None
    )
