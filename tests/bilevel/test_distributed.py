"""Two processes with half the batch each take the step that one process takes with the whole batch: DDP and FSDP2."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

import bidora_kernels as bk
from bidora_kernels.ops import _skipped_tokens, frozen_linear

from .problems import bert_loss, error, flat, small_bert

ESTIMATORS = [
    bk.FirstOrder(), bk.FirstOrder(at="before"), bk.CentralDifference(), bk.CentralDifference(at="after"),
    bk.ForwardDifference(), bk.ForwardMode(), bk.DoubleBackward(), bk.Sama(), bk.Neumann(terms=2, step=1e-3),
    bk.ConjugateGradient(iterations=2, damping=1.0),
]  # fmt: skip


SHARDED = [
    bk.Sama(max_ratio=0.01), bk.Sama(), bk.FirstOrder(), bk.ForwardDifference(), bk.CentralDifference(),
    bk.ConjugateGradient(iterations=2, damping=1.0),
]  # fmt: skip
HALF: dict[str, Any] = {"difference_batch": 0.5}
HALVED = [bk.Sama(), bk.ForwardDifference(), bk.CentralDifference()]
PENALIZED = [bk.Sama(), bk.CentralDifference(), bk.Neumann(terms=2, step=1e-3), bk.ConjugateGradient(iterations=2, damping=1.0)]
REFUSED = [
    bk.DoubleBackward(), bk.ForwardMode(), bk.Sama(bk.DoubleBackward()), bk.Neumann(difference=bk.DoubleBackward()),
]  # fmt: skip


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 40, (4, 7), generator=generator), torch.randint(3, (4,), generator=generator)


def two_steps(
    estimator: Any, train: Any, validation: Any, wrap: Any = None, lower: Any = torch.optim.SGD, **options: Any
) -> tuple[Any, Any]:
    dropout, draws = options.pop("dropout", 0.0), options.pop("draws", None)
    model = small_bert(dropout)
    if draws is not None:
        torch.manual_seed(draws)
    direction, magnitude = bk.split_parameters(model)
    wrapped = model if wrap is None else wrap(model)
    if wrap is shard:
        direction, magnitude = bk.split_parameters(model)  # fully_shard puts other parameters in their place
    optimizer = bk.BilevelOptimizer(
        wrapped, lower=lower(direction, lr=1e-2), upper=torch.optim.AdamW(magnitude, lr=1e-2), estimator=estimator,
        lower_max_norm=0.5, **options,
    )  # fmt: skip
    for _ in range(2):
        if wrap is shard:
            optimizer.hypergradient(bert_loss, train, validation)  # leaves no trace
        stats = optimizer.step(bert_loss, train, validation)
    values = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in (*direction, *magnitude)]
    return flat(values), stats


def shard(model: torch.nn.Module) -> torch.nn.Module:
    """As FSDP2 is used: every layer, then the whole."""
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


def frozen(model: torch.nn.Module) -> torch.nn.Module:
    """The magnitude and a direction of the first layer are frozen, though their optimizers hold them."""
    layer = model.bert.encoder.layer[0].attention.self.query
    layer.magnitude.requires_grad_(False)
    layer.lora_A.requires_grad_(False)
    return model


def compiled_ddp(model: torch.nn.Module) -> Any:
    return torch.compile(torch.nn.parallel.DistributedDataParallel(model), backend="eager")


def frozen_in_ddp(model: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.parallel.DistributedDataParallel(frozen(model))


def process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    # on the native backend frozen layers of any size take the way of large ones, and leave out tokens without a gradient
    frozen_linear.WORTH_FROM = _skipped_tokens.SKIPS_FROM = _skipped_tokens.TOKENS_FROM = 1
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    half = slice(2 * rank, 2 * rank + 2)
    train, validation = ((ids[half], labels[half]) for ids, labels in (batch(1), batch(2)))
    found = {}
    found["ddp"] = [two_steps(e, train, validation, torch.nn.parallel.DistributedDataParallel) for e in ESTIMATORS]
    found["fsdp, SGD"] = [two_steps(e, train, validation, shard) for e in SHARDED]
    found["fsdp, AdamW"] = [two_steps(e, train, validation, shard, torch.optim.AdamW) for e in SHARDED[:2]]
    found["ddp, half"] = [two_steps(e, train, validation, torch.nn.parallel.DistributedDataParallel, **HALF) for e in HALVED]
    found["fsdp, half"] = [two_steps(e, train, validation, shard, **HALF) for e in HALVED]
    unequal = tuple(part[:3] if rank == 0 else part[3:] for part in batch(1))
    found["ddp, unequal"] = [two_steps(e, unequal, validation, torch.nn.parallel.DistributedDataParallel, **HALF) for e in HALVED]
    found["ddp, compiled"] = [two_steps(bk.Sama(), train, validation, compiled_ddp)]
    found["ddp, frozen"] = [two_steps(e, train, validation, frozen_in_ddp, torch.optim.AdamW) for e in ESTIMATORS]
    found["group"] = [two_steps(e, train, validation, process_group=dist.group.WORLD) for e in ESTIMATORS]
    penalty = bk.OrthogonalPenalty(0.1)
    ddp = torch.nn.parallel.DistributedDataParallel
    found["ddp, penalty"] = [two_steps(e, train, validation, ddp, penalty=penalty) for e in PENALIZED]
    # each process draws masks of its own, the same ones for every estimator
    found["ddp, dropout"] = [two_steps(e, train, validation, ddp, dropout=0.3, draws=rank) for e in ESTIMATORS]
    refusals = [refusal(estimator=estimator) for estimator in REFUSED]
    refusals += [refusal(penalty=bk.OrthogonalPenalty(0.1)), refusal(grad_scaler=torch.amp.GradScaler("cpu"))]
    with pytest.raises(ValueError, match=r"the same share of every process's batch, got 0\.667 to 1: give equal numbers"):
        two_steps(bk.Sama(), unequal, validation, shard, **HALF)
    failed_step_changes_nothing(train, validation)
    numbers = ("train_loss", "validation_loss", "direct_norm", "second_order_norm", "cosine", "radius", "hypergradient_norm")
    results = {
        name: [(values, {n: getattr(stats, n) for n in numbers}) for values, stats in pairs] for name, pairs in found.items()
    }
    torch.save((results, refusals), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def refusal(**options: Any) -> str:
    model = shard(small_bert())
    direction, magnitude = bk.split_parameters(model)
    try:
        bk.BilevelOptimizer(model, lower=torch.optim.SGD(direction, lr=0.1), upper=torch.optim.SGD(magnitude, lr=0.1), **options)
    except (TypeError, ValueError) as error:
        return str(error)
    return "not refused"


def failed_step_changes_nothing(train: Any, validation: Any) -> None:
    model = shard(small_bert())
    direction, magnitude = bk.split_parameters(model)
    optimizer = bk.BilevelOptimizer(
        model, lower=torch.optim.AdamW(direction, lr=1e-2), upper=torch.optim.AdamW(magnitude, lr=1e-2)
    )
    optimizer.step(bert_loss, train, validation)
    before = [p.to_local().clone() for p in (*direction, *magnitude)]
    calls = 0

    def failing(model: torch.nn.Module, given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ArithmeticError
        return bert_loss(model, given)

    with pytest.raises(ArithmeticError):
        optimizer.step(failing, train, validation)
    assert all(torch.equal(p.to_local(), old) for p, old in zip((*direction, *magnitude), before, strict=True))


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo backend")
def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(process, (port, str(tmp_path)), nprocs=2)
    (first, refusals), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    start = flat([p for group in bk.split_parameters(small_bert()) for p in group])
    for name, estimators, lower in (
        ("ddp", ESTIMATORS, torch.optim.SGD), ("fsdp, SGD", SHARDED, torch.optim.SGD),
        ("fsdp, AdamW", SHARDED[:2], torch.optim.AdamW), ("group", ESTIMATORS, torch.optim.SGD),
    ):  # fmt: skip
        for estimator, (values, numbers), (other, others) in zip(estimators, first[name], second[name], strict=True):
            assert torch.equal(values, other), f"the processes part with {estimator}, {name}"
            assert numbers == others
            wanted, stats = two_steps(estimator, batch(1), batch(2), lower=lower)
            assert error(values - start, wanted - start) < 1e-5, (estimator, name)
            for key, number in numbers.items():
                alone = getattr(stats, key)
                assert (number == alone) if alone is None else (number == pytest.approx(alone, rel=1e-5)), (estimator, name, key)
    ((values, _),), ((other, _),) = first["ddp, compiled"], second["ddp, compiled"]
    assert torch.equal(values, other)
    assert error(values - start, two_steps(bk.Sama(), batch(1), batch(2))[0] - start) < 1e-5
    ids, labels = batch(1)
    halves = bk.MicroBatches(
        [(ids[row : row + 1], labels[row : row + 1]) for row in (0, 2, 1, 3)]
    )  # each process's first row first
    for name in ("ddp, half", "fsdp, half"):
        for estimator, (values, numbers), (other, _) in zip(HALVED, first[name], second[name], strict=True):
            assert torch.equal(values, other), f"the processes part with {estimator}, {name}"
            wanted, stats = two_steps(estimator, halves, batch(2), **HALF)
            assert error(values - start, wanted - start) < 1e-5, (estimator, name)
            assert numbers["second_order_norm"] == pytest.approx(stats.second_order_norm, rel=1e-5)
            assert numbers["train_loss"] == pytest.approx(stats.train_loss, rel=1e-9)
    ids, labels = batch(1)
    pieces = [(ids[rows], labels[rows]) for rows in (slice(0, 3), slice(3, 4), slice(0, 2))]
    share = {"difference_batch": lambda _: bk.MicroBatches([pieces[2], pieces[1]])}
    for estimator, (values, _), (other, _) in zip(HALVED, first["ddp, unequal"], second["ddp, unequal"], strict=True):
        assert torch.equal(values, other), f"the processes part with {estimator} and unequal rows"
        wanted, _ = two_steps(estimator, bk.MicroBatches(pieces[:2]), batch(2), **share)
        assert error(values - start, wanted - start) < 1e-5, estimator
    for estimator, (values, _), (other, _) in zip(ESTIMATORS, first["ddp, frozen"], second["ddp, frozen"], strict=True):
        assert torch.equal(values, other)
        wanted, _ = two_steps(estimator, batch(1), batch(2), frozen, torch.optim.AdamW)
        assert error(values - start, wanted - start) < 1e-4, estimator
    for estimator, (values, _), (other, _) in zip(PENALIZED, first["ddp, penalty"], second["ddp, penalty"], strict=True):
        assert torch.equal(values, other), f"the processes part with {estimator} and a penalty"
        wanted, _ = two_steps(estimator, batch(1), batch(2), penalty=bk.OrthogonalPenalty(0.1))
        assert error(values - start, wanted - start) < 1e-5, estimator
    dropped = zip(ESTIMATORS, first["ddp, dropout"], second["ddp, dropout"], strict=True)
    for estimator, (values, numbers), (other, others) in dropped:
        assert torch.equal(values, other), f"the processes part with {estimator} and dropout"
        assert numbers == others
    terms = {repr(e): numbers["second_order_norm"] for e, (_, numbers) in zip(ESTIMATORS, first["ddp, dropout"], strict=True)}
    exact = terms[repr(bk.DoubleBackward())]
    assert terms[repr(bk.ForwardMode())] == pytest.approx(exact, rel=1e-8)
    assert terms[repr(bk.CentralDifference())] == pytest.approx(exact, rel=1e-4)  # other masks would be off by a good part
    assert all("differentiates twice" in text for text in refusals[:4])
    assert ["penalty is not supported" in refusals[4], "grad_scaler is not supported" in refusals[5]] == [True, True]
