"""Implicit differentiation against its closed forms on quadratic problems, and against double backward on an encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bidora_kernels as bk

from .problems import (
    TRAIN,
    VALIDATION,
    Quadratic,
    bert_loss,
    bert_optimizer,
    error,
    second_order,
    small_bert,
    toy_loss,
    toy_optimizer,
)


@pytest.mark.parametrize("difference", [bk.CentralDifference(), bk.DoubleBackward()], ids=repr)
def test_implicit_estimators_on_a_convex_problem(difference: Any) -> None:
    """The second-order term is B' A^-1 v, v at the unrolled directions."""
    model = Quadratic()
    V, M = model.V.detach(), model.M.detach()
    v = V - 0.05 * (model.A @ V - model.B @ M) - model.t
    exact = model.B.T @ torch.linalg.solve(model.A, v)
    conjugate = toy_optimizer(model, estimator=bk.ConjugateGradient(iterations=6, damping=0.0, difference=difference))
    assert error(second_order(conjugate, toy_loss, "train", "validation"), exact) < 1e-6
    damped = toy_optimizer(Quadratic(), estimator=bk.ConjugateGradient(iterations=6, damping=0.5, difference=difference))
    shifted = model.A + 0.5 * torch.eye(6, dtype=torch.float64)
    assert error(second_order(damped, toy_loss, "train", "validation"), model.B.T @ torch.linalg.solve(shifted, v)) < 1e-6
    step = 1.0 / float(torch.linalg.matrix_norm(model.A, 2))
    series = sum(torch.linalg.matrix_power(torch.eye(6, dtype=torch.float64) - step * model.A, j) for j in range(4))
    neumann = toy_optimizer(Quadratic(), estimator=bk.Neumann(terms=4, step=step, difference=difference))
    assert error(second_order(neumann, toy_loss, "train", "validation"), step * model.B.T @ series @ v) < 1e-6


class Indefinite(Quadratic):
    """Its Hessian has one eigenvalue of -4 and five of 1."""

    def __init__(self) -> None:
        super().__init__()
        axis = torch.ones(6, dtype=torch.float64) / 6**0.5
        self.A = torch.eye(6, dtype=torch.float64) - 5 * torch.outer(axis, axis)
        self.t = self.V.detach() - self.t.norm() * axis  # v along the axis where the curvature is negative, before the step


@pytest.mark.parametrize("difference", [bk.CentralDifference(), bk.DoubleBackward()], ids=repr)
def test_conjugate_gradients_stop(difference: Any) -> None:
    """At once where the curvature is not positive, with v itself; after a product where the residual is gone."""
    calls = 0

    def counting(model: Quadratic, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return toy_loss(model, batch)

    def term(model: Quadratic, **options: Any) -> tuple[Tensor, int]:
        nonlocal calls
        calls = 0
        estimator = bk.ConjugateGradient(difference=difference, **options)
        found = second_order(toy_optimizer(model, lr=1e-12, estimator=estimator), counting, "train", "validation")
        return found, calls - 2  # of the lower and the upper pass

    each = 2 if isinstance(difference, bk.CentralDifference) else 1
    model = Indefinite()
    v = model.V.detach() - model.t
    found, passes = term(model, iterations=4, damping=0.0)
    assert error(found, model.B.T @ v) < 1e-6
    assert passes == 2 * each  # one product, then q
    found, _ = term(model, iterations=4, damping=5.0)  # now positive definite, and v is an eigenvector
    assert error(found, model.B.T @ v) < 1e-6
    flat_valley = Quadratic()
    flat_valley.A = 3 * torch.eye(6, dtype=torch.float64)
    v = flat_valley.V.detach() - flat_valley.t
    found, passes = term(flat_valley, iterations=6, damping=0.0)
    assert error(found, flat_valley.B.T @ v / 3) < 1e-6
    if isinstance(difference, bk.DoubleBackward):  # a difference's product is exact to its radius alone, and another step follows
        assert passes == 2 * each


@pytest.mark.parametrize("difference", [bk.CentralDifference(), bk.DoubleBackward()], ids=repr)
def test_a_penalty_is_in_the_hessian(difference: Any) -> None:
    """lambda / 2 |V|^2 on the lower level is a damping of lambda."""

    def penalty(model: Quadratic) -> Tensor:
        return 0.35 * model.V.square().sum()

    def term(damping: float, **options: Any) -> Tensor:
        estimator = bk.ConjugateGradient(iterations=6, damping=damping, difference=difference)
        return second_order(toy_optimizer(Quadratic(), lr=1e-12, estimator=estimator, **options), toy_loss, "train", "validation")

    assert error(term(0.0, penalty=penalty), term(0.7)) < 1e-6
    assert error(term(0.0), term(0.7)) > 1e-2


def test_implicit_hessian_products_differentiate_the_norm_on_an_encoder() -> None:
    results = []
    for difference in (bk.CentralDifference(), bk.DoubleBackward()):
        estimator = bk.ConjugateGradient(iterations=2, damping=1.0, difference=difference)
        results.append(second_order(bert_optimizer(small_bert(), estimator=estimator), bert_loss, TRAIN, VALIDATION))
    assert error(results[0], results[1]) < 1e-4
