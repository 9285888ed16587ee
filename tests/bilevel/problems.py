"""Problems with known answers: a quadratic one, a curved one, and a small BERT with DoRA layers, all in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import bidora_kernels as bk
from tests.tiny_models import bert, randomize, tokens

DOUBLE = torch.float64


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


class Quadratic(nn.Module):
    """L_train = V'AV/2 - V'BM and L_val = |V - t|^2/2 + |M - s|^2/2; batches are names of the losses, or (name, factor)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=DOUBLE)

        root = draw(6, 6)
        self.A, self.B, self.t, self.s = root @ root.T / 6 + torch.eye(6, dtype=DOUBLE), draw(6, 4), draw(6), draw(4)
        self.left, self.right = nn.Parameter(draw(2, 2)), nn.Parameter(draw(2))
        self.M = nn.Parameter(draw(4))

    @property
    def lower_parameters(self) -> list[nn.Parameter]:
        return [self.left, self.right]

    @property
    def V(self) -> Tensor:  # noqa: N802
        return torch.cat([self.left.flatten(), self.right])

    def loss(self, name: str) -> Tensor:
        if name == "train":
            return self.V @ self.A @ self.V / 2 - self.V @ self.B @ self.M
        return ((self.V - self.t).square().sum() + (self.M - self.s).square().sum()) / 2


class Curved(Quadratic):
    """The same with terms of higher order in the train loss, so that differences have truncation errors."""

    def loss(self, name: str) -> Tensor:
        if name == "train":
            return super().loss(name) + (self.V.sin() @ self.B @ self.M.cos()) + (self.V @ self.B @ self.M).square() / 8
        return super().loss(name)


def toy_loss(model: Quadratic, batch: Any) -> Tensor:
    name, factor = batch if isinstance(batch, tuple) else (batch, 1.0)
    return model.loss(name) * factor


def toy_optimizer(model: Quadratic, lower: str = "SGD", upper: str = "SGD", **options: Any) -> bk.BilevelOptimizer:
    return bk.BilevelOptimizer(
        model,
        lower=getattr(torch.optim, lower)(model.lower_parameters, lr=options.pop("lr", 0.05)),
        upper=getattr(torch.optim, upper)([model.M], lr=0.1),
        **options,
    )


def small_bert(dropout: float = 0.0, lora_dropout: float = 0.0, dtype: torch.dtype = DOUBLE) -> nn.Module:
    model = bert()
    config = bk.DoraConfig(r=2, lora_dropout=lora_dropout, target_modules=["query", "value"], modules_to_save=["classifier"])
    bk.apply_dora(model, config)
    randomize(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = dropout
    return model.to(dtype).train()


TRAIN = (tokens(1), torch.tensor([0, 1, 2]))
VALIDATION = (tokens(2), torch.tensor([2, 1, 0]))


def bert_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(input_ids=batch[0], labels=batch[1]).loss


def bert_optimizer(model: nn.Module, lower: Any = torch.optim.AdamW, lr: float = 1e-2, **options: Any) -> bk.BilevelOptimizer:
    direction, magnitude = bk.split_parameters(model)
    return bk.BilevelOptimizer(
        model, lower=lower(direction, lr=lr), upper=torch.optim.AdamW(magnitude, lr=1e-2), **options
    )  # fmt: skip


def scheduled(model: nn.Module, **options: Any) -> bk.BilevelOptimizer:
    direction, magnitude = bk.split_parameters(model)
    lower, upper = torch.optim.AdamW(direction, lr=1e-2), torch.optim.AdamW(magnitude, lr=1e-2)
    return bk.BilevelOptimizer(
        model, lower=lower, upper=upper, lower_scheduler=torch.optim.lr_scheduler.ExponentialLR(lower, 0.9),
        upper_scheduler=torch.optim.lr_scheduler.ExponentialLR(upper, 0.8), **options,
    )  # fmt: skip


def second_order(optimizer: bk.BilevelOptimizer, loss_fn: Any, train: Any, validation: Any) -> Tensor:
    return flat(optimizer.hypergradient(loss_fn, train, validation, terms=True)[1])


def everything(optimizer: bk.BilevelOptimizer) -> list[Any]:
    """Copies of all that a step may change."""
    parameters = [p for part in (optimizer.lower, optimizer.upper) for group in part.param_groups for p in group["params"]]
    found: list[Any] = [parameter.detach().clone() for parameter in parameters]
    found += [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
    found.append(torch.get_rng_state())
    for part in (optimizer.lower, optimizer.upper):
        state = part.state_dict()
        found.append([{**group} for group in state["param_groups"]])
        for entry in state["state"].values():
            found += [value.clone() if torch.is_tensor(value) else value for _, value in sorted(entry.items())]
    for part in (optimizer.lower_scheduler, optimizer.upper_scheduler, optimizer.grad_scaler):
        found.append(None if part is None else {k: v for k, v in part.state_dict().items() if not callable(v)})
    return found


def assert_same(left: list[Any], right: list[Any]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        if torch.is_tensor(a):
            assert torch.equal(a, b)
        else:
            assert a == b
