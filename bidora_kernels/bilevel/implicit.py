"""Implicit differentiation: the second-order term at a minimum of the lower level, by approximate inverse Hessian products."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from .estimators import CentralDifference, DoubleBackward, Estimator
from .flat import Vector, add, scaled

if TYPE_CHECKING:
    from .train_loss import TrainLoss


@dataclasses.dataclass(frozen=True)
class Implicit(Estimator):
    """h = grad_M L_val - q(p) with p near H^-1 v, H = d^2 L_train / dV^2 (the norm differentiated) and v = grad_V L_val.

    `difference` takes both H's products and q: `CentralDifference` (two passes each) or `DoubleBackward` (one dear pass each).
    """

    difference: Estimator = dataclasses.field(default_factory=CentralDifference, kw_only=True)

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.difference, CentralDifference | DoubleBackward):
            raise TypeError(f"difference must be CentralDifference or DoubleBackward, got {type(self.difference).__name__}")

    @property
    def differentiates_twice(self) -> bool:
        """As its difference."""
        return self.difference.differentiates_twice

    @property
    def takes_xi(self) -> bool:
        """No: nothing is unrolled but the optimizer's own step."""
        return False

    def mixed_derivative(self, loss: TrainLoss, vector: Vector) -> Vector:
        """As its difference."""
        return self.difference.mixed_derivative(loss, vector)

    def hessian_product(self, loss: TrainLoss, vector: Vector) -> Vector:
        """H vector."""
        if isinstance(self.difference, CentralDifference):
            return loss.hessian_difference(vector, self.difference.relative_radius)
        return loss.double_backward(vector, over="direction")


@dataclasses.dataclass(frozen=True)
class Neumann(Implicit):
    """p = step * sum_{j < terms} (I - step H)^j v, which tends to H^-1 v for 0 < step < 2 / ||H|| and a positive definite H
    (Lorraine et al., arXiv:1911.02590).

    Passes: `terms - 1` Hessian-vector products and q. One term is eq. 7 with xi = step. Memory: two more vectors over the
    directions. To be taken near a minimum of the lower level, with a step known to be short enough.
    """

    terms: int = 3
    step: float = 0.1

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        _check_count("terms", self.terms)
        if not (math.isfinite(self.step) and self.step > 0):
            raise ValueError(f"step must be a positive number, got {self.step}")

    def response(self, loss: TrainLoss, vector: Vector) -> Vector:
        """The truncated series."""
        total, term = vector, vector
        for _ in range(self.terms - 1):
            term = add(term, self.hessian_product(loss, term), -self.step)
            total = add(total, term)
        return scaled(total, self.step)


@dataclasses.dataclass(frozen=True)
class ConjugateGradient(Implicit):
    """p from `iterations` steps of conjugate gradients on (H + damping I) p = v (Rajeswaran et al., arXiv:1909.04630).

    Passes: one Hessian-vector product per iteration, and q. Memory: four more vectors over the directions. H may be indefinite
    away from a minimum, hence the damping; it stops early on a direction of no or negative curvature, and once the residual is at
    rounding level. To be taken near a minimum of the lower level, where fewer products than `Neumann`'s have to do.
    """

    iterations: int = 5
    damping: float = 1e-2

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        _check_count("iterations", self.iterations)
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"damping must be 0 or more, got {self.damping}")

    def response(self, loss: TrainLoss, vector: Vector) -> Vector:
        """Conjugate gradients from zero."""
        solution, residual, direction = scaled(vector, 0.0), vector, vector
        squared = first = loss.dot(residual, residual)
        for _ in range(self.iterations):
            product = add(self.hessian_product(loss, direction), direction, self.damping)
            curvature = loss.dot(direction, product)
            if not curvature > 0.0:
                break
            length = squared / curvature
            solution = add(solution, direction, length)
            residual = add(residual, product, -length)
            previous, squared = squared, loss.dot(residual, residual)
            if squared <= 1e-28 * first:
                break
            direction = add(residual, direction, squared / previous)
        return solution if loss.norm(solution) > 0.0 else vector


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
