"""The cases: real layer shapes by model name, and which of them make up a suite."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = (1, 128, 4096, 16384)
RANKS = (4, 16, 64, 384)

MODELS: dict[str, dict[str, tuple[int, int]]] = {  # layer: (out_features, in_features)
    "roberta-base": {"attention": (768, 768), "intermediate": (3072, 768), "output": (768, 3072)},
    "roberta-large": {"attention": (1024, 1024), "intermediate": (4096, 1024), "output": (1024, 4096)},
    "gpt2-medium": {"c_attn": (3072, 1024), "attn.c_proj": (1024, 1024), "c_fc": (4096, 1024), "mlp.c_proj": (1024, 4096)},
    "deberta-v2-xxlarge": {"attention": (1536, 1536), "intermediate": (6144, 1536), "output": (1536, 6144)},
    "llama-2-7b": {"q_proj": (4096, 4096), "gate_proj": (11008, 4096), "down_proj": (4096, 11008)},
    "llama-2-70b": {"q_proj": (8192, 8192), "k_proj": (1024, 8192), "gate_proj": (28672, 8192), "down_proj": (8192, 28672)},
    "llama-3-8b": {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "gate_proj": (14336, 4096), "down_proj": (4096, 14336)},
    "qwen-2.5-7b": {"q_proj": (3584, 3584), "k_proj": (512, 3584), "gate_proj": (18944, 3584), "down_proj": (3584, 18944)},
}
_BIASED = ("roberta", "gpt2", "deberta")
ISSUE_MODELS = tuple(name for name in MODELS if name != "llama-2-70b")


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of results: what is run, and how long at most. Subclasses say what."""

    dtype: str = "fp32"
    r: int = 16
    min_rounds: int = 7
    max_rounds: int = 20
    seconds: float = 8.0  # rounds end here once there are min_rounds
    max_sets: int = 24  # of inputs and weights, rotated past the cache
    without: tuple[str, ...] = ()  # providers left out, by name or its beginning, where the suite's time is short

    kind = "case"

    @property
    def id(self) -> str:
        """A name that no other case has; `--filter` matches it."""
        raise NotImplementedError

    @property
    def floor(self) -> str:
        """The provider that nothing of this kind can beat."""
        return "frozen linear"

    def tiny(self) -> Case:
        """The same case at toy sizes, to prove that it runs."""
        raise NotImplementedError

    def describe(self) -> dict[str, object]:
        """The fields that the results keep."""
        return {"kind": self.kind, **dataclasses.asdict(self), "without": list(self.without)}


def _small(features: int) -> int:
    return max(16, features // 512 * 8)


@dataclasses.dataclass(frozen=True)
class LayerCase(Case):
    """Forward and backward of one layer, every gradient."""

    model: str = "roberta-base"
    layer: str = "attention"
    out_features: int = 768
    in_features: int = 768
    tokens: int = 4096
    bias: bool = True
    compiled: bool = False  # also the reference under torch.compile, which takes long to compile
    plans: bool = False  # also this library held to each plan that it chooses from
    graph: bool = False  # also replayed from a CUDA graph, where launching takes the host longer than the kernels take

    kind = "layer"

    @property
    def id(self) -> str:
        return (
            f"{self.kind}/{self.model}.{self.layer}/{self.out_features}x{self.in_features}-T{self.tokens}-r{self.r}-{self.dtype}"
        )

    @property
    def conv1d(self) -> bool:
        return self.model.startswith("gpt2")

    def tiny(self) -> LayerCase:
        return dataclasses.replace(
            self,
            out_features=_small(self.out_features),
            in_features=_small(self.in_features),
            tokens=min(self.tokens, 24),
            r=min(self.r, 8),
            min_rounds=2,
            max_rounds=2,
            max_sets=2,
            seconds=1.0,
            compiled=False,
            without=(),
        )


@dataclasses.dataclass(frozen=True)
class DecodeCase(LayerCase):
    """Forward of one layer in eval mode, without gradients; norms may be cached."""

    tokens: int = 1
    max_rounds: int = 40
    kind = "decode"


OPERATIONS = ("weight_norm", "merged_weight", "orthogonality_penalty", "compose", "compose_backward")


@dataclasses.dataclass(frozen=True)
class OperationCase(Case):
    """One operation alone, against the bytes that it has to move."""

    operation: str = "weight_norm"
    out_features: int = 4096
    in_features: int = 4096
    tokens: int = 0  # of compose and compose_backward
    gradients: bool = False

    kind = "operation"

    @property
    def id(self) -> str:
        name = self.operation + ("+gradients" if self.gradients else "")
        tokens = f"-T{self.tokens}" if self.tokens else ""
        return f"{self.kind}/{name}/{self.out_features}x{self.in_features}{tokens}-r{self.r}-{self.dtype}"

    @property
    def floor(self) -> str:
        return "copy of the same bytes"

    def tiny(self) -> OperationCase:
        return dataclasses.replace(
            self,
            out_features=_small(self.out_features),
            in_features=_small(self.in_features),
            tokens=min(self.tokens, 24),
            r=min(self.r, 8),
            min_rounds=2,
            max_rounds=2,
            max_sets=2,
            seconds=1.0,
        )


@dataclasses.dataclass(frozen=True)
class StepCase(Case):
    """One training step of a model, AdamW included.

    targets: "all-linear", or "q+v". padding: the share of tokens that are padding on average, up to a half; each batch draws its
    rows' lengths evenly spread below the whole sequence. Of classifiers only.
    """

    model: str = "roberta-base"
    targets: str = "all-linear"
    layers: int = 3
    batch: int = 8
    sequence: int = 128
    hidden: int = 768
    intermediate: int = 3072
    heads: int = 12
    padding: float = 0.0
    r: int = 4
    min_rounds: int = 20
    max_rounds: int = 20
    seconds: float = 0.0

    kind = "step"

    def __post_init__(self) -> None:
        if not 0 <= self.padding <= 0.5 or (self.padding and not self.model.startswith("roberta")):
            raise ValueError(f"padding must be 0 to 0.5, and 0 for {self.model}, got {self.padding}")

    @property
    def id(self) -> str:
        padded = f"-{self.padding:.0%}-padding" if self.padding else ""
        sizes = f"{self.batch}x{self.sequence}{padded}-r{self.r}"
        return f"{self.kind}/{self.model}-{self.layers}-layers/{self.targets}-{sizes}-{self.dtype}"

    @property
    def floor(self) -> str:
        return "frozen model"

    def tiny(self) -> StepCase:
        sizes: dict[str, Any] = {"layers": 1, "batch": 4, "sequence": 8, "hidden": 32, "intermediate": 64, "heads": 2}
        return dataclasses.replace(self, **sizes, r=min(self.r, 4), min_rounds=2, max_rounds=2, without=())


@dataclasses.dataclass(frozen=True)
class BilevelCase(StepCase):
    """One iteration of bilevel training: a lower step, and an upper step where the method takes one."""

    kind = "bilevel"


def layer_cases(models: tuple[str, ...], tokens: tuple[int, ...], ranks: tuple[int, ...], dtype: str, kind=LayerCase, **more):
    """The cross product of the layers of `models`, `tokens` and `ranks`."""
    for model in models:
        for layer, (out_features, in_features) in MODELS[model].items():
            for token in tokens:
                for r in ranks:
                    yield kind(
                        dtype=dtype,
                        r=r,
                        model=model,
                        layer=layer,
                        out_features=out_features,
                        in_features=in_features,
                        tokens=token,
                        bias=model.startswith(_BIASED),
                        **more,
                    )


def layer_case(model: str, layer: str, tokens: int, r: int, dtype: str, kind=LayerCase, **more):
    """One layer of MODELS."""
    return next(
        dataclasses.replace(case, **more) for case in layer_cases((model,), (tokens,), (r,), dtype, kind) if case.layer == layer
    )


def _llama(kind: type[StepCase], **more: Any) -> StepCase:
    return kind(
        model="llama-2-7b",
        **{"layers": 8, **more},
        batch=2,
        sequence=2048,
        hidden=4096,
        intermediate=11008,
        heads=32,
        r=16,
        dtype="bf16",
    )


def _smoke() -> Iterator[Case]:
    short: dict[str, Any] = {"min_rounds": 3, "max_rounds": 3, "max_sets": 3}
    yield layer_case("roberta-base", "attention", 128, 4, "fp32", **short)
    yield layer_case("gpt2-medium", "attn.c_proj", 128, 16, "fp32", **short)
    yield layer_case("roberta-base", "attention", 24, 4, "bf16", **short)
    yield layer_case("roberta-base", "intermediate", 1, 16, "fp32", DecodeCase, **short)
    for operation in ("weight_norm", "merged_weight", "orthogonality_penalty"):
        yield OperationCase(operation=operation, out_features=768, in_features=768, r=8, **short)
    small: dict[str, Any] = {"layers": 1, "batch": 4, "sequence": 16, "hidden": 64, "intermediate": 128, "heads": 4}
    for kind in (StepCase, BilevelCase):
        yield kind(model="roberta-small", **small, **short)


NARROW = ("roberta-base", "roberta-large", "gpt2-medium")
REFERENCE = ("bidora (reference)",)  # never what auto takes where the native library is there
# of the bilevel table at three layers; at one layer every estimator is measured (python -m benchmarks.cost: all of it, 20 rounds)
COSTLY = ("FirstOrder", "CentralDifference", "Neumann", "ConjugateGradient", "ForwardMode", "DoubleBackward", "paper-code")


def _cpu() -> Iterator[Case]:
    for targets in ("all-linear", "q+v"):
        yield StepCase(targets=targets, without=REFERENCE)
        # real batches hold 0.16 to 0.70 of it, most 0.37 to 0.55: benchmarks/padding.py
        yield StepCase(targets=targets, padding=0.45, without=REFERENCE)
        yield BilevelCase(targets=targets, batch=4, min_rounds=5, max_rounds=5, without=COSTLY)
    yield BilevelCase(layers=1, batch=4, min_rounds=5, max_rounds=5)
    growth: dict[str, Any] = {"batch": 2, "min_rounds": 5, "max_rounds": 5, "without": (*REFERENCE, "plain function")}
    for layers in (1, 2, 3, 6, 12):
        yield StepCase(**{**growth, "layers": layers})
    for r in (16, 64):
        yield StepCase(**{**growth, "r": r})
    yield StepCase(**{**growth, "batch": 4})
    if torch.cpu._is_avx512_bf16_supported():
        yield StepCase(dtype="bf16", without=REFERENCE)
        yield StepCase(dtype="bf16", targets="q+v", without=REFERENCE)
    yield from _cpu_layers()
    for operation in ("weight_norm", "merged_weight"):
        for r in (1, 8, 16, 64):
            yield OperationCase(operation=operation, r=r, seconds=2.0)
        yield OperationCase(operation=operation, r=8, dtype="bf16", seconds=2.0)
    for gradients in (False, True):
        yield OperationCase(
            operation="orthogonality_penalty", out_features=1024, in_features=1024, r=16, gradients=gradients, seconds=2.0
        )


def _cpu_layers() -> Iterator[Case]:
    """768 and 1024 wide models in full, one 4096 x 4096 column; no 16,384 tokens."""
    for case in layer_cases(NARROW, (128,), RANKS, "fp32", seconds=1.0, min_rounds=5):
        first = (case.model, case.layer) == ("roberta-base", "attention")
        if case.r < 384 or first or case.layer == "c_attn":
            yield dataclasses.replace(case, compiled=first and case.r == 16, plans=first)
    for case in layer_cases(NARROW, (4096,), RANKS, "fp32", seconds=3.0, min_rounds=5):
        if (case.model, case.layer) == ("roberta-base", "attention"):
            yield dataclasses.replace(case, compiled=case.r == 16, plans=case.r == 16)
        elif case.r == 16 and case.layer not in ("c_fc", "mlp.c_proj"):  # the shapes of RoBERTa-large, whose times are long
            wide = max(case.out_features, case.in_features) > 1024
            yield dataclasses.replace(case, min_rounds=4, without=REFERENCE) if wide else case
    for case in layer_cases(NARROW, (1,), (4, 16, 64), "fp32", DecodeCase, seconds=1.0):
        if case.r == 16 or case.layer in ("attention", "c_attn"):
            yield case
    wide = {"seconds": 4.0, "max_rounds": 20}
    for tokens in (1, 8, 128):
        yield layer_case("llama-2-7b", "q_proj", tokens, 16, "fp32", DecodeCase, compiled=tokens == 1, plans=tokens > 1, **wide)
    yield layer_case("llama-2-7b", "q_proj", 128, 16, "fp32", compiled=True, plans=True, **wide)
    yield layer_case("llama-2-7b", "q_proj", 4096, 16, "fp32", seconds=0.0, min_rounds=3, without=REFERENCE)


# products with the Hessian of a whole model, or double backward through it: minutes and tens of gigabytes at a real size
EXACT = ("Neumann", "ConjugateGradient", "ForwardMode", "DoubleBackward")

COMPILED = ("bidora (reference), torch.compile",)  # of eight layers: minutes of compiling; two layers have it

# the columns of the table of predictions: (model, layer, tokens, r)
GPU_COLUMNS = (
    ("llama-2-7b", "q_proj", 4096, 16),
    ("llama-3-8b", "down_proj", 8192, 16),
    ("roberta-base", "attention", 4096, 4),
    ("llama-2-70b", "q_proj", 16384, 64),
    ("llama-2-7b", "q_proj", 4096, 384),
)


def _gpu() -> Iterator[Case]:
    for model, layer, tokens, r in GPU_COLUMNS:
        first = (layer, r) == ("q_proj", 16)  # compiling takes most of a case's time
        yield layer_case(model, layer, tokens, r, "bf16", compiled=first, plans=True, graph=True, seconds=4.0)
    yield layer_case("llama-2-7b", "q_proj", 1, 16, "bf16", DecodeCase, compiled=True, graph=True, seconds=4.0)
    short: dict[str, Any] = {"dtype": "bf16", "seconds": 3.0, "max_rounds": 40}
    for operation in ("weight_norm", "merged_weight"):
        for r in (4, 16):
            yield OperationCase(operation=operation, out_features=8192, in_features=8192, r=r, **short)
    for operation in ("compose", "compose_backward"):
        yield OperationCase(operation=operation, out_features=8192, in_features=8192, tokens=8192, r=16, **short)
    for gradients in (False, True):
        yield OperationCase(operation="orthogonality_penalty", r=16, gradients=gradients, **short)
    yield _llama(BilevelCase, without=(*EXACT, "paper-code, bidora (triton), CUDA", "CentralDifference, bidora (triton), CUDA"))
    yield _llama(StepCase, without=COMPILED)
    yield _llama(StepCase, layers=2)


def _full() -> Iterator[Case]:
    seen = set()
    dtypes = ("fp32", "bf16")
    for case in (*_cpu(), *_gpu()):
        seen.add(case.id)
        yield case
    for dtype in dtypes:
        for case in layer_cases(ISSUE_MODELS, TOKENS, RANKS, dtype, compiled=True):
            if case.id not in seen:
                yield case
        for case in layer_cases(ISSUE_MODELS, (1, 128), RANKS, dtype, DecodeCase):
            if case.id not in seen:
                yield case


SUITES = {"smoke": _smoke, "cpu": _cpu, "gpu": _gpu, "full": _full}


def suite(name: str, pattern: str | None = None, tiny: bool = False) -> list[Case]:
    """The cases of a suite whose id contains `pattern` (or matches it, with * and ?), at toy sizes with `tiny`.

    Raises ValueError where the suite does not exist or nothing matches.
    """
    if name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
    cases = list(SUITES[name]())
    if pattern is not None:
        glob = any(sign in pattern for sign in "*?[")
        cases = [case for case in cases if (fnmatch.fnmatch(case.id, pattern) if glob else pattern in case.id)]
        if not cases:
            raise ValueError(f"no case of suite {name} matches {pattern!r}; --list shows them")
    if tiny:
        cases = list({case.id: case for case in (case.tiny() for case in cases)}.values())
    return cases
