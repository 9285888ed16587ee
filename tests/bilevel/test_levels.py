"""Which parameters a step moves: those that had a gradient, and only those that the two optimizers were made with."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidora_kernels as bk

from .problems import TRAIN, VALIDATION, bert_loss, bert_optimizer, error, flat, small_bert

ESTIMATORS = [bk.FirstOrder(), bk.Sama(), bk.CentralDifference(), bk.DoubleBackward()]


def layer_of(model: nn.Module) -> Any:
    return model.bert.encoder.layer[0].attention.self.query


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("part", ["magnitude", "lora_A"])
def test_a_parameter_that_is_frozen_between_steps_stays(estimator: Any, part: str) -> None:
    """Momentum and weight decay would move one that is given zeros."""
    model = small_bert()
    optimizer = bert_optimizer(model, estimator=estimator)
    optimizer.step(bert_loss, TRAIN, VALIDATION)
    frozen = getattr(layer_of(model), part)
    frozen.requires_grad_(False)
    kept, others = frozen.detach().clone(), getattr(model.bert.encoder.layer[0].attention.self.value, part).detach().clone()
    optimizer.step(bert_loss, TRAIN, VALIDATION)
    assert torch.equal(frozen, kept)
    assert not torch.equal(getattr(model.bert.encoder.layer[0].attention.self.value, part), others)
    assert not frozen.requires_grad


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_magnitude_that_no_pass_uses_stays(estimator: Any) -> None:
    model = small_bert()
    model.spare = bk.FusedDoraLinear.from_linear(nn.Linear(4, 4), r=1).double().train()
    optimizer = bert_optimizer(model, estimator=estimator)
    kept = model.spare.magnitude.detach().clone()
    for _ in range(2):
        optimizer.step(bert_loss, TRAIN, VALIDATION)
    assert torch.equal(model.spare.magnitude, kept)


@pytest.mark.parametrize("level", ["lower", "upper"])
def test_parameters_that_were_added_later_are_refused(level: str) -> None:
    model = small_bert()
    optimizer = bert_optimizer(model)
    optimizer.step(bert_loss, TRAIN, VALIDATION)
    getattr(optimizer, level).add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.float64))]})
    with pytest.raises(ValueError, match=f"the {level} optimizer's parameters have changed: make a new"):
        optimizer.step(bert_loss, TRAIN, VALIDATION)


def test_threads_that_know_no_pass_are_refused() -> None:
    model = nn.DataParallel(small_bert())
    direction, magnitude = bk.split_parameters(model)
    with pytest.raises(TypeError, match="take DistributedDataParallel"):
        bk.BilevelOptimizer(model, lower=torch.optim.SGD(direction, lr=0.1), upper=torch.optim.SGD(magnitude, lr=0.1))


def test_a_layers_parts_belong_to_their_levels() -> None:
    model = small_bert()
    direction, magnitude = (list(group) for group in bk.split_parameters(model))
    with pytest.raises(ValueError, match=r"query\.magnitude is in the lower optimizer"):
        bk.BilevelOptimizer(model, lower=torch.optim.SGD([*direction, *magnitude[:1]]), upper=torch.optim.SGD(magnitude[1:]))
    with pytest.raises(ValueError, match=r"a direction of bert.* is in the upper optimizer"):
        bk.BilevelOptimizer(model, lower=torch.optim.SGD(direction[1:]), upper=torch.optim.SGD([*magnitude, direction[0]]))


class Normalized(nn.Module):
    """A DoRA layer behind batch normalization, whose running statistics every pass in training mode moves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm = nn.BatchNorm1d(6, affine=False)
        self.layer = bk.FusedDoraLinear.from_linear(nn.Linear(6, 3), r=2)
        self.fails_at: int | None = None
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        if self.passes == self.fails_at:
            raise ArithmeticError
        return self.layer(self.norm(x))


def square_loss(model: Normalized, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def normalized() -> tuple[Normalized, bk.BilevelOptimizer]:
    model = Normalized().double().train()
    with torch.no_grad():
        model.layer.lora_B.normal_()
    return model, bert_optimizer(model)


def statistics(model: Normalized) -> list[Tensor]:
    return [buffer.clone() for buffer in model.norm.buffers()]


def test_running_statistics_end_where_train_and_validation_end() -> None:
    torch.manual_seed(0)
    train, validation = torch.randn(2, 8, 6, dtype=torch.float64).unbind()
    model, optimizer = normalized()
    start = statistics(model)
    optimizer.hypergradient(square_loss, train, validation)
    assert all(map(torch.equal, statistics(model), start))
    model.fails_at = model.passes + 3
    with pytest.raises(ArithmeticError):
        optimizer.step(square_loss, train, validation)
    assert all(map(torch.equal, statistics(model), start))
    assert optimizer.step(square_loss, train, validation).passes == 3
    alone = nn.BatchNorm1d(6, affine=False).double()
    for batch in (train, validation):
        alone(batch)
    assert all(map(torch.equal, statistics(model), list(alone.buffers())))


def test_under_an_outer_autocast_the_head_is_cast_anew() -> None:
    """Autocast keeps 16-bit copies of trained weights until it ends; a step's updates must not leave them behind."""
    losses = []
    for outer in (False, True):
        model = small_bert(dtype=torch.float32)
        optimizer = bert_optimizer(model, torch.optim.SGD, lr=0.5)

        def under_bf16(model: nn.Module, batch: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return bert_loss(model, batch)

        with torch.autocast("cpu", torch.bfloat16) if outer else contextlib.nullcontext():
            losses.append([optimizer.step(under_bf16, TRAIN, VALIDATION).validation_loss for _ in range(4)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 4


def test_a_fused_optimizer_is_noticed_by_the_caches() -> None:
    """Its step writes past the tensors' versions: norms kept between passes in eval mode would be those of old directions."""
    results = []
    for fused in (False, True):
        model = small_bert(dtype=torch.float32).eval()
        direction, magnitude = bk.split_parameters(model)
        optimizer = bk.BilevelOptimizer(
            model, lower=torch.optim.AdamW(direction, lr=1e-2, fused=fused),
            upper=torch.optim.AdamW(magnitude, lr=1e-2, fused=fused), estimator=bk.Sama(), upper_every=3,
        )  # fmt: skip
        stats = [optimizer.step(bert_loss, TRAIN, VALIDATION) for _ in range(7)]
        with torch.no_grad():
            results.append(
                ([s.second_order_norm for s in stats[::3]], float(bert_loss(model, TRAIN)), flat([*direction, *magnitude]))
            )
    (wanted, loss, values), (got, other, others) = results
    assert got == pytest.approx(wanted, rel=1e-2)
    assert other == pytest.approx(loss, rel=1e-4)
    assert error(others, values) < 1e-4
