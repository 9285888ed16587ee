"""The providers of one operation alone: this library per backend, plain PyTorch, and a copy that moves as many bytes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bidora_kernels as bk
from bidora_kernels import native

from . import machine, oracle
from .cases import DTYPES, OperationCase
from .peers import BACKENDS, backend_context, need_backend, ours
from .timing import Candidate

SCALING = 2.0
COPY_TO_NEW = "copy into a new tensor"
NATIVE_INTO_KEPT = f"{ours('native')}, into kept memory"


def bytes_counted(case: OperationCase) -> int:
    """Bytes of every input read once and every output written once: what the operation cannot do without.

    The factors and vectors are fp32. compose reads the base output and writes y; compose_backward reads dy and the saved base
    output and writes the base output's gradient. Partial sums are not counted.
    """
    n, k, t, r, size = case.out_features, case.in_features, case.tokens, case.r, DTYPES[case.dtype].itemsize
    factors = 4 * r * (n + k)
    return {
        "weight_norm": n * k * size + factors + 4 * n,
        "merged_weight": 2 * n * k * size + factors + 8 * n,
        "orthogonality_penalty": n * k * size + factors,
        "compose": 2 * t * n * size + t * r * size + 4 * n * (r + 2),
        "compose_backward": 3 * t * n * size + 2 * t * r * size + 8 * n * (r + 2),
    }[case.operation]


def operations_counted(case: OperationCase) -> int:
    """Multiplications and additions of the algorithm without shortcuts."""
    n, k, t, r = case.out_features, case.in_features, case.tokens, case.r
    return {
        "weight_norm": 2 * n * k * r + 3 * n * k,
        "merged_weight": 2 * n * k * r + 5 * n * k,
        "orthogonality_penalty": (3 if case.gradients else 1) * 2 * n * n * k + 2 * n * k * r,
        "compose": 2 * t * n * r + 3 * t * n,
        "compose_backward": 4 * t * n * r + 4 * t * n,
    }[case.operation]


class Operands:
    """Sets of inputs of one operation, rotated past the cache."""

    def __init__(self, case: OperationCase, device: str) -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[case.dtype]

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.empty(shape, device=device).normal_(std=std, generator=generator)

        n, k, t, r = case.out_features, case.in_features, case.tokens, case.r
        touched = bytes_counted(case)
        self.sets: list[dict[str, Tensor]] = []
        for _ in range(max(1, min(case.max_sets, math.ceil(2 * machine.cache_bytes(device) / touched)))):
            lora_B = normal(n, r, std=0.02 * math.sqrt(k / r) / SCALING)
            values = {"lora_B": lora_B, "magnitude": normal(n).abs_().add_(0.5)}
            if t:
                values["base"], values["grad"] = normal(t, n).to(dtype), normal(t, n).to(dtype)
                values["hidden"] = normal(t, r).to(dtype)
                values["norm"] = normal(n).abs_().add_(0.5)
                values["scale"] = values["magnitude"] / values["norm"]
                values["scratch"] = torch.empty_like(values["base"])
            else:
                values["weight"] = normal(n, k, std=0.02).to(dtype)
                values["lora_A"] = normal(r, k, std=1 / math.sqrt(k))
            self.sets.append(values)


def _compose(base: Tensor, hidden: Tensor, lora_B: Tensor, scale: Tensor) -> Tensor:
    """y = c * (base + scaling * hidden lora_B^T), in the precision of its arguments."""
    return scale * (base + SCALING * hidden @ lora_B.to(hidden.dtype).T)


def _compose_backward(
    base: Tensor, hidden: Tensor, lora_B: Tensor, scale: Tensor, norm: Tensor, grad: Tensor
) -> dict[str, Tensor]:
    """Gradients of `_compose` with respect to base, hidden, lora_B and magnitude."""
    scaled = grad * scale
    updated = base + SCALING * hidden @ lora_B.to(hidden.dtype).T
    return {
        "base": scaled,
        "hidden": SCALING * scaled @ lora_B,
        "lora_B": SCALING * scaled.T @ hidden.to(scaled.dtype),
        "magnitude": (grad * updated).sum(0) / norm,
    }


def _plain(case: OperationCase) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """The operation in plain PyTorch, by tensors as they are (fp64 for the expected values)."""

    def call(values: dict[str, Tensor]) -> dict[str, Tensor]:
        v = values
        if case.operation == "compose":
            return {"y": _compose(v["base"], v["hidden"], v["lora_B"], v["scale"]).to(v["base"].dtype)}
        if case.operation == "compose_backward":
            return _compose_backward(v["base"], v["hidden"], v["lora_B"], v["scale"], v["norm"], v["grad"])
        return _functional(bk.reference, case, values)

    return call


def _functional(module: Any, case: OperationCase, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The operation of `functional` or `reference`."""
    weight, lora_A, lora_B = values["weight"], values["lora_A"], values["lora_B"]
    if case.operation == "weight_norm":
        return {"norm": module.weight_norm(weight, lora_A, lora_B, SCALING)}
    if case.operation == "merged_weight":
        return {"merged": module.merged_weight(weight, lora_A, lora_B, values["magnitude"], SCALING)}
    if not case.gradients:
        return {"penalty": module.orthogonality_penalty(weight, lora_A, lora_B, SCALING)}
    lora_A, lora_B = lora_A.detach().requires_grad_(), lora_B.detach().requires_grad_()
    with torch.enable_grad():
        penalty = module.orthogonality_penalty(weight, lora_A, lora_B, SCALING)
        grads = torch.autograd.grad(penalty, (lora_A, lora_B))
    return {"penalty": penalty.detach(), "lora_A": grads[0], "lora_B": grads[1]}


def _triton_launcher(case: OperationCase) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """compose and its backward have no public function of their own: the launcher."""

    def compose(values: dict[str, Tensor]) -> dict[str, Tensor]:
        from bidora_kernels.kernels.compose import launch_compose

        base, hidden, lora_B, scale = (values[name] for name in ("base", "hidden", "lora_B", "scale"))
        return {"y": launch_compose(base, hidden, lora_B, scale, SCALING, output=values["scratch"])}

    def backward(values: dict[str, Tensor]) -> dict[str, Tensor]:
        from bidora_kernels.kernels.compose_backward import launch_compose_backward

        found = launch_compose_backward(
            values["grad"], values["hidden"], values["lora_B"], values["scale"], values["norm"], SCALING, base=values["base"]
        )
        return {name: getattr(found, name) for name in ("base", "hidden", "lora_B", "magnitude")}

    return compose if case.operation == "compose" else backward


def _candidate(
    name: str, operands: Operands, call: Callable[[dict[str, Tensor]], dict[str, Tensor]], around: Callable[[], Any]
) -> Candidate:
    case = operands.case

    def verify() -> dict[str, float]:
        first = operands.sets[0]
        wanted = _plain(case)({key: value.double() for key, value in first.items()})
        with around():
            found = call(first)
        errors = {}
        for key, value in found.items():
            exact = wanted[key]
            difference = value.double() - exact
            rows = exact.dim() == 2 and key in ("merged", "y")
            share = (difference.norm(dim=1) / exact.norm(dim=1)).max() if rows else difference.norm() / exact.norm()
            errors[key] = float(share)
        # the penalty sums the squares of small differences of unit rows, which costs digits
        tolerance = oracle.TOLERANCE[DTYPES[case.dtype]] * (10 if case.operation == "orthogonality_penalty" else 1)
        return oracle.require(errors, tolerance)

    calls = [functools.partial(call, values) for values in operands.sets]
    return Candidate(name, calls, verify, around)


def _sources(operands: Operands) -> list[Tensor]:
    """For every set of inputs half as many bytes as the operation has to move: a copy reads and writes them."""
    size = max(1, bytes_counted(operands.case) // 2)
    return [torch.ones(size, dtype=torch.uint8, device=operands.device) for _ in operands.sets]


def _copy_to_new(operands: Operands) -> Candidate:
    return Candidate(COPY_TO_NEW, [source.clone for source in _sources(operands)], dict, torch.no_grad)


def _copy(operands: Operands) -> Candidate:
    calls = [functools.partial(torch.empty_like(source).copy_, source) for source in _sources(operands)]
    return Candidate("copy of the same bytes", calls, dict, torch.no_grad)


def _bidora(operands: Operands, backend: str) -> Candidate:
    need_backend(backend, operands.device)
    case = operands.case
    launcher = backend == "triton" and case.operation.startswith("compose")
    call = _triton_launcher(case) if launcher else functools.partial(_functional, bk.functional, case)

    return _candidate(ours(backend), operands, call, functools.partial(backend_context, backend, no_grad=True))


def _native_into_kept(operands: Operands) -> Candidate:
    """merged_weight as a layer's weight plan calls it in each pass: into memory that it has written before."""
    need_backend("native", operands.device)
    first = operands.sets[0]["weight"]
    norm, merged = first.new_empty(first.shape[0], dtype=torch.float32), torch.empty_like(first)

    def call(values: dict[str, Tensor]) -> dict[str, Tensor]:
        lora_A, lora_B, magnitude = values["lora_A"], values["lora_B"], values["magnitude"]
        native.merged_weight(values["weight"], lora_A, lora_B, magnitude, SCALING, norm, merged)
        return {"merged": merged}

    return _candidate(NATIVE_INTO_KEPT, operands, call, functools.partial(backend_context, "native", no_grad=True))


def operation_providers(case: OperationCase) -> dict[str, Callable[[Operands], Candidate]]:
    """Every provider of an operation by name, the copy first."""
    found: dict[str, Callable[[Operands], Candidate]] = {"copy of the same bytes": _copy}
    found["PyTorch"] = lambda o: _candidate("PyTorch", o, _plain(case), torch.no_grad)
    backends = ("triton",) if case.operation.startswith("compose") else tuple(b for b in BACKENDS if b != "reference")
    for backend in backends:
        found[ours(backend)] = functools.partial(_bidora, backend=backend)
    if case.operation == "merged_weight":
        found[COPY_TO_NEW] = _copy_to_new
        found[NATIVE_INTO_KEPT] = _native_into_kept
    return found
