"""A bilevel step on a GPU: the device's generator, its GradScaler, the kernels in the passes."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import bidora_kernels as bk
from tests.bilevel.problems import TRAIN, VALIDATION, bert_loss, bert_optimizer, error, flat, second_order, small_bert

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU")]
DEVICE = "cuda"


def on_device(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.to(DEVICE) for tensor in batch)


@pytest.mark.parametrize(("estimator", "tolerance"), [(bk.CentralDifference(), 1e-4), (bk.ForwardDifference(), 2e-2)], ids=repr)
def test_dropout_masks_of_a_difference_are_paired(estimator: Any, tolerance: float) -> None:
    """They come from the device's generator; unpaired, the difference would be noise."""
    results = []
    for chosen in (bk.DoubleBackward(), estimator):
        torch.manual_seed(5)
        optimizer = bert_optimizer(small_bert(0.2, 0.2).to(DEVICE), estimator=chosen, xi=1.0, unroll="gradient")
        with bk.use_backend("reference"):  # the kernels serve no fp64
            results.append(second_order(optimizer, bert_loss, on_device(TRAIN), on_device(VALIDATION)))
    assert error(results[1], results[0]) < tolerance


@pytest.mark.parametrize("failing", range(3))
def test_a_step_that_fails_puts_the_devices_generator_back(failing: int) -> None:
    optimizer = bert_optimizer(small_bert(0.2, 0.2).to(DEVICE), estimator=bk.Sama())
    parameters = [p for group in bk.split_parameters(optimizer.model) for p in group]
    before = [p.detach().clone() for p in parameters], torch.get_device_module(DEVICE).get_rng_state()
    calls = 0

    def broken(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss = bert_loss(model, batch)
        if calls == failing + 1:
            raise RuntimeError("broken")
        return loss

    with pytest.raises(RuntimeError, match="broken"), bk.use_backend("reference"):
        optimizer.step(broken, on_device(TRAIN), on_device(VALIDATION))
    assert torch.equal(torch.get_device_module(DEVICE).get_rng_state(), before[1])
    assert all(torch.equal(p, old) for p, old in zip(parameters, before[0], strict=True))


def test_a_grad_scaler_backs_off_until_fp16_passes_are_finite() -> None:
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**40)
    optimizer = bert_optimizer(small_bert(dtype=torch.float32).to(DEVICE), estimator=bk.Sama(), grad_scaler=scaler)
    parameters = [p for group in bk.split_parameters(optimizer.model) for p in group]

    def half(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast(DEVICE, torch.float16):
            return bert_loss(model, batch)

    skipped = 0
    for _ in range(40):
        before, scale = [p.detach().clone() for p in parameters], scaler.get_scale()
        stats = optimizer.step(half, on_device(TRAIN), on_device(VALIDATION))
        same = all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
        assert same == (stats.skipped is not None)
        if stats.skipped is None:
            break
        assert scaler.get_scale() == scale / 2
        skipped += 1
    assert 0 < skipped < 40


@pytest.mark.parametrize("estimator", [bk.CentralDifference(), bk.ForwardDifference()], ids=repr)
def test_the_second_order_term_of_the_kernels(estimator: Any) -> None:
    """In fp32, against double backward in fp64; a small xi, so that both take the validation gradient at the same place."""
    found = []
    for chosen, dtype, backend in ((bk.DoubleBackward(), torch.float64, "reference"), (estimator, torch.float32, "triton")):
        optimizer = bert_optimizer(small_bert(dtype=dtype).to(DEVICE), estimator=chosen, xi=1e-6, unroll="gradient")
        with bk.use_backend(backend):
            terms = optimizer.hypergradient(bert_loss, on_device(TRAIN), on_device(VALIDATION), terms=True)
        found.append(flat(terms[1]).double())
    exact, got = found
    assert float(got @ exact / (got.norm() * exact.norm())) > 0.999
    assert abs(float(got @ exact / (exact @ exact)) - 1) < 0.02


def without_mask(model: nn.Module) -> nn.Module:
    """On the device, with attention that gets no mask: transformers makes one where it is recorded, and none otherwise."""
    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    model.set_attn_implementation("sdpa_without_mask")  # type: ignore[operator]
    return model.to(DEVICE)


def assert_equal(found: list[list[Tensor]], tolerance: float = 0.0) -> None:
    plain, recorded = found
    errors = [0.0 if torch.equal(a, b) else error(b, a) for a, b in zip(plain, recorded, strict=True)]
    assert max(errors) <= tolerance


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", ["balanced", "paper-code"])
def test_recorded_passes_take_the_same_steps(name: str, dropout: float) -> None:
    """Batches of two lengths and micro-batches, replayed, against the same without a graph: equal to the bit.

    But for central differences, which take the norms of both sides from one kernel where nothing is recorded: they differ in
    the last bit from those of each side alone.
    """
    model, found = without_mask(small_bert(dropout, dropout, torch.float32)), []
    for graphs in (False, True):
        torch.manual_seed(4)
        optimizer = bert_optimizer(copy.deepcopy(model), cuda_graphs=graphs, **bk.preset(name).optimizer)
        stats = []
        with bk.use_backend("triton"):
            for step in range(12):
                train, validation = (
                    (torch.randint(2, 40, (4, 5 + step % 2), device=DEVICE), torch.arange(4, device=DEVICE) % 3) for _ in range(2)
                )
                parts = bk.MicroBatches([train, validation], [1.0, 1.0 + step]) if step % 4 == 0 else train
                stats.append(optimizer.step(bert_loss, parts, validation))
        found.append([*(p.detach() for p in optimizer.model.parameters()), torch.tensor([one.train_loss for one in stats])])
    assert len(optimizer._graphs._recorded) > 4
    assert_equal(found, 0.0 if name == "balanced" else 1e-3)


def test_recorded_passes_under_autocast() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return bert_loss(model, batch)

    model, found = without_mask(small_bert(dtype=torch.float32)), []
    for graphs in (False, True):
        optimizer = bert_optimizer(copy.deepcopy(model), cuda_graphs=graphs, estimator=bk.Sama())
        for outer in (False, True) * 4:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=outer):
                optimizer.step(loss, on_device(TRAIN), on_device(VALIDATION))
        found.append([p.detach() for p in optimizer.model.parameters()])
    assert optimizer._graphs._recorded
    assert_equal(found)


WAITS = """
import torch
import bidora_kernels as bk
from tests.bilevel.problems import TRAIN, VALIDATION, bert_loss, bert_optimizer, small_bert

def loss(model, batch):
    value = bert_loss(model, batch)
    return value * (1.0 if value.item() > 0 else 2.0)

optimizer = bert_optimizer(small_bert(dtype=torch.float32).to("cuda"), cuda_graphs=True, estimator=bk.Sama())
train, validation = (tuple(t.to("cuda") for t in batch) for batch in (TRAIN, VALIDATION))
before = [p.clone() for p in optimizer.model.parameters()]
try:
    optimizer.step(loss, train, validation)
except RuntimeError as error:
    assert "cannot be recorded as a CUDA graph" in str(error), error
    torch.cuda.synchronize()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert all(torch.equal(a, b) for a, b in zip(optimizer.model.parameters(), before))
    print("refused")
"""


def test_a_loss_that_waits_for_the_device_is_refused() -> None:
    """In a process of its own: what a failed recording leaves of the device's generator is not for other tests."""
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "refused", done.stderr
