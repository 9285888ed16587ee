"""The step: what it leaves alone, puts back, pairs, counts, clips, scales and resumes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidora_kernels as bk
from bidora_kernels.bilevel import optimizer as optimizer_module
from bidora_kernels.bilevel.sama import step_derivative

from .problems import (
    TRAIN,
    VALIDATION,
    Curved,
    Quadratic,
    assert_same,
    bert_loss,
    bert_optimizer,
    error,
    everything,
    flat,
    scheduled,
    small_bert,
    toy_loss,
    toy_optimizer,
)

ESTIMATORS = [
    bk.FirstOrder(), bk.FirstOrder(at="before"), bk.CentralDifference(), bk.CentralDifference(at="after"),
    bk.ForwardDifference(), bk.ForwardMode(), bk.DoubleBackward(), bk.Sama(), bk.Neumann(terms=2, step=1e-3),
    bk.ConjugateGradient(iterations=2, damping=1.0),
]  # fmt: skip


class Broken(Exception):
    pass


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_an_exception_in_any_pass_changes_nothing(estimator: Any) -> None:
    model = small_bert(dropout=0.1)
    optimizer = scheduled(model, estimator=estimator)
    optimizer.step(bert_loss, TRAIN, VALIDATION)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.5)
    before = everything(optimizer)
    passes = 0
    while True:
        calls = 0

        def failing(m: nn.Module, batch: Any, allowed: int = passes) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise Broken
            return bert_loss(m, batch)

        try:
            optimizer.step(failing, TRAIN, VALIDATION)
            break
        except Broken:
            assert_same(everything(optimizer), before)
            assert all(p.requires_grad for group in bk.split_parameters(model) for p in group)
            passes += 1
    assert passes >= 2


@pytest.mark.parametrize("level", ["lower", "upper", "upper_scheduler"])
def test_an_exception_in_an_optimizer_changes_nothing(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = scheduled(small_bert())
    optimizer.step(bert_loss, TRAIN, VALIDATION)
    before = everything(optimizer)
    part, real = getattr(optimizer, level), getattr(optimizer, level).step

    def failing(*arguments: Any) -> None:
        real(*arguments)
        raise Broken

    monkeypatch.setattr(part, "step", failing)
    with pytest.raises(Broken):
        optimizer.step(bert_loss, TRAIN, VALIDATION)
    assert_same(everything(optimizer), before)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("steps", [0, 1])
def test_hypergradient_changes_nothing(estimator: Any, steps: int) -> None:
    optimizer = scheduled(small_bert(dropout=0.1), estimator=estimator)
    for _ in range(steps):
        optimizer.step(bert_loss, TRAIN, VALIDATION)
    optimizer.lower.param_groups[0]["params"][0].grad = torch.ones_like(optimizer.lower.param_groups[0]["params"][0])
    before = everything(optimizer)
    first = optimizer.hypergradient(bert_loss, TRAIN, VALIDATION)
    assert_same(everything(optimizer), before)
    assert_same(optimizer.hypergradient(bert_loss, TRAIN, VALIDATION), first)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_step_uses_the_hypergradient_and_the_lower_optimizer(estimator: Any) -> None:
    model = small_bert(dropout=0.1)
    optimizer = bert_optimizer(model, estimator=estimator)
    twin = copy.deepcopy(model)
    direction, magnitude = bk.split_parameters(twin)
    hypergradient = optimizer.hypergradient(bert_loss, TRAIN, VALIDATION)
    state = torch.get_rng_state()
    lower, upper = torch.optim.AdamW(direction, lr=1e-2), torch.optim.AdamW(magnitude, lr=1e-2)
    grads = torch.autograd.grad(bert_loss(twin, TRAIN), direction)
    bert_loss(twin, VALIDATION)
    end = torch.get_rng_state()
    for parameter, grad in zip([*direction, *magnitude], [*grads, *hypergradient], strict=True):
        parameter.grad = grad
    lower.step()
    upper.step()
    torch.set_rng_state(state)
    optimizer.step(bert_loss, TRAIN, VALIDATION)
    assert torch.equal(torch.get_rng_state(), end)
    for group, wanted in zip(bk.split_parameters(model), (direction, magnitude), strict=True):
        for parameter, value in zip(group, wanted, strict=True):
            torch.testing.assert_close(parameter, value, rtol=1e-12, atol=1e-12)
            assert parameter.grad is None


def test_difference_passes_see_the_train_passes_random_numbers() -> None:
    seen: list[Tensor] = []

    def recording(model: nn.Module, batch: Any) -> Tensor:
        seen.append(torch.get_rng_state())
        return bert_loss(model, batch)

    optimizer = bert_optimizer(small_bert(dropout=0.3), estimator=bk.CentralDifference())
    optimizer.step(recording, TRAIN, VALIDATION)
    train, validation, plus, minus = seen
    assert torch.equal(train, plus)
    assert torch.equal(train, minus)
    assert not torch.equal(train, validation)


def test_a_resumed_optimizer_goes_on_bit_for_bit() -> None:
    model = small_bert(dropout=0.1)
    optimizer = scheduled(model, upper_every=2, lower_max_norm=0.5)
    for number in range(3):
        optimizer.step(bert_loss, TRAIN, VALIDATION if number % 2 == 0 else None)
    weights, state, random = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    assert not optimizer.needs_validation
    stats = [optimizer.step(bert_loss, TRAIN, VALIDATION) for _ in range(3)]
    other = small_bert(dropout=0.1)
    resumed = scheduled(other, upper_every=2, lower_max_norm=0.5)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    torch.set_rng_state(random)
    again = [resumed.step(bert_loss, TRAIN, VALIDATION) for _ in range(3)]
    assert [s.train_loss for s in stats] == [s.train_loss for s in again]
    assert_same(everything(optimizer), everything(resumed))
    with pytest.raises(ValueError, match="lower_scheduler"):
        bert_optimizer(small_bert()).load_state_dict(state)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_micro_batches_are_the_whole_batch(estimator: Any) -> None:
    def parts(batch: tuple[Tensor, Tensor]) -> bk.MicroBatches:
        return bk.MicroBatches([(batch[0][:1], batch[1][:1]), (batch[0][1:], batch[1][1:])], weights=[1, 2])

    whole = bert_optimizer(small_bert(), estimator=estimator).hypergradient(bert_loss, TRAIN, VALIDATION)
    split = bert_optimizer(small_bert(), estimator=estimator).hypergradient(bert_loss, parts(TRAIN), parts(VALIDATION))
    assert error(flat(split), flat(whole)) < 1e-6
    stats = bert_optimizer(small_bert(), estimator=estimator).step(bert_loss, parts(TRAIN), parts(VALIDATION))
    with torch.no_grad():
        assert stats.train_loss == pytest.approx(float(bert_loss(small_bert(), TRAIN)))


def test_a_list_is_one_batch() -> None:
    seen: list[Any] = []
    batch = ["train", 1]

    def loss(model: Quadratic, given: Any) -> Tensor:
        seen.append(given)
        return model.loss("train")

    toy_optimizer(Quadratic(), estimator=bk.FirstOrder()).step(loss, batch, batch)
    assert all(given is batch for given in seen)
    for wrong in (([],), (["a"], [1, 2]), (["a", "b"], [0, 0]), (["a", "b"], [1, -1])):
        with pytest.raises(ValueError, match=r"MicroBatches needs|weights must"):
            bk.MicroBatches(*wrong)


def test_upper_every_and_the_schedulers() -> None:
    optimizer = scheduled(small_bert(), upper_every=3)
    wanted = [True, False, False, True, False]
    for with_upper in wanted:
        assert optimizer.needs_validation is with_upper
        magnitude = optimizer.upper.param_groups[0]["params"][0].clone()
        stats = optimizer.step(bert_loss, TRAIN, VALIDATION if with_upper else None)
        assert (stats.direct_norm is not None) is with_upper
        assert stats.passes == (3 if with_upper else 1)
        assert set(stats.pass_seconds) == ({"lower", "validation", "difference"} if with_upper else {"lower"})
        assert torch.equal(magnitude, optimizer.upper.param_groups[0]["params"][0]) is not with_upper
    assert optimizer.lower.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**5)
    assert optimizer.upper.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.8**2)
    fresh = scheduled(small_bert())
    with pytest.raises(ValueError, match="val_batch must be given"):
        fresh.step(bert_loss, TRAIN)


def test_clipping_of_both_levels() -> None:
    model = Quadratic()
    V, M = model.V.detach().clone(), model.M.detach().clone()
    optimizer = toy_optimizer(model, lower_max_norm=0.2, upper_max_norm=0.1)
    optimizer.step(toy_loss, "train", "validation")
    assert float((model.V.detach() - V).norm()) == pytest.approx(0.05 * 0.2, rel=1e-5)
    assert float((model.M.detach() - M).norm()) == pytest.approx(0.1 * 0.1, rel=1e-5)


def test_a_zero_vector_skips_the_difference() -> None:
    optimizer = toy_optimizer(Quadratic(), lr=0.0, estimator=bk.CentralDifference())
    stats = optimizer.step(toy_loss, "train", "validation")
    assert stats.passes == 2
    assert stats.second_order_norm == 0.0
    assert stats.cosine is None
    assert stats.radius is None


def test_difference_batch_is_paired_on_its_own_rows() -> None:
    """The base gradient is taken on the part too: a part of half the loss gives half the term, not a mixture."""
    whole = toy_optimizer(Curved()).hypergradient(toy_loss, "train", "validation", terms=True)[1]
    optimizer = toy_optimizer(Curved(), difference_batch=lambda batch: (batch, 0.5))
    part = optimizer.hypergradient(toy_loss, "train", "validation", terms=True)[1]
    assert error(2 * flat(part), flat(whole)) < 1e-5
    assert optimizer.step(toy_loss, "train", "validation").passes == 4


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_the_penalty_belongs_to_the_lower_pass(estimator: Any) -> None:
    calls = 0
    penalty = bk.OrthogonalPenalty(0.1)

    def counting(model: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        return penalty(model)

    model = small_bert()
    twin = copy.deepcopy(model)
    optimizer = bert_optimizer(model, torch.optim.SGD, estimator=estimator, penalty=counting)
    optimizer.step(bert_loss, TRAIN, VALIDATION)
    if not isinstance(estimator, bk.Neumann | bk.ConjugateGradient):
        assert calls == 1
    direction, _ = bk.split_parameters(twin)
    grads = torch.autograd.grad(bert_loss(twin, TRAIN) + penalty(twin), direction)
    for parameter, old, grad in zip(bk.split_parameters(model)[0], direction, grads, strict=True):
        torch.testing.assert_close(parameter, old - 1e-2 * grad)
    with pytest.raises(ValueError, match="no DoRA layer"):
        penalty(nn.Linear(2, 2))


def test_a_replaced_storage_is_noticed() -> None:
    model = Quadratic()
    optimizer = toy_optimizer(model, lower="AdamW")
    optimizer.step(toy_loss, "train", "validation")
    values = model.left.detach().clone() + 1
    model.left.data = values.clone()
    wanted = Quadratic()
    wanted.load_state_dict(model.state_dict())
    got = optimizer.hypergradient(toy_loss, "train", "validation")
    assert torch.equal(model.left, values)
    other = toy_optimizer(wanted, lower="AdamW")
    other.lower.load_state_dict(copy.deepcopy(optimizer.lower.state_dict()))
    assert_same(other.hypergradient(toy_loss, "train", "validation"), got)
    model.right.data = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"a parameter must be \[2\]"):
        optimizer.step(toy_loss, "train", "validation")


# scaling, checkpointing, dtypes ----------------------------------------------------------------------------------------------


def test_a_warning_that_is_an_error_changes_nothing() -> None:
    model = small_bert(dtype=torch.float32)
    optimizer = bert_optimizer(model, estimator=bk.CentralDifference(relative_radius=1e-9), xi=1.0)
    before = everything(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            optimizer.step(bert_loss, TRAIN, VALIDATION)
    assert_same(everything(optimizer), before)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("estimator", [bk.FirstOrder(), bk.CentralDifference(), bk.Sama()], ids=repr)
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool, estimator: Any) -> None:
    results = []
    for checkpointing in (False, True):
        model = small_bert(dropout=0.2)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        optimizer = bert_optimizer(model, estimator=estimator)
        results.append(optimizer.hypergradient(bert_loss, TRAIN, VALIDATION, terms=True))
    for plain, checkpointed in zip(*results, strict=True):
        if isinstance(estimator, bk.FirstOrder) and not flat(plain).any():  # its second-order term
            assert not flat(checkpointed).any()
        else:
            assert error(flat(checkpointed), flat(plain)) < 1e-6


def test_the_radius_follows_the_compute_dtype() -> None:
    def bf16(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return bert_loss(model, batch)

    radii = {}
    for name, loss, options in (
        ("fp32", bert_loss, {}), ("bf16", bf16, {}), ("told", bert_loss, {"compute_dtype": torch.bfloat16}),
    ):  # fmt: skip
        optimizer = bert_optimizer(small_bert(dtype=torch.float32), estimator=bk.ForwardDifference(), xi=1.0, **options)
        length = flat(list(bk.split_parameters(optimizer.model)[0])).norm()
        radii[name] = optimizer.step(loss, TRAIN, VALIDATION).radius / float(length)
    assert radii["fp32"] == pytest.approx(0.2 * torch.finfo(torch.float32).eps ** 0.5, rel=1e-4)
    assert radii["bf16"] == pytest.approx(0.005, rel=1e-4)
    assert radii["told"] == pytest.approx(0.005, rel=1e-4)


def test_parameters_of_neither_level_get_no_gradient() -> None:
    model = Quadratic()
    model.extra = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = toy_optimizer(model)
    optimizer.step(lambda m, name: m.loss(name) * m.extra, "train", "validation")
    assert model.extra.grad is None
    assert model.extra.requires_grad


@pytest.mark.parametrize(
    ("name", "optimizer", "ratio", "start"),
    [
        ("balanced", {"estimator": bk.Sama(horizon=5), "upper_every": 2, "difference_batch": 2 / 3}, 0.25, "search"),
        ("first-order", {"estimator": bk.FirstOrder(), "upper_every": 2}, 0.25, "search"),
        ("paper", {"estimator": bk.CentralDifference(), "xi": "lr"}, 1.0, "init"),
        ("paper-code", {"estimator": bk.CentralDifference(at="after"), "xi": 1.0}, 1.0, "init"),
    ],
)
def test_presets(name: str, optimizer: dict[str, Any], ratio: float, start: str) -> None:
    chosen = bk.preset(name)
    assert (chosen.optimizer, chosen.validation_batch_ratio, chosen.retrain_from) == (optimizer, ratio, start)
    chosen.optimizer["upper_every"] = 7
    chosen = bk.preset(name)
    assert chosen.optimizer == optimizer
    assert bert_optimizer(small_bert(), **chosen.optimizer).step(bert_loss, TRAIN, VALIDATION).skipped is None
    with pytest.raises(ValueError, match="balanced, first-order, paper, paper-code"):
        bk.preset("best")


def test_the_lower_step_is_differentiated_where_an_upper_part_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def counted(*arguments: Any) -> Any:
        taken.append(len(taken))
        return step_derivative(*arguments)

    monkeypatch.setattr(optimizer_module, "step_derivative", counted)
    optimizer = bert_optimizer(small_bert(), estimator=bk.Sama(), upper_every=3)
    for _ in range(4):
        optimizer.step(bert_loss, TRAIN, VALIDATION)
    assert len(taken) == 2  # steps 1 and 4
