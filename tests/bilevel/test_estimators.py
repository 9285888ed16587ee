"""Each estimator against its own oracle: a hand-solved quadratic, double backward, the functional optimizer step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import bidora_kernels as bk
from bidora_kernels.bilevel.sama import kappa
from bidora_kernels.bilevel.train_loss import TrainLoss

from .problems import (
    TRAIN,
    VALIDATION,
    Curved,
    Quadratic,
    bert_loss,
    bert_optimizer,
    error,
    flat,
    second_order,
    small_bert,
    toy_loss,
    toy_optimizer,
)

UNROLLED = [
    bk.CentralDifference(), bk.CentralDifference(at="after"), bk.ForwardDifference(), bk.DoubleBackward(), bk.ForwardMode(),
]  # fmt: skip


def solved(model: Quadratic, xi: float, step: float) -> tuple[Tensor, Tensor]:
    """The terms by hand: with v = V - step (AV - BM) - t, direct = M - s and second-order = xi B'v."""
    V, M = model.V.detach(), model.M.detach()
    moved = V - step * (model.A @ V - model.B @ M)
    return M - model.s, xi * model.B.T @ (moved - model.t)


@pytest.mark.parametrize("estimator", UNROLLED, ids=repr)
@pytest.mark.parametrize("xi", [None, "lr", 0.3])
@pytest.mark.parametrize("unroll", ["gradient", "optimizer"])
def test_the_quadratic_problem_is_solved_by_hand(estimator: Any, xi: Any, unroll: str) -> None:
    model, lr = Quadratic(), 0.05
    optimizer = toy_optimizer(model, lr=lr, estimator=estimator, xi=xi, unroll=unroll)
    direct, second = optimizer.hypergradient(toy_loss, "train", "validation", terms=True)
    length = xi if isinstance(xi, float) else lr
    wanted_direct, wanted_second = solved(model, length, length if unroll == "gradient" else lr)
    assert error(flat(direct), wanted_direct) < 1e-12
    assert error(flat(second), wanted_second) < 1e-6
    total = optimizer.hypergradient(toy_loss, "train", "validation")
    assert error(flat(total), wanted_direct + wanted_second) < 1e-6


def mixed_derivative(model: Quadratic, where: Tensor, vector: Tensor) -> Tensor:
    """d/dM of grad_V L_train(where, M) . vector, by double backward."""
    twin = type(model)()
    with torch.no_grad():
        twin.M.copy_(model.M)
        twin.left.copy_(where[:4].view(2, 2))
        twin.right.copy_(where[4:])
    grads = torch.autograd.grad(twin.loss("train"), twin.lower_parameters, create_graph=True)
    (found,) = torch.autograd.grad(torch.cat([g.flatten() for g in grads]) @ vector, twin.M)
    return found


@pytest.mark.parametrize("lower", ["SGD", "AdamW"])
@pytest.mark.parametrize("unroll", ["gradient", "optimizer"])
@pytest.mark.parametrize("at", ["before", "after"])
def test_a_difference_is_taken_at_its_place(at: str, unroll: str, lower: str) -> None:
    """On a curved problem, with xi another number than the learning rate, after steps that have left moments behind."""
    model, xi = Curved(), 0.3
    optimizer = toy_optimizer(model, lower, lr=0.05, estimator=bk.CentralDifference(at=at), xi=xi, unroll=unroll)
    for _ in range(2):
        optimizer.step(toy_loss, "train", "validation")
    before = model.V.detach().clone()
    grads = torch.autograd.grad(model.loss("train"), model.lower_parameters)
    if unroll == "gradient":
        after = before - xi * torch.cat([g.flatten() for g in grads])
    else:
        moved = functional_step(optimizer.lower, model.lower_parameters, list(grads))
        after = torch.cat([part.flatten() for part in moved]).detach()
    where = {"before": before, "after": after}
    wanted = {name: -xi * mixed_derivative(model, place, after - model.t) for name, place in where.items()}
    got = second_order(optimizer, toy_loss, "train", "validation")
    assert error(got, wanted[at]) < 1e-4
    other = "after" if at == "before" else "before"
    assert error(got, wanted[other]) > 1e-3


def test_a_turned_sign_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = TrainLoss.difference
    monkeypatch.setattr(TrainLoss, "difference", lambda *arguments: [-part for part in correct(*arguments)])
    with pytest.raises(AssertionError):
        test_the_quadratic_problem_is_solved_by_hand(bk.CentralDifference(), 0.3, "gradient")


def test_xi_is_taken_per_group() -> None:
    model = Quadratic()
    lower = torch.optim.SGD([{"params": [model.left], "lr": 0.05}, {"params": [model.right], "lr": 0.4}])
    optimizer = bk.BilevelOptimizer(
        model, lower=lower, upper=torch.optim.SGD([model.M], lr=0.1), estimator=bk.ForwardDifference(), unroll="gradient"
    )
    rates = torch.tensor([0.05] * 4 + [0.4] * 2, dtype=torch.float64)
    V, M = model.V.detach(), model.M.detach()
    v = V - rates * (model.A @ V - model.B @ M) - model.t
    assert error(second_order(optimizer, toy_loss, "train", "validation"), model.B.T @ (rates * v)) < 1e-6


def test_first_order_is_the_validation_gradient_where_it_says() -> None:
    for at in ("after", "before"):
        model = Curved()
        validation = lambda m, name: (m.V.sin() @ m.B @ m.M) if name == "validation" else m.loss(name)  # noqa: E731
        optimizer = toy_optimizer(model, estimator=bk.FirstOrder(at=at))
        (got,) = optimizer.hypergradient(validation, "train", "validation")
        V = model.V.detach()
        if at == "after":
            V = V - 0.05 * torch.cat([g.flatten() for g in torch.autograd.grad(model.loss("train"), model.lower_parameters)])
        torch.testing.assert_close(got, model.B.T @ V.sin())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    ("estimator", "tolerance"),
    [(bk.CentralDifference(), 1e-4), (bk.ForwardDifference(), 2e-2), (bk.ForwardMode(), 1e-8)],
    ids=["central", "one-sided", "forward mode"],
)
def test_q_of_a_real_encoder_against_double_backward(estimator: Any, tolerance: float, dropout: float) -> None:
    results = []
    for chosen in (bk.DoubleBackward(), estimator):
        torch.manual_seed(5)
        optimizer = bert_optimizer(small_bert(dropout, dropout), estimator=chosen, xi=1.0, unroll="gradient")
        results.append(second_order(optimizer, bert_loss, TRAIN, VALIDATION))
    exact, got = results
    assert error(got, exact) < tolerance
    assert error(-got, exact) > 1.0


def test_the_mixed_derivative_differentiates_the_norm() -> None:
    """Double backward of a detached norm is another quantity: the difference would not match it."""
    optimizer = bert_optimizer(small_bert(), estimator=bk.CentralDifference(), xi=1.0, unroll="gradient")
    got = second_order(optimizer, bert_loss, TRAIN, VALIDATION)
    model = small_bert()
    direction, magnitude = bk.split_parameters(model)
    point = [p.detach().clone() for p in direction]
    first = torch.autograd.grad(bert_loss(model, TRAIN), direction)
    with torch.no_grad():
        for p, g in zip(direction, first, strict=True):
            p.sub_(g)
    v = torch.autograd.grad(bert_loss(model, VALIDATION), direction)
    with torch.no_grad():
        for p, old in zip(direction, point, strict=True):
            p.copy_(old)
    errors = {}
    for differentiate in (True, False):
        with bk.pass_mode(differentiate_norm=differentiate, backend="reference"), sdpa_kernel(SDPBackend.MATH):
            grads = torch.autograd.grad(bert_loss(model, TRAIN), direction, create_graph=True)
        product = sum((g * w).sum() for g, w in zip(grads, v, strict=True))
        errors[differentiate] = error(got, -flat(list(torch.autograd.grad(product, magnitude))))
    assert errors[True] < 1e-6
    assert errors[False] > 1e-3


# Sama ---------------------------------------------------------------------------------------------------------------------

LOWER: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    "SGD": (torch.optim.SGD, {"lr": 0.02, "weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "dampening": 0.25}),
}


def functional_step(optimizer: torch.optim.Optimizer, parameters: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The optimizer's step in differentiable operations, from its state now."""
    groups, moved = {id(p): group for group in optimizer.param_groups for p in group["params"]}, []
    for parameter, gradient in zip(parameters, grads, strict=True):
        group = groups[id(parameter)]
        state, value, g = optimizer.state.get(parameter, {}), parameter.detach(), gradient
        if isinstance(optimizer, torch.optim.SGD):
            g = g + group["weight_decay"] * value
            if group["momentum"] and "momentum_buffer" in state:
                g = group["momentum"] * state["momentum_buffer"] + (1 - group["dampening"]) * g
            moved.append(value - group["lr"] * g)
            continue
        if isinstance(optimizer, torch.optim.AdamW):
            value = value * (1 - group["lr"] * group["weight_decay"])
        else:
            g = g + group["weight_decay"] * value
        (beta1, beta2), step = group["betas"], float(state.get("step", 0)) + 1
        first = beta1 * state.get("exp_avg", 0) + (1 - beta1) * g
        second = beta2 * state.get("exp_avg_sq", 0) + (1 - beta2) * g * g
        moved.append(value - group["lr"] * (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + group["eps"]))
    return moved


@pytest.mark.parametrize("name", list(LOWER))
@pytest.mark.parametrize("max_norm", [None, 0.7])
def test_sama_takes_each_groups_settings_and_the_clipped_gradient(name: str, max_norm: float | None) -> None:
    model = Curved()
    make, options = LOWER[name]
    other = {"lr": 0.2, "weight_decay": 0.3} | ({"betas": (0.5, 0.6)} if "dam" in name else {})
    groups = [{"params": [model.left]}, {"params": [model.right], **other}]
    optimizer = bk.BilevelOptimizer(
        model, lower=make(groups, **options), upper=torch.optim.SGD([model.M], lr=0.1),
        estimator=bk.Sama(bk.CentralDifference(), max_ratio=math.inf), lower_max_norm=max_norm,
    )  # fmt: skip
    for _ in range(3):
        optimizer.step(toy_loss, "train", "validation")
    grads = torch.autograd.grad(model.loss("train"), model.lower_parameters, create_graph=True)
    if max_norm is not None:
        total = torch.cat([g.detach().flatten() for g in grads]).norm()
        assert total > 2 * max_norm
        grads = tuple(g * (max_norm / (total + 1e-6)) for g in grads)
    moved = torch.cat([part.flatten() for part in functional_step(optimizer.lower, model.lower_parameters, list(grads))])
    (wanted,) = torch.autograd.grad((moved - model.t).square().sum() / 2, model.M)
    assert error(second_order(optimizer, toy_loss, "train", "validation"), wanted) < 1e-4


@pytest.mark.parametrize("warm_steps", [0, 3])
@pytest.mark.parametrize("name", list(LOWER))
@pytest.mark.parametrize(("difference", "tolerance"), [(bk.CentralDifference(), 1e-4), (bk.ForwardDifference(), 2e-2)])
def test_sama_is_the_derivative_of_the_step_taken(name: str, warm_steps: int, difference: Any, tolerance: float) -> None:
    model = Curved()
    make, options = LOWER[name]
    optimizer = bk.BilevelOptimizer(
        model, lower=make(model.lower_parameters, **options), upper=torch.optim.SGD([model.M], lr=0.1),
        estimator=bk.Sama(difference, max_ratio=math.inf),
    )  # fmt: skip
    for _ in range(warm_steps):
        optimizer.step(toy_loss, "train", "validation")
    grads = torch.autograd.grad(model.loss("train"), model.lower_parameters, create_graph=True)
    moved = torch.cat([part.flatten() for part in functional_step(optimizer.lower, model.lower_parameters, list(grads))])
    loss = ((moved - model.t).square().sum() + (model.M - model.s).square().sum()) / 2
    (wanted,) = torch.autograd.grad(loss, model.M)
    direct, second = optimizer.hypergradient(toy_loss, "train", "validation", terms=True)
    assert error(flat(second), wanted - flat(direct)) < tolerance
    (total,) = optimizer.hypergradient(toy_loss, "train", "validation")
    assert error(total, wanted) < tolerance


def test_sama_on_a_real_encoder() -> None:
    model = small_bert()
    optimizer = bert_optimizer(model, estimator=bk.Sama(bk.CentralDifference(), max_ratio=math.inf))
    with bk.pass_mode(differentiate_norm=True, backend="reference"), sdpa_kernel(SDPBackend.MATH):
        for _ in range(3):
            optimizer.step(bert_loss, TRAIN, VALIDATION)
        direct, second = optimizer.hypergradient(bert_loss, TRAIN, VALIDATION, terms=True)
        direction, magnitude = bk.split_parameters(model)
        grads = torch.autograd.grad(bert_loss(model, TRAIN), direction, create_graph=True)
        moved = functional_step(optimizer.lower, list(direction), list(grads))
        names = {id(parameter): key for key, parameter in model.named_parameters()}
        replaced = {names[id(p)]: value for p, value in zip(direction, moved, strict=True)}
        keywords = {"input_ids": VALIDATION[0], "labels": VALIDATION[1]}
        wanted = flat(list(torch.autograd.grad(torch.func.functional_call(model, replaced, (), keywords).loss, magnitude)))
    assert error(flat(second), wanted - flat(direct)) < 1e-4


@pytest.mark.parametrize("name", list(LOWER))
def test_the_horizon_scales_the_term(name: str) -> None:
    make, options = LOWER[name]
    lengths = []
    for horizon in (1, 5):
        model = Curved()
        optimizer = bk.BilevelOptimizer(
            model, lower=make(model.lower_parameters, **options), upper=torch.optim.SGD([model.M], lr=0.1),
            estimator=bk.Sama(horizon=horizon, max_ratio=math.inf),
        )  # fmt: skip
        lengths.append(second_order(optimizer, toy_loss, "train", "validation"))
    beta = {"AdamW": 0.9, "Adam": 0.8, "SGD": 0.0, "momentum": 0.9}[name]
    wanted = sum((1 - beta**k) / (1 - beta) for k in range(1, 6))
    assert error(lengths[1], wanted * lengths[0]) < 1e-4


def test_kappa_is_what_five_and_ten_steps_of_adam_move() -> None:
    assert kappa(0.9, 5) == pytest.approx(13.1441)
    assert round(kappa(0.9, 10), 1) == 41.4
    assert kappa(0.0, 7) == 7


def test_max_ratio_cuts_the_second_term_and_says_so() -> None:
    model = Curved()
    optimizer = toy_optimizer(model, lr=3.0, estimator=bk.Sama(max_ratio=0.25))
    direct, second = (flat(t) for t in optimizer.hypergradient(toy_loss, "train", "validation", terms=True))
    assert second.norm() > direct.norm()
    total = flat(optimizer.hypergradient(toy_loss, "train", "validation"))
    torch.testing.assert_close(total, direct + second * (0.25 * direct.norm() / second.norm()))
    stats = optimizer.step(toy_loss, "train", "validation")
    assert stats.ratio_capped is True
    assert stats.second_order_norm == pytest.approx(float(second.norm()))
    assert stats.hypergradient_norm == pytest.approx(float(total.norm()))


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_clipping_multiplies_the_derivative(clip: float) -> None:
    plain = toy_optimizer(Quadratic(), estimator=bk.Sama(max_ratio=math.inf))
    model = Quadratic()
    grad = torch.cat([g.flatten() for g in torch.autograd.grad(model.loss("train"), model.lower_parameters)])
    coefficient = min(1.0, clip / float(grad.norm()))
    clipped = toy_optimizer(model, estimator=bk.Sama(max_ratio=math.inf), lower_max_norm=clip)
    V = model.V.detach() - 0.05 * coefficient * grad
    wanted = 0.05 * coefficient * model.B.T @ (V - model.t)
    assert error(second_order(clipped, toy_loss, "train", "validation"), wanted) < 1e-5
    del plain


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.RMSprop(p), "not of RMSprop"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad=True"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), "nesterov=True"),
        (lambda p: torch.optim.Adam(p, maximize=True), "maximize=True"),
    ],
)
def test_sama_names_what_it_does_not_know(make: Any, message: str) -> None:
    model = Quadratic()
    with pytest.raises((TypeError, ValueError), match=message):
        bk.BilevelOptimizer(model, lower=make(model.lower_parameters), upper=torch.optim.SGD([model.M], lr=0.1))


@pytest.mark.parametrize("estimator", [bk.DoubleBackward(), bk.ForwardMode()], ids=repr)
def test_an_operator_without_a_derivative_is_named(estimator: Any) -> None:
    """Flash attention called by name: no backend setting can replace it."""

    def loss(model: Quadratic, name: str) -> Tensor:
        query = (model.V[:4] * model.M).view(1, 1, 2, 2)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, query, query)[0].sum()

    optimizer = toy_optimizer(Quadratic(), estimator=estimator, xi=1.0)
    with pytest.raises(RuntimeError, match=r"_scaled_dot_product_flash_attention_for_cpu.*load the model with eager"):
        optimizer.hypergradient(loss, "train", "validation")


@pytest.mark.parametrize(
    "make",
    [
        lambda: bk.FirstOrder(at="during"),
        lambda: bk.CentralDifference(relative_radius=0.0),
        lambda: bk.Sama(horizon=0),
        lambda: bk.Sama(max_ratio=-1.0),
        lambda: bk.Neumann(terms=0),
        lambda: bk.ConjugateGradient(damping=-1.0),
        lambda: toy_optimizer(Quadratic(), xi=1.0),
        lambda: toy_optimizer(Quadratic(), estimator=bk.Neumann(), unroll="gradient"),
        lambda: toy_optimizer(Quadratic(), estimator=bk.CentralDifference(), xi=-1.0),
        lambda: toy_optimizer(Quadratic(), upper_every=0),
    ],
)
def test_settings_that_do_not_fit_raise(make: Any) -> None:
    with pytest.raises(ValueError, match=r"must be|takes neither"):
        make()
