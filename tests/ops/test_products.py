"""Which operator and which library multiply for the native backend, and that either library gives the layer's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bidora_kernels as bk
from bidora_kernels import native
from bidora_kernels.ops import _workspace

from .draws import FROZEN, MERGED, draw, run, violations

OPERATOR = "mkldnn::_linear_pointwise"
pytestmark = [
    pytest.mark.skipif(native.why_unavailable() is not None, reason="the native library is not there"),
    pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch was built without oneDNN"),
]


def count(call: object, backend: str = "native") -> tuple[dict[str, torch.Tensor], int]:
    """The numbers of a forward and backward pass, and how many products oneDNN did."""
    with torch.profiler.profile() as profile:
        found = run(call, backend)  # type: ignore[arg-type]
    return found, sum(event.count for event in profile.key_averages() if event.key == OPERATOR)


SHAPES = [(24, 40, 3, (2, 90)), (17, 33, 1, (70,)), (40, 17, 20, (3, 5, 7)), (24, 40, 3, (17,)), (64, 64, 3, (17,))]


@pytest.mark.parametrize("norm_known", [False, True])
@pytest.mark.parametrize(("shape", "merges"), [(MERGED, True), (FROZEN, False)], ids=["merged", "frozen"])
def test_a_training_layer_is_one_operator_each_way(
    shape: tuple[Any, ...], merges: bool, norm_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watch(name: str, merged: int) -> None:
        original = getattr(native, name)

        def watched(*args: Any) -> Any:
            seen.append((name, args[merged] is not None))
            return original(*args)

        monkeypatch.setattr(native, name, watched)

    watch("dora_linear", 7)
    watch("dora_linear_backward", 10)
    for name in ("weight_norm", "merged_weight", "product", "compose", "few_tokens", "adapter_gradients"):
        monkeypatch.setattr(native, name, lambda *args, name=name: pytest.fail(f"{name} was called by itself"))
    call = draw(1, *shape, norm_known=norm_known)
    merges_forward = merges and not norm_known  # with known norms the frozen weight is the cheaper one for so few tokens
    leaves = [t.detach().requires_grad_() for t in (call.x, call.lora_A, call.lora_B, call.magnitude)]
    with bk.use_backend("native"):
        y = bk.functional.dora_linear(leaves[0], call.weight, *leaves[1:], scaling=call.scaling, bias=call.bias, norm=call.norm)
        torch.autograd.grad(y, leaves, call.grad)
    assert seen == [("dora_linear", merges_forward), ("dora_linear_backward", merges)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "transposed", "sliced", "strided"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_layer_by_onednn(
    shape: tuple[int, int, int, tuple[int, ...]], layout: str, bias: bool, dropped: bool, by_onednn: None
) -> None:
    call = draw(1, *shape, layout=layout, bias=bias, dropped=dropped)
    ours, products = count(call)
    assert violations(call, ours) == []
    dense = layout in ("rows", "transposed")
    if dropped:
        assert products == (4 if dense else 1)
    else:
        assert products == (0 if shape == FROZEN and layout == "sliced" else 2)  # a strided weight was copied without gaps


def test_eval_mode_by_onednn(by_onednn: None) -> None:
    layer, x = bk.FusedDoraLinear.from_linear(torch.nn.Linear(64, 64), r=3).eval(), torch.randn(17, 64)
    torch.nn.init.normal_(layer.lora_B)
    with torch.no_grad(), bk.use_backend("native"):
        first = layer(x)
        assert layer._decode is not None
        with torch.profiler.profile() as profile:
            second = layer(x)
        assert any(event.key == OPERATOR for event in profile.key_averages())
        torch.testing.assert_close(second, first)
        with bk.use_backend("reference"):
            torch.testing.assert_close(second, layer(x), rtol=1e-5, atol=1e-5)


def test_a_weight_with_gaps_stays_with_torch(by_onednn: None) -> None:
    assert native.takes_onednn(90, torch.empty(24, 40))
    assert native.takes_onednn(90, torch.empty(40, 24).t())
    for weight in (torch.empty(24, 80)[:, ::2], torch.empty(24, 80)[:, :40], torch.empty(24, 1).expand(24, 40)):
        assert not native.takes_onednn(90, weight)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_a_weight_in_parts(layout: str, dropped: bool, by_onednn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_workspace, "LIMIT_BYTES", 40 * 4 * 7)  # seven rows at a time
    _workspace.release_workspace()
    call = draw(2, out_features=30, layout=layout, dropped=dropped, tokens=(90,))
    ours, products = count(call)
    assert violations(call, ours) == []
    assert products > 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype, by_onednn: None) -> None:
    """fp64 is multiplied by torch's library; 16-bit layers are multiplied in fp32, or where the processor does that in bf16."""
    call = draw(3, 24, 40, 3, (2, 90), dtype)
    ours, products = count(call)
    assert violations(call, ours) == []
    assert products == 0 if dtype is torch.float64 or native.multiplies_bf16() else products == 2


def test_who_turns_onednn_off_gets_none(by_onednn: None) -> None:
    call = draw(4, tokens=(90,))
    with torch.backends.mkldnn.flags(enabled=False):
        _, products = count(call)
    assert products == 0
    assert count(call)[1] == 2


def test_small_products_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "onednn_is_faster", lambda: True)
    weight = torch.empty(768, 768)
    assert native.takes_onednn(512, weight)
    assert not native.takes_onednn(17, weight)
    assert not native.takes_onednn(512, weight.double())


def test_an_output_by_onednn_may_be_overwritten(by_onednn: None) -> None:
    """It is no view, which autograd would not let a caller write to."""
    found = []
    for backend in ("native", "reference"):
        call = draw(5, tokens=(3, 30))
        leaves = [tensor.requires_grad_() for tensor in (call.lora_A, call.lora_B, call.magnitude)]
        with bk.use_backend(backend):
            y = bk.functional.dora_linear(call.x, call.weight, *leaves, call.scaling, call.bias)
        found.append(torch.autograd.grad((torch.nn.functional.relu_(y) * call.grad).sum(), leaves))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_only_other_processors_than_intels_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for intel in (True, False):
        for level in ("avx512", "avx2", "baseline"):
            monkeypatch.setattr(native, "instruction_set", lambda level=level: level)
            monkeypatch.setattr(native, "made_by_intel", lambda intel=intel: intel)
            wanted = level == "avx512" and not intel and torch.backends.mkl.is_available()
            assert native.onednn_is_faster.__wrapped__() is wanted
