"""How the second-order term of the hypergradient is taken: one small configuration object per method.

All of them estimate `direct - q(w)`, where `direct` is the validation loss's own gradient with respect to the magnitudes, and
q(w) = d/dV d/dM L_train(V, M) applied to a vector w over the directions (BiDoRA, arXiv:2410.09758, eq. 7-8). They differ in w
and in how q is taken.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from .flat import Vector

if TYPE_CHECKING:
    from .train_loss import TrainLoss


@dataclasses.dataclass(frozen=True)
class Estimator:
    """What every estimator answers; the defaults are those of a method without a second-order term."""

    @property
    def has_second_order(self) -> bool:
        """Whether there is a second-order term at all."""
        return True

    @property
    def reuses_lower_gradient(self) -> bool:
        """Whether the lower pass must also give the magnitudes' gradient."""
        return False

    @property
    def takes_xi(self) -> bool:
        """Whether `xi` and `unroll` mean something to it."""
        return True

    @property
    def differentiates_twice(self) -> bool:
        """Whether a pass goes through second derivatives of the model."""
        return False

    def response(self, loss: TrainLoss, vector: Vector) -> Vector:
        """The w of q(w) from the validation loss's gradient over the directions; the optimizer applies xi or J itself."""
        return vector

    def mixed_derivative(self, loss: TrainLoss, vector: Vector) -> Vector:
        """q(vector), over the magnitudes."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class FirstOrder(Estimator):
    """h = grad_M L_val alone: the second-order term is left out (the paper's ablation xi = 0).

    Passes: the lower one and the validation pass, which computes the magnitudes' gradient only. Memory: what every step here
    needs, a copy of the parameters and of the optimizers' states to undo a failed one. `at` says where: "after" the lower step
    (the default), or "before" it, as the ablation reads, in which the directions have not moved. To be taken where the directions
    hardly answer to the magnitudes within the horizon, as early in training with a small learning rate.
    """

    at: str = "after"

    def __post_init__(self) -> None:
        """Check `at`."""
        _check_at(self.at)

    @property
    def has_second_order(self) -> bool:
        """None."""
        return False


@dataclasses.dataclass(frozen=True)
class CentralDifference(Estimator):
    """q(w) = (grad_M L_train(V + e w, M) - grad_M L_train(V - e w, M)) / 2e (BiDoRA, eq. 8), the paper's own method.

    Passes: two more over the train batch, of the magnitudes' gradient only. Memory: w and a second copy of the directions; no
    graph is kept between passes. Error O(e^2); e |w| is the radius. `at`: around the directions "before" the lower step, as the
    paper writes, or "after" it, as its code and Betty do. `relative_radius`: the radius as a fraction of the directions' length;
    None takes it from the compute dtype (fp32 3.4e-4; tf32, bf16 and fp16 5e-3). To be taken where a one-sided difference is
    too coarse: 16-bit passes, strong curvature.
    """

    at: str = "before"
    relative_radius: float | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_at(self.at)
        _check_radius(self.relative_radius)

    def mixed_derivative(self, loss: TrainLoss, vector: Vector) -> Vector:
        """Two passes, on either side."""
        start = loss.before if self.at == "before" else loss.after
        step = loss.step_size(vector, self.relative_radius, central=True)
        forward, backward = loss.magnitude_gradients(start, vector, step)
        return loss.difference(forward, backward, 2.0 * step)


@dataclasses.dataclass(frozen=True)
class ForwardDifference(Estimator):
    """q(w) = (grad_M L_train(V + e w, M) - grad_M L_train(V, M)) / e: one pass fewer than eq. 8.

    Passes: one more over the train batch, of the magnitudes' gradient only: the gradient at V comes with the lower pass on the
    same rows (where `difference_batch` is a callable it is computed again on that part). Memory: w, a second copy of the
    directions and one gradient of the magnitudes; no graph is kept between passes. Error O(e). `relative_radius` as in
    `CentralDifference` (fp32 6.9e-5, bf16 5e-3). The right choice nearly always.
    """

    relative_radius: float | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_radius(self.relative_radius)

    @property
    def reuses_lower_gradient(self) -> bool:
        """Yes: it is the difference's base."""
        return True

    def mixed_derivative(self, loss: TrainLoss, vector: Vector) -> Vector:
        """One pass, on one side, against the lower pass's own gradient."""
        step = loss.step_size(vector, self.relative_radius, central=False)
        forward = loss.magnitude_gradient(loss.before, vector, step)
        return loss.difference(forward, loss.base_gradient(), step)


@dataclasses.dataclass(frozen=True)
class DoubleBackward(Estimator):
    """q(w) = grad_M (grad_V L_train . w), exact: the train loss's gradient is differentiated, and in it the norm.

    Passes: one more, with its graph kept for a second backward, so about two to three passes of time. Memory: twice a pass's. It
    runs on the reference operations under the math SDPA backend, and raises RuntimeError, naming the operator, where the model
    has one without a second derivative. To be taken as the oracle of tests, and for small models.
    """

    @property
    def differentiates_twice(self) -> bool:
        """Yes."""
        return True

    def mixed_derivative(self, loss: TrainLoss, vector: Vector) -> Vector:
        """One doubly differentiated pass."""
        return loss.double_backward(vector)


@dataclasses.dataclass(frozen=True)
class ForwardMode(Estimator):
    """q(w) = d/dt grad_M L_train(V + t w, M) at t = 0, exact and without a radius: a JVP along w, the norm differentiated.

    Passes: one more, whose forward carries tangents, so about twice a pass's time. Memory: twice a pass's, less than
    `DoubleBackward`. It runs on the reference operations under the math SDPA backend, and raises RuntimeError, naming the
    operator, where the model has one without a forward-mode rule. To be taken where an exact term is worth that price.
    """

    @property
    def differentiates_twice(self) -> bool:
        """Yes."""
        return True

    def mixed_derivative(self, loss: TrainLoss, vector: Vector) -> Vector:
        """One pass with tangents."""
        return loss.forward_mode(vector)


def _check_at(at: str) -> None:
    if at not in ("before", "after"):
        raise ValueError(f'at must be "before" or "after", got {at!r}')


def _check_radius(radius: float | None) -> None:
    if radius is not None and not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"relative_radius must be a positive number or None, got {radius}")
