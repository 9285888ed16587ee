"""What each pass of a step asks the layers for, and what the cheaper settings leave true on average."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidora_kernels as bk
from bidora_kernels.ops._context import current_mode
from tests.tiny_models import bert, randomize

from .problems import TRAIN, VALIDATION, bert_loss, bert_optimizer, error, flat, second_order, small_bert

BOTH = {"direction", "magnitude"}
EVERY = [
    bk.FirstOrder, bk.CentralDifference, bk.ForwardDifference, bk.ForwardMode, bk.DoubleBackward, bk.Sama, bk.Neumann,
    bk.ConjugateGradient,
]  # fmt: skip


@pytest.mark.parametrize("estimator", EVERY, ids=lambda kind: kind.__name__)
def test_an_estimator_says_what_it_costs_and_when_to_take_it(estimator: type) -> None:
    text = " ".join(inspect.cleandoc(str(estimator.__doc__)).split())
    for part in (" = ", "Passes:", "Memory:"):
        assert part in text, part
    assert "To be taken" in text or "The right choice" in text


@pytest.mark.parametrize(
    ("estimator", "wanted"),
    [
        (bk.FirstOrder(), [{"direction"}, {"magnitude"}]),
        (bk.ForwardDifference(), [BOTH, BOTH, {"magnitude"}]),
        (bk.Sama(), [BOTH, BOTH, {"magnitude"}]),
        (bk.CentralDifference(), [{"direction"}, BOTH, {"magnitude"}, {"magnitude"}]),
        (bk.Sama(bk.CentralDifference()), [{"direction"}, BOTH, {"magnitude"}, {"magnitude"}]),
        (bk.Neumann(terms=2, step=1e-3), [{"direction"}, BOTH, {"direction"}, {"direction"}, {"magnitude"}, {"magnitude"}]),
        (bk.DoubleBackward(), [{"direction"}, BOTH, BOTH]),
        (bk.ForwardMode(), [{"direction"}, BOTH, BOTH]),
    ],
    ids=repr,
)
def test_a_pass_computes_what_it_needs(estimator: Any, wanted: list[set[str]]) -> None:
    """By what the layers are told, and by which parameters require a gradient meanwhile."""
    seen: list[set[str]] = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        needs = set(current_mode().needs)
        groups = dict(zip(("direction", "magnitude"), bk.split_parameters(model), strict=True))
        for name, group in groups.items():
            asked = name in needs and not (isinstance(estimator, bk.ForwardMode) and len(seen) == 2 and name == "direction")
            assert all(parameter.requires_grad is asked for parameter in group), (name, needs)
        seen.append(needs)
        return bert_loss(model, batch)

    stats = bert_optimizer(small_bert(), estimator=estimator).step(watched, TRAIN, VALIDATION)
    assert seen == wanted
    assert stats.passes == len(wanted)


def test_no_pass_of_an_iteration_without_an_upper_part_but_the_lower_one() -> None:
    optimizer = bert_optimizer(small_bert(), upper_every=2)
    optimizer.step(bert_loss, TRAIN, VALIDATION)
    seen: list[set[str]] = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        seen.append(set(current_mode().needs))
        return bert_loss(model, batch)

    optimizer.step(watched, TRAIN)
    assert seen == [{"direction"}]


@pytest.mark.parametrize("estimator", [bk.CentralDifference(), bk.ForwardDifference()], ids=repr)
def test_a_difference_batch_is_unbiased(estimator: Any) -> None:
    """Over the parts of a batch, each as likely as its size, the second-order term's mean is that of the whole batch."""
    options: dict[str, Any] = {"estimator": estimator, "xi": 1.0, "unroll": "gradient"}
    whole = second_order(bert_optimizer(small_bert(), **options), bert_loss, TRAIN, VALIDATION)
    total = torch.zeros_like(whole)
    for row in range(3):

        def part(batch: Any, row: int = row) -> Any:
            return batch[0][row : row + 1], batch[1][row : row + 1]

        term = second_order(bert_optimizer(small_bert(), difference_batch=part, **options), bert_loss, TRAIN, VALIDATION)
        assert error(term, whole) > 0.1
        total += term / 3
    assert error(total, whole) < 1e-5


@pytest.mark.parametrize("r", [1, 4, 12])
@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_the_default_radius_fits_adapters_of_any_size_and_rank(r: int, size: float) -> None:
    """Longer directions with a smaller scaling are the same problem to a radius that is relative to them."""

    def made(dtype: torch.dtype) -> nn.Module:
        model = bert()
        config = bk.DoraConfig(r=r, lora_alpha=r / size**2, target_modules=["query", "value"], modules_to_save=None)
        bk.apply_dora(model, config)
        randomize(model)
        with torch.no_grad():
            for parameter in bk.split_parameters(model)[0]:
                parameter.mul_(size)
        return model.to(dtype).train()

    def q(dtype: torch.dtype, estimator: Any) -> Tensor:
        optimizer = bert_optimizer(made(dtype), torch.optim.SGD, estimator=estimator, xi=1e-6, unroll="gradient")
        return flat(optimizer.hypergradient(bert_loss, TRAIN, VALIDATION, terms=True)[1]).double()

    exact = q(torch.float64, bk.DoubleBackward())
    for estimator in (bk.CentralDifference(), bk.ForwardDifference()):
        got = q(torch.float32, estimator)
        assert float(got @ exact / (got.norm() * exact.norm())) >= 0.999, estimator
        assert abs(float(got @ exact / (exact @ exact)) - 1) < 0.02, estimator
