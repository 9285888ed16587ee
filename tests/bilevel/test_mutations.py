"""Each term of the hypergradient, broken on purpose: the test that covers it must notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import bidora_kernels as bk
from bidora_kernels.bilevel import implicit, optimizer, sama, train_loss
from bidora_kernels.bilevel.flat import scaled

from . import test_estimators as covered
from . import test_implicit as implicit_tests
from . import test_step as steps
from .problems import TRAIN, VALIDATION, bert_loss, bert_optimizer, error, second_order, small_bert

Patch = Callable[[pytest.MonkeyPatch], None]


def wrapped(owner: Any, name: str, change: Callable[..., Any]) -> Patch:
    """Replace a function by `change(original, *arguments)`."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments, **keywords: change(original, *arguments, **keywords))

    return patch


def without_second_moment(
    optimizer_: Any, group: Any, parameters: Any, given: Any, horizon: int, clip: float
) -> dict[Any, torch.Tensor]:
    """J of Adam with sqrt(v_hat) taken for a constant."""
    (beta1, beta2), eps, results = group["betas"], group["eps"], {}
    for parameter in parameters:
        state, g = optimizer_.state.get(parameter, {}), given[parameter]
        step = int(state.get("step", 0)) + 1
        second = (beta2 * state.get("exp_avg_sq", 0) + (1 - beta2) * g * g) / (1 - beta2**step)
        results[parameter] = group["lr"] * (1 - beta1) / (1 - beta1**step) / (second.sqrt() + eps)
    return results


MUTATIONS: dict[str, tuple[Patch, Callable[[], None]]] = {
    "the width of the difference": (
        wrapped(train_loss.TrainLoss, "difference", lambda real, self, a, b, width: real(self, a, b, 2 * width)),
        lambda: covered.test_the_quadratic_problem_is_solved_by_hand(bk.ForwardDifference(), 0.3, "gradient"),
    ),
    "xi": (
        wrapped(optimizer.BilevelOptimizer, "_times_xi", lambda real, self, vector: vector),
        lambda: covered.test_the_quadratic_problem_is_solved_by_hand(bk.CentralDifference(), 0.3, "gradient"),
    ),
    "xi, one rate for all groups": (
        wrapped(optimizer.BilevelOptimizer, "_times_xi", lambda real, self, vector: scaled(vector, 0.05)),
        covered.test_xi_is_taken_per_group,
    ),
    "the second-order term left out": (
        wrapped(optimizer.BilevelOptimizer, "_second_order", lambda real, *arguments: None),
        lambda: covered.test_the_quadratic_problem_is_solved_by_hand(bk.CentralDifference(), 0.3, "gradient"),
    ),
    "validation before the lower step": (
        wrapped(
            optimizer.BilevelOptimizer, "_lower_step",
            lambda real, self, grads: (real(self, grads), self._direction.set(self._start))[0],
        ),
        lambda: covered.test_the_quadratic_problem_is_solved_by_hand(bk.CentralDifference(), 0.3, "optimizer"),
    ),
    "Adam's second moment not differentiated": (
        lambda monkeypatch: monkeypatch.setattr(sama, "_adam", without_second_moment),
        lambda: covered.test_sama_is_the_derivative_of_the_step_taken("AdamW", 3, bk.CentralDifference(), 1e-4),
    ),
    "Adam's learning rate": (
        wrapped(optimizer, "step_derivative", lambda real, *arguments: scaled(real(*arguments), 2.0)),
        lambda: covered.test_sama_is_the_derivative_of_the_step_taken("AdamW", 3, bk.CentralDifference(), 1e-4),
    ),
    "dampening": (
        wrapped(sama, "_sgd", lambda real, o, g, p, *rest: real(o, {**g, "dampening": 0.0}, p, *rest)),
        lambda: covered.test_sama_is_the_derivative_of_the_step_taken("momentum", 3, bk.CentralDifference(), 1e-4),
    ),
    "the horizon": (
        wrapped(sama, "kappa", lambda real, beta, horizon: float(horizon)),
        lambda: covered.test_the_horizon_scales_the_term("AdamW"),
    ),
    "clipping": (
        wrapped(optimizer, "step_derivative", lambda real, o, f, g, horizon, clip: real(o, f, g, horizon, 1.0)),
        lambda: covered.test_clipping_multiplies_the_derivative(1e-3),
    ),
    "max_ratio": (
        wrapped(
            optimizer.BilevelOptimizer, "_capped",
            lambda real, self, a, b: ([x + y for x, y in zip(a, b, strict=True)], True),
        ),
        covered.test_max_ratio_cuts_the_second_term_and_says_so,
    ),
    "the norm, in a Hessian": (
        wrapped(
            train_loss.Passes, "run",
            lambda real, self, kind, *arguments, differentiate_norm=None, **keywords: real(self, kind, *arguments, **keywords),
        ),
        implicit_tests.test_implicit_hessian_products_differentiate_the_norm_on_an_encoder,
    ),
    "Neumann's step": (
        wrapped(implicit, "scaled", lambda real, vector, factor: vector),
        lambda: implicit_tests.test_implicit_estimators_on_a_convex_problem(bk.CentralDifference()),
    ),
    "dropout not paired": (
        lambda monkeypatch: (
            wrapped(train_loss.PassState, "restore", lambda real, self: None)(monkeypatch),
            wrapped(train_loss.TrainLoss, "_check_drawn", lambda real, self, drawn: None)(monkeypatch),
        ),
        lambda: covered.test_q_of_a_real_encoder_against_double_backward(bk.CentralDifference(), 1e-4, 0.2),
    ),
    "the base of another batch": (
        wrapped(
            train_loss.TrainLoss, "base_gradient",
            lambda real, self: real(self) if self._base is not None else scaled(real(self), 2.0),
        ),
        steps.test_difference_batch_is_paired_on_its_own_rows,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MUTATIONS))
def test_a_broken_term_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, test = MUTATIONS[name]
    test()
    if name == "validation before the lower step":
        real = optimizer.BilevelOptimizer._compute

        def remembering(self: Any, result: Any, watch: Any, undo: Any, *arguments: Any, **keywords: Any) -> None:
            self._start = undo.direction
            real(self, result, watch, undo, *arguments, **keywords)

        monkeypatch.setattr(optimizer.BilevelOptimizer, "_compute", remembering)
    patch(monkeypatch)
    with pytest.raises(AssertionError):
        test()


def test_around_which_directions_the_difference_is_taken() -> None:
    """`at` matters on a curved problem: the two are not the same estimate."""
    found = [
        second_order(bert_optimizer(small_bert(), estimator=bk.CentralDifference(at=at), xi=1.0), bert_loss, TRAIN, VALIDATION)
        for at in ("before", "after")
    ]
    assert error(found[0], found[1]) > 1e-3
