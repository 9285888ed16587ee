"""The providers of a layer: what a user would otherwise pick, each the way its documentation says is fastest, and this library.

PEFT: dropout 0 (it then reuses the base output), the adapter's dtype as named, `DoraCaching` where it may cache (eval mode).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import bidora_kernels as bk

from . import machine, oracle
from .cases import DTYPES, DecodeCase, LayerCase
from .plain_function import plain_function
from .timing import Candidate

BACKENDS = ("native", "triton", "reference")
LAYER_PLANS = {"native": ("activation plan", "weight plan"), "triton": ("activation plan", "weight plan", "weight plan, W' kept")}


class Unavailable(RuntimeError):
    """A provider cannot run here; the text says why."""


def ours(backend: str) -> str:
    """The name of this library's provider on one backend."""
    return f"bidora ({backend})"


@contextlib.contextmanager
def backend_context(backend: str, no_grad: bool = False) -> Iterator[None]:
    """Run this library on one backend."""
    with bk.use_backend(backend), torch.no_grad() if no_grad else contextlib.nullcontext():
        yield


def need_backend(backend: str, device: str) -> None:
    """Raise Unavailable where a backend cannot serve a device."""
    from bidora_kernels.ops._backend import resolve

    try:
        with bk.use_backend(backend):
            resolve(device)
    except bk.BackendUnavailable as error:
        raise Unavailable(str(error)) from None


@contextlib.contextmanager
def native_plan(plan: str | None) -> Iterator[None]:
    """Hold the native backend, which chooses for itself, to one plan by replacing what makes the choice; None leaves it."""
    if plan is None:
        yield
        return
    from bidora_kernels.ops import _native_plan

    with mock.patch.object(_native_plan, "weight_plan_pays", return_value=plan.startswith("weight")):
        yield


def force_triton_plan(layer: Any, plan: str, tokens: int) -> None:
    """Hold a layer to one plan of the triton backend. Raises Unavailable where it does not take it."""
    if not hasattr(layer, "forced_plan"):
        raise Unavailable("this version of the triton backend has one plan")
    layer.forced_plan, kept = plan.split(" ")[0], "kept" in plan
    layer.reuse = 1_000_000 if kept else 1
    taken = layer.plan(tokens)
    if (taken.name, taken.kept) != (layer.forced_plan, kept):
        raise Unavailable(f"the library takes the {taken}")


def need_package(name: str) -> None:
    """Raise Unavailable where an optional package is not installed."""
    if importlib.util.find_spec(name) is None:
        raise Unavailable(f"the package {name} is not installed")


@dataclasses.dataclass
class Set:
    """One set of inputs and frozen weights."""

    x: Tensor
    grad: Tensor
    weight: nn.Parameter
    bias: nn.Parameter | None


class Material:
    """The tensors of a layer case: as many sets as it takes to leave the cache, and one adapter for all of them.

    ||scaling * B A|| has the size of ||W0|| and magnitudes differ from norms by up to 30 %: no term can be dropped unseen.
    """

    def __init__(self, case: LayerCase, device: str) -> None:
        self.case, self.device, self.dtype = case, device, DTYPES[case.dtype]
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.empty(shape, device=device).normal_(std=std, generator=generator)

        n, k, t, r = case.out_features, case.in_features, case.tokens, case.r
        touched = (n * k + 2 * t * (n + k)) * self.dtype.itemsize
        count = max(1, min(case.max_sets, math.ceil(2 * machine.cache_bytes(device) / touched)))
        self.sets = []
        for _ in range(count):
            bias = nn.Parameter(normal(n).to(self.dtype), False) if case.bias else None
            weight = nn.Parameter(normal(n, k, std=0.02).to(self.dtype), False)
            x = normal(t, k).to(self.dtype).requires_grad_(case.kind == "layer")
            self.sets.append(Set(x, normal(t, n).to(self.dtype), weight, bias))
        scaling = 2.0
        lora_A, lora_B = normal(r, k, std=1 / math.sqrt(k)), normal(n, r, std=0.02 * math.sqrt(k / r) / scaling)
        norm = (self.sets[0].weight.float() + scaling * lora_B @ lora_A).norm(dim=1)
        spread = torch.empty(n, device=device).uniform_(0.7, 1.3, generator=generator)
        self.adapter = oracle.Adapter(lora_A, lora_B, norm * spread, scaling)

    @functools.cache  # noqa: B019 - a material lives as long as its case
    def expected(self, rule: str) -> oracle.Expected:
        first = self.sets[0]
        return oracle.expected(first.x.detach(), first.grad, first.weight, first.bias, self.adapter, rule)

    def plain(self, which: Set) -> Any:
        """The frozen layer as its model has it: an nn.Linear, or transformers' Conv1D, over the set's own weight."""
        n, k = self.case.out_features, self.case.in_features
        if self.case.conv1d:
            need_package("transformers")
            from transformers.pytorch_utils import Conv1D

            transposed: Any = Conv1D(n, k)
            transposed.weight = nn.Parameter(which.weight.detach().t().contiguous(), False)
            transposed.bias = which.bias
            return transposed
        layer: Any = nn.Linear(k, n, bias=which.bias is not None, device="meta")
        layer.weight, layer.bias = which.weight, which.bias
        return layer


Gradients = dict[str, Tensor]


def layer_candidate(
    name: str,
    material: Material,
    rule: str,
    make: Callable[[Set], tuple[Callable[[Tensor], Tensor], dict[str, Tensor]]],
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    graph: bool = False,
) -> Candidate:
    """Build a candidate from `make`, which returns a set's forward and the tensors whose gradients it computes beside x's.

    graph: replay a CUDA graph of each call instead of launching its kernels one by one.
    """
    if graph and material.device != "cuda":
        raise Unavailable("CUDA graphs need a GPU")
    train = material.case.kind == "layer"
    sets = material.sets
    made = [make(which) for which in sets]

    def results(forward: Callable[[Tensor], Tensor], parameters: dict[str, Tensor], which: Set) -> Gradients:
        if not train:
            return {"y": forward(which.x)}
        y = forward(which.x)
        grads = torch.autograd.grad(y, [which.x, *parameters.values()], which.grad.to(y.dtype))
        return {"y": y, **dict(zip(("x", *parameters), grads, strict=True))}

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        with around(), contextlib.nullcontext() if train else torch.no_grad():
            yield

    calls: list[Callable[[], Gradients]] = [
        functools.partial(results, forward, parameters, which) for (forward, parameters), which in zip(made, sets, strict=True)
    ]
    if graph:
        with entered():
            calls = [captured(call) for call in calls]

    def verify() -> dict[str, float]:
        with entered():
            if not train:
                calls[0]()  # a second call may take what the first has prepared, and that is what is timed
            found = calls[0]()
        return oracle.compare(found, material.expected(rule), oracle.TOLERANCE[material.dtype])

    return Candidate(name, calls, verify, entered)


def captured(call: Callable[[], Gradients]) -> Callable[[], Gradients]:
    """`call` recorded in a CUDA graph: each replay reads the same tensors and overwrites the same results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled, tuned or allocated once must be over before the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()

    def replay() -> Gradients:
        graph.replay()
        return found

    return replay


def _frozen(material: Material, graph: bool = False) -> Candidate:
    return layer_candidate("frozen linear", material, "frozen", lambda which: (material.plain(which), {}), graph=graph)


class _Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def peft_layer(layer: nn.Module, adapter: oracle.Adapter, dora: bool, fp32: bool, conv1d: bool, train: bool) -> Any:
    """PEFT's own layer around `layer`, holding the adapter's values; adapters in fp32, or in the layer's dtype."""
    need_package("peft")
    import peft

    r = adapter.lora_A.shape[0]
    alpha = int(adapter.scaling * r)
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, target_modules=["layer"], use_dora=dora, fan_in_fan_out=conv1d, lora_dropout=0.0
    )
    holder: Any = _Holder(layer)
    wrapped: Any = peft.get_peft_model(holder, config, autocast_adapter_dtype=fp32).base_model.model
    wrapped = wrapped.layer
    with torch.no_grad():
        wrapped.lora_A.default.weight.copy_(adapter.lora_A)
        wrapped.lora_B.default.weight.copy_(adapter.lora_B)
        if dora:
            wrapped.lora_magnitude_vector.default.weight.copy_(adapter.magnitude)
    return wrapped.train(train)


def _peft(name: str, material: Material, dora: bool, fp32: bool = False, caching: bool = False, graph: bool = False) -> Candidate:
    train = material.case.kind == "layer"

    def make(which: Set) -> tuple[Callable[[Tensor], Tensor], dict[str, Tensor]]:
        layer = peft_layer(material.plain(which), material.adapter, dora, fp32, material.case.conv1d, train)
        parameters = {"lora_A": layer.lora_A.default.weight, "lora_B": layer.lora_B.default.weight}
        if dora:
            parameters["magnitude"] = layer.lora_magnitude_vector.default.weight
        return layer, parameters

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        from peft.helpers import DoraCaching

        autocast = torch.autocast(material.device, material.dtype, enabled=fp32)
        with autocast, DoraCaching(enabled=caching):
            yield

    return layer_candidate(name, material, "dora" if dora else "lora", make, around, graph)


def _bidora(material: Material, backend: str, merged: bool = False, plan: str | None = None, graph: bool = False) -> Candidate:
    need_backend(backend, material.device)
    adapter, train = material.adapter, material.case.kind == "layer"

    def make(which: Set) -> tuple[Callable[[Tensor], Tensor], dict[str, Tensor]]:
        plain = material.plain(which)
        settings: dict[str, Any] = {"r": adapter.lora_A.shape[0], "lora_alpha": adapter.scaling * adapter.lora_A.shape[0]}
        layer: bk.FusedDoraLinear
        if material.case.conv1d:
            layer = bk.FusedDoraConv1D.from_conv1d(plain, **settings)
        else:
            layer = bk.FusedDoraLinear.from_linear(plain, **settings)
        with torch.no_grad():
            for name in ("lora_A", "lora_B", "magnitude"):
                getattr(layer, name).copy_(getattr(adapter, name))
        layer.train(train)
        if merged:
            layer.merge()
        if plan == "activation plan" and backend == "native" and material.case.dtype != "fp32":
            raise Unavailable("the native products take fp32: a 16-bit weight is converted, which the merged weight is already")
        if plan is not None and backend == "triton":
            force_triton_plan(layer, plan, material.case.tokens)
        return layer, {"lora_A": layer.lora_A, "lora_B": layer.lora_B, "magnitude": layer.magnitude}

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with bk.use_backend(backend), native_plan(plan if backend == "native" else None):
            yield

    name = ours(backend) + (" merged" if merged else "") + (f", {plan}" if plan else "")
    with around():
        return layer_candidate(name, material, "dora", make, around, graph)


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def _function(name: str, material: Material, call: Callable[..., Tensor]) -> Candidate:
    """A provider that is a function of (x, weight, lora_A, lora_B, magnitude, scaling, bias)."""
    adapter = material.adapter

    def make(which: Set) -> tuple[Callable[[Tensor], Tensor], dict[str, Tensor]]:
        parameters = {name: _leaf(getattr(adapter, name)) for name in ("lora_A", "lora_B", "magnitude")}
        return (lambda x: call(x, which.weight, *parameters.values(), adapter.scaling, which.bias)), parameters

    return layer_candidate(name, material, "dora", make)


def _compiled(material: Material) -> Candidate:
    if not material.case.compiled:
        raise Unavailable("not compiled for this case")
    torch._dynamo.reset()
    function = torch.compile(bk.reference.dora_linear, dynamic=False)
    return _function("reference, torch.compile", material, function)


def _merged(material: Material) -> Candidate:
    """An nn.Linear that holds W': what a merged export costs."""

    def make(which: Set) -> tuple[Callable[[Tensor], Tensor], dict[str, Tensor]]:
        a = material.adapter
        weight = bk.reference.merged_weight(which.weight, a.lora_A, a.lora_B, a.magnitude, a.scaling).detach()
        return material.plain(dataclasses.replace(which, weight=nn.Parameter(weight, False))), {}

    return layer_candidate("merged linear", material, "dora", make)


Builder = Callable[[Material], Candidate]


def layer_providers(case: LayerCase) -> dict[str, Builder]:
    """Every provider of a layer case by name, the floor first."""
    decode = isinstance(case, DecodeCase)
    found: dict[str, Builder] = {"frozen linear": _frozen}
    if decode:
        found["merged linear"] = _merged
    found["PEFT LoRA"] = lambda m: _peft("PEFT LoRA", m, dora=False)
    found["PEFT DoRA"] = lambda m: _peft("PEFT DoRA", m, dora=True)
    if case.dtype != "fp32":
        name = "PEFT DoRA, fp32 adapters"  # PEFT's default on a 16-bit model
        found[name] = lambda m: _peft("PEFT DoRA, fp32 adapters", m, dora=True, fp32=True)
    if decode:
        found["PEFT DoRA, DoraCaching"] = lambda m: _peft("PEFT DoRA, DoraCaching", m, dora=True, caching=True)
    else:
        found["plain function"] = lambda m: _function("plain function", m, plain_function)
    if case.compiled:
        found["reference, torch.compile"] = _compiled
    for backend in BACKENDS:
        found[ours(backend)] = functools.partial(_bidora, backend=backend)
        for plan in LAYER_PLANS.get(backend, ()) if case.plans else ():
            found[f"{ours(backend)}, {plan}"] = functools.partial(_bidora, backend=backend, plan=plan)
    if decode:
        found["bidora merged"] = lambda m: dataclasses.replace(_bidora(m, "reference", merged=True), name="bidora merged")
    return found | (_graphs(case, decode) if case.graph else {})


def _graphs(case: LayerCase, decode: bool) -> dict[str, Builder]:
    """The providers that are also replayed from a CUDA graph: the kernels' own time, without the host's."""
    found: dict[str, Builder] = {
        "frozen linear": lambda m: _frozen(m, graph=True),
        "PEFT LoRA": lambda m: _peft("PEFT LoRA", m, dora=False, graph=True),
    }
    if decode:
        found["PEFT DoRA, DoraCaching"] = lambda m: _peft("PEFT DoRA", m, dora=True, caching=True, graph=True)
    else:  # PEFT's default, under autocast, cannot be captured
        found["PEFT DoRA"] = lambda m: _peft("PEFT DoRA", m, dora=True, graph=True)
    found[ours("triton")] = lambda m: _bidora(m, "triton", graph=True)
    for plan in LAYER_PLANS["triton"] if case.plans and not decode else ():
        found[f"{ours('triton')}, {plan}"] = functools.partial(_bidora, backend="triton", plan=plan, graph=True)
    return {f"{name}, CUDA graph": build for name, build in found.items()}
