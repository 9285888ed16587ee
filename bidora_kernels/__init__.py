"""DoRA and BiDoRA for PyTorch: layers, kernels and a bilevel optimizer. Importing it needs torch alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import functional, reference
from .config import DoraConfig
from .frozen import FrozenLinear
from .model import DoraReport, apply_dora, load_adapter, merge_and_unload, save_adapter, split_parameters
from .modules import FusedDoraConv1D, FusedDoraLinear
from .ops._backend import BackendUnavailable, backends, use_backend
from .ops._context import pass_mode
from .ops.quantized import QuantizedFormat, register_quantized_format

__version__ = "0.1.0"

_LAZY = {  # name -> module; loaded on first use
    "BilevelOptimizer": "bilevel",
    "BilevelPreset": "bilevel",
    "CentralDifference": "bilevel",
    "ConjugateGradient": "bilevel",
    "DoubleBackward": "bilevel",
    "FirstOrder": "bilevel",
    "ForwardDifference": "bilevel",
    "ForwardMode": "bilevel",
    "MicroBatches": "bilevel",
    "Neumann": "bilevel",
    "OrthogonalPenalty": "bilevel",
    "Sama": "bilevel",
    "StepStats": "bilevel",
    "preset": "bilevel",
}

if TYPE_CHECKING:
    from .bilevel import (
        BilevelOptimizer,
        BilevelPreset,
        CentralDifference,
        ConjugateGradient,
        DoubleBackward,
        FirstOrder,
        ForwardDifference,
        ForwardMode,
        MicroBatches,
        Neumann,
        OrthogonalPenalty,
        Sama,
        StepStats,
        preset,
    )

__all__ = [
    "BackendUnavailable",
    "BilevelOptimizer",
    "BilevelPreset",
    "CentralDifference",
    "ConjugateGradient",
    "DoraConfig",
    "DoraReport",
    "DoubleBackward",
    "FirstOrder",
    "ForwardDifference",
    "ForwardMode",
    "FrozenLinear",
    "FusedDoraConv1D",
    "FusedDoraLinear",
    "MicroBatches",
    "Neumann",
    "OrthogonalPenalty",
    "QuantizedFormat",
    "Sama",
    "StepStats",
    "apply_dora",
    "backends",
    "functional",
    "load_adapter",
    "merge_and_unload",
    "pass_mode",
    "preset",
    "reference",
    "register_quantized_format",
    "save_adapter",
    "split_parameters",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
