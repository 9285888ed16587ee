"""What only a GPU can show beside speed: real rounding and memory, CUDA graphs, 64-bit offsets, two minutes of random layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bidora_kernels as bk

from .stress import FIXED, check_fixed, stress

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU")]
STRESS_SECONDS = 120


@pytest.fixture(autouse=True)
def _exact_products() -> None:
    """fp32 products of the library and of the reference run in fp32."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("index", range(len(FIXED)), ids=lambda index: str(FIXED[index][:5]))
def test_fixed_shapes(index: int) -> None:
    assert check_fixed(index, "cuda") == []


def test_random_layers_for_two_minutes() -> None:
    layers, wrong = stress(STRESS_SECONDS, "cuda", 2048)
    print(f"{layers} random layers")
    assert wrong == []


def model(dtype: torch.dtype = torch.bfloat16, dropout: float = 0.0) -> nn.Module:
    net = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to("cuda", dtype)
    bk.apply_dora(net, bk.DoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules=["0", "2"]))
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.lora_B, std=0.02)
    return net


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", ["activation", "weight"])
def test_an_autocast_to_the_other_16_bit_dtype(plan: str, stored: torch.dtype) -> None:
    other = torch.float16 if stored is torch.bfloat16 else torch.bfloat16
    net, found = model(stored), []
    net[0].forced_plan = net[2].forced_plan = plan
    for backend in ("triton", "reference"):
        net.zero_grad()
        with bk.use_backend(backend), torch.autocast("cuda", other):
            y = net(torch.linspace(-1, 1, 64 * 256, device="cuda", dtype=stored).view(64, 256))
        y.float().square().mean().backward()
        found.append([y.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_magnitude_that_is_no_number_shows_in_either_plan(dtype: torch.dtype) -> None:
    net, x = model(dtype), torch.ones(64, 256, device="cuda", dtype=dtype)
    with torch.no_grad():
        net[0].magnitude.mul_(torch.tensor(0.0, device="cuda") / 0.0)
    for net[0].forced_plan in ("activation", "weight"):
        assert bool(net[0](x).isnan().all())


def test_a_graph_captured_in_eval_mode_follows_the_parameters() -> None:
    net, x = model().eval(), torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        net(x)  # leaves the norms in the layers
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            net(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
        net[0].lora_B.mul_(5.0)
        graph.replay()
        torch.testing.assert_close(y, net(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("plan", ["activation", "weight"])
def test_a_cuda_graph_captures_a_step(plan: str) -> None:
    net, data = model(), torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    twin = model()
    for layer, other in ((net[0], twin[0]), (net[2], twin[2])):
        other.load_state_dict(layer.state_dict())
        layer.forced_plan = other.forced_plan = plan
    static = data.clone()

    def step(one: nn.Module, x: torch.Tensor) -> torch.Tensor:
        loss = one(x).float().square().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in one.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad.zero_()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(net, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(net, static)
    for _ in range(3):
        step(twin, data)  # the warm-up; a capture runs nothing
    for _ in range(4):
        static.copy_(data)
        graph.replay()
        assert torch.equal(loss, step(twin, data))  # deterministic, so equal to the bit
    for mine, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_by_inductor(dynamic: bool) -> None:
    net = model()
    for layer in (net[0], net[2]):
        layer.forced_plan = "activation"
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic)
    trained = [p for p in net.parameters() if p.requires_grad]
    for tokens in (64, 96):
        x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
        found = [torch.autograd.grad(one(x).float().square().sum(), trained) for one in (net, compiled)]
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2 * float(want.abs().max()))


def test_gradients_are_reproducible_to_the_bit() -> None:
    net, x = model(), torch.randn(3000, 256, device="cuda", dtype=torch.bfloat16)
    trained = [p for p in net.parameters() if p.requires_grad]
    first = torch.autograd.grad(net(x).float().square().sum(), trained)
    for _ in range(5):
        again = torch.autograd.grad(net(x).float().square().sum(), trained)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_activations_of_more_than_two_to_the_31_elements() -> None:
    """The last tokens of a tensor whose offsets need 64 bits equal those of a short one."""
    tokens, features = 2**31 // 1024 + 64, 1024
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    layer = bk.FusedDoraLinear.from_linear(nn.Linear(features, features, device="cuda", dtype=torch.bfloat16), r=4)
    nn.init.normal_(layer.lora_B, std=0.02)
    x = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)
    for plan in ("activation", "weight"):
        layer.forced_plan = plan
        y = layer(x)
        grads = torch.autograd.grad(y[-32:].float().square().sum(), [layer.lora_A, layer.magnitude])
        short = layer(x[-32:])
        assert torch.equal(y[-32:], short)
        for got, want in zip(
            grads, torch.autograd.grad(short.float().square().sum(), [layer.lora_A, layer.magnitude]), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2 * float(want.abs().max()))
        del y, short


def test_weights_of_more_than_two_to_the_31_elements() -> None:
    rows, columns = 2**31 // 8192 + 64, 8192
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    lora_A, lora_B = torch.randn(4, columns, device="cuda"), torch.randn(rows, 4, device="cuda")
    magnitude = torch.rand(rows, device="cuda") + 0.5
    last = slice(rows - 32, rows)
    with torch.no_grad():
        for name, more in (("weight_norm", ()), ("merged_weight", (magnitude,))):
            whole = getattr(bk.functional, name)(weight, lora_A, lora_B, *more, 0.5)
            alone = getattr(bk.functional, name)(weight[last], lora_A, lora_B[last], *(m[last] for m in more), 0.5)
            torch.testing.assert_close(whole[last], alone, rtol=1e-2, atol=1e-2)
            del whole


def test_a_pass_saves_what_it_needs() -> None:
    """Beyond x, with a bias: the base output where the magnitude trains, nothing of that size where it does not."""
    layer = bk.FusedDoraLinear.from_linear(nn.Linear(2048, 2048, device="cuda", dtype=torch.bfloat16), r=16)
    layer.forced_plan = "activation"
    x = torch.randn(8192, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    held = {}
    for needs in (("direction",), ("direction", "magnitude")):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with bk.pass_mode(needs=needs):
            y = layer(x)
        held[needs] = torch.cuda.memory_allocated() - before
        del y
    output = 8192 * 2048 * 2
    assert held["direction",] < 1.1 * output  # y itself
    assert held["direction", "magnitude"] < 2.1 * output
