"""What a layer must compute, in fp64, on a sample of rows and columns: every provider is held to it before it is timed."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .timing import Disagreement

SAMPLE = 32
# Relative error allowed: eight roundings of a bf16 layer's terms; in fp32 the error of long sums, far below any dropped term.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8 * 2**-8}
RULES = ("frozen", "lora", "dora")


@dataclasses.dataclass
class Adapter:
    """The values that every provider starts from, fp32."""

    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    scaling: float


@dataclasses.dataclass
class Expected:
    """fp64 results of one layer: sampled rows of y and dx, whole gradients of the factors, sampled entries of the magnitude's."""

    tokens: Tensor
    outputs: Tensor
    y: Tensor
    x: Tensor
    lora_A: Tensor | None
    lora_B: Tensor | None
    magnitude: Tensor | None


def expected(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter, rule: str) -> Expected:
    """Compute them for a frozen layer, LoRA, y = x (W + s B A)^T + b, or DoRA with a detached norm (arXiv:2402.09353, eq. 5)."""
    tokens = torch.linspace(0, x.shape[0] - 1, min(SAMPLE, x.shape[0]), device=x.device).long()
    outputs = torch.linspace(0, weight.shape[0] - 1, min(SAMPLE, weight.shape[0]), device=x.device).long()
    x, grad, weight = x.double(), grad.double(), weight.double()
    lora_A, lora_B, scaling = adapter.lora_A.double(), adapter.lora_B.double(), adapter.scaling
    if rule == "frozen":
        updated, scale = weight, torch.ones_like(adapter.magnitude, dtype=torch.float64)
    else:
        updated = weight + scaling * lora_B @ lora_A
        norm = updated.norm(dim=1)
        scale = adapter.magnitude.double() / norm if rule == "dora" else torch.ones_like(norm)
    merged = scale[:, None] * updated
    y = x[tokens] @ merged.T
    if bias is not None:
        y = y + bias.double()
    grad_x = grad[tokens] @ merged
    if rule == "frozen":
        return Expected(tokens, outputs, y, grad_x, None, None, None)
    scaled = grad * scale
    grad_B = scaling * scaled.T @ (x @ lora_A.T)
    grad_A = scaling * (scaled @ lora_B).T @ x
    grad_magnitude = None
    if rule == "dora":
        grad_magnitude = (grad[:, outputs] * (x @ updated[outputs].T)).sum(0) / norm[outputs]
    return Expected(tokens, outputs, y, grad_x, grad_A, grad_B, grad_magnitude)


def _row_error(actual: Tensor, wanted: Tensor) -> float:
    return float(((actual.detach().double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def _error(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.detach().double() - wanted).norm() / wanted.norm())


def require(errors: dict[str, float], tolerance: float) -> dict[str, float]:
    """Return the errors, or raise Disagreement naming those that are too large or not a number."""
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        text = ", ".join(f"{name} {error:.2g}" for name, error in wrong.items())
        raise Disagreement(f"relative error above {tolerance:.2g}: {text}")
    return {name: float(f"{error:.3g}") for name, error in errors.items()}


def compare(results: dict[str, Tensor], wanted: Expected, tolerance: float) -> dict[str, float]:
    """Relative errors of y and dx (the worst sampled row), dA, dB and dm (as a whole); raises Disagreement above the tolerance.

    `results` holds whichever of y, x, lora_A, lora_B, magnitude the provider computed.
    """
    errors = {}
    for name, actual in results.items():
        if name in ("y", "x"):
            errors[name] = _row_error(actual[wanted.tokens], getattr(wanted, name))
        elif name == "magnitude":
            errors[name] = _error(actual[wanted.outputs], getattr(wanted, name))
        else:
            errors[name] = _error(actual, getattr(wanted, name))
    return require(errors, tolerance)
