"""The providers of one bilevel iteration: the authors' method on PEFT's layers, and this library's estimators and presets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import bidora_kernels as bk

from . import oracle
from .cases import DTYPES, BilevelCase
from .graphs import GRAPHS, GraphedGradients
from .models import (
    LEARNING_RATE,
    Batch,
    Workbench,
    bidora_model,
    check_model,
    peft_model,
    peft_steps,
    plain_function_model,
    trained,
)
from .peers import BACKENDS, Unavailable, backend_context, need_backend, ours
from .timing import Candidate

RADIUS = 0.01  # Betty's default length of the perturbation
# Of the hypergradient against the exact one: a one-sided difference is up to 2e-2 off. In 16 bits the second-order term is not
# compared: the reference there is the authors' method, and at its fixed radius the difference of two 16-bit passes is rounding
TOLERANCE = {torch.float32: {"direct": 1e-3, "second_order": 5e-2}, torch.bfloat16: {"direct": 1e-1}}
ESTIMATORS: dict[str, dict[str, Any]] = {  # name: constructor arguments of the estimator, arguments of the optimizer
    "FirstOrder": {},
    "ForwardDifference": {"xi": 1.0},
    "CentralDifference": {"xi": 1.0},
    "Sama": {},
    "Neumann": {},
    "ConjugateGradient": {},
    "ForwardMode": {"xi": 1.0},
    "DoubleBackward": {"xi": 1.0},
}
COMPARABLE = {  # those that estimate the second-order term at xi = 1, and where
    "CentralDifference": "before",
    "ForwardDifference": "before",
    "ForwardMode": "before",
    "DoubleBackward": "before",
    "paper-code": "after",
}
PRESETS = ("balanced", "paper-code")
TWICE = ("ForwardMode", "DoubleBackward")  # differentiate through a pass, which is then not recorded
# name: (estimator or preset, what is set otherwise): rows of `benchmarks.cost` alone
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ForwardDifference, 1/2": ("ForwardDifference", {"difference_batch": 0.5}),
    "balanced, whole": ("balanced", {"difference_batch": None}),
}
Direction = Sequence[Tensor]
Terms = tuple[Tensor, Tensor]


class DifferenceMethod:
    """Eq. 8 of BiDoRA on layers that know nothing of it, in the order of the authors' code, with xi = 1.

    The lower step, a validation pass, two train passes around the updated directions; each asks for the gradients it uses.

    one_sided: a single perturbed pass, whose base gradient comes from the lower pass. autocast: of every forward pass. graphs:
    every pass is a CUDA graph.
    """

    def __init__(
        self, bench: Workbench, model: nn.Module, magnitude: Direction, one_sided: bool = False, autocast: bool = False,
        graphs: bool = False,
    ) -> None:  # fmt: skip
        chosen, self.autocast = {id(p) for p in magnitude}, autocast
        self.bench, self.model, self.magnitude, self.one_sided = bench, model, list(magnitude), one_sided
        self.direction = [p for p in trained(model) if id(p) not in chosen]
        self.lower = torch.optim.AdamW(self.direction, lr=LEARNING_RATE)
        self.upper = torch.optim.AdamW(self.magnitude, lr=LEARNING_RATE)
        self._graphed = GraphedGradients(self._loss) if graphs else None

    def _loss(self, batch: Batch) -> Tensor:
        return self.bench.loss(self.model, batch, self.autocast)

    def _gradients(self, batch: Batch, of: Direction) -> list[Tensor]:
        return list(torch.autograd.grad(self._loss(batch), of)) if self._graphed is None else self._graphed(batch, of)

    def hypergradient(self, train: Batch, validation: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """(direct, second-order term to subtract); the lower step is taken."""
        lower_of = [*self.direction, *self.magnitude] if self.one_sided else self.direction
        lower = self._gradients(train, lower_of)
        base = lower[len(self.direction) :]
        if self.one_sided:
            saved = [p.detach().clone() for p in self.direction]
        for parameter, gradient in zip(self.direction, lower, strict=False):
            parameter.grad = gradient
        self.lower.step()
        both = self._gradients(validation, [*self.direction, *self.magnitude])
        vector, direct = both[: len(self.direction)], both[len(self.direction) :]
        with torch.no_grad():
            step = RADIUS / torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(v, dtype=torch.float32) for v in vector])
            )
            if self.one_sided:
                updated = [p.detach().clone() for p in self.direction]
                torch._foreach_copy_(self.direction, saved)
            scaled = torch._foreach_mul(vector, float(step))
            torch._foreach_add_(self.direction, scaled)
        plus = self._gradients(train, self.magnitude)
        if self.one_sided:
            with torch.no_grad():
                torch._foreach_copy_(self.direction, updated)
            return direct, list(torch._foreach_div(torch._foreach_sub(plus, base), float(step)))
        with torch.no_grad():
            torch._foreach_add_(self.direction, scaled, alpha=-2.0)
        minus = self._gradients(train, self.magnitude)
        with torch.no_grad():
            torch._foreach_add_(self.direction, scaled)
        return direct, list(torch._foreach_div(torch._foreach_sub(plus, minus), 2.0 * float(step)))

    def iteration(self, train: Batch, validation: Batch) -> None:
        """A lower and an upper step."""
        direct, second_order = self.hypergradient(train, validation)
        for parameter, gradient in zip(self.magnitude, torch._foreach_sub(direct, second_order), strict=True):
            parameter.grad = gradient
        self.upper.step()


def _pairs(bench: Workbench, validation: Sequence[Batch]) -> list[tuple[Batch, Batch]]:
    train = bench.batches
    return [(batch, validation[(index + 1) % len(validation)]) for index, batch in enumerate(train)]


def _difference_candidate(
    name: str,
    bench: Workbench,
    build: Callable[[Workbench], tuple[nn.Module, dict[str, list[Tensor]]]],
    one_sided: bool = False,
    autocast: bool = False,
    graphs: bool = False,
) -> Candidate:
    model, parts = build(bench)
    method = DifferenceMethod(bench, model, parts["magnitude"], one_sided, autocast, graphs)

    def verify() -> dict[str, float]:
        return check_model(bench, model, parts, "dora", autocast)

    return Candidate(name, [functools.partial(method.iteration, *pair) for pair in _pairs(bench, bench.batches)], verify)


def exact_terms(bench: Workbench) -> dict[str, Terms]:
    """(direct, second-order term) of the hypergradient at xi = 1 and the first batches, by where the second one is taken.

    In fp64 on the reference: "before" the lower step by double backward, "after" it by central differences. A 16-bit case takes
    the direct term of the authors' method on PEFT's DoRA instead.
    """
    pair = _pairs(bench, bench.batches)[0]
    if DTYPES[bench.case.dtype] is not torch.float32:
        model, parts = peft_model(bench, dora=True, fp32=bench.weight_dtype != torch.float32)
        method = DifferenceMethod(bench, model, parts["magnitude"], autocast=True)
        direct, second_order = method.hypergradient(*pair)
        return dict.fromkeys(("before", "after"), (_flat(direct), -_flat(second_order)))
    found = {}
    for at, estimator in (("before", bk.DoubleBackward()), ("after", bk.CentralDifference(at="after"))):
        model = bench.copy(torch.float64)
        bk.apply_dora(model, bench.dora_config())
        bench.fill_bidora(model)
        optimizer = _optimizer(model, {"estimator": estimator, "xi": 1.0})
        with bk.use_backend("reference"):
            terms = optimizer.hypergradient(bench.loss, *pair, terms=True)
        found[at] = (_flat(terms[0]), _flat(terms[1]))
    return found


def _flat(tensors: Direction) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def _optimizer(model: nn.Module, arguments: dict[str, Any]) -> bk.BilevelOptimizer:
    direction, magnitude = bk.split_parameters(model)
    lower, upper = (torch.optim.AdamW(group, lr=LEARNING_RATE) for group in (direction, magnitude))
    return bk.BilevelOptimizer(model, lower=lower, upper=upper, **arguments)


def _bidora(
    bench: Workbench, label: str, backend: str, settings: Callable[[], dict[str, Any]], ratio: float, reference: Any
) -> Candidate:
    need_backend(backend, bench.device)
    around = functools.partial(backend_context, backend)
    arguments = settings()
    with around():
        model, parts = bidora_model(bench)
        optimizer = _optimizer(model, arguments)
    every = arguments.get("upper_every", 1)
    pairs = _pairs(bench, bench.batches if ratio == 1.0 else bench.batch_part(ratio))

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return bench.loss(model, batch)

    def iterations(pair: tuple[Batch, Batch]) -> None:
        for _ in range(every):
            optimizer.step(loss_fn, pair[0], pair[1])

    def verify() -> dict[str, float]:
        with around():
            errors = check_model(bench, model, parts, "dora")
            direct, second_order = optimizer.hypergradient(loss_fn, *_pairs(bench, bench.batches)[0], terms=True)
        return errors | _compare_terms(bench, label, direct, second_order, reference())

    return Candidate(f"{label}, {ours(backend)}", [functools.partial(iterations, pair) for pair in pairs], verify, around, every)


def _compare_terms(
    bench: Workbench, label: str, direct: Direction, second_order: Direction, exact: dict[str, Terms]
) -> dict[str, float]:
    """Hold a hypergradient to the exact one: the direct term always, the second-order one where it means the same."""
    tolerance = TOLERANCE[DTYPES[bench.case.dtype]]
    wanted = exact[COMPARABLE.get(label, "before")]
    found = {"direct": _error(direct, wanted[0])}
    if label in COMPARABLE and "second_order" in tolerance:
        found["second_order"] = _error(second_order, wanted[1])
    checked: dict[str, float] = {}
    for name, error in found.items():
        checked |= oracle.require({name: error}, tolerance[name])
    return checked


def _error(found: Direction, wanted: Tensor) -> float:
    return float((_flat(found) - wanted).norm() / wanted.norm())


def _estimator(name: str, case: BilevelCase) -> Callable[[], dict[str, Any]]:
    def settings() -> dict[str, Any]:
        if name == "ForwardMode" and case.model.startswith("llama"):
            raise Unavailable("the gradient of SiLU has no forward-mode rule in PyTorch")
        if not hasattr(bk, name):
            raise Unavailable(f"this version has no estimator {name}")
        return {"estimator": getattr(bk, name)(), **ESTIMATORS[name]}

    return settings


def bilevel_providers(case: BilevelCase, variants: bool = False) -> dict[str, Callable[[Workbench], Candidate]]:
    """Every provider of a bilevel iteration by name: the floor and plain steps, the authors' method, estimators, presets.

    variants: these too with other settings, `VARIANTS`.
    """
    found = peft_steps(case)
    peer = "Eq. 8 on PEFT DoRA"
    found[peer] = lambda b: _difference_candidate(peer, b, lambda b: peft_model(b, dora=True))
    if torch.cuda.is_available():
        found[peer + GRAPHS] = lambda b: _difference_candidate(peer, b, lambda b: peft_model(b, dora=True), graphs=True)
    if case.model.startswith("llama"):
        name = "Eq. 8 on PEFT DoRA, fp32 adapters"

        def default(bench: Workbench) -> Candidate:
            return _difference_candidate(name, bench, lambda b: peft_model(b, dora=True, fp32=True), autocast=True)

        found[name] = default
    found["one-sided on the plain function"] = lambda b: _difference_candidate(
        "one-sided on the plain function", b, plain_function_model, one_sided=True
    )
    backend = next((b for b in BACKENDS if _serves(b)), "reference")
    reference = functools.cache(exact_terms)

    chosen: dict[str, tuple[Callable[[], dict[str, Any]], float]] = {name: (_estimator(name, case), 1.0) for name in ESTIMATORS}
    for name in PRESETS:
        preset = bk.preset(name)
        chosen[name] = functools.partial(dict, preset.optimizer), preset.validation_batch_ratio
    for name, (base, changes) in VARIANTS.items() if variants else ():
        settings, ratio = chosen[base]
        chosen[name] = functools.partial(_changed, settings, changes), ratio
    for name, (settings, ratio) in chosen.items():
        found[f"{name}, {ours(backend)}"] = functools.partial(_build, name, backend, settings, ratio, reference)
        if torch.cuda.is_available() and name not in TWICE:
            graphed = functools.partial(_changed, settings, {"cuda_graphs": True})
            found[f"{name}, {ours(backend)}{GRAPHS}"] = functools.partial(_build, name, backend, graphed, ratio, reference)
    return found


def _changed(settings: Callable[[], dict[str, Any]], changes: dict[str, Any]) -> dict[str, Any]:
    return settings() | changes


def _build(label: str, backend: str, settings: Any, ratio: float, reference: Any, bench: Workbench) -> Candidate:
    return _bidora(bench, label, backend, settings, ratio, lambda: reference(bench))


def _serves(backend: str) -> bool:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        need_backend(backend, device)
    except Unavailable:
        return False
    return True
