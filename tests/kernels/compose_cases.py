"""`compose` and its gradients expressed through `reference.dora_linear`.

With x = [base | hidden], weight = [I | 0] and lora_A = [0 | I], the reference's two products are base and hidden themselves, and
the gradient of x is [grad_base | grad_hidden].
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bidora_kernels import reference

from .comparison import TINY_ROW, ZERO_ROW


@dataclasses.dataclass
class Case:
    base: Tensor
    hidden: Tensor
    lora_B: Tensor
    magnitude: Tensor
    norm: Tensor
    bias: Tensor | None
    base_dropped: Tensor | None
    grad_output: Tensor
    scaling: float

    def to(self, dtype: torch.dtype) -> Case:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Case(**{name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in fields.items()})

    def absolute(self) -> Case:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Case(**{name: value.abs() if isinstance(value, Tensor) else value for name, value in fields.items()})

    def replace(self, **changes: object) -> Case:
        return dataclasses.replace(self, **changes)


def make_case(
    tokens: int,
    out_features: int,
    r: int,
    dtype: torch.dtype,
    *,
    hidden_dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype | None = None,
    base_dtype: torch.dtype | None = None,
    bias: bool = True,
    dropped: bool = False,
) -> Case:
    """base and scaling * hidden @ lora_B^T are of one size; scales lie in 0.5 to 2; rows 2 and 3 have degenerate norms."""
    norm = torch.rand(out_features) + 0.5
    magnitude = norm * (0.5 + 1.5 * torch.rand(out_features)) * torch.where(torch.rand(out_features) < 0.5, -1.0, 1.0)
    if out_features > 4:
        norm[ZERO_ROW], norm[TINY_ROW] = 0.0, 1e-21
        magnitude[ZERO_ROW], magnitude[TINY_ROW] = 0.0, 1e-21
    hidden_dtype = hidden_dtype or dtype
    base_dtype = base_dtype or dtype
    return Case(
        base=torch.randn(tokens, out_features).to(base_dtype),
        hidden=torch.randn(tokens, r).to(hidden_dtype),
        lora_B=(torch.randn(out_features, r) / r**0.5).to(adapter_dtype or hidden_dtype),
        magnitude=magnitude,
        norm=norm,
        bias=torch.randn(out_features).to(dtype) if bias else None,
        base_dropped=torch.randn(tokens, out_features).to(base_dtype) if dropped else None,
        grad_output=torch.randn(tokens, out_features).to(dtype),
        scaling=0.8,
    )


@dataclasses.dataclass
class Results:
    """The output and every gradient, in the dtypes in which the reference computes them."""

    output: Tensor
    base: Tensor
    dropped: Tensor | None
    hidden: Tensor
    lora_B: Tensor
    magnitude: Tensor


def reference_results(case: Case) -> Results:
    out_features = case.base.shape[1]
    r, dtype = case.hidden.shape[1], torch.promote_types(case.base.dtype, case.hidden.dtype)
    identity = torch.eye(out_features + r, dtype=dtype)
    weight, lora_A = identity[:out_features], identity[out_features:].to(reference.norm_dtype(identity))
    hidden = case.hidden.to(dtype)
    zero = torch.zeros_like(hidden)
    dropped = None
    if case.base_dropped is None:
        x = torch.cat([case.base.to(dtype), hidden], dim=1).requires_grad_()
    else:
        x = torch.cat([case.base.to(dtype), zero], dim=1).requires_grad_()
        dropped = torch.cat([case.base_dropped.to(dtype), hidden], dim=1).requires_grad_()
    lora_B = case.lora_B.to(lora_A.dtype).requires_grad_()
    magnitude = case.magnitude.to(lora_A.dtype).requires_grad_()
    norm = case.norm.to(lora_A.dtype)
    output = reference.dora_linear(x, weight, lora_A, lora_B, magnitude, case.scaling, case.bias, x_dropped=dropped, norm=norm)
    inputs = [x, lora_B, magnitude] + ([] if dropped is None else [dropped])
    grads = torch.autograd.grad(output, inputs, case.grad_output.to(output.dtype))
    with_hidden = grads[0] if dropped is None else grads[3]
    return Results(
        output=output.detach(),
        base=grads[0][:, :out_features],
        dropped=None if dropped is None else grads[3][:, :out_features],
        hidden=with_hidden[:, out_features:],
        lora_B=grads[1],
        magnitude=grads[2],
    )
