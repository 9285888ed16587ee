"""The two phases of BiDoRA: a search that trains directions and magnitudes, then a retraining of the directions alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .flat import copy_all

WARMUP = 0.06  # of a phase's steps


def linear_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: float = WARMUP) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm up over the first `warmup` of `steps`, from 1/w to 1 times the rate, then fall linearly to 1/(steps - w)."""
    rising = math.ceil(warmup * steps)

    def factor(step: int) -> float:
        return (step + 1) / rising if step < rising else max(0.0, (steps - step) / max(1, steps - rising))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@dataclasses.dataclass(frozen=True)
class TwoPhases:
    """How many steps each phase takes, and where the retraining starts ("search" or "init").

    Raises ValueError for negative counts, for no steps at all and for another `retrain_from`.
    """

    search_steps: int
    retrain_steps: int
    retrain_from: str = "search"

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.search_steps < 0 or self.retrain_steps < 0 or self.search_steps + self.retrain_steps == 0:
            raise ValueError(f"steps must be 0 or more and not all 0, got {self.search_steps} and {self.retrain_steps}")
        if self.retrain_from not in ("search", "init"):
            raise ValueError(f'retrain_from must be "search" or "init", got {self.retrain_from!r}')

    @property
    def steps(self) -> int:
        """Steps of both phases."""
        return self.search_steps + self.retrain_steps

    def phase(self, step: int) -> str:
        """The phase, "search" or "retrain", that a step counted from 0 belongs to."""
        return "search" if step < self.search_steps else "retrain"

    def upper_steps(self, upper_every: int) -> int:
        """Upper steps of the search, the first step having one."""
        return math.ceil(self.search_steps / upper_every)

    def begin_retraining(
        self, direction: Sequence[nn.Parameter], magnitude: Iterable[nn.Parameter], initial: Sequence[Tensor]
    ) -> None:
        """Freeze the magnitudes, and put the directions back to `initial` where the retraining starts from "init".

        `initial` holds the directions' values before the search, in the order of `direction`.
        """
        for parameter in magnitude:
            parameter.requires_grad_(False)
        if self.retrain_from == "init":
            if [value.shape for value in initial] != [parameter.shape for parameter in direction]:
                raise ValueError("initial must hold one value per direction, in its shape")
            copy_all([parameter.detach() for parameter in direction], list(initial))
