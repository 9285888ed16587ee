"""An eager call bypasses the dispatcher: it computes what the operator does, and leaves to it what traces or intercepts."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bidora_kernels as bk
from bidora_kernels import native
from bidora_kernels.ops import _library

from .draws import Call, draw, run

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))


def _output(call: Call, leaves: list[torch.Tensor]) -> torch.Tensor:
    x, lora_A, lora_B, magnitude = leaves
    return bk.functional.dora_linear(x, call.weight, lora_A, lora_B, magnitude, call.scaling, call.bias)


def _leaves(call: Call) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in (call.x, call.lora_A, call.lora_B, call.magnitude)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("dropped", "detach_norm", "norm_known"), [(False, True, False), (True, False, False), (False, True, True)]
)
def test_the_operator_computes_the_same(
    dtype: torch.dtype, dropped: bool, detach_norm: bool, norm_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = draw(30, dtype=dtype, dropped=dropped, detach_norm=detach_norm, norm_known=norm_known, tokens=(3, 50))
    eager = run(call, "native")
    monkeypatch.setattr(_library, "is_eager", lambda *tensors: False)
    operator = run(call, "native")
    assert operator.keys() == eager.keys()
    assert all(torch.equal(operator[name], value) for name, value in eager.items())


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_whoever_intercepts_operators_sees_one_forward_and_one_backward() -> None:
    call = draw(31)
    seen = _Seen()
    leaves = _leaves(call)
    with seen:
        _output(call, leaves).backward(call.grad)
    ours = [name for name in seen.names if name.startswith("bidora_kernels")]
    assert ours == ["bidora_kernels.dora_linear.default", "bidora_kernels.dora_linear_backward.default"]


def test_without_gradients_nothing_is_kept() -> None:
    call = draw(32)
    with torch.no_grad():
        y = _output(call, _leaves(call))
    expected, storage = y.clone(), StorageWeakRef(y.untyped_storage())
    del y
    assert storage.expired()
    with torch.inference_mode():
        assert torch.equal(_output(call, _leaves(call)), expected)


def test_the_output_that_the_backward_reads_goes_through_the_hooks_of_saved_tensors() -> None:
    call, packed = draw(33, tokens=(40,)), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = _output(call, _leaves(call))
    assert packed.count(tuple(y.shape)) == 1


def test_without_hooks_the_output_is_let_go_with_the_pass() -> None:
    call = draw(33, tokens=(40,))
    y = _output(call, _leaves(call))
    node = y.grad_fn
    assert node.output[0].data_ptr() == y.data_ptr()  # no copy
    y.backward(call.grad)
    assert node.output is None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_keeps_no_output(use_reentrant: bool) -> None:
    call = draw(34, tokens=(40,))
    leaves, again = _leaves(call), _leaves(call)
    _output(call, leaves).backward(call.grad)
    outputs, runs = [], []

    def segment(*tensors: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        y = _output(call, list(tensors))
        outputs.append(StorageWeakRef(y.untyped_storage()))
        return y * 1.0

    y = checkpoint(segment, *again, use_reentrant=use_reentrant)
    assert outputs[0].expired()
    y.backward(call.grad)
    assert len(runs) == 2
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, again, strict=True))


def test_a_second_derivative_names_the_backend_that_has_it() -> None:
    call = draw(36, tokens=(40,))
    leaves = _leaves(call)
    first = torch.autograd.grad(_output(call, leaves), leaves, call.grad, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(sum(grad.sum() for grad in first), leaves)
