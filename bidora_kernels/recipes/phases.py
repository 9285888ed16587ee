"""The phases of a run, and the order in which each draws its examples."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..bilevel import preset
from .settings import TrainSettings
from .tasks import permutation, split_indices


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase: its steps and the training examples that its batches are drawn from."""

    name: str
    steps: int
    train: list[int]
    validation: list[int]
    cost: float  # of a step, in passes, for the time left


class Order:
    """Batches of a seeded order, reshuffled every epoch; the batch at any position is known without the ones before it."""

    def __init__(self, indices: list[int], batch_size: int, seed: int, *purpose: object) -> None:
        """Draw batches of `batch_size` from `indices`."""
        self._indices, self._batch_size, self._seed, self._purpose = indices, batch_size, seed, purpose
        self._epochs: dict[int, list[int]] = {}

    def batch(self, number: int) -> list[int]:
        """The batch at a position, counted from 0."""
        places = range(number * self._batch_size, (number + 1) * self._batch_size)
        return [self._indices[self._epoch(place // len(self._indices))[place % len(self._indices)]] for place in places]

    def _epoch(self, epoch: int) -> list[int]:
        if epoch not in self._epochs:
            order = permutation(len(self._indices), self._seed, *self._purpose, epoch)
            self._epochs = {old: known for old, known in self._epochs.items() if old == epoch - 1} | {epoch: order}
        return self._epochs[epoch]


def plan_phases(settings: TrainSettings, labels: list[Any], stratified: bool) -> list[Phase]:
    """The phases of a run. Raises UserError where the validation split would be empty by accident."""
    everything = list(range(len(labels)))
    if settings.method != "bidora":
        return [Phase("train", settings.steps + settings.retrain_steps, everything, [], 1)]
    chosen = preset(settings.bilevel)
    train, validation = split_indices(labels, settings.partition, settings.seed, stratified)
    upper = 1 + validation_batch_size(settings) / settings.batch_size  # a difference pass and the validation pass
    cost = 1 + upper / chosen.optimizer.get("upper_every", 1) if validation else 1
    phases = [Phase("search", settings.steps, train, validation, cost)]
    if settings.retrain_steps:
        phases.append(Phase("retrain", settings.retrain_steps, everything, [], 1))
        if not validation and retrain_from(settings) == "init":
            del phases[0]  # without a validation split nothing of the search would be kept
    return phases


def retrain_from(settings: TrainSettings) -> str:
    """Where the retraining starts: the setting, else what the bilevel preset says."""
    return settings.retrain_from or preset(settings.bilevel).retrain_from


def validation_batch_size(settings: TrainSettings) -> int:
    """Validation examples per upper step: the setting, else the bilevel preset's share of the train batch."""
    return settings.validation_batch_size or max(1, round(settings.batch_size * preset(settings.bilevel).validation_batch_ratio))
