"""Settings of the bilevel optimizer by name, as data."""

from __future__ import annotations

import dataclasses
from typing import Any

from .estimators import CentralDifference, FirstOrder
from .sama import Sama


@dataclasses.dataclass(frozen=True)
class BilevelPreset:
    """What a preset settles.

    optimizer: keyword arguments of `BilevelOptimizer`. validation_batch_ratio: validation rows per train row of an upper step.
    retrain_from: where the retraining starts, "search" (it goes on from what the search found) or "init" (it starts afresh).
    """

    optimizer: dict[str, Any]
    validation_batch_ratio: float
    retrain_from: str


_PRESETS = {
    # what the library recommends: in every second step a difference pass on two thirds of the train batch, for a loss that is a
    # mean over rows (a batch whose rows have unequal numbers of labelled tokens is left whole). Against ten real steps of the
    # lower level its hypergradient, from a quarter as many validation as train rows, was nearer than the first-order one from
    # the same rows in seven of twelve draws, by 6 % on average, all of which is one draw's, and at worst 17 % farther; on the
    # whole batch by 9 %, again one draw's, and on half of its 16 rows nothing was left of it (benchmarks/BILEVEL.md). So small
    # a validation batch costs far more accuracy than any second-order term regains
    "balanced": BilevelPreset({"estimator": Sama(horizon=5), "upper_every": 2, "difference_batch": 2 / 3}, 0.25, "search"),
    # the same without the second-order term and its pass
    "first-order": BilevelPreset({"estimator": FirstOrder(), "upper_every": 2}, 0.25, "search"),
    # BiDoRA's text, eq. 7-8: xi is the lower learning rate
    "paper": BilevelPreset({"estimator": CentralDifference(), "xi": "lr"}, 1.0, "init"),
    # what the authors' code computes through Betty: xi = 1, differences around the updated directions
    "paper-code": BilevelPreset({"estimator": CentralDifference(at="after"), "xi": 1.0}, 1.0, "init"),
}


def preset(name: str) -> BilevelPreset:
    """The preset "balanced", "first-order", "paper" or "paper-code". Raises ValueError for another name."""
    if name not in _PRESETS:
        raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, got {name!r}")
    chosen = _PRESETS[name]
    return dataclasses.replace(chosen, optimizer=dict(chosen.optimizer))
