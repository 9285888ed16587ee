"""The weight plan: y = x W'^T with W' rebuilt or kept between passes, and its gradients, against fp64."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

import bidora_kernels as bk
from bidora_kernels import reference
from bidora_kernels.kernels._launch import LAUNCHES
from bidora_kernels.kernels.magnitude_gradient import NEAR_ZERO, launch_magnitude_gradient
from bidora_kernels.model import report as describe
from bidora_kernels.ops import _backend, _context
from bidora_kernels.ops._triton_weight_plan import merge

from .comparison import DTYPES, TINY_ROW, ZERO_ROW, Layer, assert_mutation_fails, assert_rows_close, make_layer, ordinary_rows

SHAPES = [(72, 104, 1), (133, 150, 3), (104, 72, 16), (40, 90, 100), (72, 56, 130)]
NAMES = ("y", "x", "lora_A", "lora_B", "magnitude")


def run(layer: Layer, x: Tensor, grad: Tensor, backend: str, bias: bool = True, detach: bool = True, **options: object) -> dict:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, layer.lora_A, layer.lora_B, layer.magnitude)]
    with bk.use_backend(backend):
        y = bk.functional.dora_linear(
            leaves[0], layer.weight, *leaves[1:], layer.scaling, layer.bias if bias else None, detach_norm=detach, **options
        )
        return dict(zip(NAMES, [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))], strict=True))


def sizes(layer: Layer, x: Tensor, grad: Tensor, detach: bool) -> dict[str, Tensor]:
    """Each result as a sum over absolute values."""
    exact, signed_x, x, grad = layer.double().absolute(), x.double(), x.double().abs(), grad.double().abs()
    norm = reference.weight_norm(*[t.double() for t in (layer.weight, layer.lora_A, layer.lora_B)], layer.scaling)
    above = norm >= reference.NORM_FLOOR
    inverse = torch.where(above, 1.0 / norm, 0.0)
    scale = torch.where(above, exact.magnitude * inverse, 1.0)
    updated = exact.weight + layer.scaling * exact.lora_B @ exact.lora_A
    inner = grad.T @ x
    magnitude = (inner * updated).sum(1) * inverse
    dV = scale[:, None] * inner
    signed = reference.direction(*[t.double() for t in (layer.weight, layer.lora_A, layer.lora_B)], layer.scaling)
    # W' rounds every product of an output on its own: by the length of both rows over the root of their size in all
    output = (signed_x @ signed.T).abs() + signed_x.norm(dim=1)[:, None] * signed.norm(dim=1) / signed.shape[1] ** 0.5
    if not detach:
        dV = dV + (scale * magnitude * inverse)[:, None] * updated
    return {
        "y": x @ (scale[:, None] * updated).T + exact.bias,
        "x": grad @ (scale[:, None] * updated),
        "lora_A": layer.scaling * exact.lora_B.T @ dV,
        "lora_B": layer.scaling * dV @ exact.lora_A.T,
        "magnitude": (grad * output).sum(0) * inverse,
    }


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, tokens: int = 35) -> tuple[Layer, Tensor, Tensor]:
    layer = make_layer(*shape, dtype, torch.float32)
    return layer, torch.randn(tokens, shape[1]).to(dtype), torch.randn(tokens, shape[0]).to(dtype)


def check(shape: tuple[int, int, int], dtype: torch.dtype, plan: str, bias: bool, detach: bool, tokens: int = 35) -> None:
    layer, x, grad = inputs(shape, dtype, tokens)
    got = run(layer, x, grad, "triton", bias, detach, plan=plan)
    expected = run(layer.double(), x.double(), grad, "reference", bias, detach)
    same, bounds = run(layer, x, grad, "reference", bias, detach), sizes(layer, x, grad, detach)
    for name in NAMES:
        assert got[name].dtype == same[name].dtype
        assert_rows_close(got[name], expected[name], same[name], dtype, bounds[name])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(shape, dtype, "weight", True, shape[2] % 2 == 1)


def test_without_a_bias_and_through_the_norm() -> None:
    check((72, 104, 3), torch.bfloat16, "weight", False, True)
    check((72, 104, 3), torch.float32, "weight", False, False)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("r", [3, 16, 130])
def test_the_activation_plan_without_a_bias(r: int, dtype: torch.dtype) -> None:
    """It keeps y instead of the base output, and reads the magnitude's gradient off it."""
    check((72, 104, r), dtype, "activation", False, r != 16)


@pytest.mark.parametrize("detach", [True, False])
def test_library_products_at_large_ranks(detach: bool) -> None:
    check((72, 56, 130), torch.float32, "activation", True, detach)
    check((72, 56, 130), torch.bfloat16, "activation", detach, True)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["weight", "activation"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("r", [1, 3, 16, 64, 100, 512])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 104), (72, 1000), (333, 77)])
def test_cross_product(out_features: int, in_features: int, r: int, dtype: torch.dtype, plan: str) -> None:
    for bias, detach in ((True, True), (False, True), (True, False), (False, False)):
        check((out_features, in_features, r), dtype, plan, bias, detach)


MUTATIONS = {
    "no weight": lambda layer: Layer(0 * layer.weight, layer.lora_A, layer.lora_B, layer.magnitude, layer.bias, layer.scaling),
    "no low rank": lambda layer: Layer(layer.weight, layer.lora_A, layer.lora_B, layer.magnitude, layer.bias, 0.0),
    "low rank turned": lambda layer: Layer(layer.weight, layer.lora_A, layer.lora_B, layer.magnitude, layer.bias, -layer.scaling),
    "scale turned": lambda layer: Layer(layer.weight, layer.lora_A, layer.lora_B, -layer.magnitude, layer.bias, layer.scaling),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_term_is_noticed(dtype: torch.dtype) -> None:
    layer, x, grad = inputs((72, 104, 16), dtype)
    exact = layer.double()
    got, same, bounds = (
        run(layer, x, grad, "triton", plan="weight"), run(layer, x, grad, "reference"), sizes(layer, x, grad, True)
    )  # fmt: skip
    expected = run(exact, x.double(), grad, "reference")
    norm = reference.weight_norm(exact.weight, exact.lora_A, exact.lora_B, layer.scaling)
    touched = {
        "no weight": ("y", "x", "magnitude"), "no low rank": ("y", "x", "lora_A", "lora_B", "magnitude"),
        "low rank turned": NAMES, "scale turned": ("y", "x", "lora_A", "lora_B"),
    }  # fmt: skip
    for mutation, mutate in MUTATIONS.items():
        mutated = run(mutate(exact), x.double(), grad, "reference", norm=norm)
        for name in touched[mutation]:
            rows = ordinary_rows(norm) if name in ("lora_B", "magnitude") else None
            try:
                assert_mutation_fails(mutated[name], got[name], expected[name], same[name], rows, dtype, bounds[name])
            except AssertionError as error:
                raise AssertionError(f"{mutation}, {name}: {error}") from error


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_kept_merged_weight_changes_no_bit(bias: bool, detach: bool) -> None:
    layer, x, grad = inputs((72, 104, 4), torch.bfloat16)
    rebuilt = run(layer, x, grad, "triton", bias, detach, plan="weight")
    merged, norm = merge(layer.weight, layer.lora_A, layer.lora_B, layer.magnitude, layer.scaling, torch.bfloat16)
    LAUNCHES.clear()
    kept = run(layer, x, grad, "triton", bias, detach, merged=merged, norm=norm)
    assert LAUNCHES["merged_weight"] == LAUNCHES["weight_norm"] == LAUNCHES["compose"] == 0
    for name in NAMES:
        assert torch.equal(kept[name], rebuilt[name]), name
    # who cannot use it computes as if it were not there
    for options in ({"backend": "reference"}, {"backend": "triton", "precise": True}):
        with bk.pass_mode(**options) if options["backend"] == "triton" else contextlib.nullcontext():
            without = run(layer, x, grad, options["backend"], bias, detach)
            given = run(layer, x, grad, options["backend"], bias, detach, merged=merged, norm=norm)
        for name in NAMES:
            torch.testing.assert_close(given[name], without[name], rtol=2**-7, atol=2**-7 * float(without[name].abs().max()))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("plan", "kept", "bias"),
    [("weight", False, True), ("weight", True, True), ("activation", False, True), ("activation", False, False)],
)
def test_magnitudes_near_zero_keep_their_gradient(plan: str, kept: bool, bias: bool, dtype: torch.dtype) -> None:
    layer, x, grad = inputs((72, 104, 16), dtype)
    layer.magnitude[::3] = 0.0
    layer.magnitude[1::9] = 1e-7
    options: dict[str, object] = {"plan": plan, "bias": bias}
    if kept:
        merged, norm = merge(layer.weight, layer.lora_A, layer.lora_B, layer.magnitude, layer.scaling, dtype)
        options = {"merged": merged, "norm": norm}
    got = run(layer, x, grad, "triton", **options)["magnitude"]
    expected, same = (run(one, x.to(one.weight.dtype), grad, "reference", bias)["magnitude"] for one in (layer.double(), layer))
    assert_rows_close(got, expected, same, dtype, sizes(layer, x, grad, True)["magnitude"])
    assert got[[ZERO_ROW, TINY_ROW]].abs().max() == 0.0


def test_the_gradient_of_lost_rows() -> None:
    """The kernel alone: exact where |magnitude| is small, untouched elsewhere, and each term matters."""
    layer, x, grad = inputs((72, 104, 16), torch.float32, tokens=70)
    norm = reference.weight_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
    layer.magnitude = norm.clone()
    lost = torch.arange(72) % 5 == 0
    layer.magnitude[lost] = norm[lost] * NEAR_ZERO * 0.9
    before = torch.full((72,), 7.0)
    arguments = (grad, x, layer.weight, layer.lora_A, layer.lora_B, layer.magnitude, norm)
    got = launch_magnitude_gradient(before.clone(), *arguments, layer.scaling)
    lost = lost | ~ordinary_rows(norm)
    assert torch.equal(got[~lost], before[~lost])
    rows = lost & ordinary_rows(norm)

    def value(one: Layer, g: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        updated = reference.direction(one.weight.to(dtype), one.lora_A.to(dtype), one.lora_B.to(dtype), scaling)
        return ((g.T.to(dtype) @ x.to(dtype)) * updated).sum(1)[rows] / norm[rows].to(dtype)

    expected, same = (value(layer, grad, layer.scaling, dtype) for dtype in (torch.float64, torch.float32))
    bound = sizes(layer, x, grad, True)["magnitude"][rows]
    assert_rows_close(got[rows], expected, same, bound=bound)
    without = Layer(0 * layer.weight, layer.lora_A, layer.lora_B, layer.magnitude, layer.bias, layer.scaling)
    for mutated in (
        value(layer, grad, 0.0, torch.float64), value(layer, grad, -layer.scaling, torch.float64),
        value(without, grad, layer.scaling, torch.float64), value(layer, -grad, layer.scaling, torch.float64),
        expected * norm[rows],
    ):  # fmt: skip
        assert_mutation_fails(mutated, got[rows], expected, same, bound=bound)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("plan", ["activation", "weight"])
def test_an_output_overwritten_in_place(plan: str, bias: bool) -> None:
    layer, x, grad = inputs((72, 104, 4), torch.float32)
    found = []
    for in_place in (True, False):
        leaves = [tensor.detach().requires_grad_() for tensor in (layer.lora_A, layer.lora_B, layer.magnitude)]
        with bk.use_backend("triton"):
            y = bk.functional.dora_linear(x, layer.weight, *leaves, layer.scaling, layer.bias if bias else None, plan=plan)
            y = y.mul_(3.0).relu_() if in_place else (y * 3.0).relu()
            found.append(torch.autograd.grad(y, leaves, grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_an_output_overwritten_in_a_compiled_call(bias: bool) -> None:
    """A compiled call keeps the base output: autograd would refuse a saved y that was overwritten."""
    layer, x, grad = inputs((72, 104, 4), torch.float32)

    def call(lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
        y = bk.functional.dora_linear(
            x, layer.weight, lora_A, lora_B, magnitude, layer.scaling, layer.bias if bias else None, plan="activation"
        )
        return y.mul_(3.0).relu_()

    found = []
    for one in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaves = [tensor.detach().requires_grad_() for tensor in (layer.lora_A, layer.lora_B, layer.magnitude)]
        with bk.use_backend("triton"):
            found.append(torch.autograd.grad(one(*leaves), leaves, grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", ["activation", "weight"])
def test_a_second_backward_gives_the_same_bits(plan: str) -> None:
    layer, x, grad = inputs((72, 104, 4), torch.bfloat16)
    leaves = [tensor.detach().requires_grad_() for tensor in (layer.lora_A, layer.lora_B, layer.magnitude)]
    with bk.use_backend("triton"):
        y = bk.functional.dora_linear(x, layer.weight, *leaves, layer.scaling, None, plan=plan)
        first = torch.autograd.grad(y, leaves, grad, retain_graph=True)
        second = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("plan", ["activation", "weight"])
def test_what_a_forward_keeps(plan: str, bias: bool) -> None:
    """Beside its inputs and y: another tensor of y's size only where a bias hides what the magnitude's gradient needs."""
    layer, x, _ = inputs((72, 104, 4), torch.bfloat16, tokens=50)
    leaves = [tensor.detach().requires_grad_() for tensor in (layer.lora_A, layer.lora_B, layer.magnitude)]
    with bk.use_backend("triton"):
        y = bk.functional.dora_linear(x, layer.weight, *leaves, layer.scaling, layer.bias if bias else None, plan=plan)
    assert y.grad_fn is not None
    large = [tensor for tensor in y.grad_fn.saved_tensors if tensor is not None and tensor.numel() == y.numel()]
    assert len(large) == bias
    assert all(tensor.data_ptr() != y.data_ptr() for tensor in large)


@pytest.mark.parametrize("needs", [(), ("direction",), ("magnitude",)])
def test_a_pass_computes_what_it_needs(needs: tuple[str, ...]) -> None:
    layer, x, grad = inputs((72, 104, 4), torch.float32)
    leaves = [tensor.detach().requires_grad_() for tensor in (layer.lora_A, layer.lora_B, layer.magnitude)]
    wanted = [leaf for leaf, group in zip(leaves, ("direction", "direction", "magnitude"), strict=True) if group in needs]
    full = run(layer, x, grad, "triton", plan="weight")
    LAUNCHES.clear()
    with bk.pass_mode(needs=needs, backend="triton"):
        y = bk.functional.dora_linear(x, layer.weight, *leaves, layer.scaling, layer.bias, plan="weight")
        got = torch.autograd.grad(y, wanted, grad) if wanted else []
    names = [name for name, group in zip(NAMES[2:], ("direction", "direction", "magnitude"), strict=True) if group in needs]
    for name, value in zip(names, got, strict=True):
        torch.testing.assert_close(value, full[name], rtol=1e-6, atol=1e-6)
    assert LAUNCHES["merged_weight"] == 1  # x needs no gradient: the backward writes none
    assert LAUNCHES["compose_backward"] == bool(needs)
    assert LAUNCHES["magnitude_gradient"] == ("magnitude" in needs)


def make_dora(**options: object) -> bk.FusedDoraLinear:
    dora = bk.FusedDoraLinear.from_linear(torch.nn.Linear(104, 72), r=4, **options)
    torch.nn.init.normal_(dora.lora_B, std=0.3)
    return dora


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_keeps_its_merged_weight_between_micro_batches(training: bool) -> None:
    dora, x = make_dora().train(training), torch.randn(40, 104)
    dora.reuse, dora.forced_plan = 4, "weight"  # at these sizes launches decide
    optimizer = torch.optim.SGD([dora.lora_A, dora.lora_B, dora.magnitude], lr=0.1)

    def rebuilds() -> int:
        before = LAUNCHES["merged_weight"]
        with bk.use_backend("triton"):
            y = dora(x)
        with bk.use_backend("reference"):
            torch.testing.assert_close(y, dora(x), rtol=1e-4, atol=1e-4)
        y.square().sum().backward()
        return LAUNCHES["merged_weight"] - before

    with bk.use_backend("triton"):
        assert dora.plan(40).kept
    assert [rebuilds() for _ in range(4)] == [1, 0, 0, 0]
    optimizer.step()
    assert [rebuilds(), rebuilds()] == [1, 0]
    for name in ("lora_A", "lora_B", "magnitude"):
        with torch.no_grad():
            getattr(dora, name).mul_(1.1)
        assert [rebuilds(), rebuilds()] == [1, 0]
    dora.load_state_dict({name: 1.1 * value for name, value in dora.state_dict().items()})
    assert [rebuilds(), rebuilds()] == [1, 0]
    dora.magnitude = torch.nn.Parameter(2.0 * dora.magnitude.detach())
    assert [rebuilds(), rebuilds()] == [1, 0]
    dora.lora_A.data.mul_(0.5)  # as a flat buffer writes: not counted, but announced
    _context.bump_parameter_epoch()
    assert [rebuilds(), rebuilds()] == [1, 0]
    dora.magnitude.data.mul_(1.5)  # nobody can see it
    dora.clear_cache()
    assert [rebuilds(), rebuilds()] == [1, 0]
    dora.train(training)
    assert rebuilds() == 1


def test_when_nothing_is_kept() -> None:
    x = torch.randn(40, 104)

    def rebuilds(dora: bk.FusedDoraLinear, **mode: object) -> int:
        LAUNCHES.clear()
        with bk.pass_mode(backend="triton", **mode), torch.no_grad():
            for _ in range(3):
                dora(x)
        return LAUNCHES["merged_weight"]

    dora = make_dora()
    assert rebuilds(dora, reuse=3) == 1
    dora.clear_cache()
    assert rebuilds(dora, reuse=3, precise=True) == 0
    assert rebuilds(make_dora(lora_dropout=0.5), reuse=3) == 0
    dora.forced_plan = "activation"
    assert rebuilds(dora, reuse=3) == 0
    dora.forced_plan = "weight"
    assert rebuilds(dora) == 3
    with torch.inference_mode():
        inside = make_dora()
        inside.reuse = 5
        with bk.use_backend("triton"):
            assert inside(x).shape == (40, 72)


def test_sizes_that_auto_leaves_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(104, 72), torch.nn.Linear(72, 3))
    report = bk.apply_dora(model, bk.DoraConfig(r=2, target_modules=["0", "1"]))
    assert "plain PyTorch" not in str(report)
    monkeypatch.setattr(_backend, "_auto", lambda device_type: "triton")  # what auto resolves to on a GPU
    assert model[0].plan(5).name != "reference"
    assert model[1].plan(5).reason == "plain PyTorch: [3, 72] are not both multiples of 8"
    described = describe(model, [], {}).layers
    assert "plain PyTorch" not in described["0"]
    assert described["1"].endswith("in plain PyTorch: [3, 72] are not both multiples of 8")
    LAUNCHES.clear()
    model(torch.randn(5, 104))
    assert LAUNCHES["weight_norm"] == 1


def test_plans_in_words() -> None:
    dora = make_dora()
    wide = bk.FusedDoraLinear.from_linear(torch.nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16), r=4)
    with bk.use_backend("triton"):
        assert str(wide.plan(16384)).startswith("weight plan: modelled ")
        assert str(wide.plan(1)).startswith("activation plan: modelled ")
        wide.reuse = 8
        assert str(wide.plan(16384)).startswith("weight plan, merged weight kept between passes: modelled ")
        assert "with one merged weight for 8 passes" in wide.plan(16384).reason
        dora.forced_plan = "activation"
        assert str(dora.plan(40)) == "activation plan: asked for by name"
        with bk.pass_mode(precise=True):
            assert dora.plan(40).reason == "a precise pass keeps its base output in fp32"
        assert make_dora(lora_dropout=0.1).plan(40).reason == "dropout needs the product with the frozen weight"
    with bk.use_backend("reference"):
        assert str(dora.plan(40)) == "reference plan: plain PyTorch: asked for by name"
