"""The train loss of one step as the estimators see it: derivatives at chosen points, always with the same random numbers."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops._context import DirectionPoint, pass_mode
from .batches import parts_of
from .flat import Vector, add, scaled
from .passes import LossFunction, Passes, checked_loss
from .radius import noise_floor, relative_radius
from .snapshot import PassState


class TrainLoss:
    """Derivatives of L_train around this step's directions. Every pass rewinds the random state to the train pass's start.

    `before` and `after` are the directions before and after the unrolled step. The parameters are left wherever the last pass
    put them: whoever makes this object restores them.
    """

    def __init__(
        self,
        passes: Passes,
        loss_fn: LossFunction,
        batch: Any,
        start: PassState,
        before: Vector,
        after: Vector,
        base: Vector | None,
        drawn: PassState | None,
        compute_dtype: torch.dtype,
        penalty: Callable[[Any], Tensor] | None = None,
        point: DirectionPoint | None = None,
    ) -> None:
        """Keep what the derivatives need.

        base: the lower pass's gradient on the same rows, where it was computed; drawn: the generators after it. point: where the
        lower pass ran.
        """
        self._penalty, self._point = penalty, point
        self._passes, self._loss_fn, self._batch = passes, loss_fn, batch
        self._start, self.before, self.after = start, before, after
        self._base, self._drawn, self._compute_dtype = base, drawn, compute_dtype
        self.radius: float | None = None
        self.signal: float | None = None

    def step_size(self, vector: Vector, relative: float | None, central: bool) -> float:
        """The e of a difference along `vector`: the radius over the vector's length."""
        if relative is None:
            relative = relative_radius(self._compute_dtype, central)
        scale = self.norm(self.before)
        self.radius = relative * (scale if scale > 0.0 else 1.0)
        return self.radius / self.norm(vector)

    def norm(self, vector: Vector) -> float:
        """The length of a vector over the directions."""
        return float(self._passes.lower.norm(vector))

    def dot(self, left: Vector, right: Vector) -> float:
        """The inner product of two vectors over the directions."""
        return float(self._passes.lower.dot(left, right))

    def magnitude_gradient(
        self, start: Vector, vector: Vector | None = None, step: float = 0.0, point: DirectionPoint | None = None
    ) -> Vector:
        """grad_M L_train at `start + step * vector`; `point` names that place where another pass runs there."""
        self._passes.lower.set(start, vector, step)
        self._start.restore()
        result = self._passes.run("difference", self._loss_fn, self._batch, {"magnitude"}, point=point)
        self._check_drawn(result.drawn)
        return self._passes.upper.gather(result.magnitude)

    def _check_drawn(self, drawn: PassState) -> None:
        """Raise RuntimeError where two passes of a difference drew other random numbers: it would show nothing else."""
        self._drawn = self._drawn or drawn
        if not drawn.drew_as(self._drawn):
            raise RuntimeError(
                "two passes over the same batch drew different random numbers, so their difference is noise. Where the model is "
                "compiled, one pass may have run outside its graphs: raise torch._dynamo.config.recompile_limit or set dropout "
                "to 0. Else take FirstOrder()"
            )

    def magnitude_gradients(self, start: Vector, vector: Vector, step: float) -> tuple[Vector, Vector]:
        """grad_M L_train at `start + step * vector` and `start - step * vector`, the norms of both from one read of a weight."""
        plus, minus = (self._passes.lower.point(start, vector, length) for length in (step, -step))
        if plus is None or minus is None:
            return self.magnitude_gradient(start, vector, step), self.magnitude_gradient(start, vector, -step)
        plus.others = (minus,)
        try:
            forward = self.magnitude_gradient(start, vector, step, plus)
            return forward, self.magnitude_gradient(start, vector, -step, minus)
        finally:
            plus.release()
            minus.release()

    def base_gradient(self) -> Vector:
        """grad_M L_train at the directions before the step: the lower pass's own where it has it, else one more pass."""
        if self._base is None:
            self._base = self.magnitude_gradient(self.before, point=self._point)
        return self._base

    def difference(self, plus: Vector, minus: Vector, width: float) -> Vector:
        """(plus - minus) / width; `signal` is the change of the gradient over its noise floor."""
        change = [a - b for a, b in zip(plus, minus, strict=True)]
        upper = self._passes.upper
        floor = noise_floor(self._compute_dtype) * upper.norm(plus)
        self.signal = float(upper.norm(change) / floor.clamp(min=torch.finfo(torch.float64).tiny))
        return scaled(change, 1.0 / width)

    def double_backward(self, vector: Vector, over: str = "magnitude") -> Vector:
        """The gradient of (grad_V L_train . vector) over the magnitudes, or over the directions: a Hessian-vector product.

        At the directions before the step, the norm differentiated. The penalty is in a Hessian, and has no mixed derivative.
        """
        lower = self._passes.lower
        target = self._passes.upper if over == "magnitude" else lower
        lower.set(self.before)
        self._start.restore()
        total = target.zeros()
        had = [False] * len(target.parameters)
        with self._passes.stopwatch.measure("double backward"), _twice_differentiable(self._passes):
            for loss in self._losses(with_penalty=over == "direction"):
                first = _grads(loss, lower.parameters, create_graph=True)
                product = _inner(first, lower.views(vector))
                if product is not None and product.requires_grad:
                    second = _grads(product, target.parameters)
                    had = [before or grad is not None for before, grad in zip(had, second, strict=True)]
                    _accumulate(total, target.gather(second))
        self._passes.touch(target, had)
        self._passes.average(total)
        self._passes.check_finite(total, "double backward")
        return total

    def forward_mode(self, vector: Vector) -> Vector:
        """The tangent of grad_M L_train along `vector`, at the directions before the step, the norm differentiated."""
        lower, upper = self._passes.lower, self._passes.upper
        lower.set(self.before)
        self._start.restore()
        total = upper.zeros()
        had = [False] * len(upper.parameters)
        with (
            self._passes.stopwatch.measure("forward mode"),
            _twice_differentiable(self._passes),
            dual_level(),
            self._passes.requiring({"magnitude"}),
        ):
            with torch.no_grad():  # an in-place copy gives the parameters tangents; they end with the level
                for parameter, tangent in zip(lower.parameters, lower.views(vector), strict=True):
                    parameter.copy_(make_dual(parameter.detach().clone(), tangent))
            for loss in self._losses(with_penalty=False):
                if loss.requires_grad:
                    grads = _grads(loss, upper.parameters)
                    had = [before or grad is not None for before, grad in zip(had, grads, strict=True)]
                    tangents = [None if grad is None else unpack_dual(grad).tangent for grad in grads]
                    _accumulate(total, upper.gather(tangents))
        self._passes.touch(upper, had)
        self._passes.average(total)
        self._passes.check_finite(total, "forward mode")
        return total

    def hessian_difference(self, vector: Vector, relative: float | None = None) -> Vector:
        """A Hessian-vector product over the directions by a central difference of their gradient, the norm differentiated."""
        if self.norm(vector) == 0.0:
            return self._passes.lower.zeros()
        step = self.step_size(vector, relative, central=True)
        sides = []
        for sign in (1.0, -1.0):
            self._passes.lower.set(self.before, vector, sign * step)
            self._start.restore()
            result = self._passes.run(
                "hessian", self._loss_fn, self._batch, {"direction"}, self._penalty, differentiate_norm=True
            )
            self._check_drawn(result.drawn)
            sides.append(self._passes.lower.gather(result.direction))
        return scaled(add(sides[0], sides[1], -1.0), 0.5 / step)

    def _losses(self, with_penalty: bool) -> Iterator[Tensor]:
        """The weighted loss of each part of the batch, then the penalty."""
        for part, weight in parts_of(self._batch):
            yield checked_loss(self._loss_fn(self._passes.model, part)) * weight
        if with_penalty and self._penalty is not None:
            yield checked_loss(self._penalty(self._passes.model), "the penalty")


@contextlib.contextmanager
def _twice_differentiable(passes: Passes) -> Iterator[None]:
    """Reference operations, the norm differentiated, math attention; an operator without a derivative is named."""
    needs = {"direction", "magnitude"}
    try:
        with (
            torch.enable_grad(),
            passes.no_sync(),
            passes.requiring(needs),
            sdpa_kernel(SDPBackend.MATH),
            pass_mode(needs=needs, differentiate_norm=True, backend="reference"),
        ):
            yield
    except (RuntimeError, NotImplementedError) as error:
        found = re.search(r"(?:derivative for|use forward AD with) (\S+)", str(error))
        if found is None:
            raise
        raise RuntimeError(
            f"{found[1]} has no derivative of the kind needed here: load the model with eager or SDPA attention (it runs under "
            "the math backend), or take CentralDifference or ForwardDifference"
        ) from error


def _accumulate(total: Vector, terms: Vector) -> None:
    for part, term in zip(total, terms, strict=True):
        part.add_(term)


def _grads(value: Tensor, parameters: Sequence[Tensor], create_graph: bool = False) -> list[Tensor | None]:
    """The gradients of a scalar, None for a parameter that does not require one or that it does not depend on."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    found = iter(torch.autograd.grad(value, wanted, create_graph=create_graph, allow_unused=True) if wanted else ())
    return [next(found) if parameter.requires_grad else None for parameter in parameters]


def _inner(grads: Sequence[Tensor | None], views: list[Tensor]) -> Tensor | None:
    terms = [(grad * view).sum() for grad, view in zip(grads, views, strict=True) if grad is not None]
    return torch.stack(terms).sum() if terms else None
