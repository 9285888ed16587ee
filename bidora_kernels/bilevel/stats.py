"""What a step reports, and the two warnings that its numbers may call for."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from torch import Tensor

from ..ops._context import DirectionPoint
from .flat import FlatParameters, Vector
from .passes import Stopwatch

NEGLIGIBLE = 1e-2  # of the first-order term
PATIENCE = 20  # upper steps in a row


@dataclasses.dataclass(frozen=True)
class StepStats:
    """What a step did. All but the train loss, the passes, their seconds and `skipped` are None where it had no upper part.

    train_loss, validation_loss: mean losses, the penalty left out; None where the step was skipped before them.
    direct_norm, second_order_norm, cosine: the two terms of the hypergradient before `max_ratio` and clipping, and the cosine
    between them; `second_order_norm` is 0, and `cosine` None, where the term was left out.
    hypergradient_norm: the length of the hypergradient after `max_ratio`, before clipping.
    ratio_capped: whether `max_ratio` cut the second-order term. radius: the length of the perturbation of a difference.
    passes: forward and backward passes; pass_seconds: their seconds by kind.
    skipped: why nothing was updated (under a GradScaler), or None.
    """

    train_loss: float | None
    validation_loss: float | None = None
    direct_norm: float | None = None
    second_order_norm: float | None = None
    cosine: float | None = None
    hypergradient_norm: float | None = None
    ratio_capped: bool | None = None
    radius: float | None = None
    passes: int = 0
    pass_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    skipped: str | None = None


@dataclasses.dataclass
class Hypergradient:
    """The two terms, and what was seen on the way."""

    train_loss: Tensor | None = None
    validation_loss: Tensor | None = None
    direct: Vector | None = None
    second_order: Vector | None = None
    touched: set[int] = dataclasses.field(default_factory=set)  # the identities of parameters that had a gradient
    radius: float | None = None
    left: tuple[DirectionPoint, Vector] | None = None  # where the validation pass ran, if the step ends there
    signal: float | None = None  # what the perturbation changed of the gradient, over its noise floor


def step_stats(
    result: Hypergradient,
    watch: Stopwatch,
    flat: FlatParameters,
    hypergradient: Vector | None = None,
    capped: bool | None = None,
    skipped: str | None = None,
) -> StepStats:
    """The numbers of a step; `flat` are the magnitudes."""
    cosine = direct_norm = second_norm = None
    if hypergradient is not None and result.direct is not None:
        direct_norm, second_norm = float(flat.norm(result.direct)), 0.0
        if result.second_order is not None:
            second_norm = float(flat.norm(result.second_order))
            lengths = direct_norm * second_norm
            cosine = float(flat.dot(result.direct, result.second_order)) / lengths if lengths > 0 else None
    return StepStats(
        train_loss=None if result.train_loss is None else float(result.train_loss),
        validation_loss=None if result.validation_loss is None else float(result.validation_loss),
        direct_norm=direct_norm,
        second_order_norm=second_norm,
        cosine=cosine,
        hypergradient_norm=None if hypergradient is None else float(flat.norm(hypergradient)),
        ratio_capped=capped,
        radius=result.radius,
        passes=watch.passes,
        pass_seconds=watch.seconds(),
        skipped=skipped,
    )


class Advice:
    """Warns once where the difference is below the noise floor, and once where the second-order term buys nothing."""

    def __init__(self) -> None:
        """Nothing was said yet."""
        self._said: set[str] = set()
        self._negligible = 0

    def after(self, stats: StepStats, signal: float | None, estimator: Any) -> None:
        """Look at a step's numbers."""
        if signal is not None and signal < 1.0:
            self._say(
                f"the perturbation of length {stats.radius:.1e} changed the gradient by less than its rounding, so the "
                "second-order term is noise: raise the estimator's relative_radius, compute the loss in a finer dtype, or take "
                "FirstOrder()"
            )
        if stats.direct_norm is None or stats.second_order_norm is None or not estimator.has_second_order:
            return
        self._negligible = self._negligible + 1 if stats.second_order_norm < NEGLIGIBLE * stats.direct_norm else 0
        if self._negligible >= PATIENCE:
            remedy = "raise its horizon" if hasattr(estimator, "horizon") else "raise xi, take Sama(horizon=...)"
            self._say(
                f"the second-order term was below {NEGLIGIBLE:.0%} of the first-order one for {PATIENCE} upper steps, so its "
                f"passes buy nothing with {type(estimator).__name__}: {remedy}, or take FirstOrder()"
            )

    def _say(self, text: str) -> None:
        kind = text.split(" ", 2)[1]
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(text, stacklevel=4)
