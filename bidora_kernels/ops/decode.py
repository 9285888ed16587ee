"""A layer's forward for few tokens where nothing has changed since the last one: one look at its state, then its kernels.

Decoding a token reads the weight once; the Python around that read takes longer than it for a small layer, and a tenth of it for
a large one whose code has left the processor's cache. What a call finds out from the parameters alone is kept here instead. Up to
FEW_TOKENS one kernel gives the output, beyond them, where no weight plan pays, the products of the activation plan.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import native, reference
from ._backend import backend_under
from ._context import PassMode
from ._library import PLAIN, is_eager
from ._native_plan import FEW_TOKENS, Layer, takes_few_tokens, weight_plan_pays
from .parameter_state import ParameterState, is_counted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# by their own names: each step through a module's attributes is one more line of memory to fetch between two tokens
_grad, _autocast = torch.is_grad_enabled, torch.is_autocast_enabled
_traced = torch._C._get_tracing_state
_modes, _transform = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack


class Decode:
    """y = c * (x V^T) + bias without gradients, as the native backend takes it, while the parameters stay what they are.

    Its inputs are plain CPU tensors in fp32 or a 16-bit dtype.
    """

    __slots__ = ("_layer", "_most", "_terms", "state")

    def __init__(
        self, held: Mapping[str, Tensor | None], weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor,
        bias: Tensor | None, scaling: float, norm: Tensor,
    ) -> None:  # fmt: skip
        """Keep the layer's constants and its scale c, and where the parameters that the module holds stand, `held` by name."""
        self.state = ParameterState(held.values(), scaling)
        terms = (lora_A.detach(), lora_B.detach(), magnitude.detach(), None if bias is None else bias.detach())
        layer = Layer(weight.detach(), *terms, scaling, in_bf16=False)
        self._most = _most_tokens(layer.weight)
        self._layer, scale = layer, reference.row_scale(layer.magnitude, norm)
        self._terms = layer.weight, layer.lora_A, layer.lora_B, scale, layer.bias, scaling

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or unpickled module finds its own."""
        return type(None), ()

    def __call__(self, x: Tensor, held: Mapping[str, Tensor | None], scaling: float, mode: PassMode) -> Tensor | None:
        """y of the module that holds these parameters, or None where the call is another one than this can take."""
        weight, lora_A, lora_B, scale, bias, factor = self._terms
        dtype, shape, columns = x.dtype, x.shape, weight.shape[1]
        if (
            _grad()
            or type(x) not in PLAIN
            or dtype not in DTYPES
            or not x.is_cpu
            or len(shape) == 0
            or shape[-1] != columns
            or not 0 < (size := x.numel()) <= self._most * columns
            or mode.precise
            or mode.point is not None
            or _autocast("cpu")
            or _modes() != 0
            or _transform() is not None
            or _traced() is not None
            or forward_ad._current_level >= 0
            or (mode.backend != "native" and backend_under(mode, "cpu") != "native")
            or not self.state.is_current(held.values(), scaling)
        ):
            return None
        mode.seen_dtypes.add(dtype if dtype is weight.dtype else torch.promote_types(dtype, weight.dtype))
        x, tokens = self._layer.flat(x), size // columns
        if tokens <= FEW_TOKENS:
            y = scale.new_empty(tokens, scale.shape[0])
            native.few_tokens(x, weight, lora_A, lora_B, scale, bias, factor, y)
        else:
            y = native.product(x, weight)
            native.compose(y, torch.mm(x, lora_A.t()), lora_B, scale, bias, factor, y)
        if len(shape) == 2 and dtype is torch.float32:
            return y
        return y.to(dtype).view(*shape[:-1], y.shape[1])


def _most_tokens(weight: Tensor) -> int:
    """How many tokens' outputs the short way gives for this weight: those of one kernel or of the activation plan."""
    dtype = reference.norm_dtype(weight)
    if dtype is not torch.float32 or native.stored(weight) is not weight:
        return 0
    if not takes_few_tokens(1, weight, dtype, norm_known=True):
        return 0
    if weight.dtype is not dtype:
        return FEW_TOKENS
    pays = functools.partial(weight_plan_pays, weight=weight, dtype=dtype, norm_known=True)
    return bisect.bisect_left(range(1, weight.shape[1] + 1), True, key=pays)  # it pays at the latest with a square x


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
