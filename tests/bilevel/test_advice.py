"""The warnings: a difference that is noise, and a second-order term that buys nothing; each once, and not without reason."""

from __future__ import annotations

import warnings

import pytest
import torch

import bidora_kernels as bk
from bidora_kernels.bilevel.stats import PATIENCE

from .problems import TRAIN, VALIDATION, bert_loss, bert_optimizer, small_bert


def test_a_difference_below_the_noise_floor_is_reported_once() -> None:
    estimator = bk.ForwardDifference(relative_radius=1e-8)
    optimizer = bert_optimizer(small_bert(dtype=torch.float32), estimator=estimator, xi=1.0)
    with pytest.warns(UserWarning, match="less than its rounding.*raise the estimator's relative_radius"):
        optimizer.step(bert_loss, TRAIN, VALIDATION)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(bert_loss, TRAIN, VALIDATION)


@pytest.mark.parametrize("estimator", [bk.ForwardDifference(), bk.CentralDifference()], ids=repr)
def test_the_default_radius_is_above_it(estimator: object) -> None:
    optimizer = bert_optimizer(small_bert(dtype=torch.float32), estimator=estimator, xi=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.step(bert_loss, TRAIN, VALIDATION)


@pytest.mark.parametrize(
    ("estimator", "options", "remedy"),
    [(bk.ForwardDifference(), {"xi": 1e-7}, "raise xi"), (bk.Sama(), {}, "raise its horizon")],
)
def test_a_negligible_term_is_reported_once(estimator: object, options: dict[str, float], remedy: str) -> None:
    optimizer = bert_optimizer(small_bert(), lr=1e-9, estimator=estimator, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(PATIENCE - 1):
            optimizer.step(bert_loss, TRAIN, VALIDATION)
    with pytest.warns(UserWarning, match=f"below 1% of the first-order one.*{remedy}"):
        optimizer.step(bert_loss, TRAIN, VALIDATION)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(bert_loss, TRAIN, VALIDATION)
