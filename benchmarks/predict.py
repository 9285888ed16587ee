"""Predicting before measuring: the kernels that each provider runs, their bytes and operations, and the time these take at the
ceilings of the machine. The gap between that and the measured time is what is left to explain.

T tokens, N out_features, K in_features, r rank; `size` bytes per element of activations and weights. A kernel takes the longer of
its bytes at the copy bandwidth and its operations at the matrix product's rate, plus the cost of one operator; nothing is
assumed to stay in a cache between kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from bidora_kernels.ops.cost_model import LIBRARY_RANK

from .cases import OperationCase
from .operations import bytes_counted, operations_counted


class Counts(NamedTuple):
    """Bytes moved and operations done."""

    bytes: float
    operations: float


class Kernel(NamedTuple):
    """One launch."""

    name: str
    bytes: float
    operations: float = 0.0
    full_product: bool = False  # x W or dy W, which the frozen layer takes as well


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer and one batch."""

    tokens: int
    out: int
    inner: int
    r: int
    size: int
    train: bool = True


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a machine reaches: bytes per second of a copy, operations per second of a matrix product, seconds per operator."""

    bandwidth: float
    arithmetic: float
    operator: float


# An H200 as the project's notes take it before any measurement: copy, bf16 product, a launch inside a CUDA graph
MODELLED_H200 = Ceilings(4.3e12, 780e12, 1.5e-6)
Plan = list[Kernel]


def _product(s: Shape, name: str = "x W") -> Kernel:
    return Kernel(name, s.size * (s.tokens * (s.inner + s.out) + s.out * s.inner), 2.0 * s.tokens * s.out * s.inner, True)


def _over_inputs(s: Shape, name: str) -> Kernel:
    """A skinny product that reads or writes one [T, K]."""
    return Kernel(name, s.size * s.tokens * (s.inner + s.r), 2.0 * s.tokens * s.inner * s.r)


def _over_outputs(s: Shape, name: str) -> Kernel:
    """A skinny product that reads or writes one [T, N]."""
    return Kernel(name, s.size * s.tokens * (s.out + s.r), 2.0 * s.tokens * s.out * s.r)


def _pass(
    s: Shape, outputs: float = 0, weights: float = 0, inputs: float = 0, name: str = "element-wise", size: int = 0
) -> Kernel:
    """An element-wise kernel that touches so many [T, N], [N, K] and [T, K] arrays."""
    return Kernel(name, (size or s.size) * (outputs * s.tokens * s.out + weights * s.out * s.inner + inputs * s.tokens * s.inner))


def frozen(s: Shape) -> Plan:
    """y = x W^T and dx = dy W."""
    return [_product(s)] + ([_product(s, "dy W")] if s.train else [])


def _lora_forward(s: Shape) -> Plan:
    return [_product(s), _over_inputs(s, "h = x A"), _over_outputs(s, "h B"), _pass(s, 2), _pass(s, 3)]


def _low_rank_backward(s: Shape) -> Plan:
    return [_over_outputs(s, "dh"), _over_outputs(s, "dB"), _over_inputs(s, "dA"), _over_inputs(s, "dh A"), _product(s, "dy W")]


def peft_lora(s: Shape) -> Plan:
    """PEFT's LoRA: the low-rank branch in kernels of its own, scaled and added."""
    return _lora_forward(s) + ([_pass(s, 2), *_low_rank_backward(s), _pass(s, inputs=3)] if s.train else [])


def _peft_norm(s: Shape, size: int) -> Plan:
    """PEFT sends an identity matrix through A and B, then scales, adds, and norms, each over a whole [N, K]."""
    square = Kernel("A eye", size * (s.inner**2 + s.inner * s.r), 2.0 * s.inner**2 * s.r)
    product = Kernel("B (A eye)", size * s.out * s.inner, 2.0 * s.out * s.inner * s.r)
    return [Kernel("eye", size * s.inner**2), square, product, *(_pass(s, weights=n, size=size) for n in (2, 3, 1))]


def peft_dora(s: Shape, norm: bool = True) -> Plan:
    """PEFT's DoRA with adapters in the weight's dtype."""
    forward = (_peft_norm(s, s.size) if norm else []) + [
        _product(s), _over_inputs(s, "h = x A"), _over_outputs(s, "h B"), *(_pass(s, n) for n in (2, 2, 2, 3, 3)),
    ]  # fmt: skip
    if not s.train:
        return forward
    return [*forward, *(_pass(s, n) for n in (2, 2, 3, 1, 2, 3, 1, 3)), *_low_rank_backward(s), _pass(s, inputs=3)]


def peft_dora_fp32(s: Shape) -> Plan:
    """PEFT's default on a 16-bit model: fp32 adapters under autocast, so large arrays in fp32, and casts."""
    casts = [_pass(s, weights=3), _pass(s, weights=3), _pass(s, inputs=3), _pass(s, inputs=3)]
    forward = [*_peft_norm(s, 4), *casts, _product(s), _over_inputs(s, "h = x A"), _over_outputs(s, "h B")]
    forward += [_pass(s, n, size=4) for n in (1.5, 1.5, 2, 3, 2.5, 1.5)]
    if not s.train:
        return forward
    backward = [_pass(s, n, size=4) for n in (1.5, 1.5, 2, 2, 1.5, 2.5, 1, 2, 1.5, 2.5, 1, 1.5)]
    return [*forward, *backward, *_low_rank_backward(s), _pass(s, inputs=6)]


def plain_function(s: Shape) -> Plan:
    """The twenty-line function: W' written once and kept."""
    merged = Kernel("W + s B A", 2.0 * s.size * s.out * s.inner, 2.0 * s.out * s.inner * s.r)
    forward = [merged, _pass(s, weights=1), _pass(s, weights=2), _product(s)]
    backward = [
        _product(s, "dy W'"), _over_outputs(s, "dy B"), _over_inputs(s, "dA"), _over_inputs(s, "x A"), _over_outputs(s, "dB"),
        _pass(s, 3), _pass(s, 3), _pass(s, 1),
    ]  # fmt: skip
    return forward + (backward if s.train else [])


def _one_pass_gradients(s: Shape) -> Kernel:
    """dA, dB and dm from one reading of dy, y and x."""
    return Kernel("gradients", s.size * s.tokens * (2 * s.out + s.inner), 4.0 * s.tokens * (s.out + s.inner) * s.r)


def native_weight_plan(s: Shape) -> Plan:
    """Native: W' = c (W + s B A) written to a workspace in fp32 for the forward and again for the backward product."""
    write = Kernel("W'", (s.size + 4.0) * s.out * s.inner, 4.0 * s.out * s.inner * s.r)
    return [write, _product(s)] + ([_one_pass_gradients(s), write, _product(s, "dy W'")] if s.train else [])


def native_activation_plan(s: Shape) -> Plan:
    """Native: the frozen weight's product, corrected; norms known where no gradient is asked for."""
    norm = Kernel("norm", s.size * s.out * s.inner, 2.0 * s.out * s.inner * s.r)
    forward = [_product(s), _over_inputs(s, "h = x A"), _over_outputs(s, "y += h B"), _pass(s, 2)]
    if not s.train:
        return forward
    backward = [_one_pass_gradients(s), _pass(s, 2), _product(s, "g W"), _over_outputs(s, "g B"), _over_inputs(s, "dx += dh A")]
    return [norm, *forward, *backward]


def native(s: Shape) -> Plan:
    """The native plan that moves fewer bytes; the library makes the choice for each direction by the same count."""
    plans = (native_weight_plan(s), native_activation_plan(s))
    return min(plans, key=lambda plan: sum(kernel.bytes for kernel in plan))


def triton_activation_plan(s: Shape) -> Plan:
    """Triton: norm, product, h, compose; one pass for g and the partial sums of dh, dB, dm, then two products and dA."""
    rank, tiles = max(16, s.r), -(-s.out // 128)
    few = s.r < LIBRARY_RANK  # beyond it two library products read dy again instead
    partials = 4.0 * s.r * (tiles * s.tokens + 8 * s.out) if few else 2.0 * s.size * s.tokens * s.out
    norm = Kernel("norm", s.size * s.out * s.inner, 2.0 * s.out * s.inner * rank)
    compose = Kernel("compose", s.size * 2.0 * s.tokens * s.out, 2.0 * s.tokens * s.out * rank)
    forward = [_product(s), _over_inputs(s, "h = x A"), compose]
    if not s.train:
        return forward
    backward = Kernel("compose_backward", 3.0 * s.size * s.tokens * s.out + partials, 4.0 * s.tokens * s.out * rank)
    return [
        norm, *forward, backward, Kernel("reduce_partials", partials if few else 0.0), _product(s, "g W"),
        Kernel("dx += dh A", 2.0 * s.size * s.tokens * s.inner, 2.0 * s.tokens * s.inner * rank), _over_inputs(s, "dA"),
    ]  # fmt: skip


def triton_weight_plan(s: Shape) -> Plan:
    """Triton: norm, W' written once and kept for the backward pass."""
    write = Kernel("norm and W'", 3.0 * s.size * s.out * s.inner, 4.0 * s.out * s.inner * max(16, s.r))
    gradients = [_over_inputs(s, "h = x A"), _pass(s, 2, name="dh, dB, dm"), _product(s, "dy W'"), _over_inputs(s, "dA")]
    return [write, _product(s)] + (gradients if s.train else [])


def triton_kept_plan(s: Shape) -> Plan:
    """Triton: W' of an earlier pass with the same parameters."""
    return triton_weight_plan(s)[1:]


PLANS: dict[str, Callable[[Shape], Plan]] = {
    "frozen linear": frozen,
    "merged linear": frozen,
    "PEFT LoRA": peft_lora,
    "PEFT DoRA": peft_dora,
    "PEFT DoRA, fp32 adapters": peft_dora_fp32,
    "PEFT DoRA, DoraCaching": lambda s: peft_dora(s, norm=False),
    "plain function": plain_function,
    "bidora (native)": native,
    "bidora (native), activation plan": native_activation_plan,
    "bidora (native), weight plan": native_weight_plan,
    "bidora (triton)": triton_activation_plan,
    "bidora (triton), activation plan": triton_activation_plan,
    "bidora (triton), weight plan": triton_weight_plan,
    "bidora (triton), weight plan, W' kept": triton_kept_plan,
    "bidora merged": frozen,
}


def seconds(plan: Plan, ceilings: Ceilings) -> float:
    """The plan's time at the ceilings."""
    return sum(max(k.bytes / ceilings.bandwidth, k.operations / ceilings.arithmetic) + ceilings.operator for k in plan)


def counts(plan: Plan) -> Counts:
    """The plan's bytes and operations."""
    return Counts(sum(k.bytes for k in plan), sum(k.operations for k in plan))


def case_shape(case: dict[str, Any]) -> Shape:
    """The shape of a layer or decode case of a results file."""
    size = 4 if case["dtype"] == "fp32" else 2
    return Shape(case["tokens"], case["out_features"], case["in_features"], case["r"], size, case["kind"] == "layer")


def operation_counts(case: dict[str, Any]) -> Counts:
    """The counted bytes and operations of an operation case of a results file."""
    fields = {field.name for field in dataclasses.fields(OperationCase)}
    rebuilt = OperationCase(**{name: value for name, value in case.items() if name in fields})
    return Counts(bytes_counted(rebuilt), operations_counted(rebuilt))
