"""A quantized weight for tests: int8 per row, registered through the public hook, with its dequantized blocks counted."""

from __future__ import annotations

import dataclasses
import weakref

import torch
from torch import Tensor, nn

import bidora_kernels as bk
from bidora_kernels.ops.quantized import dequantized

from .draws import Call, draw


class RowQuantized(nn.Parameter):
    """int8 values and one scale per row."""

    def __new__(cls, weight: Tensor) -> RowQuantized:
        scales = weight.float().abs().amax(1, keepdim=True) / 127
        self = torch.Tensor._make_subclass(cls, (weight.float() / scales).round().to(torch.int8), False)
        self.scales, self.values_dtype = scales, weight.dtype
        return self


class Live:
    """Bytes of dequantized blocks that are alive, and the most there were at once."""

    now = peak = 0

    def watch(self, block: Tensor) -> Tensor:
        size = block.numel() * block.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(block, self.release, size)
        return block

    def release(self, size: int) -> None:
        self.now -= size


LIVE = Live()


def rows(weight: RowQuantized, start: int, stop: int) -> Tensor:
    values = weight.data[start:stop].as_subclass(Tensor).float() * weight.scales[start:stop]
    return LIVE.watch(values.to(weight.values_dtype))


bk.register_quantized_format(
    bk.QuantizedFormat(
        "int8 rows of a test",
        lambda weight: isinstance(weight, RowQuantized),
        lambda weight: tuple(weight.shape),
        lambda weight: weight.values_dtype,
        rows,
    )
)


def quantized_linear(out_features: int, in_features: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias, dtype=dtype)
    linear.weight = RowQuantized(linear.weight.detach())
    return linear


def trained(linear: nn.Linear, **options: object) -> bk.FusedDoraLinear:
    """A DoRA layer whose every term matters."""
    layer = bk.FusedDoraLinear.from_linear(linear, r=4, **options)
    nn.init.normal_(layer.lora_B, std=0.3)
    with torch.no_grad():
        layer.magnitude *= torch.linspace(0.5, 1.5, layer.out_features)
    return layer


def plain_twin(layer: bk.FusedDoraLinear) -> bk.FusedDoraLinear:
    """The same layer over the dequantized weight."""
    weight, lora_A, lora_B, _ = layer.direction_terms()
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    twin = bk.FusedDoraLinear.from_linear(linear, layer.r, layer.lora_alpha, layer.lora_dropout, False, layer.detach_norm)
    with torch.no_grad():
        twin.lora_A.copy_(lora_A)
        twin.lora_B.copy_(lora_B)
        twin.magnitude.copy_(layer.magnitude)
    return twin.train(layer.training)


def quantized_call(**options: object) -> tuple[Call, Call]:
    """A random call of dora_linear over a quantized weight, and the same over the values that it holds."""
    call = draw(**options)
    weight = RowQuantized(call.weight)
    return dataclasses.replace(call, weight=weight), dataclasses.replace(call, weight=dequantized(weight))
