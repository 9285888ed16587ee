"""One training step of each kind behind one interface: a plain AdamW step, and a bilevel one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..bilevel import BilevelOptimizer, OrthogonalPenalty, StepStats, preset
from ..bilevel.schedule import linear_schedule
from .settings import TrainSettings

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What a step reports; None where it has no such number. `passes` counts forward and backward passes.

    `stats` is what the bilevel optimizer says of a step with an upper part.
    """

    train_loss: float
    validation_loss: float | None
    hypergradient_norm: float | None
    passes: float
    stats: StepStats | None = None


def _penalty(settings: TrainSettings) -> OrthogonalPenalty | None:
    return OrthogonalPenalty(settings.penalty) if settings.penalty else None


class PlainUpdate:
    """AdamW on one loss: the baselines, and the retraining."""

    needs_validation = False

    def __init__(
        self, model: nn.Module, settings: TrainSettings, parameters: Iterable[nn.Parameter], steps: int, retrain: bool
    ) -> None:
        """Train `parameters` for `steps`, with the retraining's learning rate and weight decay if `retrain`."""
        lr, decay = settings.lr, settings.weight_decay
        if retrain:
            lr = lr if settings.retrain_lr is None else settings.retrain_lr
            decay = decay if settings.retrain_weight_decay is None else settings.retrain_weight_decay
        self._model = model
        self._parameters = list(parameters)
        self._optimizer = torch.optim.AdamW(self._parameters, lr=lr, weight_decay=decay)
        self._scheduler = linear_schedule(self._optimizer, steps, settings.warmup)
        self._max_norm = settings.max_norm
        self._penalty = _penalty(settings)

    @property
    def rates(self) -> tuple[float, float | None]:
        """The lower and the upper learning rate of the next step."""
        return self._optimizer.param_groups[0]["lr"], None

    def step(self, loss_fn: LossFunction, train_batch: Any, validation_batch: Any = None) -> StepRecord:
        """Take one step on `train_batch`; where `loss_fn` raises nothing has changed."""
        self._optimizer.zero_grad()
        loss = loss_fn(self._model, train_batch)
        total = loss if self._penalty is None else loss + self._penalty(self._model)
        total.backward()
        if self._max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        self._optimizer.step()
        self._scheduler.step()
        return StepRecord(loss.item(), None, None, 1)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's and the scheduler's state."""
        return {"optimizer": self._optimizer.state_dict(), "scheduler": self._scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])


class BilevelUpdate:
    """A bilevel step: directions on the train batch, magnitudes on the validation batch."""

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        lower: Iterable[nn.Parameter],
        upper: Iterable[nn.Parameter],
        steps: int,
    ) -> None:
        """Train `lower` and `upper` for `steps` with the optimizer settings of the bilevel preset."""
        upper_lr = settings.lr if settings.upper_lr is None else settings.upper_lr
        self._lower = torch.optim.AdamW(lower, lr=settings.lr, weight_decay=settings.weight_decay)
        self._upper = torch.optim.AdamW(upper, lr=upper_lr, weight_decay=settings.upper_weight_decay)
        chosen = dict(preset(settings.bilevel).optimizer)
        if settings.horizon is not None:
            chosen["estimator"] = dataclasses.replace(chosen["estimator"], horizon=settings.horizon)
        upper_steps = math.ceil(steps / chosen.get("upper_every", 1))
        self._optimizer = BilevelOptimizer(
            model,
            lower=self._lower,
            upper=self._upper,
            lower_scheduler=linear_schedule(self._lower, steps, settings.warmup),
            upper_scheduler=linear_schedule(self._upper, upper_steps, settings.warmup),
            lower_max_norm=settings.max_norm,
            penalty=_penalty(settings),
            **chosen,
        )

    @property
    def needs_validation(self) -> bool:
        """Whether the next step has an upper part."""
        return self._optimizer.needs_validation

    @property
    def rates(self) -> tuple[float, float | None]:
        """The lower and the upper learning rate of the next step."""
        return self._lower.param_groups[0]["lr"], self._upper.param_groups[0]["lr"]

    def step(self, loss_fn: LossFunction, train_batch: Any, validation_batch: Any = None) -> StepRecord:
        """Take one step; where `loss_fn` raises nothing has changed."""
        # without a GradScaler every step has a train loss
        stats = self._optimizer.step(loss_fn, train_batch, validation_batch)
        return StepRecord(
            cast(float, stats.train_loss),
            _number(stats.validation_loss),
            _number(stats.hypergradient_norm),
            stats.passes,
            None if stats.direct_norm is None else stats,
        )

    def state_dict(self) -> dict[str, Any]:
        """The state of both optimizers and schedulers."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._optimizer.load_state_dict(state)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
