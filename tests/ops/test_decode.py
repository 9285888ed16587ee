"""A call with few tokens takes the short way only while everything is as it was, and gives the same numbers there."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bidora_kernels as bk
from bidora_kernels import native
from bidora_kernels.bilevel.flat import FlatParameters
from bidora_kernels.ops import decode as decode_module
from bidora_kernels.ops.parameter_state import ParameterState

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))


def made(bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> bk.FusedDoraLinear:
    torch.manual_seed(seed)
    layer = bk.FusedDoraLinear.from_linear(nn.Linear(40, 24, bias=bias, dtype=dtype), r=3)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.magnitude.mul_(1.5)
    return layer.eval()


def exact(layer: bk.FusedDoraLinear, x: Tensor) -> Tensor:
    weight, lora_A, lora_B, scaling = layer.direction_terms()
    bias = None if layer.bias is None else layer.bias.double()
    factors = (t.double() for t in (lora_A, lora_B, layer.magnitude))
    return bk.reference.dora_linear(x.double(), weight.double(), *factors, scaling, bias)


@pytest.fixture
def short_ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each look at the short way, whether it served."""
    seen: list[bool] = []
    real = decode_module.Decode.__call__

    def watched(self: Any, *arguments: Any) -> Tensor | None:
        y = real(self, *arguments)
        seen.append(y is not None)
        return y

    monkeypatch.setattr(decode_module.Decode, "__call__", watched)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 40), (40,), (2, 3, 40), (16, 40)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_second_call_gives_the_firsts_numbers(
    dtype: torch.dtype, shape: tuple[int, ...], bias: bool, short_ways: list[bool]
) -> None:
    layer, x = made(bias, dtype), torch.randn(shape).to(dtype)
    with torch.no_grad():
        first, second, third = layer(x), layer(x), layer(x.flip(-1).flip(-1))
    assert short_ways == [True, True]
    assert second.dtype == dtype
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    torch.testing.assert_close(second.double(), exact(layer, x), rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [17, 21, 22], ids=str)
def test_more_tokens_take_the_activation_plans_products(tokens: int, dtype: torch.dtype, short_ways: list[bool]) -> None:
    """From 22 tokens on the weight plan pays for [24, 40]; and always for a 16-bit weight, not for 16-bit inputs."""
    layer, x = made(), torch.randn(tokens, 40).to(dtype)
    with torch.no_grad():
        layer(x[:1])
        first, second = layer(x), layer(x)
        layer._decode = None
        other_way = layer(x)
    assert short_ways == [tokens < 22] * 2
    assert second.dtype == dtype
    assert torch.equal(first, second)
    assert torch.equal(first, other_way)
    torch.testing.assert_close(second.double(), exact(layer, x), rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def set_(name: str) -> Callable[[bk.FusedDoraLinear], None]:
    def change(layer: bk.FusedDoraLinear) -> None:
        with torch.no_grad():
            getattr(layer, name).mul_(1.25)

    return change


def replace(name: str) -> Callable[[bk.FusedDoraLinear], None]:
    def change(layer: bk.FusedDoraLinear) -> None:
        setattr(layer, name, nn.Parameter(getattr(layer, name).detach() * 1.25, requires_grad=False))

    return change


def storage(layer: bk.FusedDoraLinear) -> None:
    for _ in range(20):  # the allocator hands an address that nobody holds out again
        layer.magnitude.data = layer.magnitude.data * 1.02
        layer.bias.data = layer.bias.data * 1.02


def rescaled(layer: bk.FusedDoraLinear) -> None:
    layer.scaling *= 2.0


def loaded(layer: bk.FusedDoraLinear) -> None:
    layer.load_state_dict({name: value * 1.25 for name, value in layer.state_dict().items()})


def without_bias(layer: bk.FusedDoraLinear) -> None:
    layer.bias = None


def through_flat_buffers(layer: bk.FusedDoraLinear) -> None:
    buffers = FlatParameters([layer.lora_A, layer.lora_B])
    layer(torch.randn(1, 40))
    buffers.set([buffer * 1.5 for buffer in buffers.buffers])


def in_fp64(layer: bk.FusedDoraLinear) -> None:
    layer.double().float()
    with torch.no_grad():
        layer.magnitude.mul_(0.5)


CHANGES = {
    **{f"{name} written in place": set_(name) for name in ("weight", "lora_A", "lora_B", "magnitude", "bias")},
    **{f"{name} replaced": replace(name) for name in ("weight", "lora_A", "lora_B", "magnitude", "bias")},
    "a storage replaced": storage, "scaling": rescaled, "another state": loaded, "no bias": without_bias,
    "a write past the counters": through_flat_buffers, "cast there and back": in_fp64,
}  # fmt: skip


@pytest.mark.parametrize("what", list(CHANGES))
def test_a_change_is_noticed_and_the_way_found_again(what: str, short_ways: list[bool]) -> None:
    layer, x = made(), torch.randn(2, 40)
    with torch.no_grad():
        before = [layer(x), layer(x)][1]
        CHANGES[what](layer)
        short_ways.clear()
        after, again = layer(x), layer(x)
    assert short_ways in ([False, True], [True])  # stale, or dropped already
    assert not torch.allclose(after, before, rtol=1e-3)
    torch.testing.assert_close(after.double(), exact(layer, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(after, again)


def test_a_state_that_is_not_looked_at_would_give_stale_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ParameterState, "is_current", lambda *arguments: True)
    for what in ("magnitude written in place", "weight replaced", "scaling", "a write past the counters"):
        layer, x = made(), torch.randn(2, 40)
        with torch.no_grad():
            before = [layer(x), layer(x)][1]
            CHANGES[what](layer)
            assert torch.equal(layer(x), before)


def test_a_merged_and_a_training_layer_do_not_take_it(short_ways: list[bool]) -> None:
    layer, x = made(), torch.randn(1, 40)
    with torch.no_grad():
        y = [layer(x), layer(x)][1]
        layer.merge()
        torch.testing.assert_close(layer(x), y)
        layer.unmerge()
        assert torch.equal(layer(x), y)
    assert short_ways == [True]
    layer.train()
    layer(x).sum().backward()
    assert layer.magnitude.grad is not None
    layer = made()
    layer.lora_dropout = 0.5
    with torch.no_grad():
        layer(x)
        layer.training = True  # as an attribute: dropout is on
        assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    "mode",
    [
        "grad",
        "autocast",
        "precise",
        "reference",
        "dispatch mode",
        "vmap",
        "forward mode",
        "point",
        "trace",
        "many tokens",
        "strided",
    ],
)
def test_other_calls_go_the_long_way(mode: str, short_ways: list[bool]) -> None:
    layer, x = made(), torch.randn(2, 40)
    with torch.no_grad():
        y = [layer(x), layer(x)][1]
    short_ways.clear()
    if mode == "point":
        buffers = FlatParameters([layer.lora_A, layer.lora_B])
        with torch.no_grad():
            for _ in range(2):  # the parameters lie elsewhere now
                layer(x)
        assert short_ways == [False, True]
        short_ways.clear()
    if mode == "grad":
        out = layer(x)
        assert out.requires_grad
        out.sum().backward()
        assert layer.lora_A.grad is not None
    with torch.no_grad():
        if mode == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
        elif mode == "precise":
            with bk.pass_mode(precise=True):
                layer(x)
        elif mode == "reference":
            with bk.use_backend("reference"):
                torch.testing.assert_close(layer(x), y)
        elif mode == "dispatch mode":
            with FlopCounterMode(display=False):
                assert torch.equal(layer(x), y)
        elif mode == "vmap":
            torch.testing.assert_close(torch.vmap(layer)(x), y)
        elif mode == "forward mode":
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
                assert torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent is not None
        elif mode == "point":
            with bk.pass_mode(point=buffers.point()):
                torch.testing.assert_close(layer(x), y)
        elif mode == "trace":
            traced = torch.jit.trace(layer, (x,), check_trace=False)
            layer.magnitude.mul_(2.0)
            torch.testing.assert_close(traced(x).double(), exact(layer, x), rtol=1e-5, atol=1e-5)
        elif mode == "many tokens":
            many = torch.randn(300, 40)
            torch.testing.assert_close(layer(many).double(), exact(layer, many), rtol=1e-5, atol=1e-5)
        elif mode == "strided":  # served: a copy is made
            assert torch.equal(layer(x.repeat_interleave(2, 1)[:, ::2]), y)
    assert short_ways == [mode == "strided"] * len(short_ways)
    assert len(short_ways) >= 1


@pytest.mark.parametrize(
    "x", [torch.randn(2, 41), torch.ones(2, 40, dtype=torch.int64), torch.randn(2, 40, device="meta")], ids=repr
)
def test_wrong_inputs_raise_as_on_the_long_way(x: Tensor) -> None:
    layer, messages = made(), []
    for _ in range(2):
        with torch.no_grad(), pytest.raises((TypeError, ValueError)) as caught:
            layer(x)
        messages.append(str(caught.value))
        with torch.no_grad():
            layer(torch.randn(1, 40))
    assert messages[0] == messages[1]


def test_no_token_at_all() -> None:
    layer = made()
    with torch.no_grad():
        for _ in range(2):
            layer(torch.randn(1, 40))
            assert layer(torch.empty(0, 40)).shape == (0, 24)


def test_under_inference_mode() -> None:
    layer, x = made(), torch.randn(1, 40)
    with torch.inference_mode():
        first, second = layer(x), layer(x)
    assert torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(layer(x), first)
    made_there = torch.inference_mode()(made)()
    with torch.inference_mode():
        assert torch.equal(made_there(x), made_there(x))


def test_a_copy_has_a_way_of_its_own(short_ways: list[bool]) -> None:
    layer, x = made(), torch.randn(1, 40)
    with torch.no_grad():
        y = [layer(x), layer(x)][1]
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            twin.magnitude.mul_(2.0)
            torch.testing.assert_close(twin(x).double(), exact(twin, x), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(twin(x).double(), exact(twin, x), rtol=1e-5, atol=1e-5)
        assert torch.equal(layer(x), y)


def test_a_compiled_layer(short_ways: list[bool]) -> None:
    layer, x = made(), torch.randn(2, 40)
    with torch.no_grad():
        y = [layer(x), layer(x)][1]
        short_ways.clear()
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), y)
    torch._dynamo.reset()
    assert short_ways == []


def test_a_short_way_says_what_it_saw() -> None:
    layer, x = made(dtype=torch.bfloat16), torch.randn(1, 40).bfloat16()
    with torch.no_grad():
        layer(x)
        with bk.pass_mode() as mode:
            layer(x)
    assert mode.seen_dtypes == {torch.bfloat16}


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "magnitude", "bias"])
@pytest.mark.parametrize("called_before", [False, True])
def test_parametrizations(name: str, called_before: bool) -> None:
    class Times(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = nn.Parameter(torch.tensor(1.0))

        def forward(self, value: Tensor) -> Tensor:
            return value * self.k

    layer, x = made(), torch.randn(2, 40)
    with torch.no_grad():
        for _ in range(2 * called_before):
            layer(x)
        nn.utils.parametrize.register_parametrization(layer, name, Times())
        for _ in range(3):
            torch.testing.assert_close(layer(x).double(), exact(layer, x), rtol=1e-5, atol=1e-5)
            layer.parametrizations[name][0].k.mul_(3.0)


def test_under_vmap_over_parameters() -> None:
    layer, x = made(), torch.randn(2, 40)
    stacked = {name: torch.stack([value.detach(), 2 * value.detach()]) for name, value in layer.named_parameters()}
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        ours = torch.vmap(lambda parameters: torch.func.functional_call(layer, parameters, (x,)))(stacked)
        torch.testing.assert_close(ours[0], layer(x))
        for value in layer.parameters():
            value.mul_(2.0)
        torch.testing.assert_close(ours[1], layer(x))
        assert not torch.allclose(ours[0], ours[1])


def test_a_recomputed_segment_has_its_own_passs_mode() -> None:
    """A reentrant checkpoint's first forward runs without gradients, and may take the short way."""
    layer, x = made(), torch.randn(2, 40, requires_grad=True)
    for needs in ({"direction"}, {"magnitude"}, {"direction"}):
        layer.zero_grad(set_to_none=True)
        with bk.pass_mode(needs=needs):
            torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True).sum().backward()
        got = {name for name, p in layer.named_parameters() if p.grad is not None}
        assert got == ({"magnitude"} if needs == {"magnitude"} else {"lora_A", "lora_B"})


def test_a_pickled_layer_is_no_larger_for_it() -> None:
    layer = made()
    before = len(pickle.dumps(layer))
    with torch.no_grad():
        for _ in range(2):
            layer(torch.randn(1, 40))
    layer._norm_cache = None
    assert len(pickle.dumps(layer)) < before + 1000  # another weight would be 3,840


def test_a_layer_that_never_takes_it_looks_once() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = bk.FusedDoraConv1D.from_conv1d(Conv1D(24, 40), r=3).eval()
    x = torch.randn(1, 40)
    with torch.no_grad():
        made_first = [layer(x), layer._decode][1]
        layer(x)
    assert layer._decode is made_first
    assert made_first._most == 0


@pytest.mark.parametrize("tokens", [1, 5])
def test_the_kernels_numbers_do_not_depend_on_which_thread_takes_which_rows(tokens: int) -> None:
    torch.manual_seed(0)
    x, weight, lora_A = torch.randn(tokens, 512), torch.randn(4099, 512), torch.randn(30, 512)
    lora_B, scale = torch.randn(4099, 30), torch.rand(4099)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, *(2, 3, 8) * 20):
            torch.set_num_threads(count)
            found.append(torch.full((tokens, 4099), torch.nan))
            native.few_tokens(x, weight, lora_A, lora_B, scale, None, 0.5, found[-1])
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[0], scale * (x @ weight.t() + 0.5 * x @ lora_A.t() @ lora_B.t()), rtol=1e-4, atol=1e-3)
    assert all(torch.equal(other, found[0]) for other in found[1:])
