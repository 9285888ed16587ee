"""Bilevel optimization of two groups of parameters: the lower level on train batches, the upper one on validation batches."""

from .batches import MicroBatches
from .estimators import CentralDifference, DoubleBackward, FirstOrder, ForwardDifference, ForwardMode
from .implicit import ConjugateGradient, Neumann
from .optimizer import BilevelOptimizer
from .penalty import OrthogonalPenalty
from .presets import BilevelPreset, preset
from .sama import Sama
from .stats import StepStats

__all__ = [
    "BilevelOptimizer",
    "BilevelPreset",
    "CentralDifference",
    "ConjugateGradient",
    "DoubleBackward",
    "FirstOrder",
    "ForwardDifference",
    "ForwardMode",
    "MicroBatches",
    "Neumann",
    "OrthogonalPenalty",
    "Sama",
    "StepStats",
    "preset",
]
