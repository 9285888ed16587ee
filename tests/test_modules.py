"""The layers: identity at the start, PEFT's dropout, dtypes, merging, the eval-mode cache, copies, bad input."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidora_kernels as bk
from bidora_kernels import reference
from bidora_kernels.ops import _backend, _context

OUT, IN = 10, 12


def conv1d() -> nn.Module:
    module = pytest.importorskip("transformers.pytorch_utils").Conv1D(OUT, IN)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    return module


def make(kind: str = "linear", dtype: torch.dtype = torch.float32, **options: object) -> tuple[nn.Module, bk.FusedDoraLinear]:
    """A plain layer and a DoRA layer over it."""
    if kind == "linear":
        base = nn.Linear(IN, OUT).to(dtype)
        return base, bk.FusedDoraLinear.from_linear(base, r=3, lora_alpha=6, **options)
    base = conv1d().to(dtype)
    return base, bk.FusedDoraConv1D.from_conv1d(base, r=3, lora_alpha=6, **options)


def train_adapter(layer: bk.FusedDoraLinear) -> bk.FusedDoraLinear:
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.magnitude.mul_(torch.linspace(0.5, 1.5, OUT).to(layer.magnitude.dtype))
    return layer


def expected_output(layer: bk.FusedDoraLinear, x: Tensor) -> Tensor:
    weight, lora_A, lora_B, scaling = layer.direction_terms()
    return reference.dora_linear(x, weight, lora_A, lora_B, layer.magnitude, scaling, layer.bias)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_new_layer_is_the_layer_it_replaces(kind: str, dtype: torch.dtype) -> None:
    base, layer = make(kind, dtype)
    x = torch.randn(7, IN, dtype=dtype)
    y, truth = layer(x), base(x)
    assert y.dtype == dtype
    rows = layer.direction_terms()[0]
    summed = x.abs() @ rows.abs().T + base.bias.abs()  # two orders of one sum differ by eps of the sum of absolute terms
    assert ((y - truth).abs() <= 2 * torch.finfo(dtype).eps * summed).all()
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.magnitude.dtype == reference.norm_dtype(base.weight)
    torch.testing.assert_close(layer.magnitude.data, rows.to(layer.magnitude.dtype).norm(dim=1))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_frozen_weight_is_shared_not_copied(kind: str) -> None:
    base, layer = make(kind)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert {name for name, parameter in layer.named_parameters() if parameter.requires_grad} == {"lora_A", "lora_B", "magnitude"}


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_forward_is_the_reference(kind: str, use_rslora: bool) -> None:
    _, layer = make(kind, use_rslora=use_rslora)
    assert layer.scaling == pytest.approx(6 / 3**0.5 if use_rslora else 2.0)
    train_adapter(layer)
    x = torch.randn(2, 5, IN)
    torch.testing.assert_close(layer(x), expected_output(layer, x))


def test_dropout_is_one_call_on_x_and_only_in_training() -> None:
    _, layer = make(lora_dropout=0.4)
    train_adapter(layer)
    x = torch.randn(5, IN)
    torch.manual_seed(7)
    y = layer(x)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    x_dropped = nn.functional.dropout(x, 0.4)
    assert torch.equal(after, torch.get_rng_state())
    weight, lora_A, lora_B, scaling = layer.direction_terms()
    expected = reference.dora_linear(x, weight, lora_A, lora_B, layer.magnitude, scaling, layer.bias, x_dropped)
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, expected_output(layer, x))
    state = torch.get_rng_state()
    torch.testing.assert_close(layer.eval()(x), expected_output(layer, x))
    assert torch.equal(state, torch.get_rng_state())


FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("weight_dtype", "x_dtype", "autocast"), list(itertools.product(FLOATS, FLOATS, [None, torch.bfloat16])))
@pytest.mark.parametrize("training", [True, False])
def test_output_has_the_input_dtype_or_autocasts(
    weight_dtype: torch.dtype, x_dtype: torch.dtype, autocast: torch.dtype | None, training: bool
) -> None:
    _, layer = make(dtype=weight_dtype)
    train_adapter(layer).train(training)
    x = torch.randn(4, IN).to(x_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast is not None):
        y = layer(x)
    assert y.dtype == (autocast or x_dtype)
    y.float().square().sum().backward()
    assert x.grad.dtype == x_dtype
    for name in ("lora_A", "lora_B", "magnitude"):
        parameter = getattr(layer, name)
        assert parameter.grad.dtype == parameter.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()
    layer.merge()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast is not None):
        merged = layer(x)
    assert merged.dtype == y.dtype
    torch.testing.assert_close(merged.float(), y.float(), rtol=0.05, atol=0.15)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_bit_exact_unmerge(kind: str, dtype: torch.dtype) -> None:
    base, layer = make(kind, dtype)
    train_adapter(layer).eval()
    original, x = base.weight.detach().clone(), torch.randn(4, IN, dtype=dtype)
    before, state = layer(x), {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.merge()
    layer.merge()  # a second one changes nothing
    assert layer.merged
    torch.testing.assert_close(layer(x), before, **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}))
    assert torch.equal(base.weight, original)  # the shared weight is not written
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    with pytest.raises(RuntimeError, match="call unmerge"):
        layer.train()(x)
    layer.eval().unmerge()
    assert layer.weight is base.weight
    assert torch.equal(layer.weight, original)
    assert torch.equal(layer(x), before)


def test_safe_merge_refuses_and_changes_nothing() -> None:
    _, layer = make()
    with torch.no_grad():
        layer.magnitude[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert not layer.merged


def test_a_merged_layer_moves_and_loads() -> None:
    _, layer = make()
    train_adapter(layer).eval().merge()
    layer.double()
    assert layer.merged
    assert layer.weight.dtype == torch.float64
    layer.unmerge()
    assert layer.weight.dtype == torch.float64
    other = train_adapter(make()[1]).double().eval()
    layer.merge()
    layer.load_state_dict(other.state_dict())
    assert not layer.merged
    x = torch.randn(3, IN, dtype=torch.float64)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_plain_layer_it_leaves_behind(kind: str) -> None:
    _, layer = make(kind)
    train_adapter(layer).eval()
    plain = layer.to_linear() if kind == "linear" else layer.to_conv1d()
    assert type(plain).__name__ == {"linear": "Linear", "conv1d": "Conv1D"}[kind]
    assert not plain.training
    x = torch.randn(4, IN)
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        plain.weight.zero_()
    assert layer.weight.abs().sum() > 0


class TestEvalCache:
    """Every change that can be noticed is noticed; the one that cannot is pinned."""

    @pytest.fixture
    def layer(self) -> bk.FusedDoraLinear:
        layer = train_adapter(make()[1]).eval()
        layer(torch.zeros(1, IN))
        return layer

    @staticmethod
    def is_fresh(layer: bk.FusedDoraLinear) -> bool:
        x = torch.randn(4, IN)
        return torch.allclose(layer(x), expected_output(layer, x), rtol=1e-5, atol=1e-6)

    def test_it_is_used(self, layer: bk.FusedDoraLinear, monkeypatch: pytest.MonkeyPatch) -> None:
        def explode(*args: object) -> None:
            raise AssertionError("computed again")

        monkeypatch.setattr(bk.functional, "weight_norm", explode)
        with torch.no_grad():
            layer(torch.zeros(1, IN))
        layer.lora_A.data.zero_().add_(0)  # unseen, pinned below
        layer(torch.zeros(1, IN))
        with torch.no_grad():
            layer.lora_A.add_(1.0)
        with pytest.raises(AssertionError, match="computed again"):
            layer(torch.zeros(1, IN))

    @pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "magnitude"])
    def test_in_place_write(self, layer: bk.FusedDoraLinear, name: str) -> None:
        with torch.no_grad():
            getattr(layer, name).mul_(torch.rand_like(getattr(layer, name)) + 1)
        assert self.is_fresh(layer)

    @pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "magnitude"])
    def test_replaced_storage(self, layer: bk.FusedDoraLinear, name: str) -> None:
        getattr(layer, name).data = torch.randn_like(getattr(layer, name))
        assert self.is_fresh(layer)
        setattr(layer, name, nn.Parameter(torch.randn_like(getattr(layer, name)), requires_grad=False))
        assert self.is_fresh(layer)

    @pytest.mark.parametrize("assign", [True, False])
    def test_load_state_dict(self, layer: bk.FusedDoraLinear, assign: bool) -> None:
        layer.load_state_dict(train_adapter(make()[1]).state_dict(), assign=assign)
        assert self.is_fresh(layer)

    def test_merge_and_unmerge(self, layer: bk.FusedDoraLinear) -> None:
        layer.merge()
        layer.unmerge()
        assert self.is_fresh(layer)

    def test_moved(self, layer: bk.FusedDoraLinear) -> None:
        layer.double().float()
        assert self.is_fresh(layer)

    def test_an_announced_write_through_an_alias(self, layer: bk.FusedDoraLinear) -> None:
        layer.lora_B.data.view(-1).neg_()
        _context.bump_parameter_epoch()
        assert self.is_fresh(layer)

    def test_a_foreign_write_through_data_is_not_seen_until_told(self, layer: bk.FusedDoraLinear) -> None:
        layer.lora_B.data.mul_(3.0)
        assert not self.is_fresh(layer)
        layer.clear_cache()
        assert self.is_fresh(layer)
        layer.lora_B.data.mul_(3.0)
        layer.train()
        assert self.is_fresh(layer)

    def test_inference_mode_first_then_gradients(self) -> None:
        layer = train_adapter(make()[1]).eval()
        x = torch.randn(3, IN)
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
        expected = torch.autograd.grad(expected_output(layer, x).sum(), [layer.lora_A, layer.magnitude])
        torch.testing.assert_close(layer.lora_A.grad, expected[0])
        torch.testing.assert_close(layer.magnitude.grad, expected[1])

    def test_a_differentiated_norm_is_not_cached_under_grad(self) -> None:
        layer = train_adapter(make(detach_norm=False)[1]).eval()
        x = torch.randn(3, IN)
        with torch.no_grad():
            layer(x)
        weight, lora_A, lora_B, scaling = layer.direction_terms()
        expected = reference.dora_linear(x, weight, lora_A, lora_B, layer.magnitude, scaling, layer.bias, detach_norm=False)
        ours = torch.autograd.grad(layer(x).square().sum(), layer.lora_B)[0]
        torch.testing.assert_close(ours, torch.autograd.grad(expected.square().sum(), layer.lora_B)[0])


@pytest.mark.parametrize("merged", [True, False])
def test_copies_and_files(merged: bool) -> None:
    _, layer = make()
    train_adapter(layer).eval()
    x = torch.randn(4, IN)
    expected = layer(x)
    if merged:
        layer.merge()
    twin = copy.deepcopy(layer)
    twin.unmerge()
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.lora_B.zero_()
    layer.unmerge()
    assert torch.equal(layer(x), expected)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    restored = make()[1].eval()
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(restored(x), expected)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B", "magnitude"}


def test_repr_names_the_settings() -> None:
    text = repr(make(use_rslora=True, lora_dropout=0.1)[1])
    assert text == (
        "FusedDoraLinear(in_features=12, out_features=10, bias=True, r=3, lora_alpha=6, lora_dropout=0.1, use_rslora=True)"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": -2}, "r must be a positive integer, got -2"),
        ({"r": 2.0}, "r must be a positive integer, got 2.0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bk.FusedDoraLinear.from_linear(nn.Linear(4, 4), **options)


def test_a_rank_larger_than_the_layer_warns() -> None:
    with pytest.warns(UserWarning, match=r"r=6 is larger than the smaller side of a layer \[8, 4\]"):
        bk.FusedDoraLinear.from_linear(nn.Linear(4, 8), r=6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e19])
def test_a_weight_that_cannot_be_normed_names_its_row(value: float) -> None:
    linear = nn.Linear(4, 8)
    with torch.no_grad():
        linear.weight[5, 2] = value
    with pytest.raises(ValueError, match="in row 5"):
        bk.FusedDoraLinear.from_linear(linear)


def test_wrong_modules() -> None:
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear, got Embedding"):
        bk.FusedDoraLinear.from_linear(nn.Embedding(3, 4))
    with pytest.raises(TypeError, match="conv1d must be a transformers Conv1D, got Linear"):
        bk.FusedDoraConv1D.from_conv1d(nn.Linear(3, 4))
    with pytest.raises(TypeError, match="from_conv1d"):
        bk.FusedDoraConv1D.from_linear(nn.Linear(3, 4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(3, IN + 1)}, ValueError, r"x must be \[..., 12\], got \[3, 13\]"),
        ({"x": torch.ones(3, IN, dtype=torch.long)}, TypeError, "x must be fp64, fp32, bf16 or fp16, got int64"),
        ({"lora_A": torch.randn(3, IN - 1)}, ValueError, r"lora_A must be \[r, 12\], got \[3, 11\]"),
        ({"lora_B": torch.randn(OUT, 2)}, ValueError, r"lora_B must be \[10, 3\], got \[10, 2\]"),
        ({"magnitude": torch.randn(OUT + 1)}, ValueError, r"magnitude must be \[10\], got \[11\]"),
        ({"bias": torch.randn(OUT, 1)}, ValueError, r"bias must be \[10\], got \[10, 1\]"),
        ({"x_dropped": torch.randn(2, IN)}, ValueError, r"x_dropped must be \[3, 12\], got \[2, 12\]"),
        ({"magnitude": torch.randn(OUT, device="meta")}, ValueError, "magnitude must be on cpu like weight, got meta"),
        ({"weight": torch.randn(OUT, IN, 1)}, ValueError, r"weight must be \[out, in\], got \[10, 12, 1\]"),
    ],
)
def test_functional_checks_before_it_computes(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    arguments = {
        "x": torch.randn(3, IN), "weight": torch.randn(OUT, IN), "lora_A": torch.randn(3, IN), "lora_B": torch.randn(OUT, 3),
        "magnitude": torch.randn(OUT),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        bk.functional.dora_linear(**(arguments | change), scaling=1.0)


def test_an_fp64_input_of_a_layer_in_fp32_has_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `auto` takes the triton backend, whose model of costs knows no fp64."""
    layer = bk.FusedDoraLinear.from_linear(nn.Linear(64, 40), r=4)
    monkeypatch.setattr(_backend, "resolve", lambda device_type: "triton")
    plan = layer.plan(4, torch.float64)
    assert plan.name == "reference"
    assert not plan.kept
    assert layer.plan(4, torch.float32).name in ("activation", "weight")


@pytest.mark.parametrize("training", [True, False])
def test_forward_mode_and_reverse_mode_take_the_norm_for_the_same(training: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 12)
    for detach_norm in (True, False):
        layer = bk.FusedDoraLinear.from_linear(nn.Linear(12, 8), r=2, detach_norm=detach_norm).train(training)
        nn.init.normal_(layer.lora_B)

        def output(lora_A: Tensor, layer: Any = layer) -> Any:
            return torch.func.functional_call(layer, {"lora_A": lora_A}, (x,))

        reverse, forward = torch.func.jacrev(output)(layer.lora_A), torch.func.jacfwd(output)(layer.lora_A)
        torch.testing.assert_close(forward, reverse)


def test_a_layer_seen_by_a_functional_transform_can_be_copied() -> None:
    layer = bk.FusedDoraLinear.from_linear(nn.Linear(12, 8), r=2).eval()
    torch.func.grad(lambda x: layer(x).sum())(torch.randn(12))
    twin = copy.deepcopy(layer)
    torch.save(layer, io.BytesIO())
    assert torch.equal(twin(torch.ones(12)), layer(torch.ones(12)))


def test_modes_and_devices_of_one_call_do_not_stay_with_the_thread() -> None:
    """The scratch memory of the native backend outlives the call that made it."""
    from bidora_kernels.ops._workspace import release_workspace

    release_workspace()
    layer = bk.FusedDoraLinear.from_linear(nn.Linear(64, 64).half(), r=4, lora_dropout=0.1)
    x = torch.randn(40, 64).half()
    with torch.inference_mode():
        layer.eval()(x)
    layer.train()(x).sum().backward()
    release_workspace()
    plain = bk.FusedDoraLinear.from_linear(nn.Linear(64, 64), r=4)
    with torch.device("meta"):
        plain(torch.ones(400, 64, device="cpu")).sum().backward()
    assert plain.magnitude.grad is not None
