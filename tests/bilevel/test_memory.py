"""No graph is kept between passes: a bilevel step needs little more memory than plain DoRA's step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bidora_kernels as bk
from benchmarks.memory import peak_bytes
from tests.tiny_models import randomize

from .problems import bert_loss, bert_optimizer, flat

transformers = pytest.importorskip("transformers")
BATCH = (torch.randint(2, 40, (16, 32), generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3)
DIFFERENCES = [bk.Sama(), bk.Sama(bk.CentralDifference()), bk.ForwardDifference(), bk.CentralDifference(at="after")]


def model(r: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    found = transformers.BertForSequenceClassification(config).eval()
    bk.apply_dora(found, bk.DoraConfig(r=r, target_modules="all-linear", task_type="SEQ_CLS"))
    randomize(found)
    return found.float().train()


def adapter_bytes(module: torch.nn.Module) -> int:
    return 4 * sum(p.numel() for group in bk.split_parameters(module) for p in group)


def plain_peak(r: int) -> int:
    """A step of AdamW on everything that trains, its gradients let go at the end as the bilevel step does."""
    module = model(r)
    optimizer = torch.optim.AdamW([p for group in bk.split_parameters(module) for p in group], lr=1e-3)

    def step() -> None:
        bert_loss(module, BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return peak_bytes(step, "cpu")


def bilevel_peak(r: int, estimator: Any) -> int:
    optimizer = bert_optimizer(model(r), estimator=estimator)
    optimizer.step(bert_loss, BATCH, BATCH)
    return peak_bytes(lambda: optimizer.step(bert_loss, BATCH, BATCH), "cpu")


@pytest.mark.parametrize("r", [2, 64])
@pytest.mark.parametrize("estimator", DIFFERENCES, ids=repr)
def test_a_step_needs_four_adapters_beyond_plain_dora(estimator: Any, r: int) -> None:
    """Four: parameters, gradients, v and the saved copy. Optimizer states apart: their copy, to undo a failed step, is two more.

    At r = 2 activations are the larger part, so a graph that stayed alive would be seen; at r = 64 the adapters are.
    """
    size = adapter_bytes(model(r))
    assert bilevel_peak(r, estimator) <= plain_peak(r) + 4 * size + 2 * size


def test_a_graph_that_stays_alive_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meter sees what the test above is about: the lower pass's graph, held by its loss."""
    from bidora_kernels.bilevel import passes

    kept: list[torch.Tensor] = []
    checked = passes.checked_loss

    def holding(loss: torch.Tensor, *arguments: Any) -> torch.Tensor:
        kept.append(loss + 0.0)
        return checked(loss, *arguments)

    size, limit = adapter_bytes(model(2)), plain_peak(2)
    honest = bilevel_peak(2, bk.Sama())
    monkeypatch.setattr(passes.Passes, "_backward", lambda self, loss, weight: (loss * weight).backward(retain_graph=True))
    monkeypatch.setattr(passes, "checked_loss", holding)
    assert bilevel_peak(2, bk.Sama()) > max(honest, limit + 6 * size)


def test_memory_does_not_grow_from_step_to_step() -> None:
    optimizer = bert_optimizer(model(8), estimator=bk.Sama())
    for _ in range(2):
        optimizer.step(bert_loss, BATCH, BATCH)
    assert len({peak_bytes(lambda: optimizer.step(bert_loss, BATCH, BATCH), "cpu") for _ in range(3)}) == 1
    assert flat(list(bk.split_parameters(optimizer.model)[0])).isfinite().all()
