"""The lower level's regularizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import orthogonality_penalty, penalty_plan


class OrthogonalPenalty:
    """coefficient * sum over layers of ||Vhat Vhat^T - I||_F^2 (BiDoRA, arXiv:2410.09758, eq. 3), a scalar; call it with a model.

    It sums over every module that answers `direction_terms()`, and differentiates the norm whatever the layer does. probes, as in
    `functional.orthogonality_penalty`: "auto" is exact for the layers whose weight @ weight^T, kept from step to step, fits the
    budget, and estimates the others' terms without bias from random probes; 0 is exact everywhere; a number estimates everywhere.
    `plan(model)` says what becomes of each layer. Raises ValueError for a coefficient that is negative or not finite, for other
    probes, and for a model without such a module.
    """

    def __init__(self, coefficient: float, probes: int | str = "auto") -> None:
        """Keep the coefficient (the paper's gamma) and the probes."""
        if not (math.isfinite(coefficient) and coefficient >= 0):
            raise ValueError(f"coefficient must be 0 or more, got {coefficient}")
        penalty_plan(torch.empty(0, 0), probes)
        self.coefficient = coefficient
        self.probes = probes

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty of the model as it is now."""
        terms = [orthogonality_penalty(*module.direction_terms(), probes=self.probes) for _, module in _layers(model)]
        return self.coefficient * torch.stack([term.to(terms[0]) for term in terms]).sum()

    def plan(self, model: nn.Module) -> dict[str, str]:
        """In words, how each layer's term is computed with the native and triton backends: exact or estimated, and why."""
        return {name: penalty_plan(module.direction_terms()[0], self.probes) for name, module in _layers(model)}

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"OrthogonalPenalty({self.coefficient}{'' if self.probes == 'auto' else f', probes={self.probes!r}'})"


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    found = False
    for name, module in model.named_modules():
        if callable(getattr(module, "direction_terms", None)):
            found = True
            yield name, module
    if not found:
        raise ValueError("OrthogonalPenalty found no module with direction_terms(): the model has no DoRA layer")
