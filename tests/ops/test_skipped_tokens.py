"""The native backward leaves out tokens whose output has no gradient, and gives the numbers of the whole pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bidora_kernels as bk
from bidora_kernels import native
from bidora_kernels.ops import _native_plan, _skipped_tokens

from ..tiny_models import bert, padded_classifier_gradients, randomize
from .draws import Call, draw, run, violations

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason="the native library is not there")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens are looked for in every layer; how many tokens each backward pass of the kernels has, in their order."""
    monkeypatch.setattr(_skipped_tokens, "SKIPS_FROM", 1)
    counts: list[int] = []
    for name, at in (("dora_linear_backward", 0), ("adapter_gradients", 1)):
        inner = getattr(native, name)

        def counted(*args: Tensor, inner: object = inner, at: int = at, **kwargs: object) -> object:
            counts.append(args[at].numel() // args[at].shape[-1])
            return inner(*args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(native, name, counted)
    return counts


def without_gradient(call: Call, kept: list[int]) -> Call:
    """The call with a gradient of the tokens `kept` alone; some of the zeros are negative."""
    flat = call.grad.reshape(-1, call.grad.shape[-1])
    zeros = torch.zeros_like(flat)
    zeros[::2] = -0.0
    zeros[kept] = flat[kept]
    call.grad = zeros.reshape(call.grad.shape)
    return call


KEPT = {"none": [], "one": [5], "padded": [*range(7), *range(30, 47)], "last": [59], "every other": [*range(0, 60, 2)]}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_pass_without_them(kept: str, dropped: bool, detach_norm: bool, dtype: torch.dtype, seen: list[int]) -> None:
    call = draw(2, tokens=(3, 20), dtype=dtype, dropped=dropped, detach_norm=detach_norm)
    assert violations(without_gradient(call, KEPT[kept]), run(call, "native")) == []
    assert seen == [len(KEPT[kept])]


@pytest.mark.parametrize("layout", ["rows", "transposed", "sliced", "strided"])
@pytest.mark.parametrize(("out_features", "in_features", "r"), [(24, 40, 1), (40, 17, 33), (1, 1, 1), (130, 64, 100)])
@pytest.mark.parametrize("bias", [True, False])
def test_shapes_and_layouts(layout: str, out_features: int, in_features: int, r: int, bias: bool, seen: list[int]) -> None:
    call = draw(3, out_features, in_features, r, (60,), layout=layout, bias=bias)
    assert violations(without_gradient(call, KEPT["padded"]), run(call, "native")) == []
    assert seen == [24]


@pytest.mark.parametrize("needs", [("direction",), ("magnitude",), ()])
def test_parts_of_a_pass(needs: tuple[str, ...], seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    searches, real = [], _native_plan.tokens_with_gradient

    def searched(*args: Tensor) -> Tensor | None:
        found = real(*args)
        searches.append((args[0].numel() // args[0].shape[-1], None if found is None else found.numel()))
        return found

    monkeypatch.setattr(_native_plan, "tokens_with_gradient", searched)
    call = without_gradient(draw(4, tokens=(60,), dtype=torch.float64), KEPT["padded"])
    ours, theirs = run(call, "native", needs), run(call, "reference", needs)
    assert searches == [(3 * 20, 24)]
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-12, atol=1e-12)
    assert seen == [24]


def test_a_gradient_without_memory_of_its_own(seen: list[int]) -> None:
    """Tokens of a transposed or expanded gradient are found as well."""
    call = draw(5, tokens=(20, 3))
    batch_first = without_gradient(draw(5, tokens=(3, 20)), KEPT["padded"]).grad.reshape(3, 20, -1)
    call.grad = batch_first.transpose(0, 1)
    assert violations(call, run(call, "native")) == []
    call.grad = torch.zeros(1).expand(20, 3, 24)
    found = run(call, "native")
    assert all(not found[name].any() for name in ("x", "lora_A", "lora_B", "magnitude"))
    assert seen == [24, 0]


def test_few_are_not_worth_it(seen: list[int]) -> None:
    """A pass in which most tokens have a gradient, or that is small, runs as it is."""
    for kept in (45, 46):
        call = without_gradient(draw(6, tokens=(60,)), [*range(kept)])
        assert violations(call, run(call, "native")) == []
    few = without_gradient(draw(6, tokens=(16,)), [0])
    assert violations(few, run(few, "native")) == []
    assert seen == [45, 60, 16]


def test_a_pass_without_a_product_is_not_searched(monkeypatch: pytest.MonkeyPatch, seen: list[int]) -> None:
    """As of a first layer, whose input is frozen: gathering would cost more than the sums."""
    monkeypatch.setattr(native, "nonzero_rows", lambda *args: pytest.fail("there is no product to make smaller"))
    call = without_gradient(draw(6, tokens=(60,)), [0])
    factors = [value.requires_grad_() for value in (call.lora_A, call.lora_B, call.magnitude)]
    with bk.use_backend("native"):
        y = bk.functional.dora_linear(call.x, call.weight, *factors, scaling=call.scaling, bias=call.bias)
    torch.autograd.grad(y, factors, call.grad)
    assert seen == [60]


def test_a_number_of_tokens_is_one_of_few(seen: list[int]) -> None:
    """The library makes a kernel for each, and keeps it."""
    for kept in range(1, 400, 7):
        call = draw(6, tokens=(640,), r=1)
        call.grad[kept:] = 0
        run(call, "native")
    assert set(seen) == set(range(20, 401, 20))


def test_as_it_is_shipped() -> None:
    """Nothing patched: a layer of usual size skips."""
    layer = bk.FusedDoraLinear.from_linear(torch.nn.Linear(1024, 1024), r=2)
    x, grad = torch.randn(64, 1024, requires_grad=True), torch.zeros(64, 1024)
    grad[3] = 1.0
    with torch.no_grad():
        x[5:] = float("nan")
    with bk.use_backend("native"):
        layer(x).backward(grad)
    assert x.grad is not None
    assert x.grad[3].any()
    assert not x.grad[4:].any()
    assert layer.lora_B.grad.isfinite().all()


def test_small_products_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "nonzero_rows", lambda *args: pytest.fail("a search costs more than this product"))
    call = without_gradient(draw(7, tokens=(60,)), [0])
    assert violations(call, run(call, "native")) == []


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("r", [3, 40])
def test_weights_in_blocks(dropped: bool, r: int, seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native_plan, "rows_per_block", lambda features, dtype: 5)
    call = without_gradient(draw(9, r=r, tokens=(60,), dropped=dropped), KEPT["padded"])
    assert violations(call, run(call, "native")) == []
    assert seen == [24]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_output_does_not_tell(dtype: torch.dtype, seen: list[int]) -> None:
    """Rows that the bias hides or whose magnitude is 0, an overwritten output, and one kept in more digits than y has."""
    call = without_gradient(draw(10, tokens=(60,), dtype=dtype), KEPT["padded"])
    assert call.bias is not None
    call.bias[:5] *= 1000
    call.magnitude[7] = 0.0
    exact = run(call.double(), "reference")["magnitude"]
    precise = run(call, "native", precise=True)
    torch.testing.assert_close(precise["magnitude"].double(), exact, rtol=1e-4, atol=1e-3 * float(exact.norm()))
    factors = [value.requires_grad_() for value in (call.lora_A, call.lora_B, call.magnitude)]
    x = call.x.requires_grad_()
    with bk.use_backend("native"):
        y = bk.functional.dora_linear(x, call.weight, *factors, scaling=call.scaling, bias=call.bias)
        grads = torch.autograd.grad(y.mul_(1), [x, *factors], call.grad)
    torch.testing.assert_close(grads[3].double(), exact, rtol=1e-4, atol=1e-2 * float(exact.norm()))
    assert seen == [24, 24]


def test_a_lost_gradient_is_not_hidden(seen: list[int]) -> None:
    """A NaN is a gradient; what is NaN in a token that was left out does not reach the others' gradients."""
    call = without_gradient(draw(8, tokens=(60,)), KEPT["padded"])
    call.x[10] = float("nan")
    assert all(value.isfinite().all() for name, value in run(call, "native").items() if name != "y")
    call.grad[10, 3] = float("nan")
    found = run(call, "native")
    assert found["x"][10].isnan().all()
    assert found["magnitude"][3].isnan()
    assert seen == [24, 25]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_classifier_with_padding(compiled: bool, seen: list[int]) -> None:
    """Padding has no gradient in any layer, and in the last one only the token that is read has one."""
    model = bert()
    bk.apply_dora(model, bk.DoraConfig(r=2, target_modules="all-linear"))
    randomize(model)
    gradients, real = padded_classifier_gradients(model, compiled)
    for ours, theirs in zip(gradients("native"), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert seen.count(64) == 3  # query, key and value of the first layer, whose input needs no gradient
    assert {*seen} == {4, real, 64}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 3, 31, 32, 33, 64, 65, 127, 128, 129, 700])
def test_nonzero_rows(dtype: torch.dtype, columns: int) -> None:
    """Of a matrix of many rows, on several threads; the smallest numbers there are count, and the last columns."""
    smallest = {torch.float64: 5e-324, torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}[dtype]
    rows = {0: 1.0, 4: float("nan"), 5: smallest, 17: -smallest, 900: smallest, 1999: float("-inf")}
    for t in (torch.zeros(2000, columns, dtype=dtype), torch.zeros(2000, columns + 5, dtype=dtype)[:, 2 : 2 + columns]):
        t[::3] = -0.0
        for row, value in rows.items():
            t[row, columns - 1 if row in (5, 900) else row * 7 % columns] = value
        assert native.nonzero_rows(t).tolist() == list(rows)
        assert native.nonzero_rows(t.contiguous().reshape(50, 40, columns)).tolist() == list(rows)
    wide = torch.ones(50, columns + 5, dtype=dtype)  # what lies between the rows of a view is not looked at
    wide[:, 2 : 2 + columns] = 0
    assert native.nonzero_rows(wide[:, 2 : 2 + columns]).numel() == 0


def test_nonzero_rows_by_multiples() -> None:
    t = torch.zeros(9, 2)
    assert native.nonzero_rows(t, 4).tolist() == []
    t[2], t[7] = 1.0, 1.0
    assert native.nonzero_rows(t, 2).tolist() == [2, 7]
    assert native.nonzero_rows(t, 4).tolist() == [0, 1, 2, 7]
    assert native.nonzero_rows(t, 7).tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert native.nonzero_rows(t, 100).tolist() == [*range(9)]
    with pytest.raises(RuntimeError, match="multiple must be 1 or more"):
        native.nonzero_rows(t, 0)


def test_nonzero_rows_of_nothing() -> None:
    assert native.nonzero_rows(torch.ones(0, 4)).shape == (0,)
    assert native.nonzero_rows(torch.ones(4, 0)).shape == (0,)
    with pytest.raises(RuntimeError, match="dimensions"):
        native.nonzero_rows(torch.ones(4))
