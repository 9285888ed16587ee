"""The lower level's regularizer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..functional import orthogonality_penalty


class OrthogonalPenalty:
    """coefficient * sum over layers of ||Vhat Vhat^T - I||_F^2 (BiDoRA, arXiv:2410.09758, eq. 3), a scalar; call it with a model.

    It sums over every module that answers `direction_terms()`, and differentiates the norm whatever the layer does. Raises
    ValueError for a coefficient that is negative or not finite, and for a model without such a module.
    """

    def __init__(self, coefficient: float) -> None:
        """Keep the coefficient (the paper's gamma)."""
        if not (math.isfinite(coefficient) and coefficient >= 0):
            raise ValueError(f"coefficient must be 0 or more, got {coefficient}")
        self.coefficient = coefficient

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty of the model as it is now."""
        terms = [
            orthogonality_penalty(*module.direction_terms())  # type: ignore[operator]
            for module in model.modules()
            if callable(getattr(module, "direction_terms", None))
        ]
        if not terms:
            raise ValueError("OrthogonalPenalty found no module with direction_terms(): the model has no DoRA layer")
        return self.coefficient * torch.stack([term.to(terms[0]) for term in terms]).sum()

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"OrthogonalPenalty({self.coefficient})"
