"""Passes that run at the same directions find the row norms once, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidora_kernels as bk
from bidora_kernels import functional, native, reference
from bidora_kernels.bilevel.flat import FlatParameters

from .problems import TRAIN, VALIDATION, bert_loss, bert_optimizer, flat, small_bert

LAYERS = 4  # with DoRA, of the small BERT
PARTS = bk.MicroBatches([TRAIN, VALIDATION], weights=[2.0, 1.0])
ESTIMATORS = [
    bk.FirstOrder(), bk.FirstOrder(at="before"), bk.CentralDifference(), bk.CentralDifference(at="after"),
    bk.ForwardDifference(), bk.Sama(), bk.DoubleBackward(), bk.Neumann(terms=2, step=1e-3),
]  # fmt: skip


def both(model: nn.Module) -> Tensor:
    return flat([p for group in bk.split_parameters(model) for p in group])


def after_steps(
    between: Callable[[nn.Module, int], None] = lambda model, number: None,
    train: Any = TRAIN,
    validation: Any = VALIDATION,
    dtype: torch.dtype = torch.float64,
    backend: str = "reference",
    steps: int = 4,
    **options: Any,
) -> Tensor:
    """Every trained value after some steps; `between` runs before each."""
    model = small_bert(dtype=dtype, dropout=0.1)
    torch.manual_seed(5)
    with bk.use_backend(backend):
        optimizer = bert_optimizer(model, **options)
        for number in range(steps):
            between(model, number)
            optimizer.step(bert_loss, train, validation)
    return both(model)


def without_points(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(FlatParameters, "point", lambda self, *arguments: None)
        return after_steps(**options)


@pytest.fixture
def norms_found(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """[norms of a layer found so far, reads of a weight for those that are shared]."""
    found, one, several = [0, 0], reference.weight_norm, functional.weight_norms

    def counted(*arguments: Any) -> Tensor:
        found[0] += 1
        return one(*arguments)

    def counted_read(*arguments: Any) -> Tensor:
        found[1] += 1
        return several(*arguments)

    monkeypatch.setattr(reference, "weight_norm", counted)
    monkeypatch.setattr(functional, "weight_norms", counted_read)
    return found


@pytest.mark.parametrize(
    ("options", "first", "later", "shared_reads"),
    [
        ({"estimator": bk.FirstOrder()}, 2, 1, 1),
        ({"estimator": bk.FirstOrder(at="before")}, 1, 1, 1),
        ({"estimator": bk.ForwardDifference()}, 3, 2, 1),
        ({"estimator": bk.Sama()}, 3, 2, 1),
        ({"estimator": bk.CentralDifference()}, 4, 3, 2),  # two norms of one read among them
        ({"estimator": bk.CentralDifference(at="after")}, 4, 3, 2),
        ({"estimator": bk.Sama(), "difference_batch": lambda batch: (batch[0][:2], batch[1][:2])}, 3, 2, 1),
        ({"estimator": bk.CentralDifference(), "unroll": "gradient"}, 4, 4, 1),
    ],
    ids=repr,
)
def test_norms_of_a_step(options: dict[str, Any], first: int, later: int, shared_reads: int, norms_found: list[int]) -> None:
    """A later step's lower pass has them from the validation pass, a pass that returns has them, and two sides are one read."""
    with bk.use_backend("reference"):
        optimizer = bert_optimizer(small_bert(), **options)
        norms_found[:] = 0, 0
        optimizer.step(bert_loss, TRAIN, VALIDATION)
        assert norms_found[0] == first * LAYERS
        norms_found[:] = 0, 0
        optimizer.step(bert_loss, TRAIN, VALIDATION)
    assert norms_found == [later * LAYERS, shared_reads * LAYERS]


def test_micro_batches_find_the_norms_once(norms_found: list[int]) -> None:
    with bk.use_backend("reference"):
        optimizer = bert_optimizer(small_bert())
        norms_found[:] = 0, 0
        optimizer.step(bert_loss, PARTS, bk.MicroBatches([VALIDATION, TRAIN, TRAIN]))
    assert norms_found[0] == 3 * LAYERS


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_nothing_else_changes(estimator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.equal(after_steps(estimator=estimator), without_points(monkeypatch, estimator=estimator))


@pytest.mark.parametrize(
    "options",
    [
        {"upper_every": 2}, {"train": PARTS}, {"difference_batch": lambda batch: (batch[0][:2], batch[1][:2])},
        {"estimator": bk.CentralDifference(), "unroll": "gradient"}, {"lower_max_norm": 0.1},
    ],
    ids=repr,
)  # fmt: skip
def test_nor_with_other_settings(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.equal(after_steps(**options), without_points(monkeypatch, **options))


@pytest.mark.parametrize("rows", [1, 3])
def test_nor_on_the_native_backend(rows: int, norms_found: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With four tokens the norms are a read of the weight and are shared; with 21 they come with the merged weight."""
    if (reason := native.why_unavailable()) is not None:
        pytest.skip(reason)
    batch = (TRAIN[0][:rows, : 4 if rows == 1 else 7], TRAIN[1][:rows])
    options: dict[str, Any] = {"backend": "native", "dtype": torch.float32, "train": batch, "validation": batch}
    got = after_steps(**options)
    assert norms_found[1] == (4 * LAYERS if rows == 1 else 0)
    assert torch.equal(got, without_points(monkeypatch, **options))


def moved(model: nn.Module, number: int) -> None:
    """A write that no counter shows, of one value in one layer."""
    if number == 2:
        bk.split_parameters(model)[0][1].data[0, 0] += 0.5


def reweighted(model: nn.Module, number: int) -> None:
    """The frozen weight written in place, then replaced."""
    layers = [module for module in model.modules() if isinstance(module, bk.FusedDoraLinear)]
    if number == 2:
        layers[0].weight.mul_(1.5)
    elif number == 3:
        layers[1].weight = nn.Parameter(layers[1].weight * 0.5, requires_grad=False)


def replaced(model: nn.Module, number: int) -> None:
    """A parameter's storage replaced, by other values."""
    parameter = bk.split_parameters(model)[0][1]
    if number == 2:
        parameter.data = parameter.data * 1.5


@pytest.mark.parametrize("between", [moved, reweighted, replaced])
def test_what_happens_between_steps_is_noticed(
    between: Callable[[nn.Module, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    got = after_steps(between)
    assert torch.equal(got, without_points(monkeypatch, between=between))
    assert not torch.allclose(got, after_steps())


def test_norms_of_other_directions_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the comparison with where the last step ended, a write between steps meets stale norms."""
    honest = after_steps(moved)

    def trusting(self: bk.BilevelOptimizer) -> Any:
        left, self._left = self._left, None
        return (None, self._direction.clone()) if left is None else (left[0], self._direction.clone())

    monkeypatch.setattr(bk.BilevelOptimizer, "_where", trusting)
    assert not torch.equal(after_steps(moved), honest)
    assert torch.equal(after_steps(), without_points(monkeypatch))


def test_a_model_can_be_copied_and_pickled_after_a_step() -> None:
    model = small_bert()
    optimizer = bert_optimizer(model)
    with bk.use_backend("reference"):
        optimizer.step(bert_loss, TRAIN, VALIDATION)
        assert optimizer._left is not None
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            layers = [module for module in twin.modules() if isinstance(module, bk.FusedDoraLinear)]
            assert all(not layer._forward_mode.point.norms for layer in layers if layer._forward_mode.point is not None)
            assert torch.equal(both(twin), both(model))


def test_a_point_holds_nothing_of_a_finished_difference() -> None:
    model = small_bert()
    optimizer = bert_optimizer(model, estimator=bk.CentralDifference())
    with bk.use_backend("reference"):
        optimizer.step(bert_loss, TRAIN, VALIDATION)
    points = [module._forward_mode.point for module in model.modules() if isinstance(module, bk.FusedDoraLinear)]
    assert len(points) == LAYERS
    assert all(point is not None and not point.norms and not point.others for point in points)
    assert points[0].value_of(optimizer._direction.parameters[0]) is None
