"""Frozen weights held in 4 or 8 bits: dequantized a block of rows at a time, never as a whole.

A row of V = weight + scaling * lora_B @ lora_A needs only its own row of the weight, so norms, merged weights and the layer run
block by block over the quantized storage; the backward dequantizes each block again. One hook per storage format says how its
rows are read: bitsandbytes' 4-bit parameters (NF4, FP4) and torchao's weight-only tensors are known, others are registered.

`torch.compile` breaks its graph around a quantized layer, which then runs as it does in eager mode; fullgraph=True raises.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import reference
from . import _library as library
from . import dora_linear as operator

BLOCK_BYTES = 64 << 20  # of dequantized rows at a time

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def _outside_graphs(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """As torch.compiler.disable, without importing dynamo where nothing is compiled."""

    @functools.wraps(function)
    def outside(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        dynamo = sys.modules.get("torch._dynamo")
        return (function if dynamo is None else dynamo.disable(function))(*args, **kwargs)

    outside.__dict__["_torchdynamo_disable"] = True
    outside.__dict__["_torchdynamo_disable_msg"] = (
        "a quantized weight is dequantized block by block, outside any graph: compile without fullgraph=True"
    )
    return outside


@dataclasses.dataclass(frozen=True)
class QuantizedFormat:
    """How one kind of quantized weight is read.

    matches: whether a tensor is of this kind. shape: its [out, in]. dtype: of the dequantized values. rows: (weight, start, stop)
    to the dequantized rows [stop - start, in]. step: rows may be cut at multiples of it.
    """

    name: str
    matches: Callable[[Tensor], bool]
    shape: Callable[[Any], tuple[int, int]]
    dtype: Callable[[Any], torch.dtype]
    rows: Callable[[Any, int, int], Tensor]
    step: Callable[[Any], int] = lambda weight: 1


_FORMATS: list[QuantizedFormat] = []


def register_quantized_format(quantized: QuantizedFormat) -> None:
    """Let layers and operations take weights of another quantized storage; the latest match wins."""
    _FORMATS.insert(0, quantized)


def format_of(weight: Tensor) -> QuantizedFormat | None:
    """The format of a quantized weight, None for a plain tensor."""
    if type(weight) is Tensor or type(weight) is torch.nn.Parameter:
        return None
    return next((known for known in _FORMATS if known.matches(weight)), None)


def stand_in(weight: Tensor) -> Tensor:
    """The weight itself, or for a quantized one a tensor with the shape, dtype and device of its values, and no memory."""
    quantized = format_of(weight)
    if quantized is None:
        return weight
    return torch.empty(1, dtype=quantized.dtype(weight), device=weight.device).expand(quantized.shape(weight))


def dequantized(weight: Tensor) -> Tensor:
    """The weight itself, or all values of a quantized one, which remember it as `dequantized_from`: what is cached follows it."""
    quantized = format_of(weight)
    return weight if quantized is None else _all_rows(quantized, weight)


@_outside_graphs
def _all_rows(quantized: QuantizedFormat, weight: Tensor) -> Tensor:
    values: Any = quantized.rows(weight, 0, quantized.shape(weight)[0])
    values.dequantized_from = weight
    return values


def row_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their dequantized values [rows, in]), at most BLOCK_BYTES at a time where the format can be cut so small."""
    quantized = format_of(weight)
    if quantized is None:
        raise TypeError(f"weight must be quantized, got a {type(weight).__name__}")
    out_features, in_features = quantized.shape(weight)
    step = quantized.step(weight)
    fit = BLOCK_BYTES // max(1, in_features * quantized.dtype(weight).itemsize)
    count = max(step, fit // step * step)
    for start in range(0, out_features, count):
        stop = min(start + count, out_features)
        yield slice(start, stop), quantized.rows(weight, start, stop)


@_outside_graphs
def by_rows(function: Callable[..., Tensor], weight: Tensor, lora_A: Tensor, *per_row: Tensor) -> Tensor:
    """function(weight, lora_A, *per_row) for a function whose result has one row per output feature, block by block.

    A backward dequantizes and computes each block again.
    """
    quantized = format_of(weight)
    if quantized is None:
        return function(weight, lora_A, *per_row)
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (lora_A, *per_row))
    results = []
    for part, block in row_blocks(weight):
        if not differentiable:
            results.append(function(block, lora_A, *(tensor[part] for tensor in per_row)))
            del block
            continue

        def block_of(lora_A: Tensor, *tensors: Tensor, part: slice = part) -> Tensor:
            return function(quantized.rows(weight, part.start, part.stop), lora_A, *tensors)

        del block
        results.append(checkpoint(block_of, lora_A, *(t[part] for t in per_row), use_reentrant=False, preserve_rng_state=False))
    return torch.cat(results) if len(results) != 1 else results[0]


@dataclasses.dataclass(frozen=True)
class _Call:
    """What a pass over the blocks knows beside its tensors."""

    scaling: float
    detach_norm: bool
    precise: bool
    backend: str
    plan: str
    product_dtype: torch.dtype
    out_dtype: torch.dtype
    keeps: bool


class _QuantizedLinear(torch.autograd.Function):
    """The layer's operator on every block of rows, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, x_dropped: Tensor | None, weight: Tensor,
        bias: Tensor | None, norm_given: Tensor | None, call: _Call,
    ) -> Tensor:  # fmt: skip
        """y [..., out]."""
        out_features = lora_B.shape[0]
        y = x.new_empty((*x.shape[:-1], out_features), dtype=call.out_dtype)
        dtype = reference.norm_dtype(stand_in(weight))
        norm = torch.empty(out_features, dtype=dtype, device=x.device) if norm_given is None else norm_given
        beyond: list[Tensor] = []
        for part, block in row_blocks(weight):
            values, norms, kept = operator._dora_linear(
                x, block, lora_A, lora_B[part], magnitude[part], None if norm_given is None else norm[part],
                None if bias is None else bias[part], x_dropped, call.scaling, call.detach_norm, call.precise, call.product_dtype,
                call.out_dtype, call.keeps, call.backend, call.plan,
            )  # fmt: skip
            y[..., part] = values
            if norm_given is None:
                norm[part] = norms
            beyond.append(kept)
            del block  # before the next one is made
        ctx.call, ctx.output = call, None
        if call.keeps and all(kept.numel() == 0 for kept in beyond):
            ctx.output = operator.kept_output(y)
        ctx.weight, ctx.differentiate_norm = weight, not call.detach_norm and norm_given is None
        ctx.save_for_backward(x, lora_A, lora_B, magnitude, x_dropped, bias, norm, *beyond)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, lora_A, lora_B, magnitude and x_dropped."""
        library.refuse_tangent(grad_output)
        if library.is_many(grad_output):
            raise NotImplementedError(
                'a quantized layer takes one gradient at a time: run the forward under use_backend("reference")'
            )
        x, lora_A, lora_B, magnitude, x_dropped, bias, norm, *beyond = ctx.saved_tensors
        call, needs, output = ctx.call, ctx.needs_input_grad, operator.saved_output(ctx)
        needs_direction = needs[1] or needs[2]
        grads: list[Tensor | None] = [None, None, None]  # x, x_dropped, lora_A: summed over blocks
        grad_B, grad_m = torch.empty_like(lora_B), torch.empty_like(magnitude)
        for part, block in row_blocks(ctx.weight):
            kept: Tensor | None = beyond.pop(0)
            if kept is None or kept.numel() == 0:
                kept = None if output is None else output[..., part]
            found = operator._dora_linear_backward(
                grad_output[..., part], x if x_dropped is None else x_dropped, block, lora_A, lora_B[part], magnitude[part],
                norm[part], None if bias is None else bias[part], kept, call.scaling, x_dropped is not None, needs[0], needs[4],
                needs_direction, needs[3], ctx.differentiate_norm, call.product_dtype, call.backend, call.plan,
            )  # fmt: skip
            del block
            for slot, value in enumerate(found[:3]):
                if (needs[0], needs[4], needs_direction)[slot]:
                    held = grads[slot]
                    grads[slot] = value.to(torch.promote_types(value.dtype, torch.float32)) if held is None else held.add_(value)
            if needs_direction:
                grad_B[part] = found[3]
            if needs[3]:
                grad_m[part] = found[4]
        grad_x, grad_dropped, grad_A = (
            None if grad is None else grad.to(like.dtype) for grad, like in zip(grads, (x, x, lora_A), strict=True)
        )
        return (
            grad_x, grad_A if needs[1] else None, grad_B if needs[2] else None, grad_m if needs[3] else None, grad_dropped,
            None, None, None, None,
        )  # fmt: skip


@_outside_graphs
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
    backend: str,
    plan: str,
) -> Tensor:
    """As `ops.dora_linear.dora_linear`, for a quantized weight; the reference backend's backward computes the forward again."""
    if backend == "reference":

        def plain(x: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, x_dropped: Tensor | None) -> Tensor:
            values = dequantized(weight)
            return reference.dora_linear(
                x, values, lora_A, lora_B, magnitude, scaling, bias, x_dropped, detach_norm, norm, precise
            )

        return checkpoint(plain, x, lora_A, lora_B, magnitude, x_dropped, use_reentrant=False, preserve_rng_state=False)
    like = stand_in(weight)
    keeps = operator.reads_output(lora_A, lora_B, magnitude, detach_norm)
    call = _Call(
        scaling, detach_norm, precise, backend, plan, reference.matmul_dtype(x, like, precise), reference.output_dtype(x), keeps
    )
    return _QuantizedLinear.apply(x, lora_A, lora_B, magnitude, x_dropped, weight, bias, norm, call)


def _is_bitsandbytes(weight: Tensor) -> bool:
    return type(weight).__name__ == "Params4bit" and getattr(weight, "quant_state", None) is not None


def _bitsandbytes_rows(weight: Any, start: int, stop: int) -> Tensor:
    from bitsandbytes import functional as library

    state, (_, in_features) = weight.quant_state, weight.quant_state.shape
    absmax = state.absmax
    if state.nested:
        absmax = library.dequantize_blockwise(absmax, state.state2) + state.offset
    first, last = start * in_features, stop * in_features
    part = library.QuantState(
        absmax=absmax[first // state.blocksize : -(-last // state.blocksize)].float(),
        shape=torch.Size((stop - start, in_features)),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    packed = weight.data.reshape(-1).view(torch.uint8)[first // 2 : -(-last // 2)]
    return library.dequantize_4bit(packed.reshape(-1, 1), part).reshape(stop - start, in_features)


def _bitsandbytes_step(weight: Any) -> int:
    return int(weight.quant_state.blocksize // math.gcd(weight.quant_state.blocksize, weight.quant_state.shape[1]))


def _is_torchao(weight: Tensor) -> bool:
    return type(weight).__module__.startswith("torchao.") and hasattr(weight, "dequantize")


def _torchao_rows(weight: Any, start: int, stop: int) -> Tensor:
    if (start, stop) == (0, weight.shape[0]):
        return weight.dequantize()
    return weight[start:stop].dequantize()


register_quantized_format(
    QuantizedFormat("torchao", _is_torchao, lambda weight: tuple(weight.shape), lambda weight: weight.dtype, _torchao_rows)
)
register_quantized_format(
    QuantizedFormat(
        "bitsandbytes 4-bit",
        _is_bitsandbytes,
        lambda weight: tuple(weight.quant_state.shape),
        lambda weight: weight.quant_state.dtype,
        _bitsandbytes_rows,
        _bitsandbytes_step,
    )
)
