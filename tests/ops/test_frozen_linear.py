"""frozen_linear gives F.linear's numbers, and multiplies only the tokens whose output has a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bidora_kernels as bk
from bidora_kernels import native
from bidora_kernels.functional import frozen_linear
from bidora_kernels.ops import _skipped_tokens
from bidora_kernels.ops import frozen_linear as op

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason="the native library is not there")
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
KEPT = {"none": [], "one": [5], "some": [*range(7), *range(30, 47)], "last": [59], "most": [*range(50)], "all": [*range(60)]}
Case = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls of any size are served; the tokens of each product in their order: a forward pass's, then its backward pass's."""
    monkeypatch.setattr(op, "WORTH_FROM", 1)
    monkeypatch.setattr(_skipped_tokens, "SKIPS_FROM", 1)
    counts, inner = [], native.product

    def counted(x: Tensor, *others: Any) -> Tensor:
        counts.append(x.shape[0])
        return inner(x, *others)

    monkeypatch.setattr(native, "product", counted)
    return counts


def draw(
    dtype: torch.dtype = torch.float32, out_features: int = 24, in_features: int = 40, tokens: tuple[int, ...] = (3, 20)
) -> Case:
    """(x, weight, bias, the gradient of y)."""
    torch.manual_seed(0)
    x = torch.randn(*tokens, in_features, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(out_features, in_features).to(dtype), torch.randn(out_features).to(dtype)
    return x, weight, bias, torch.randn(*tokens, out_features).to(dtype)


def only(grad: Tensor, kept: list[int]) -> Tensor:
    """The gradient of the tokens `kept` alone; some of the zeros are negative."""
    flat = grad.reshape(-1, grad.shape[-1])
    zeros = torch.zeros_like(flat)
    zeros[::2] = -0.0
    zeros[kept] = flat[kept]
    return zeros.reshape(grad.shape)


def agree(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    assert got.dtype is wanted.dtype
    error, size = (torch.linalg.vector_norm(t.detach().double()) for t in (got.double() - wanted.double(), wanted))
    assert float(error) <= tolerance * float(size)


def compare(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, tolerance: float) -> None:
    """Output and gradient against F.linear's."""
    wanted = F.linear(x, weight, bias)
    y = frozen_linear(x, weight, bias)
    agree(y, wanted, tolerance)
    agree(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(wanted, x, grad)[0], tolerance)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_it_is_f_linear(kept: str, biased: bool, dtype: torch.dtype, seen: list[int]) -> None:
    x, weight, bias, grad = draw(dtype)
    compare(x, weight, bias if biased else None, only(grad, KEPT[kept]), TOLERANCE[dtype])
    count = len(KEPT[kept])
    assert seen == [60, count if count <= 45 else 60]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("layout", ["rows", "transposed", "sliced", "strided"])
def test_by_onednn(layout: str, biased: bool, seen: list[int], by_onednn: None) -> None:
    x, weight, bias, grad = draw()
    weight = LAYOUTS.get(layout, lambda t: t)(weight)
    some = only(grad, KEPT["some"])
    compare(x, weight, bias if biased else None, some, 2e-6)
    compare(x.transpose(0, 1), weight, bias if biased else None, some.transpose(0, 1), 2e-6)
    compare(torch.cat([x, x], dim=2)[..., :40], weight, bias if biased else None, grad, 2e-6)
    compare(torch.stack([x.reshape(60, 40)] * 2, dim=2)[..., 0], weight, bias if biased else None, some.reshape(60, 24), 2e-6)
    compare(x[:, :1].expand(3, 20, 40), weight, bias if biased else None, some, 2e-6)
    assert seen == [60, 24, 60, 24, 60, 60, 60, 24, 60, 24]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "sliced": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
    "strided": lambda t: torch.stack([t, t], dim=2)[:, :, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(24, 40), (1, 1), (1, 9), (130, 64)])
def test_layouts_of_the_weight(layout: str, sizes: tuple[int, int], seen: list[int]) -> None:
    x, weight, bias, grad = draw(torch.float64, *sizes)
    compare(x, LAYOUTS[layout](weight), bias, only(grad, KEPT["some"]), 1e-13)
    assert seen == [60, 24]


def test_layouts_of_the_tokens(seen: list[int]) -> None:
    """Transposed and sliced inputs, gradients that are transposed, expanded or of a transposed output."""
    x, weight, bias, grad = draw(torch.float64, tokens=(20, 3))
    kept = only(grad, KEPT["some"])
    compare(x.transpose(0, 1), weight, bias, kept.transpose(0, 1), 1e-13)
    compare(torch.cat([x, x], dim=2)[..., :40], weight, bias, kept, 1e-13)
    compare(x.reshape(4, 5, 3, 40), weight, bias, kept.reshape(4, 5, 3, 24), 1e-13)
    compare(x.reshape(60, 40), weight, bias, kept.reshape(60, 24), 1e-13)
    assert seen == [60, 24] * 4
    compare(x, weight, bias, torch.ones(1, 1, 1, dtype=torch.float64).expand(20, 3, 24), 1e-13)
    compare(x, weight, bias, torch.zeros(1, 1, 1, dtype=torch.float64).expand(20, 3, 24), 1e-13)
    assert seen[8:] == [60, 60, 60, 0]


@pytest.mark.parametrize("shape", [(0, 40), (3, 0, 40), (40,), (1, 40)])
def test_no_and_single_tokens(shape: tuple[int, ...], seen: list[int]) -> None:
    _, weight, bias, _ = draw(torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    compare(x, weight, bias, torch.randn(*shape[:-1], 24, dtype=torch.float64), 1e-13)
    assert seen == ([1, 1] if shape == (1, 40) else [])


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(weight_dtype: torch.dtype, x_dtype: torch.dtype, seen: list[int]) -> None:
    """Also where the backward pass runs under it."""
    x, weight, bias, grad = draw()
    x, weight, bias = x.detach().to(x_dtype).requires_grad_(), weight.to(weight_dtype), bias.to(weight_dtype)
    grad = only(grad, KEPT["some"]).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        wanted, y = F.linear(x, weight, bias), frozen_linear(x, weight, bias)
        inside = torch.autograd.grad(y, x, grad, retain_graph=True)[0]
    agree(y, wanted, 1e-2)
    for found in (inside, torch.autograd.grad(y, x, grad)[0]):
        agree(found, torch.autograd.grad(wanted, x, grad, retain_graph=True)[0], 1e-2)
    assert seen == [60, 24, 24]


def test_an_fp32_pass_is_not_rounded_by_an_autocast_around_its_backward(seen: list[int]) -> None:
    x, weight, bias, grad = draw()
    y = frozen_linear(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, x, grad)[0]
    agree(found, (grad.double() @ weight.double()).float(), 2e-6)
    assert seen == [60, 60]


def test_fp64_under_autocast_stays_fp64(seen: list[int]) -> None:
    x, weight, bias, grad = draw(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        compare(x, weight, bias, grad, 1e-13)
    assert seen == []


def test_twice_differentiable(seen: list[int]) -> None:
    x, weight, bias, _ = draw(torch.float64, tokens=(20,))
    assert torch.autograd.gradcheck(lambda x: frozen_linear(x, weight, bias), x)
    assert torch.autograd.gradgradcheck(lambda x: frozen_linear(x, weight, bias), x)
    assert seen


def test_functional_transforms_are_f_linears(seen: list[int]) -> None:
    x, weight, bias, _ = draw(torch.float64)
    tangent = torch.randn_like(x)
    found = torch.func.jvp(lambda x: frozen_linear(x, weight, bias), (x.detach(),), (tangent,))[1]
    agree(found, tangent @ weight.t(), 1e-13)
    found = torch.func.vmap(lambda x: frozen_linear(x, weight, bias))(x.detach())
    agree(found, F.linear(x, weight, bias), 1e-13)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight))
        found = torch.autograd.forward_ad.unpack_dual(frozen_linear(x, dual, bias)).tangent
        agree(found, F.linear(x, torch.ones_like(weight)), 1e-13)
    assert seen == []


def test_trained_weights_and_biases_get_their_gradients(seen: list[int]) -> None:
    x, weight, bias, grad = draw(torch.float64)
    for trained in (weight, bias):
        trained.requires_grad_()
        found = torch.autograd.grad(frozen_linear(x, weight, bias), trained, grad)[0]
        agree(found, torch.autograd.grad(F.linear(x, weight, bias), trained, grad)[0], 1e-13)
        trained.requires_grad_(False)
    assert seen == []


@pytest.mark.parametrize("backend", ["reference", "native", "auto"])
def test_the_backend_decides(backend: str, seen: list[int]) -> None:
    x, weight, bias, grad = draw(torch.float64)
    with bk.use_backend(backend):
        compare(x, weight, bias, only(grad, [0]), 1e-13)
    assert seen == ([] if backend == "reference" else [60, 1])


def test_small_products_are_f_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "product", lambda *args: pytest.fail("this product is too small to be worth it"))
    x, weight, bias, grad = draw(torch.float64)
    compare(x, weight, bias, grad, 0.0)


def test_as_it_is_shipped() -> None:
    """Nothing patched: a layer of usual size leaves tokens out, and what is not finite there reaches nothing."""
    x, weight, bias, _ = draw(torch.float32, 1024, 1024, (64,))
    weight[0, 0] = float("inf")
    grad = torch.zeros(64, 1024)
    grad[3, 5] = 1.0
    (found,) = torch.autograd.grad(frozen_linear(x, weight, bias), x, grad)
    assert torch.equal(found[3, 1:], weight[5, 1:])
    assert not found[4:].any()
    x, weight, bias, grad = draw(torch.float32, 1024, 1024, (64,))
    compare(x, weight, bias, grad, 1e-5)


def test_a_nan_is_a_gradient(seen: list[int]) -> None:
    x, weight, bias, grad = draw()
    grad = only(grad, KEPT["some"])
    grad.view(60, 24)[10, 3] = float("nan")
    (found,) = torch.autograd.grad(frozen_linear(x, weight, bias), x, grad)
    assert found.view(60, 40)[10].isnan().all()
    assert seen == [60, 25]


def test_it_keeps_no_activation_and_the_output_may_be_overwritten(seen: list[int]) -> None:
    x, weight, bias, grad = draw()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = frozen_linear(x, weight, bias)
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]
    y = frozen_linear(x, weight, bias)
    y.relu_()
    found = torch.autograd.grad(y, x, grad)[0]
    agree(found, torch.autograd.grad(F.linear(x, weight, bias).relu(), x, grad)[0], 2e-6)
    assert len(seen) == 3


def test_a_weight_that_changed_is_noticed(seen: list[int]) -> None:
    x, weight, bias, grad = draw()
    y = frozen_linear(x, weight, bias)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, x, grad)
    assert seen == [60]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, seen: list[int]) -> None:
    x, weight, bias, grad = draw(torch.float64)
    grad = only(grad, KEPT["some"])
    y = checkpoint(lambda x: frozen_linear(x, weight, bias).sin(), x, use_reentrant=reentrant)
    y.backward(grad)
    agree(x.grad, torch.autograd.grad(F.linear(x, weight, bias).sin(), x, grad)[0], 1e-13)  # type: ignore[arg-type]
    assert seen == [60, 60, 24]


def test_inference(seen: list[int]) -> None:
    x, weight, bias, _ = draw(torch.float64)
    wanted = F.linear(x, weight, bias)
    with torch.no_grad():
        agree(frozen_linear(x, weight, bias), wanted, 1e-13)
    with torch.inference_mode():
        agree(frozen_linear(x, weight, bias), wanted, 1e-13)
    assert not frozen_linear(x.detach(), weight, bias).requires_grad
    assert seen == [60] * 3


WRONG: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "features": lambda x, weight, bias: (x[..., :7], weight, bias),
    "dtype": lambda x, weight, bias: (x, weight.double(), bias),
    "bias": lambda x, weight, bias: (x, weight, bias[:5]),
    "bias elsewhere": lambda x, weight, bias: (x, weight, bias.to("meta")),
    "integers": lambda x, weight, bias: (x.long(), weight, bias),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_are_f_linears(wrong: str, seen: list[int], by_onednn: None) -> None:
    operands = WRONG[wrong](*draw()[:3])
    with pytest.raises(RuntimeError) as theirs:
        F.linear(*operands)
    with pytest.raises(RuntimeError) as ours:
        frozen_linear(*operands)
    assert str(ours.value) == str(theirs.value)
    assert seen == []


@pytest.mark.parametrize("kind", ["strided", "expanded", "one", "a row"])
def test_an_unusual_bias_is_f_linears(kind: str, seen: list[int], by_onednn: None) -> None:
    """oneDNN would take its first numbers, whatever its stride."""
    x, weight, _, grad = draw()
    bias = {
        "strided": torch.arange(48.0)[::2],
        "expanded": torch.ones(1).expand(24),
        "one": torch.ones(1),
        "a row": torch.randn(1, 24),
    }[kind]
    compare(x, weight, bias, grad, 0.0)
    assert seen == []


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_checkpoint_recomputed_under_another_backend(where: str, seen: list[int]) -> None:
    x, weight, bias, grad = draw(torch.float64)
    backends = {"forward": ("reference", "native"), "backward": ("native", "reference")}[where]
    with bk.use_backend(backends[0]):
        y = checkpoint(lambda x: frozen_linear(x, weight, bias).sin(), x, use_reentrant=False)
    with bk.use_backend(backends[1]):
        found = torch.autograd.grad(y, x, grad)[0]
    agree(found, torch.autograd.grad(F.linear(x, weight, bias).sin(), x, grad)[0], 1e-13)
    assert seen == ([60] if where == "forward" else [60, 60])


def test_a_backend_that_does_not_run_here_is_no_matter(seen: list[int]) -> None:
    x, weight, bias, grad = draw()
    with bk.use_backend("triton"):
        compare(x, weight, bias, grad, 0.0)
    assert seen == []


def test_nested_tensors(seen: list[int]) -> None:
    _, weight, bias, _ = draw()
    parts = [torch.randn(3, 40), torch.randn(5, 40)]
    found = frozen_linear(torch.nested.nested_tensor(parts), weight, bias)
    for part, y in zip(parts, found.unbind(), strict=True):
        agree(y, F.linear(part, weight, bias), 1e-6)
    assert seen == []


def test_a_gradient_with_a_tangent_and_many_gradients_at_once(seen: list[int]) -> None:
    x, weight, bias, grad = draw(torch.float64)
    tangent = only(grad, [50])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(only(grad, [3]), tangent)
        found = torch.autograd.forward_ad.unpack_dual(torch.autograd.grad(frozen_linear(x, weight, bias), x, dual)[0]).tangent
        agree(found, tangent @ weight, 1e-13)
    many = torch.stack([only(grad, [1]), only(grad, KEPT["some"]), grad])
    found = torch.autograd.grad(frozen_linear(x, weight, bias), x, many, is_grads_batched=True)[0]
    agree(found, many @ weight, 1e-13)
    with torch.autograd.forward_ad.dual_level():
        found = torch.autograd.grad(frozen_linear(x, weight, bias), x, many, is_grads_batched=True)[0]
    agree(found, many @ weight, 1e-13)
    assert seen == [60, 60, 60]  # forward passes alone


def test_a_traced_call_is_f_linears(seen: list[int]) -> None:
    x, weight, bias, _ = draw()
    traced = torch.jit.trace(lambda x: frozen_linear(x, weight, bias), x)
    agree(traced(2 * x), F.linear(2 * x, weight, bias), 1e-6)
    assert len(seen) == 1  # the tracer's own call of the function, which it compares with the trace
