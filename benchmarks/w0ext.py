"""An experiment, not a plan of the library: W0 and lora_A in one buffer, so that x W0^T and x lora_A^T are one matrix product.

    [base | h] = x [W0; lora_A]^T        dx = [g | dh] [W0; lora_A]

It gives up what users are promised: the layer no longer shares its weight's storage, and lora_A takes the weight's dtype and
must be a view of the buffer. Run it to see what that promise costs:

    python -m benchmarks.w0ext --tokens 4096 --model roberta-base --layer attention --r 16
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from typing import Any

import torch
from torch import Tensor

import bidora_kernels as bk

from . import machine, peers
from .cases import DTYPES, MODELS, LayerCase
from .tables import milliseconds, our_provider, times_as_long
from .timing import Candidate, measure, quantiles, ratio


class _ExtendedLinear(torch.autograd.Function):
    """DoRA's activation form over one [N + r, K] buffer, in plain PyTorch; the norm is a constant."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, extended: Tensor, scaling: float, bias: Any
    ):
        out_features = lora_B.shape[0]
        norm = bk.functional.weight_norm(extended[:out_features], lora_A, lora_B, scaling)
        both = x @ extended.T
        base, hidden = both[:, :out_features], both[:, out_features:]
        updated = torch.addmm(base, hidden, lora_B.to(x.dtype).T, alpha=scaling)
        scale = magnitude / norm
        y = updated * scale.to(x.dtype)
        ctx.save_for_backward(x, hidden, lora_B, extended, scale, y, magnitude)
        ctx.scaling = scaling
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (grad,) = grads
        x, hidden, lora_B, extended, scale, y, magnitude = ctx.saved_tensors
        scaled = grad * scale.to(grad.dtype)
        grad_hidden = ctx.scaling * (scaled @ lora_B.to(grad.dtype))
        grad_x = torch.cat([scaled, grad_hidden], dim=1) @ extended
        grad_A = grad_hidden.T @ x
        grad_B = ctx.scaling * (scaled.T @ hidden)
        grad_magnitude = (grad * y).sum(0, dtype=torch.float32) / magnitude
        return grad_x, grad_A, grad_B, grad_magnitude, None, None, None


def candidate(material: peers.Material, one_buffer: bool) -> Candidate:
    """The same plain-PyTorch layer with one buffer, or with two tensors joined in no way (`one_buffer` False)."""
    adapter = material.adapter

    def make(which: peers.Set) -> tuple[Any, dict[str, Tensor]]:
        parameters = {
            "lora_A": adapter.lora_A.to(material.dtype).clone().requires_grad_(),
            "lora_B": adapter.lora_B.clone().requires_grad_(),
            "magnitude": adapter.magnitude.clone().requires_grad_(),
        }
        if one_buffer:
            extended = torch.cat([which.weight.detach(), parameters["lora_A"].detach()])
            return (lambda x: _ExtendedLinear.apply(x, *parameters.values(), extended, adapter.scaling, which.bias)), parameters
        return (lambda x: _SeparateLinear.apply(x, *parameters.values(), which.weight, adapter.scaling, which.bias)), parameters

    return peers.layer_candidate("one buffer" if one_buffer else "two tensors", material, "dora", make)


class _SeparateLinear(torch.autograd.Function):
    """The same layer with W0 and lora_A apart: what the buffer is compared with."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, weight: Tensor, scaling: float, bias: Any
    ):
        norm = bk.functional.weight_norm(weight, lora_A, lora_B, scaling)
        hidden = x @ lora_A.T
        updated = torch.addmm(x @ weight.T, hidden, lora_B.to(x.dtype).T, alpha=scaling)
        scale = magnitude / norm
        y = updated * scale.to(x.dtype)
        ctx.save_for_backward(x, hidden, lora_A, lora_B, weight, scale, y, magnitude)
        ctx.scaling = scaling
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (grad,) = grads
        x, hidden, lora_A, lora_B, weight, scale, y, magnitude = ctx.saved_tensors
        scaled = grad * scale.to(grad.dtype)
        grad_hidden = ctx.scaling * (scaled @ lora_B.to(grad.dtype))
        grad_x = torch.addmm(grad_hidden @ lora_A, scaled, weight)
        grad_A = grad_hidden.T @ x
        grad_B = ctx.scaling * (scaled.T @ hidden)
        grad_magnitude = (grad * y).sum(0, dtype=torch.float32) / magnitude
        return grad_x, grad_A, grad_B, grad_magnitude, None, None, None


def run(case: LayerCase, device: str) -> dict[str, Any]:
    """Time the floor, both forms and this library on one layer, interleaved; returns times by provider."""
    material = peers.Material(case, device)
    candidates = [candidate(material, one_buffer=True), candidate(material, one_buffer=False)]
    for name, build in peers.layer_providers(case).items():
        if name in ("frozen linear", *map(peers.ours, peers.BACKENDS)):
            try:
                candidates.append(build(material))
            except peers.Unavailable:
                continue
    for each in candidates:
        each.verify()
    return measure(candidates, device, case.min_rounds, case.max_rounds, case.seconds)


def main() -> int:
    """Run the experiment and print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.w0ext", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="roberta-base", choices=tuple(MODELS))
    parser.add_argument("--layer", default="attention")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES))
    parser.add_argument("--json", action="store_true", help="print times by round")
    arguments = parser.parse_args()
    if arguments.layer not in MODELS[arguments.model]:
        parser.error(f"--layer must be one of {', '.join(MODELS[arguments.model])}, got {arguments.layer!r}")
    n, k = MODELS[arguments.model][arguments.layer]
    case = LayerCase(
        model=arguments.model, layer=arguments.layer, out_features=n, in_features=k, tokens=arguments.tokens, r=arguments.r,
        dtype=arguments.dtype, max_rounds=40, seconds=20.0,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    times = run(case, device)
    if arguments.json:
        print(json.dumps({"case": case.id, "machine": machine.describe(device), **machine.commit(), "seconds": times}))
        return 0
    print(case.id)
    show = functools.partial(ratio, to=times["frozen linear"])
    for name, seconds in times.items():
        print(f"  {name:<20} {milliseconds(quantiles(seconds)[1]):>9} ms  {times_as_long(show(seconds))} of the frozen linear")
    print(f"  one buffer / two tensors: {times_as_long(ratio(times['one buffer'], times['two tensors']))}")
    ours = our_provider(times)
    if ours:
        print(f"  {ours} / one buffer: {times_as_long(ratio(times[ours], times['one buffer']))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
