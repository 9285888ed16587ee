"""The estimators on the real encoder, MiniLM, and real sentences: Sama and the default radius against double backward."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import bidora_kernels as bk

from .problems import error, flat, second_order
from .test_estimators import functional_step

SENTENCES = [
    "The book was written by a friend of hers.", "Grain exports rose sharply in the third quarter.", "Who did you see Mary with?",
    "The bank raised its prime lending rate.", "They drank the pub dry.", "Him seems that the weather is fine.",
]  # fmt: skip


@pytest.fixture(scope="module")
def encoded(minilm_dir: Path) -> tuple[nn.Module, Any, Any]:
    """MiniLM with DoRA on query and value after a few steps of training in fp32, a train and a validation batch."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_dir)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(minilm_dir, num_labels=2).eval()
    bk.apply_dora(model, bk.DoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS"))

    def batch(texts: list[str], labels: list[int]) -> dict[str, torch.Tensor]:
        return {**tokenizer(texts, return_tensors="pt", padding=True), "labels": torch.tensor(labels)}

    train, validation = batch(SENTENCES[:4], [1, 0, 1, 0]), batch(SENTENCES[4:], [0, 1])
    parameters = [p for group in bk.split_parameters(model) for p in group]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        loss(model, train).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, train, validation


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def test_sama_is_the_derivative_of_adamws_step(encoded: tuple[nn.Module, Any, Any]) -> None:
    model, train, validation = encoded
    model = copy.deepcopy(model).double()
    direction, magnitude = bk.split_parameters(model)
    optimizer = bk.BilevelOptimizer(
        model, lower=torch.optim.AdamW(direction, lr=1e-3, weight_decay=0.1), upper=torch.optim.AdamW(magnitude, lr=1e-3),
        estimator=bk.Sama(bk.CentralDifference(), max_ratio=math.inf),
    )  # fmt: skip
    with bk.pass_mode(differentiate_norm=True, backend="reference"), sdpa_kernel(SDPBackend.MATH):
        for _ in range(2):
            optimizer.step(loss, train, validation)
        direct, second = optimizer.hypergradient(loss, train, validation, terms=True)
        one_sided = bk.BilevelOptimizer(
            model, lower=optimizer.lower, upper=optimizer.upper, estimator=bk.Sama(max_ratio=math.inf)
        )  # fmt: skip
        cheaper = second_order(one_sided, loss, train, validation)
        grads = torch.autograd.grad(loss(model, train), direction, create_graph=True)
        moved = functional_step(optimizer.lower, list(direction), list(grads))
        names = {id(parameter): key for key, parameter in model.named_parameters()}
        replaced = {names[id(p)]: value for p, value in zip(direction, moved, strict=True)}
        whole = torch.func.functional_call(model, replaced, (), dict(validation)).loss
        wanted = flat(list(torch.autograd.grad(whole, magnitude))) - flat(direct)
    assert error(flat(second), wanted) < 1e-4
    assert error(cheaper, wanted) < 2e-2


@pytest.mark.parametrize(
    ("dtype", "estimator", "cosine"),
    [
        (torch.float32, bk.CentralDifference(), 0.999),
        (torch.float32, bk.ForwardDifference(), 0.999),
        (torch.bfloat16, bk.CentralDifference(), 0.99),
        (torch.bfloat16, bk.ForwardDifference(), 0.95),
        (torch.float16, bk.CentralDifference(), 0.99),
        (torch.float16, bk.ForwardDifference(), 0.95),
    ],
    ids=repr,
)
def test_the_default_radius_on_a_real_encoder(
    encoded: tuple[nn.Module, Any, Any], dtype: torch.dtype, estimator: Any, cosine: float
) -> None:
    """The bounds that `python -m benchmarks.fidelity` holds later stages, other ranks and all layers to."""
    model, train, validation = encoded

    def rounded(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype if dtype.itemsize == 2 else torch.bfloat16, enabled=dtype.itemsize == 2):
            return loss(model, batch)

    def q(model: nn.Module, estimator: Any, loss_fn: Any) -> torch.Tensor:
        direction, magnitude = bk.split_parameters(model)
        optimizer = bk.BilevelOptimizer(
            model, lower=torch.optim.SGD(direction, lr=1.0), upper=torch.optim.SGD(magnitude, lr=1.0), estimator=estimator,
            xi=1.0, unroll="gradient",
        )  # fmt: skip
        return second_order(optimizer, loss_fn, train, validation).double()

    exact, got = q(copy.deepcopy(model).double(), bk.DoubleBackward(), loss), q(copy.deepcopy(model), estimator, rounded)
    assert float(got @ exact / (got.norm() * exact.norm())) >= cosine
    assert abs(float(got @ exact / (exact @ exact)) - 1) < 2 * (1 - cosine) + 0.01  # its length along the exact one
