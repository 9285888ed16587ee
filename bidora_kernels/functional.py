"""The operations, checked and differentiable; each has the same name and meaning in `reference`.

Shapes: x [..., in], weight [out, in], lora_A [r, in], lora_B [out, r], magnitude and bias [out]. Dtypes: fp64, fp32, bf16 or
fp16 each; norms and scales are computed in fp32 (fp64 for an fp64 weight). The weight and the bias are frozen: gradients flow to
x, lora_A, lora_B and magnitude only. The weight may be quantized (ops/quantized.py). Every function raises TypeError for a dtype
and ValueError for a shape or device that does not fit, and BackendUnavailable where a backend was asked for by name and cannot
run.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .ops import _backend, cost_model
from .ops import _checks as checks
from .ops import dora_linear as _dora_linear
from .ops import frozen_linear as _frozen_linear
from .ops import merged_weight as _merged_weight
from .ops import orthogonality as _orthogonality
from .ops import quantized as _quantized
from .ops import weight_norm as _weight_norm
from .ops._context import DirectionPoint, PassMode, current_mode
from .ops._library import is_captured as is_captured
from .ops._library import is_transformed as is_transformed
from .ops.decode import Decode as Decode
from .ops.decode import may_decode as may_decode


def _frozen(weight: Tensor) -> Tensor:
    return weight.detach() if weight.requires_grad else weight


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    x_dropped: Tensor | None = None,
    detach_norm: bool = True,
    *,
    norm: Tensor | None = None,
    merged: Tensor | None = None,
    plan: str = "auto",
) -> Tensor:
    """y = c * (x weight^T + scaling * (x lora_A^T) lora_B^T) + bias with c = magnitude / ||V|| (DoRA, arXiv:2402.09353, eq. 5).

    V = weight + scaling * lora_B @ lora_A, normed per row. Returns [..., out] in x's dtype, or autocast's.

    x_dropped: x after dropout; it then feeds the low-rank branch and the (c - 1) part of the base output, as in PEFT.
    detach_norm: treat the norm as a constant in the backward pass (DoRA, section 4.3); False differentiates it.
    norm: [out], the row norms where they are known already (from `weight_norm`); they are then constants.
    merged: [out, in], the merged weight that the triton backend's weight plan left for this pass, given together with its norms,
    which are then no constants; other backends, and passes that cannot use it, leave it aside.
    plan: "auto", or the triton backend's "activation" or "weight" plan by name; dropout and precise passes always take the
    first, a compiled call takes it unless the other is named, and other backends choose for themselves.
    A row whose norm is below 1e-18 has c = 1, and its magnitude no gradient.
    """
    stored, kind = weight, _quantized.format_of(weight)
    weight = weight if kind is None else _quantized.stand_in(weight)
    if not checks.is_usual_call(x, weight, lora_A, lora_B, magnitude, bias):
        checks.check_direction(weight, lora_A, lora_B)
        checks.check_row_vector("magnitude", magnitude, weight)
        checks.check_input("x", x, weight)
        if bias is not None:
            checks.check_row_vector("bias", bias, weight)
    if norm is not None:
        checks.check_row_vector("norm", norm, weight)
    if merged is not None:
        checks.check_shape("merged", merged, tuple(weight.shape))
        if norm is None:
            raise ValueError("merged needs the norm that it was made with")
    if plan not in cost_model.PLANS:
        raise ValueError(f"plan must be one of {', '.join(cost_model.PLANS)}, got {plan!r}")
    if x_dropped is not None:
        checks.check_shape("x_dropped", x_dropped, tuple(x.shape))
        checks.check_input("x_dropped", x_dropped, weight)
    mode = current_mode()
    product_dtype = reference.matmul_dtype(x, weight, mode.precise)
    mode.saw(product_dtype)
    if mode.differentiate_norm is not None:
        detach_norm = not mode.differentiate_norm
    factors = lora_A, lora_B
    lora_A, lora_B, magnitude = _needed(mode, lora_A, lora_B, magnitude)
    weight = _frozen(weight)
    bias = None if bias is None else _frozen(bias)
    backend, norm_known = _serving(mode, x.device.type, (x, lora_A, lora_B, magnitude), weight, x), norm is not None
    if mode.point is not None and detach_norm and not norm_known and not _norm_is_free(backend, x, weight, x_dropped):
        norm = _norm_at(mode.point, stored, *factors, scaling)
    may_choose = backend == "triton" and x_dropped is None and not mode.precise
    if merged is not None:
        fits = may_choose and kind is None and merged.dtype == reference.matmul_dtype(x, weight)
        merged, norm = (merged, norm) if fits else (None, norm if detach_norm else None)
    if backend == "reference" and kind is None:
        return reference.dora_linear(
            x, weight, lora_A, lora_B, magnitude, scaling, bias, x_dropped, detach_norm, norm, mode.precise
        )
    chosen = "activation"
    if merged is not None:
        chosen = "weight"
    elif may_choose:
        chosen = _plan_of_call(x, weight, lora_A, lora_B, magnitude, norm_known, plan, bias is not None)
    if kind is not None:
        return _quantized.dora_linear(
            x, stored, lora_A, lora_B, magnitude, scaling, bias, x_dropped, detach_norm, norm, mode.precise, backend, chosen
        )
    return _dora_linear.dora_linear(
        x, weight, lora_A, lora_B, magnitude, scaling, bias, x_dropped, detach_norm, norm, mode.precise, product_dtype, backend,
        chosen, merged,
    )  # fmt: skip


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x weight^T + bias of a layer that is not trained, [..., out]; dtypes, autocast and errors as of F.linear.

    x is [..., in]. On the native backend products of 2^26 multiply-adds or more go to the faster library, with its rounding, and
    where it is cheaper the gradient of x is computed from the tokens alone whose output has one: a token without one then has a
    gradient of 0 even where the weight is not finite. Everything else is F.linear's.
    """
    # while compiling a choice by sizes would compile anew for every size
    served = not torch.compiler.is_compiling() and _frozen_linear.is_served(x, weight, bias)
    if served and _backend.takes_native(current_mode()):
        return _frozen_linear.frozen_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _norm_is_free(backend: str, x: Tensor, weight: Tensor, x_dropped: Tensor | None) -> bool:
    """Whether the call finds the norms without another read of the weight: the native weight plan does."""
    if backend != "native" or x_dropped is not None:
        return False
    from .ops import _native_plan

    tokens, dtype = x.numel() // max(1, weight.shape[1]), reference.norm_dtype(weight)
    few = _native_plan.takes_few_tokens(tokens, weight, dtype, False)
    return not few and _native_plan.weight_plan_pays(tokens, weight, dtype, False)


def _norm_at(point: DirectionPoint, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor | None:
    """The norms at a point of the directions, from there or put there for the passes to come; None for foreign factors."""
    owner = weight if weight._base is None else weight._base  # a transposed view is a new tensor in every call
    place = () if _quantized.format_of(weight) is not None else (weight.data_ptr(), weight.shape, weight.stride())
    key, version = (id(lora_A), id(lora_B), scaling, id(owner), *place), weight._version
    known = point.norms.get(key)
    if known is not None and known[1]() is owner and known[2] == version:
        return known[0]
    points = (point, *point.others)
    values = [(chosen.value_of(lora_A), chosen.value_of(lora_B)) for chosen in points]
    pairs = [(a, b) for a, b in values if a is not None and b is not None]
    if len(pairs) < len(points):
        return None
    for chosen, norm in zip(points, weight_norms(weight, pairs, scaling), strict=True):
        chosen.norms[key] = norm, weakref.ref(owner), version
    return point.norms[key][0]


def _plan_of_call(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, norm_known: bool, plan: str, has_bias: bool
) -> str:
    """ "activation" or "weight" for a call that may take either."""
    if plan != "auto":
        return plan
    if torch.compiler.is_compiling():
        return "activation"  # a choice by sizes would compile anew for every size
    out_features, in_features = weight.shape
    tokens = x.numel() // in_features if in_features else 0
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x, lora_A, lora_B, magnitude))
    size = reference.matmul_dtype(x, weight).itemsize
    shape = tokens, out_features, in_features, lora_A.shape[0], size
    return cost_model.choose(*shape, trains, norm_known, has_bias=has_bias).name


def plan(
    weight: Tensor,
    r: int,
    tokens: int,
    *,
    dtype: torch.dtype | None = None,
    trains: bool = True,
    norm_known: bool = False,
    dropped: bool = False,
    reuse: int = 1,
    forced: str = "auto",
    has_bias: bool = False,
) -> cost_model.Plan:
    """How `dora_linear` would run for `tokens` rows of x in `dtype` (the weight's by default), and why.

    Its `name` is "activation" or "weight", or "reference" where plain PyTorch serves the call; `print` shows the reason.
    trains: gradients will be taken. norm_known: the norms are at hand. dropped: dropout is active. reuse: how many passes run
    with the same parameters. forced: a plan by name. has_bias: the layer has one.
    """
    weight = _quantized.stand_in(weight)
    out_features, in_features = weight.shape
    sample = torch.empty(0, dtype=dtype or weight.dtype, device=weight.device)
    mode, backend, unserved = current_mode(), _backend.resolve(weight.device.type), None
    if backend == "triton":
        unserved = left_to_reference(weight)
        if unserved is None and sample.dtype == torch.float64 and _is_auto():
            unserved = "the kernels do not serve fp64 inputs"
    if backend == "reference" or unserved:
        reason = unserved or _backend.auto_choice(weight.device.type).reason if _is_auto() else "asked for by name"
        return cost_model.Plan("reference", False, f"plain PyTorch: {reason}")
    if backend == "native":
        from .ops import _native_plan

        product_dtype = reference.norm_dtype(weight)
        if not dropped and _native_plan.takes_few_tokens(tokens, weight, product_dtype, norm_known):
            return cost_model.Plan("activation", False, "native backend: for so few tokens one kernel reads the weight once")
        bf16 = _native_plan.in_bf16(reference.matmul_dtype(sample, weight, mode.precise), weight, dropped)
        operands = torch.bfloat16 if bf16 else product_dtype
        pays = not dropped and _native_plan.takes_weight_plan(tokens, weight, operands, norm_known)
        reason = "the processor multiplies bf16 operands several times as fast" if bf16 else (
            "writing the merged weight moves fewer bytes than correcting the output"
        ) if pays else (
            "dropout needs the product with the frozen weight" if dropped
            else "correcting the output moves fewer bytes than writing the merged weight"
        )  # fmt: skip
        return cost_model.Plan("weight" if pays else "activation", False, f"native backend: {reason}")
    if dropped or mode.precise:
        why = "dropout needs the product with the frozen weight" if dropped else "a precise pass keeps its base output in fp32"
        return cost_model.Plan("activation", False, why)
    size = reference.matmul_dtype(sample, weight).itemsize
    return cost_model.choose(tokens, out_features, in_features, r, size, trains, norm_known, reuse, forced, has_bias)


def _is_auto() -> bool:
    return _backend.asked_for(current_mode()) == "auto"


def left_to_reference(weight: Tensor) -> str | None:
    """Why `auto` leaves this weight to plain PyTorch where it would take the triton backend, or None."""
    weight = _quantized.stand_in(weight)
    auto = _is_auto() and _backend.resolve(weight.device.type) == "triton"
    return _unserved(weight) if auto else None


def _unserved(weight: Tensor) -> str | None:
    if weight.dtype == torch.float64:
        return "the kernels do not serve fp64 weights"
    if weight.shape[0] % 8 or weight.shape[1] % 8:
        return f"[{weight.shape[0]}, {weight.shape[1]}] are not both multiples of 8"  # 16-bit loads and register spills
    return None


def _serving(
    mode: PassMode, device_type: str, differentiable: tuple[Tensor, ...], weight: Tensor, x: Tensor | None = None
) -> str:
    """The backend that takes this call. `auto` leaves to the reference what the others do not serve; a named one raises."""
    backend = _backend.backend_under(mode, device_type)
    if backend == "reference":
        return backend
    reason = None
    if is_transformed(*differentiable):
        reason = "forward-mode derivatives and functional transforms"
    elif backend == "triton" and weight.dtype == torch.float64:
        reason = "fp64 weights"
    elif x is not None and x.dtype == torch.float64 and weight.dtype != torch.float64:
        reason = f"an fp64 input with a weight in {str(weight.dtype).removeprefix('torch.')}"
    elif backend == "triton" and _is_auto() and _unserved(weight):
        return "reference"  # the kernels would be right, and slower
    if reason is None:
        return backend
    if _is_auto():
        return "reference"
    raise NotImplementedError(f'backend {backend!r} does not serve {reason}: use backend "reference"')


def _needed(mode: PassMode, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the groups that this pass does not need out of the graph."""
    if "direction" not in mode.needs:
        lora_A, lora_B = lora_A.detach(), lora_B.detach()
    return lora_A, lora_B, magnitude if "magnitude" in mode.needs else magnitude.detach()


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """n = ||weight + scaling * lora_B @ lora_A||_2 per row, [out], in fp32 (fp64 for an fp64 weight); differentiable."""
    checks.check_direction(_quantized.stand_in(weight), lora_A, lora_B)
    if _quantized.format_of(weight) is not None:
        return _quantized.by_rows(lambda w, a, b: weight_norm(w, a, b, scaling), weight, lora_A, lora_B)
    weight, backend = _frozen(weight), _serving(current_mode(), weight.device.type, (lora_A, lora_B), weight=weight)
    if backend == "reference":
        return reference.weight_norm(weight, lora_A, lora_B, scaling)
    return _weight_norm.weight_norm(weight, lora_A, lora_B, scaling, backend)


def weight_norms(weight: Tensor, sets: Sequence[tuple[Tensor, Tensor]], scaling: float) -> Tensor:
    """The norms for several (lora_A, lora_B) of one rank and dtype, [len(sets), out]; constants, not differentiable.

    The triton backend reads the weight once for all of them: a bilevel step's directions and their perturbations.
    """
    if not sets:
        raise ValueError("sets must hold at least one (lora_A, lora_B)")
    for lora_A, lora_B in sets:
        checks.check_direction(_quantized.stand_in(weight), lora_A, lora_B)
    ranks, dtypes = {a.shape[0] for a, _ in sets}, {tensor.dtype for pair in sets for tensor in pair}
    if len(ranks) > 1 or len(dtypes) > 1:
        raise ValueError(
            f"sets must share one rank and one dtype, got ranks {sorted(ranks)} and dtypes {sorted(map(str, dtypes))}"
        )
    backend = _serving(current_mode(), weight.device.type, sets[0], weight=_quantized.stand_in(weight))
    if backend == "reference" or _quantized.format_of(weight) is not None:
        with torch.no_grad():
            return torch.stack([weight_norm(weight, lora_A, lora_B, scaling) for lora_A, lora_B in sets])
    return _weight_norm.weight_norms(_frozen(weight), sets, scaling, backend)


def normalized_direction(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """V / ||V|| per row with V = weight + scaling * lora_B @ lora_A, [out, in], fp32 (fp64 for an fp64 weight); differentiable.

    A row whose norm is below 1e-18 is 0, with zero gradient.
    """
    checks.check_direction(_quantized.stand_in(weight), lora_A, lora_B)
    if _quantized.format_of(weight) is not None:
        return _quantized.by_rows(lambda w, a, b: normalized_direction(w, a, b, scaling), weight, lora_A, lora_B)
    weight, backend = _frozen(weight), _serving(current_mode(), weight.device.type, (lora_A, lora_B), weight=weight)
    if backend == "reference":
        return reference.normalized_direction(weight, lora_A, lora_B, scaling)
    return _merged_weight.normalized_direction(weight, lora_A, lora_B, scaling, backend)


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float) -> Tensor:
    """magnitude * V / ||V|| per row, [out, in], in the weight's dtype; differentiable, the norm included.

    A row whose norm is below 1e-18 is the row of V.
    """
    checks.check_direction(_quantized.stand_in(weight), lora_A, lora_B)
    checks.check_row_vector("magnitude", magnitude, _quantized.stand_in(weight))
    if _quantized.format_of(weight) is not None:
        return _quantized.by_rows(lambda w, a, b, m: merged_weight(w, a, b, m, scaling), weight, lora_A, lora_B, magnitude)
    weight, backend = _frozen(weight), _serving(current_mode(), weight.device.type, (lora_A, lora_B, magnitude), weight=weight)
    if backend == "reference":
        return reference.merged_weight(weight, lora_A, lora_B, magnitude, scaling)
    return _merged_weight.merged_weight(weight, lora_A, lora_B, magnitude, scaling, backend)


def kept_merged(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(the merged weight that the triton backend's weight plan multiplies with, [out, in] in `dtype`, its norms [out])."""
    from .ops import _triton_weight_plan

    return _triton_weight_plan.merge(weight, lora_A, lora_B, magnitude, scaling, dtype)


def orthogonality_penalty(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *, probes: int | str = 0) -> Tensor:
    """R = ||Vhat Vhat^T - I||_F^2 with Vhat = V / ||V|| (BiDoRA, arXiv:2410.09758, eq. 3), a scalar; differentiable.

    Rows whose norm is below 1e-18 are left out. probes: 0 is exact; a number k estimates R, without bias, from k pairs of random
    vectors of the device's generator; "auto" is exact where weight @ weight^T, [out, out], fits the cache's budget, else an
    estimate. Raises ValueError for other probes. A quantized weight is dequantized whole for the call.
    """
    weight = _quantized.dequantized(weight)
    checks.check_direction(weight, lora_A, lora_B)
    weight, backend = _frozen(weight), _serving(current_mode(), weight.device.type, (lora_A, lora_B), weight=weight)
    if pairs := _orthogonality.probes_for(weight, probes):
        return _orthogonality.estimated_penalty(weight, lora_A, lora_B, scaling, pairs, backend)
    if backend == "reference":
        return reference.orthogonality_penalty(weight, lora_A, lora_B, scaling)
    return _orthogonality.orthogonality_penalty(weight, lora_A, lora_B, scaling, backend)


def penalty_plan(weight: Tensor, probes: int | str = 0) -> str:
    """In words, how `orthogonality_penalty` works for a weight [out, in] with the native and triton backends.

    Whether it is exact or estimated, and whether weight @ weight^T is kept between calls; errors as there.
    """
    return _orthogonality.penalty_plan(_quantized.dequantized(weight), probes)
