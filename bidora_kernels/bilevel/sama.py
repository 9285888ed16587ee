"""The derivative of the lower optimizer's own step, which makes the second-order term that of the step really taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .estimators import CentralDifference, DoubleBackward, Estimator, ForwardDifference
from .flat import FlatParameters, Vector
from .sharding import local_part


@dataclasses.dataclass(frozen=True)
class Sama(Estimator):
    """h = grad_M L_val - q(kappa J v): the derivative through the lower optimizer's own step.

    v = grad_V L_val after the step, q as `difference` takes it, and J the diagonal derivative of the step's length with respect
    to its gradient: for AdamW and Adam lr * du/dg with u = m_hat / (sqrt(v_hat) + eps), both moments differentiated (0 where
    v_hat is 0); for SGD lr, with momentum lr * (1 - dampening) after the first step. Clipping multiplies J by its coefficient,
    whose own derivative is left out. With `horizon` K the term is multiplied by kappa_K = sum_{k<=K} (1 - beta1^k) / (1 - beta1)
    (K for SGD; the momentum for beta1): what a lasting change of the gradient moves the directions by in K steps, while they
    move little. The second-order term is cut to `max_ratio` times the first-order one's length; math.inf leaves it alone.

    Where the horizon fails: on the first step, where Adam's is a sign function and J lives in the few entries whose gradient is
    about `eps`; and against a single real step, of which it is kappa times too long. 10 overshoots at large learning rates.

    Passes: as its `difference`. Memory: one more vector over the directions. To be taken wherever the lower optimizer is one of
    those it knows, others, amsgrad, nesterov and maximize raising by name. It always unrolls the optimizer's own step, so `xi`
    and `unroll` do not apply.
    """

    difference: Estimator = dataclasses.field(default_factory=ForwardDifference)
    horizon: int = 1
    max_ratio: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.difference, CentralDifference | ForwardDifference | DoubleBackward):
            raise TypeError(
                f"difference must be ForwardDifference, CentralDifference or DoubleBackward, got {type(self.difference).__name__}"
            )
        if not isinstance(self.horizon, int) or isinstance(self.horizon, bool) or self.horizon < 1:
            raise ValueError(f"horizon must be a positive integer, got {self.horizon!r}")
        if not self.max_ratio > 0:
            raise ValueError(f"max_ratio must be a positive number, got {self.max_ratio}")

    @property
    def reuses_lower_gradient(self) -> bool:
        """As its difference."""
        return self.difference.reuses_lower_gradient

    @property
    def differentiates_twice(self) -> bool:
        """As its difference."""
        return self.difference.differentiates_twice

    @property
    def takes_xi(self) -> bool:
        """No: J has the learning rate in it."""
        return False

    def mixed_derivative(self, loss: Any, vector: Vector) -> Vector:
        """As its difference."""
        return self.difference.mixed_derivative(loss, vector)


def check_lower_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer whose step is differentiated, unwrapped. Raises TypeError or ValueError where its derivative is not known."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        raise TypeError(
            f"Sama knows the step of AdamW, Adam and SGD, not of {type(optimizer).__name__}: "
            "take ForwardDifference or CentralDifference with xi"
        )
    for group in optimizer.param_groups:
        for option in ("amsgrad", "nesterov", "maximize"):
            if group.get(option):
                raise ValueError(f"Sama does not know the step of {type(optimizer).__name__} with {option}=True")
    return optimizer


def step_derivative(
    optimizer: torch.optim.Optimizer, flat: FlatParameters, grads: Sequence[Tensor | None], horizon: int, clip: float = 1.0
) -> Vector:
    """J * kappa over the directions, from the optimizer's state before its step and the gradients it will be given.

    A parameter without a gradient is not moved, so its J is 0. `clip` is the coefficient that was applied to the gradients.
    """
    optimizer = check_lower_optimizer(optimizer)
    pairs = zip(flat.parameters, grads, strict=True)
    given = {parameter: local_part(grad) for parameter, grad in pairs if grad is not None}
    results: dict[torch.nn.Parameter, tuple[Tensor, Tensor]] = {}  # J * kappa, and what it is 0 without
    for group in optimizer.param_groups:
        parameters = [parameter for parameter in group["params"] if parameter in given]
        if not parameters:
            continue
        if isinstance(optimizer, torch.optim.SGD):
            results.update(_sgd(optimizer, group, parameters, horizon, clip))
        else:
            results.update(_adam(optimizer, group, parameters, given, horizon, clip))
    values, roots = (
        flat.gather([None if (found := results.get(p)) is None else found[part] for p in flat.parameters]) for part in (0, 1)
    )
    return [torch.where(root > 0.0, value, 0.0) for value, root in zip(values, roots, strict=True)]


def kappa(beta: float, horizon: int) -> float:
    """sum_{k <= horizon} (1 - beta^k) / (1 - beta)."""
    return sum(sum(beta**power for power in range(k)) for k in range(1, horizon + 1))


def _sgd(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: list[Any], horizon: int, clip: float
) -> dict[Any, tuple[Tensor, Tensor]]:
    momentum = group["momentum"]
    factor = float(group["lr"]) * clip * kappa(momentum, horizon)
    results = {}
    for parameter in parameters:
        started = momentum != 0.0 and optimizer.state[parameter].get("momentum_buffer") is not None
        value = local_part(parameter.detach())
        rate = torch.full_like(value, factor * (1.0 - group["dampening"] if started else 1.0))
        results[parameter] = rate, torch.ones_like(value)
    return results


@torch.no_grad()
def _adam(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    parameters: list[Any],
    given: dict[Any, Tensor],
    horizon: int,
    clip: float,
) -> dict[Any, tuple[Tensor, Tensor]]:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    factor = float(group["lr"]) * clip * kappa(beta1, horizon)
    decays_gradient = not (isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False))
    results: dict[Any, tuple[Tensor, Tensor]] = {}
    for (dtype, device, step), members in _alike(optimizer, parameters).items():
        del dtype, device
        states = [optimizer.state[parameter] for parameter in members] if step > 1 else []
        values = [local_part(parameter.detach()) for parameter in members]
        grads = [given[parameter] for parameter in members]
        if group["weight_decay"] and decays_gradient:
            grads = list(torch._foreach_add(grads, values, alpha=group["weight_decay"]))
        correction1, correction2 = 1.0 - beta1**step, 1.0 - beta2**step
        # m_hat and sqrt(v_hat) as they will be in the step
        first = list(torch._foreach_mul(grads, (1.0 - beta1) / correction1))
        second = list(torch._foreach_mul(grads, grads))
        torch._foreach_mul_(second, (1.0 - beta2) / correction2)
        if step > 1:
            torch._foreach_add_(first, [local_part(state["exp_avg"]) for state in states], alpha=beta1 / correction1)
            torch._foreach_add_(second, [local_part(state["exp_avg_sq"]) for state in states], alpha=beta2 / correction2)
        root = list(torch._foreach_sqrt(second))
        del second
        denominator = list(torch._foreach_add(root, float(group["eps"])))
        # du/dg = [(1 - beta1)/c1 - m_hat (1 - beta2) g / (c2 root (root + eps))] / (root + eps)
        torch._foreach_mul_(first, grads)
        torch._foreach_mul_(first, -(1.0 - beta2) / correction2)
        torch._foreach_div_(first, root)
        torch._foreach_div_(first, denominator)
        torch._foreach_add_(first, (1.0 - beta1) / correction1)
        torch._foreach_div_(first, denominator)
        torch._foreach_mul_(first, factor)
        results.update(zip(members, zip(first, root, strict=True), strict=True))
    return results


def _alike(optimizer: torch.optim.Optimizer, parameters: list[Any]) -> dict[tuple[Any, Any, int], list[Any]]:
    """Parameters by dtype, device and the number of their next step."""
    alike: dict[tuple[Any, Any, int], list[Any]] = {}
    for parameter in parameters:
        step = int(optimizer.state[parameter].get("step", 0)) + 1 if optimizer.state.get(parameter) else 1
        alike.setdefault((parameter.dtype, parameter.device, step), []).append(parameter)
    return alike
