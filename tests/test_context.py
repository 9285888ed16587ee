"""`pass_mode`: what a pass needs is really skipped, and a recomputed segment keeps the mode of its first forward."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bidora_kernels as bk
from bidora_kernels.ops._context import DirectionPoint, current_mode


def trained_layer(**options: object) -> bk.FusedDoraLinear:
    layer = bk.FusedDoraLinear.from_linear(nn.Linear(12, 10), r=3, **options)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.magnitude.mul_(torch.linspace(0.5, 1.5, 10))
    return layer


def grads(layer: bk.FusedDoraLinear) -> dict[str, bool]:
    return {name: getattr(layer, name).grad is not None for name in ("lora_A", "lora_B", "magnitude")}


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        ({"direction"}, {"lora_A": True, "lora_B": True, "magnitude": False}),
        ({"magnitude"}, {"lora_A": False, "lora_B": False, "magnitude": True}),
        ({"direction", "magnitude"}, {"lora_A": True, "lora_B": True, "magnitude": True}),
        (set(), {"lora_A": False, "lora_B": False, "magnitude": False}),
    ],
)
def test_only_what_is_needed_gets_a_gradient(needs: set[str], expected: dict[str, bool]) -> None:
    layer, x = trained_layer(), torch.randn(4, 12, requires_grad=True)
    plain = layer(x)
    full = torch.autograd.grad(plain.square().sum(), [x, layer.lora_A, layer.lora_B, layer.magnitude])
    with bk.pass_mode(needs=needs):
        y = layer(x)
        y.square().sum().backward()
    torch.testing.assert_close(y, plain)
    assert grads(layer) == expected
    for tensor, grad in zip([x, layer.lora_A, layer.lora_B, layer.magnitude], full, strict=True):
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, grad)


def test_unknown_group() -> None:
    with (
        pytest.raises(ValueError, match=r"needs must be a subset of \['direction', 'magnitude'\], got \['weights'\]"),
        bk.pass_mode({"weights"}),
    ):
        pass


def test_modes_nest_and_end() -> None:
    with bk.pass_mode(needs={"magnitude"}, differentiate_norm=True):
        with bk.pass_mode(backend="reference", precise=True):
            inner = current_mode()
            assert (inner.needs, inner.differentiate_norm, inner.backend, inner.precise) == (
                {"magnitude"},
                True,
                "reference",
                True,
            )
        assert current_mode().backend is None
    assert current_mode().needs == {"direction", "magnitude"}


def test_the_mode_differentiates_a_detached_norm() -> None:
    layer = trained_layer(detach_norm=True)
    free = trained_layer(detach_norm=False)
    free.load_state_dict(layer.state_dict())
    x = torch.randn(5, 12)
    with bk.pass_mode(differentiate_norm=True):
        overridden = torch.autograd.grad(layer(x).square().sum(), layer.lora_B)[0]
    torch.testing.assert_close(overridden, torch.autograd.grad(free(x).square().sum(), free.lora_B)[0])
    detached = torch.autograd.grad(layer(x).square().sum(), layer.lora_B)[0]
    assert (overridden - detached).norm() > 0.05 * detached.norm()


def test_the_ops_report_the_dtype_they_saw() -> None:
    layer, x = trained_layer(), torch.randn(4, 12)
    with bk.pass_mode() as mode:
        layer(x)
    assert mode.seen_dtypes == {torch.float32}
    with bk.pass_mode() as mode, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert mode.seen_dtypes == {torch.bfloat16}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("other_thread", [True, False])
def test_a_recomputed_segment_keeps_its_mode(use_reentrant: bool, other_thread: bool) -> None:
    """The backward runs outside the block, and on a thread that never saw it."""
    layer, x = trained_layer(), torch.randn(4, 12, requires_grad=True)
    calls: list[int] = []

    def segment(inputs: Tensor) -> Tensor:
        calls.append(threading.get_ident())
        return layer(inputs)

    with bk.pass_mode(needs={"magnitude"}, differentiate_norm=True):
        loss = checkpoint(segment, x, use_reentrant=use_reentrant).square().sum()
    failures: list[BaseException] = []

    def run_backward() -> None:
        try:
            loss.backward()
        except BaseException as error:
            failures.append(error)

    if other_thread:
        thread = threading.Thread(target=run_backward)
        thread.start()
        thread.join()
    else:
        run_backward()
    assert not failures
    assert len(calls) == 2
    assert (calls[0] != calls[1]) == other_thread
    assert grads(layer) == {"lora_A": False, "lora_B": False, "magnitude": True}
    expected = torch.autograd.grad(layer(x).square().sum(), layer.magnitude)[0]
    torch.testing.assert_close(layer.magnitude.grad, expected)


def test_a_compiled_layer_follows_the_mode() -> None:
    """One graph traced under one mode must not serve another; eager and compiled gradients agree in each."""
    layer, x = trained_layer(), torch.randn(4, 12, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for options in ({}, {"needs": {"magnitude"}}, {"differentiate_norm": True}, {"needs": {"direction"}}, {}):
        results = []
        for run in (layer, compiled):
            layer.zero_grad(set_to_none=True)
            with bk.pass_mode(**options):
                y = run(x)
                (grad_x,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
                y.square().sum().backward()
            results.append([y, grad_x, layer.lora_A.grad, layer.lora_B.grad, layer.magnitude.grad])
        for eager, traced in zip(*results, strict=True):
            assert (eager is None) == (traced is None)
            if eager is not None:
                torch.testing.assert_close(eager, traced)


@pytest.mark.parametrize("slices", [True, False])
def test_the_norms_at_a_point_belong_to_their_weight(slices: bool) -> None:
    """Factors that several weights share, whole tensors or parts of one."""
    weights = torch.randn(64, 32) * torch.linspace(0.1, 3, 64).unsqueeze(1)
    first, second = (weights[:32], weights[32:]) if slices else (weights[:32].clone(), weights[32:].clone())
    lora_A, lora_B, magnitude, x = torch.randn(4, 32), torch.randn(32, 4), torch.ones(32), torch.randn(3, 32)
    with bk.pass_mode(point=DirectionPoint(lambda tensor: tensor)):
        found = [bk.functional.dora_linear(x, weight, lora_A, lora_B, magnitude, 1.0) for weight in (first, second, first)]
        first.mul_(torch.linspace(1, 2, 32))
        found.append(bk.functional.dora_linear(x, first, lora_A, lora_B, magnitude, 1.0))
    torch.testing.assert_close(found[1], bk.reference.dora_linear(x, second, lora_A, lora_B, magnitude, 1.0))
    torch.testing.assert_close(found[3], bk.reference.dora_linear(x, first, lora_A, lora_B, magnitude, 1.0))
    assert torch.equal(found[0], found[2])
