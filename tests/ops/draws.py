"""Random calls of the operations, their fp64 truth, and the bound that a result must keep.

A row's error against fp64 is at most 2 * (the reference's own error of that row in the same dtype, or its usual one where that is
larger, + eps * the row's size), the size being the norm of the row, or of the root of its summed squared terms where the terms
cancel. Few numbers say little of what is usual, and a short row may lie far outside it by chance: `usual_error`, `tail`.
Every term counts: scaling * BA is as large as the weight, magnitudes are not the norms, the bias is as large as the rest.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

import bidora_kernels as bk

FEW = 100  # numbers: fewer do not tell an error's usual size
MERGED, FROZEN = (24, 40, 3, (2, 9)), (64, 64, 3, (17,))  # shapes of fp32 layers by the weight that they multiply with, both ways
LEAVES = ("x", "x_dropped", "lora_A", "lora_B", "magnitude")


@dataclasses.dataclass
class Call:
    """One call of dora_linear and the gradient of its output."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    scaling: float
    bias: Tensor | None
    x_dropped: Tensor | None
    grad: Tensor
    detach_norm: bool = True
    norm: Tensor | None = None

    def double(self) -> Call:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Call(**{k: v.double() if isinstance(v, Tensor) else v for k, v in values.items()})


def draw(
    seed: int = 0,
    out_features: int = 24,
    in_features: int = 40,
    r: int = 3,
    tokens: tuple[int, ...] = (2, 9),
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    dropped: bool = False,
    detach_norm: bool = True,
    layout: str = "rows",
    norm_known: bool = False,
) -> Call:
    """A call whose terms are all of one size. layout: rows, transposed, sliced or strided weights and inputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    adapter = torch.float64 if dtype == torch.float64 else torch.float32
    scaling = 1.5
    weight, x = normal(out_features, in_features).to(dtype), normal(*tokens, in_features).to(dtype)
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    elif layout == "sliced":
        weight, x = torch.cat([weight, weight], 1)[:, :in_features], torch.cat([x, x], -1)[..., :in_features]
    elif layout == "strided":
        weight, x = weight.repeat_interleave(2, 1)[:, ::2], x.repeat_interleave(2, -1)[..., ::2]
    keep = torch.rand(x.shape, generator=generator) > 0.3
    lora_A, lora_B = normal(r, in_features).to(adapter), (normal(out_features, r) / (scaling * max(r, 1) ** 0.5)).to(adapter)
    magnitude = ((torch.rand(out_features, generator=generator) + 0.5) * max(in_features, 1) ** 0.5).to(adapter)
    return Call(
        x, weight, lora_A, lora_B, magnitude, scaling, normal(out_features).to(dtype) if bias else None,
        (x * keep / 0.7).to(dtype) if dropped else None, normal(*tokens, out_features).to(dtype), detach_norm,
        bk.reference.weight_norm(weight, lora_A, lora_B, scaling) if norm_known else None,
    )  # fmt: skip


def run(
    call: Call, backend: str, needs: tuple[str, ...] = ("direction", "magnitude"), precise: bool = False
) -> dict[str, Tensor]:
    """y and every gradient that the pass needs, under a backend."""
    leaves = {name: None if (value := getattr(call, name)) is None else value.detach().requires_grad_() for name in LEAVES}
    with bk.pass_mode(backend=backend, needs=needs, precise=precise):
        y = bk.functional.dora_linear(
            weight=call.weight, scaling=call.scaling, bias=call.bias, detach_norm=call.detach_norm, norm=call.norm, **leaves
        )  # fmt: skip
        group = {"lora_A": "direction", "lora_B": "direction", "magnitude": "magnitude"}
        wanted = {n: leaf for n, leaf in leaves.items() if leaf is not None and (n not in group or group[n] in needs)}
        grads = torch.autograd.grad(y, list(wanted.values()), call.grad.to(y.dtype))
    return {"y": y.detach()} | dict(zip(wanted, grads, strict=True))


def sizes(call: Call) -> dict[str, Tensor]:
    """For y and every gradient, the root of the summed squares of its terms, in fp64: what rounding errors are relative to."""
    c = call.double()

    def squared(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, tensor.shape[-1]).square()

    inputs = c.x if c.x_dropped is None else c.x_dropped
    norm = bk.reference.weight_norm(c.weight, c.lora_A, c.lora_B, c.scaling) if c.norm is None else c.norm
    scale = bk.reference.row_scale(c.magnitude, norm).square()
    updated = c.weight.square() + c.scaling**2 * (c.lora_B.square() @ c.lora_A.square())
    u, g, flat = squared(inputs) @ updated.t(), squared(c.grad), squared(inputs)
    frozen = squared(c.x) @ c.weight.square().t() * (c.x_dropped is not None)
    offset = 0.0 if c.bias is None else c.bias.square()
    dense, factor = (g * scale).t() @ flat, c.scaling**2
    grad_x, through_weight = (g * scale) @ updated, g @ c.weight.square()
    # where terms cancel in a row's length (a short row's may), the error left in it is an error of the whole row
    rows = c.weight + c.scaling * (c.lora_B @ c.lora_A)
    length = scale * (rows.square() * updated).sum(1) / norm.pow(4).clamp_min(1e-300) * (c.norm is None)
    x, grad = (value.reshape(-1, value.shape[-1]) for value in (inputs, c.grad))
    by_length = length * (x @ rows.t()).square()
    dense, grad_x = dense + length[:, None] * (grad.t() @ x).square(), grad_x + (g * length) @ updated
    # read off y, the magnitude's gradient has the rounding of c u + bias divided by c
    per_magnitude = (g * (u * scale + by_length + offset)).sum(0) / scale.clamp_min(1e-300) / norm.square().clamp_min(1e-300)
    per_magnitude = torch.where(norm > 0, per_magnitude, 0.0)  # a zero row has no direction, and by convention no gradient
    along = 0.0
    if not c.detach_norm:
        # an error of the norm's gradient turns a whole row: its terms do not average out
        through = per_magnitude * scale / norm.square().clamp_min(1e-300)
        along = factor * through[:, None] * (rows @ c.lora_A.t()).square()
        dense = dense + (per_magnitude * scale / norm.square().clamp_min(1e-300))[:, None] * updated
    found = {
        "y": scale * u + by_length + frozen + offset, "x": grad_x if c.x_dropped is None else through_weight,
        "x_dropped": grad_x + through_weight, "lora_A": factor * c.lora_B.square().t() @ dense,
        "lora_B": factor * dense @ c.lora_A.square().t() + along, "magnitude": per_magnitude,
    }  # fmt: skip
    return {name: value.sqrt() for name, value in found.items()}


def violations(call: Call, ours: dict[str, Tensor], eps_of: torch.dtype | None = None) -> list[str]:
    """Where `ours` breaks the bound, in words. `eps_of`: the coarsest dtype that the call rounds to (the input's)."""
    terms = max(*call.weight.shape, call.x.numel() // max(1, call.x.shape[-1]))
    return compare(ours, run(call, "reference"), run(call.double(), "reference"), sizes(call), eps_of or call.x.dtype, terms)


def usual_error(observed: Tensor, numbers: int, eps: float, terms: int) -> Tensor:
    """The usual relative error: the one observed, or, where that is of few numbers, at least that of a plain fp32 sum.

    Added one after the other, partial sums of k terms have sqrt(k) times a term's size and are rounded by about 0.2 eps of it:
    0.2 eps * sqrt(terms / 2) of the root of the summed squares.
    """
    plain = 0.2 * min(eps, torch.finfo(torch.float32).eps) * (terms / 2) ** 0.5
    return observed.clamp_min(plain) if numbers < FEW else observed


def tail(length: int, rows: int) -> float:
    """How many times the usual error the worst of some rows of `length` normal errors has once in 10,000 calls; at least 2.

    A chi-squared variable of n degrees is over n + 2 sqrt(n x) + 2 x with a probability of at most exp(-x) (Laurent and Massart,
    2000).
    """
    x = math.log(1e4 * rows)
    return max(2.0, (1.0 + 2.0 * (x / length) ** 0.5 + 2.0 * x / length) ** 0.5)


def compare(
    ours: dict[str, Tensor], reference: dict[str, Tensor], truth: dict[str, Tensor], size: dict[str, Tensor],
    eps_of: torch.dtype, terms: int = 1,
) -> list[str]:  # fmt: skip
    """The bound itself, row by row; `terms`: of the longest sum, whose rounding the fp64 truth has too."""
    eps, found = torch.finfo(eps_of).eps, []
    for name, value in ours.items():
        exact = truth[name]
        # one number per output feature (the magnitude's gradient, lora_B's at r = 1) is one row: among many single numbers some
        # error lies far outside the usual, and a bound of twice the usual would only count them
        rows = (-1, exact.shape[-1]) if exact.dim() > 1 and exact.shape[-1] > 1 else (1, exact.numel())
        if exact.numel() == 0:
            continue
        error, own = ((v.double() - exact).reshape(rows).norm(dim=1) for v in (value, reference[name]))
        row_size = torch.maximum(exact.reshape(rows).norm(dim=1), size[name].reshape(rows).norm(dim=1))
        # in fp64 the truth is the reference, whose own error, that of sums of random terms, then reads as 0
        of_truth = torch.finfo(torch.float64).eps * row_size * terms**0.5
        # a row that the reference hits by luck is held to the reference's usual error of this call, as the other rows are
        usual = (own / row_size.clamp_min(1e-300)).square().mean().sqrt()
        own = torch.maximum(own, row_size * usual_error(usual, exact.numel(), eps, terms))
        factor = tail(exact.numel() // len(error), len(error))
        excess = error / (factor * (own + of_truth + eps * row_size) + of_truth).clamp_min(1e-300)
        if not bool((excess <= 1).all()):  # a NaN is no less
            found.append(f"{name}: {excess.max().item():.3g} times the bound")
    return found
