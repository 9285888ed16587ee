"""Loads the compiled csrc library, or says why it is absent and how to get it; and calls its operators.

The operators compute in one accumulating dtype, fp32 or fp64 (`norm`'s), and take the factors and vectors in it; weights, inputs
and gradients may be fp64, fp32, bf16 or fp16. The library is looked for and loaded at the first question, never at import.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

_LIBRARY = Path(__file__).parent / "_native.so"
_HOW = "install a C++17 compiler, then: pip install --no-build-isolation --force-reinstall --no-deps bidora-kernels (or -e .)"

# the magnitude's gradient is read off y unless the bias is this much larger than the rest of y, and exactly recomputed there;
# means of absolute values weighted by the output's gradient
DOUBTFUL_RATIO = 2.5

# multiply-adds of a product from which it goes to oneDNN: the first of a shape makes a kernel, half a millisecond, which such
# a product takes itself; a thousand kernels are kept
ONEDNN_FROM = 1 << 25


@functools.cache
def why_unavailable() -> str | None:
    """Why the native library cannot be used here, or None where it can; the first call loads it."""
    if not _LIBRARY.exists():
        return f"the native library was not built for this installation ({platform.machine()}): {_HOW}"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"the native library does not load ({error}): {_HOW}"
    return None


def instruction_set() -> str | None:
    """Whose kernels run here: "avx512", "avx2" or "baseline" (what every machine of its kind has); None without the library."""
    return None if why_unavailable() else torch.ops.bidora_native.instruction_set()


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this processor has instructions for products of bf16 values, which torch's library then takes."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def made_by_intel() -> bool:
    """Whether the processor is one of Intel's, by its own word."""
    return why_unavailable() is None and bool(torch.ops.bidora_native.made_by_intel())


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies fp32 matrices faster than MKL, torch's library for them, does on this processor.

    MKL takes its AVX-512 kernels on Intel's processors alone. On a Zen 4 oneDNN needs 0.8 to 0.95 of its time.
    """
    if instruction_set() != "avx512" or made_by_intel():
        return False
    return torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def takes_onednn(tokens: int, weight: Tensor) -> bool:
    """Whether a product of so many rows with this weight goes to oneDNN; never where torch was told not to use it.

    Its kernels are for weights without gaps, by rows or by columns.
    """
    if weight.dtype is not torch.float32 or tokens * weight.numel() < ONEDNN_FROM:
        return False
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        return False
    return onednn_is_faster() and bool(torch.backends.mkldnn.enabled)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x weight^T + bias, [tokens, out], of matrices of one dtype, in `out` where there is one; a weight may be transposed."""
    if takes_onednn(x.shape[0], weight):
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], None)
        return y if out is None else out.copy_(y)
    transposed = weight.t()
    return torch.mm(x, transposed, out=out) if bias is None else torch.addmm(bias, x, transposed, out=out)


def is_transposed(weight: Tensor) -> bool:
    """Whether [out, in] is the transposed view of a matrix [in, out] with contiguous rows (transformers' Conv1D)."""
    rows, columns = weight.stride()
    return rows == 1 and columns != 1 and columns >= weight.shape[0] > 1


def stored(weight: Tensor) -> Tensor:
    """The weight where the kernels can read it in place (rows or columns contiguous), else a contiguous copy."""
    rows, columns = weight.stride()
    fits = (columns == 1 and rows >= weight.shape[1]) or is_transposed(weight)
    return weight if fits else weight.contiguous()


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Row norms of V = weight + scaling * lora_B @ lora_A, [out], in the factors' dtype (fp32 or fp64)."""
    norm = lora_A.new_empty(weight.shape[0])
    torch.ops.bidora_native.weight_norm(stored(weight), lora_A, lora_B, scaling, norm)
    return norm


def merged_weight(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    scaling: float,
    norm: Tensor,
    out: Tensor,
    norm_known: bool = False,
    minus_weight: bool = False,
    dither: bool = False,
) -> None:
    """Write magnitude * V / ||V|| (rows of length 1 without a magnitude) to `out`, and the norms to `norm` unless they are known.

    `out` has the weight's orientation: a transposed view where the weight is one. minus_weight: store the result less the weight.
    dither: round to a bf16 `out` up or down by a fixed noise of each element's place, so that small changes survive on average.
    """
    torch.ops.bidora_native.merged_weight(
        stored(weight), lora_A, lora_B, magnitude, scaling, norm, norm_known, minus_weight, out, dither
    )


def _multiplies(rows: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies the rows of a tensor [..., features] with a weight."""
    return takes_onednn(rows.numel() // max(1, rows.shape[-1]), weight)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    scaling: float,
    merged: Tensor | None,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x W'^T + bias [..., out], the norms [out]) with W' = magnitude * V / ||V||; norms that are known are given.

    With `merged`, memory for W' in the weight's orientation, by one product with it: x [..., in] has the dtype of `merged`, the
    norms' or bf16, to which W' is then rounded with a fixed dither. Without it by the frozen weight, of the norms' dtype as x is.
    """
    weight = stored(weight)
    y, found = torch.ops.bidora_native.dora_linear.default(
        x, weight, lora_A, lora_B, magnitude, bias, scaling, merged, norm, _multiplies(x, weight if merged is None else merged)
    )
    return y, found if norm is None else norm


def dora_linear_backward(
    grad_output: Tensor,
    x: Tensor,
    output: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    scaling: float,
    merged: Tensor | None,
    needs_direction: bool,
    needs_x: bool,
    doubtful_ratio: float = DOUBTFUL_RATIO,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(grad_x, grad_lora_A, grad_lora_B, grad_magnitude, doubtful rows where there are some) of `dora_linear`.

    `output` is its y: without it there is no magnitude's gradient. grad_x is by W' with `merged`, memory for it in dy's dtype,
    and then of dy's shape where that is contiguous, else a matrix; without it by the frozen weight, of dy's dtype, and a matrix.
    Doubtful rows are those of `adapter_gradients`.
    """
    weight = stored(weight) if needs_x else weight
    return torch.ops.bidora_native.dora_linear_backward.default(  # type: ignore[no-any-return]
        grad_output, x, output, weight, lora_A, lora_B, magnitude, norm, bias, scaling, merged, needs_direction, needs_x,
        doubtful_ratio, needs_x and _multiplies(grad_output, weight if merged is None else merged),
    )  # fmt: skip


def nonzero_rows(t: Tensor, multiple: int = 1) -> Tensor:
    """The indices of the rows of [..., columns] that hold anything but zeros, int64, ascending. A NaN is no zero.

    `t` is contiguous, or a matrix with contiguous rows. multiple: as many of the first other rows are among them as make their
    number a multiple of it, or all rows there are; no row needs no other.
    """
    return torch.ops.bidora_native.nonzero_rows.default(t, multiple)  # type: ignore[no-any-return]


def adapter_gradients(
    x: Tensor,
    grad_output: Tensor,
    output: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    scaling: float,
    needs_direction: bool,
    from_updated: bool = False,
    doubtful_ratio: float = DOUBTFUL_RATIO,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(grad_lora_A, grad_lora_B, grad_magnitude, doubtful rows of it) of y = c * (V x) + bias from x, dy and y.

    Without `output` there is no magnitude's gradient. A doubtful row is one whose gradient cannot be read off y accurately: the
    bias hides the rest in the tokens that have a gradient, an fp16 y lies below the normal numbers there, or the magnitude is
    next to 0. from_updated: `output` is V x itself.
    """
    grad_A = torch.empty_like(lora_A) if needs_direction else None
    grad_B = torch.empty_like(lora_B) if needs_direction else None
    grad_magnitude = None if output is None else torch.empty_like(magnitude)
    doubtful = None if output is None else torch.empty(magnitude.shape, dtype=torch.bool, device="cpu")
    count = torch.ops.bidora_native.adapter_gradients(
        x, grad_output, output, lora_A, lora_B, magnitude, norm, bias, scaling, grad_A, grad_B, grad_magnitude, doubtful,
        doubtful_ratio, from_updated,
    )  # fmt: skip
    return grad_A, grad_B, grad_magnitude, doubtful if count else None


def direction_backward(
    weight: Tensor,
    grad: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    scaling: float,
    norm: Tensor,
    grad_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(grad_lora_A, grad_lora_B, grad_magnitude) of magnitude * V / ||V|| (rows of length 1 without a magnitude) under `grad`
    [out, in], plus those of ||V|| under `grad_norm` [out]; either may be absent."""
    grad_A, grad_B = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    grad_magnitude = torch.zeros_like(magnitude) if magnitude is not None and grad is not None else None
    if weight.numel() == 0:
        return grad_A, grad_B, grad_magnitude
    row_major = weight if weight.stride(1) == 1 and weight.stride(0) >= weight.shape[1] else weight.contiguous()
    torch.ops.bidora_native.direction_backward(
        row_major, grad, lora_A, lora_B, magnitude, scaling, norm, grad_norm, grad_A, grad_B, grad_magnitude
    )
    return grad_A, grad_B, grad_magnitude


def compose(
    base: Tensor,
    hidden: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    scaling: float,
    out: Tensor,
    base_dropped: Tensor | None = None,
) -> None:
    """Write scale * (base + scaling * hidden @ lora_B^T) + bias to `out`, which may be `base`.

    With `base_dropped`: u = base_dropped + scaling * hidden @ lora_B^T is written over it, and base + scale * u - base_dropped +
    bias to `out`.
    """
    torch.ops.bidora_native.compose(base, base_dropped, hidden, lora_B, scale, bias, scaling, out)


def few_tokens(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: Tensor, bias: Tensor | None, scaling: float, out: Tensor
) -> None:
    """Write scale * (x weight^T + scaling * (x lora_A^T) lora_B^T) + bias to `out`, tokens * out numbers of any shape.

    The weight is read once in its own dtype; `stored` says how it must lie. The library's matrix products read one at half the
    speed of memory where there are few rows of x.
    """
    torch.ops.bidora_native.few_tokens.default(x, weight, lora_A, lora_B, scale, bias, scaling, out)
