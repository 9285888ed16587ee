"""Two processes with half the batch each take the step that one process takes with the whole batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import bidora_kernels as bk

from .problems import bert_loss, bert_optimizer, error, flat, small_bert

ESTIMATORS = [
    bk.FirstOrder(), bk.CentralDifference(), bk.CentralDifference(at="after"), bk.ForwardDifference(), bk.ForwardMode(),
    bk.DoubleBackward(), bk.Sama(), bk.Neumann(terms=2, step=1e-3), bk.ConjugateGradient(iterations=2, damping=1.0),
]  # fmt: skip


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 40, (4, 7), generator=generator), torch.randint(3, (4,), generator=generator)


def two_steps(estimator: Any, train: Any, validation: Any, wrap: Any = None) -> tuple[torch.Tensor, Any]:
    model = small_bert()
    optimizer = bert_optimizer(model, torch.optim.SGD, estimator=estimator, lower_max_norm=0.5)
    if wrap is not None:
        optimizer = bk.BilevelOptimizer(
            wrap(model), lower=optimizer.lower, upper=optimizer.upper, estimator=estimator, lower_max_norm=0.5
        )  # fmt: skip
    for _ in range(2):
        stats = optimizer.step(bert_loss, train, validation)
    return flat([parameter for group in bk.split_parameters(model) for parameter in group]), stats


def process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    half = slice(2 * rank, 2 * rank + 2)
    train, validation = ((ids[half], labels[half]) for ids, labels in (batch(1), batch(2)))
    train, validation = tuple(train), tuple(validation)
    results = [two_steps(e, train, validation, torch.nn.parallel.DistributedDataParallel) for e in ESTIMATORS]
    torch.save([(values, stats.train_loss, stats.hypergradient_norm) for values, stats in results], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo backend")
def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(process, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    start = flat([p for group in bk.split_parameters(small_bert()) for p in group])
    for estimator, (values, loss, length), (other, *_) in zip(ESTIMATORS, first, second, strict=True):
        assert torch.equal(values, other), f"the processes part with {estimator}"
        wanted, stats = two_steps(estimator, batch(1), batch(2))
        assert error(values - start, wanted - start) < 1e-5, estimator
        assert loss == pytest.approx(stats.train_loss)
        assert length == pytest.approx(stats.hypergradient_norm, rel=1e-5)
