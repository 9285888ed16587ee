"""The layer's operator on the native backend: against fp64, per row; what a pass skips; what it refuses."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch

import bidora_kernels as bk
from bidora_kernels import native
from bidora_kernels.ops import _native_plan, _workspace

from .draws import FROZEN, MERGED, draw, run, violations

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "transposed", "sliced", "strided"])
@pytest.mark.parametrize("shape", [MERGED, FROZEN], ids=str)
@pytest.mark.parametrize(("dropped", "detach_norm", "bias", "norm_known"), list(itertools.product([False, True], repeat=4)))
def test_every_variant(
    shape: tuple[Any, ...], dtype: torch.dtype, layout: str, dropped: bool, detach_norm: bool, bias: bool, norm_known: bool
) -> None:
    call = draw(1, *shape, dtype=dtype, layout=layout, dropped=dropped, detach_norm=detach_norm, bias=bias, norm_known=norm_known)
    assert violations(call, run(call, "native")) == []


@pytest.mark.parametrize(
    ("out_features", "in_features", "r", "tokens"),
    [
        (1, 1, 1, (1,)), (5, 7, 1, (1,)), (37, 51, 13, (3,)), (64, 129, 64, (70,)), (130, 1100, 8, (2, 33)),
        (300, 20, 5, (4, 4, 4)), (33, 700, 17, (1,)), (16, 16, 40, (100,)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes(out_features: int, in_features: int, r: int, tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    call = draw(2, out_features, in_features, r, tokens, dtype)
    assert violations(call, run(call, "native")) == []


@pytest.mark.parametrize("in_bf16", [True, False])
@pytest.mark.parametrize("layout", ["rows", "transposed", "strided"])
@pytest.mark.parametrize(("weights", "tokens"), [(torch.bfloat16, 3), (torch.bfloat16, 40), (torch.float32, 40)], ids=str)
def test_products_in_bf16(weights: torch.dtype, tokens: int, layout: str, in_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bf16 layer, or an fp32 one under autocast, whether the processor has bf16 instructions or not."""
    monkeypatch.setattr(native, "multiplies_bf16", lambda: in_bf16)
    dtypes = []

    def watch(name: str, position: int) -> None:
        real = getattr(native, name)

        def watched(*arguments: Any) -> Any:
            if arguments[position] is not None:
                dtypes.append(arguments[position].dtype)
            return real(*arguments)

        monkeypatch.setattr(native, name, watched)

    for name, position in (("merged_weight", 6), ("dora_linear", 7), ("dora_linear_backward", 10)):  # where W' is written
        watch(name, position)
    for detach_norm in (True, False):
        call = draw(9, 70, 130, 4, (tokens,), weights, layout=layout, detach_norm=detach_norm)
        with torch.autocast("cpu", torch.bfloat16):
            ours = run(call, "native")
        assert ours["y"].dtype == torch.bfloat16
        assert violations(call, ours, torch.bfloat16) == []
    assert set(dtypes) == {torch.bfloat16 if in_bf16 else torch.float32}


def test_blocks_of_bf16_products_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "multiplies_bf16", lambda: True)
    call = draw(11, 640, 64, 4, (40,), torch.bfloat16, bias=False)
    exact = run(call.double(), "reference")["x"]
    errors = []
    for rows in (640, 10):
        monkeypatch.setattr(_native_plan, "rows_per_block", lambda *arguments, rows=rows: rows)
        errors.append(float((run(call, "native")["x"].double() - exact).norm() / exact.norm()))
    assert errors[1] < 1.5 * errors[0]  # 1.2; 3.4 with the sum rounded at every block


def test_precise_and_dropout_passes_stay_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for in_bf16 in (True, False):
        monkeypatch.setattr(native, "multiplies_bf16", lambda in_bf16=in_bf16: in_bf16)
        call = draw(9, 70, 130, 4, (40,), torch.bfloat16)
        dropped = draw(9, 70, 130, 4, (40,), torch.bfloat16, dropped=True)
        found.append([run(call, "native", precise=True), run(dropped, "native")])
    for ours, other in zip(*found, strict=True):
        assert all(torch.equal(ours[name], other[name]) for name in ours)


@pytest.mark.parametrize("shape", [(24, 40, 3, (0,)), (24, 40, 3, (2, 0)), (0, 40, 3, (5,)), (24, 0, 3, (5,)), (24, 40, 0, (5,))])
@pytest.mark.parametrize("dropped", [False, True])
def test_empty(shape: tuple[int, int, int, tuple[int, ...]], dropped: bool) -> None:
    call = draw(3, *shape, dropped=dropped)
    ours, reference = run(call, "native"), run(call, "reference")
    for name, value in reference.items():
        assert ours[name].shape == value.shape
        torch.testing.assert_close(ours[name], value)


@pytest.mark.parametrize("plan", [True, False])
@pytest.mark.parametrize("detach_norm", [True, False])
def test_both_plans(plan: bool, detach_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native_plan, "weight_plan_pays", lambda *args, **kwargs: plan)
    call = draw(4, detach_norm=detach_norm)
    assert violations(call, run(call, "native")) == []


def test_many_tokens_take_the_merged_weight_and_few_do_not() -> None:
    weight = torch.empty(4096, 4096, device="meta")
    assert _native_plan.weight_plan_pays(8192, weight, torch.float32, norm_known=False)
    assert not _native_plan.weight_plan_pays(1, weight, torch.float32, norm_known=True)
    assert _native_plan.weight_plan_pays(1, weight.bfloat16(), torch.float32, norm_known=True)


@pytest.mark.parametrize("layout", ["rows", "transposed"])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_layer_larger_than_the_workspace(layout: str, dropped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_workspace, "LIMIT_BYTES", 40 * 4 * 7)  # seven rows at a time
    call = draw(5, out_features=30, layout=layout, dropped=dropped, dtype=torch.bfloat16, tokens=(90,))
    _workspace.release_workspace()
    before = _workspace.workspace_bytes()
    assert violations(call, run(call, "native")) == []
    assert 0 < _workspace.workspace_bytes() - before <= 40 * 4 * 7


def test_the_sum_of_no_token_and_a_strided_input_of_none() -> None:
    call = draw(19, tokens=(0,))
    leaves = [tensor.requires_grad_() for tensor in (call.lora_A, call.lora_B, call.magnitude)]
    wide = torch.empty(0, 80).requires_grad_()
    for x in (call.x, wide[:, ::2], torch.empty(40, 0).t(), torch.empty(2, 0, 40)):
        with bk.use_backend("native"):
            y = bk.functional.dora_linear(x, call.weight, *leaves, call.scaling, call.bias)
        assert y.shape == (*x.shape[:-1], 24)
        for gradient in torch.autograd.grad(y.sum(), leaves):
            assert not gradient.any()


@pytest.mark.parametrize("layout", ["rows", "transposed"])
@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_the_merged_weight_less_the_weight_keeps_a_small_update(layout: str, size: float) -> None:
    call = draw(20, layout=layout)
    lora_B = call.lora_B * size
    norm = native.weight_norm(call.weight, call.lora_A, lora_B, call.scaling)
    out = torch.empty_like(call.weight)
    native.merged_weight(call.weight, call.lora_A, lora_B, norm, call.scaling, norm, out, norm_known=True, minus_weight=True)
    torch.testing.assert_close(out, call.scaling * (lora_B @ call.lora_A), rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("detach_norm", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_a_zero_row(dropped: bool, detach_norm: bool, moved: bool) -> None:
    call = draw(8, dropped=dropped, detach_norm=detach_norm)
    call.weight[::3] = 0
    call.magnitude[::3] = 0
    if not moved:
        call.lora_B[::3] = 0
    assert violations(call, run(call, "native")) == []


@pytest.mark.parametrize("needs", [(), ("direction",), ("magnitude",)])
@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("shape", [MERGED, FROZEN], ids=str)
def test_a_pass_computes_what_it_needs(
    shape: tuple[Any, ...], needs: tuple[str, ...], detach_norm: bool, dropped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watch(name: str, needs_direction: int) -> None:
        original = getattr(native, name)

        def watched(*args: object) -> object:
            seen.append((args[2] is not None, args[needs_direction]))
            return original(*args)

        monkeypatch.setattr(native, name, watched)

    watch("adapter_gradients", 9)
    watch("dora_linear_backward", 11)
    call = draw(9, *shape, detach_norm=detach_norm, dropped=dropped)
    ours = run(call, "native", needs)
    assert violations(call, ours) == []
    reads_output = "magnitude" in needs or ("direction" in needs and not detach_norm)
    assert [found for found in seen if any(found)] == ([(reads_output, "direction" in needs)] if needs else [])
    if not dropped:
        y = bk.functional.dora_linear(call.x, call.weight, call.lora_A, call.lora_B, call.magnitude, call.scaling)
        assert not y.requires_grad


def test_a_frozen_input_gets_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, original = [], native.dora_linear_backward

    def watched(*args: Any) -> Any:
        wanted.append(args[10:13])
        return original(*args)

    monkeypatch.setattr(native, "dora_linear_backward", watched)
    monkeypatch.setattr(_native_plan, "_product", lambda *args: pytest.fail("a gradient of x was computed"))
    call = draw(10, tokens=(200,))
    lora_A = call.lora_A.requires_grad_()
    y = bk.functional.dora_linear(call.x, call.weight, lora_A, call.lora_B, call.magnitude, call.scaling)
    torch.autograd.grad(y.sum(), lora_A)
    assert wanted == [(None, True, False)]  # no memory for W', directions, not x


@pytest.mark.parametrize("tokens", [(90,), (6, 15)], ids=str)
def test_columns_of_wider_tensors_are_read_in_place(tokens: tuple[int, ...]) -> None:
    call = draw(14, 30, 40, 4, tokens)
    wide = torch.cat([call.x, call.x], dim=-1)
    found = []
    for backend in ("native", "reference"):
        x = wide.detach().requires_grad_()
        leaves = [x, *(t.detach().requires_grad_() for t in (call.lora_A, call.lora_B, call.magnitude))]
        with bk.use_backend(backend):
            y = bk.functional.dora_linear(x[..., 40:], call.weight, *leaves[1:], call.scaling, call.bias)
        pattern = torch.linspace(-1, 1, 2 * y.numel()).reshape(*tokens, -1)
        y = torch.cat([y.detach(), y], dim=-1)  # the gradient reaches y as columns of a wider one
        found.append(torch.autograd.grad((y * pattern).sum(), leaves))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_one_row_without_a_dimension_of_its_own() -> None:
    call = draw(13, tokens=())
    lora_A = call.lora_A.requires_grad_()
    for weight in (call.weight, call.weight.t().contiguous().t()):
        found = []
        for backend in ("native", "reference"):
            with bk.use_backend(backend):
                y = bk.functional.dora_linear(call.x, weight, lora_A, call.lora_B, call.magnitude, call.scaling, call.bias)
            found.append((y, *torch.autograd.grad(y.sum(), lora_A)))
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("detach_norm", [True, False])
def test_y_may_be_overwritten(detach_norm: bool) -> None:
    call, found = draw(11, detach_norm=detach_norm), []
    for backend, in_place, c in (
        ("native", True, call), ("native", False, call), ("reference", False, call), ("reference", False, call.double()),
    ):  # fmt: skip
        leaves = [t.detach().requires_grad_() for t in (c.lora_A, c.lora_B, c.magnitude)]
        with bk.use_backend(backend):
            y = bk.functional.dora_linear(c.x, c.weight, *leaves, c.scaling, c.bias, detach_norm=detach_norm)
        y = y.relu_() if in_place else y.relu()
        found.append(torch.autograd.grad(y.square().sum(), leaves))
    *ours, reference, truth = found
    for values in ours:
        for value, own, exact in zip(values, reference, truth, strict=True):
            rounding = (own - exact).norm() + torch.finfo(value.dtype).eps * exact.norm()
            assert float((value - exact).norm()) <= 2 * float(rounding)


def test_a_retained_graph_runs_twice() -> None:
    call = draw(12)
    magnitude = call.magnitude.requires_grad_()
    y = bk.functional.dora_linear(call.x, call.weight, call.lora_A, call.lora_B, magnitude, call.scaling, call.bias)
    first = torch.autograd.grad(y.sum(), magnitude, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), magnitude)[0], first)


def test_what_has_no_rule_says_which_backend_has_one() -> None:
    call = draw(13)
    lora_A, magnitude = call.lora_A.requires_grad_(), call.magnitude.requires_grad_()

    def layer(down: torch.Tensor) -> torch.Tensor:
        return bk.functional.dora_linear(call.x, call.weight, down, call.lora_B, magnitude, call.scaling)

    with bk.use_backend("native"):
        grad = torch.autograd.grad(layer(lora_A).square().sum(), magnitude, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
            torch.autograd.grad(grad.sum(), lora_A)
        with pytest.raises(NotImplementedError, match='use backend "reference"'):
            torch.func.jvp(layer, (lora_A,), (lora_A,))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            layer(torch.autograd.forward_ad.make_dual(lora_A.detach(), lora_A.detach()))
        with pytest.raises(NotImplementedError, match="an fp64 input with a weight in float32"):
            bk.functional.dora_linear(call.x.double(), call.weight, lora_A, call.lora_B, magnitude, call.scaling)
    assert torch.func.jvp(layer, (lora_A,), (lora_A,))[1].shape == call.grad.shape  # auto goes to the reference
    assert bk.functional.dora_linear(call.x.double(), call.weight, lora_A, call.lora_B, magnitude, 1.0).dtype == torch.float64


@pytest.mark.parametrize("weight_dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [MERGED, FROZEN], ids=str)
def test_mixed_dtypes_and_autocast(
    shape: tuple[Any, ...], weight_dtype: torch.dtype, x_dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    call = draw(14, *shape, dtype=torch.float32)
    call.x, call.weight = call.x.to(x_dtype), call.weight.to(weight_dtype)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        ours, reference = run(call, "native"), run(call, "reference")
    assert {n: v.dtype for n, v in ours.items()} == {n: v.dtype for n, v in reference.items()}
    dtypes = (weight_dtype, x_dtype, autocast or x_dtype)
    assert violations(call, ours, max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)) == []


def test_a_precise_pass_feels_a_small_change() -> None:
    """bf16: what a change of lora_B by 1e-5 does to the magnitude's gradient survives in a precise pass."""
    call = draw(15, out_features=64, in_features=64, tokens=(256,), dtype=torch.bfloat16, bias=False)
    call.lora_B.zero_()
    moved = draw(15, out_features=64, in_features=64, tokens=(256,), dtype=torch.bfloat16, bias=False)
    moved.lora_B = 1e-4 * moved.lora_B
    true, ours = (
        run(*[moved.double() if exact else moved, backend], ("magnitude",), precise=True)["magnitude"].double()
        - run(*[call.double() if exact else call, backend], ("magnitude",), precise=True)["magnitude"].double()
        for exact, backend in ((True, "reference"), (False, "native"))
    )
    assert torch.cosine_similarity(true, ours, dim=0) > 0.99


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    call = draw(16, out_features=200, in_features=300, r=5, tokens=(700,), detach_norm=False)
    threads, found = torch.get_num_threads(), []
    arguments = [t.contiguous() for t in (call.lora_A, call.lora_B, call.magnitude)]
    norm = bk.reference.weight_norm(call.weight, *arguments[:2], call.scaling)
    y = run(call, "reference")["y"]
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            grads = native.adapter_gradients(call.x, call.grad, y, *arguments, norm, call.bias, call.scaling, True)[:3]
            norm_grads = native.direction_backward(call.weight, None, *arguments[:2], None, call.scaling, norm, norm)[:2]
            found.append([native.weight_norm(call.weight, *arguments[:2], call.scaling), *grads, *norm_grads])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_threads_do_not_share_a_workspace() -> None:
    calls = [draw(seed, out_features=48 + seed, tokens=(100,)) for seed in range(4)]
    expected = [run(call, "native") for call in calls]
    failures: list[str] = []

    def work(index: int) -> None:
        for _ in range(20):
            for name, value in run(calls[index], "native").items():
                if not torch.equal(value, expected[index][name]):
                    failures.append(f"{index}: {name}")

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [MERGED, FROZEN], ids=str)
def test_opcheck(shape: tuple[Any, ...], dropped: bool, dtype: torch.dtype) -> None:
    call = draw(17, *shape, dtype=dtype, dropped=dropped)
    leaves = [t.detach().requires_grad_() for t in (call.x, call.lora_A, call.lora_B, call.magnitude)]
    torch.library.opcheck(
        torch.ops.bidora_kernels.dora_linear.default,
        (
            leaves[0], call.weight, *leaves[1:], None, call.bias, call.x_dropped, call.scaling, False, False, dtype, dtype, True,
            "native",
        ),
    )  # fmt: skip


@pytest.mark.parametrize("dropped", [False, True])
def test_compiled_without_a_break(dropped: bool) -> None:
    call = draw(18, dropped=dropped, tokens=(50,))

    def layer(x, down, up, magnitude):
        return bk.functional.dora_linear(
            x, call.weight, down, up, magnitude, call.scaling, call.bias, call.x_dropped, detach_norm=False
        ).tanh()

    found = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().requires_grad_() for t in (call.x, call.lora_A, call.lora_B, call.magnitude)]
        with bk.use_backend("native"):
            y = function(*leaves)
        found.append([y, *torch.autograd.grad(y, leaves, call.grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("tokens", [1, 3, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_tokens_read_the_weight_once_in_its_own_dtype(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native_plan, "_outputs", lambda *args: pytest.fail("a merged weight was written"))
    monkeypatch.setattr(native, "compose", lambda *args: pytest.fail("a product was corrected"))
    call = draw(19, out_features=90, in_features=70, tokens=(tokens,), dtype=dtype, norm_known=True)
    with bk.use_backend("native"):
        assert "one kernel" in str(bk.functional.plan(call.weight, 3, tokens, norm_known=True))
        assert "one kernel" not in str(bk.functional.plan(call.weight, 3, 17, norm_known=True))
    assert violations(call, run(call, "native")) == []
