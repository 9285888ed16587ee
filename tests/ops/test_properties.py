"""Random shapes, ranks, dtypes and strides; and that the comparison sees every term of the equation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bidora_kernels as bk
from bidora_kernels import native

from .draws import Call, compare, draw, run, sizes, violations

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))

CALLS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "out_features": st.integers(1, 150),
        "in_features": st.integers(1, 300),
        "r": st.integers(1, 40),
        "tokens": st.one_of(st.tuples(st.integers(1, 120)), st.tuples(st.integers(1, 4), st.integers(1, 40))),
        "dtype": st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
        "bias": st.booleans(),
        "dropped": st.booleans(),
        "detach_norm": st.booleans(),
        "layout": st.sampled_from(["rows", "transposed", "sliced", "strided"]),
        "norm_known": st.booleans(),
    }
)
SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=60, **SETTINGS)
@given(CALLS)
def test_a_layer_of_any_shape(drawn: dict[str, object]) -> None:
    call = draw(**drawn)
    assert violations(call, run(call, "native")) == []


@pytest.mark.slow
@settings(max_examples=1000, **SETTINGS)
@given(CALLS)
def test_a_thousand_layers(drawn: dict[str, object]) -> None:
    call = draw(**drawn)
    assert violations(call, run(call, "native")) == []


def without_update(call: Call) -> Call:
    return dataclasses.replace(call, lora_B=torch.zeros_like(call.lora_B))


def ones(call: Call, name: str) -> Call:
    return dataclasses.replace(call, **{name: torch.ones_like(call.magnitude)})


MUTATIONS = {  # what the equation loses -> (the mutated call, the results that must then break the bound)
    "the low-rank update": (without_update, ["y", "x", "lora_A", "magnitude"]),
    "the update's sign": (
        lambda c: dataclasses.replace(c, scaling=-c.scaling), ["y", "x", "lora_A", "lora_B", "magnitude"],
    ),
    "scaling": (lambda c: dataclasses.replace(c, scaling=1.0), ["y", "x", "lora_A", "lora_B", "magnitude"]),
    "the norm": (lambda c: ones(c, "norm"), ["y", "x", "lora_A", "lora_B", "magnitude"]),
    "the magnitude": (lambda c: ones(c, "magnitude"), ["y", "x", "lora_A", "lora_B"]),
    "the magnitude's sign": (
        lambda c: dataclasses.replace(c, magnitude=-c.magnitude), ["y", "x", "lora_A", "lora_B"],
    ),
    "the bias": (lambda c: dataclasses.replace(c, bias=None), ["y"]),
    "the bias's sign": (lambda c: dataclasses.replace(c, bias=-c.bias), ["y"]),
    "the frozen weight": (lambda c: dataclasses.replace(c, weight=torch.zeros_like(c.weight)), ["y", "x", "lora_A", "magnitude"]),
    "the gradient's sign": (lambda c: dataclasses.replace(c, grad=-c.grad), ["x", "lora_A", "lora_B", "magnitude"]),
    "one token": (
        lambda c: dataclasses.replace(c, grad=torch.cat([torch.zeros_like(c.grad[:1]), c.grad[1:]])),
        ["x", "lora_A", "lora_B", "magnitude"],
    ),
    "the norm's derivative": (lambda c: dataclasses.replace(c, detach_norm=True), ["lora_A", "lora_B"]),
}  # fmt: skip
DROPPED = {
    "dropout on the update and the change of scale": (
        lambda c: dataclasses.replace(c, x_dropped=c.x), ["y", "lora_A", "lora_B", "magnitude"],
    ),
    "the frozen branch without dropout": (lambda c: dataclasses.replace(c, x=c.x_dropped), ["y"]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("what", "dropped"),
    [(what, dropped) for what in MUTATIONS for dropped in (False, True)] + [(what, True) for what in DROPPED],
)
def test_the_comparison_sees_every_term(what: str, dropped: bool, dtype: torch.dtype) -> None:
    mutate, must_break = (MUTATIONS | DROPPED)[what]
    call = draw(21, 48, 64, 4, (3, 30), dtype, dropped=dropped, detach_norm=False)
    if dropped and what in ("the norm", "the magnitude"):
        must_break = [name for name in must_break if name != "x"] + ["x_dropped"]
    elif dropped:
        must_break = ["x_dropped" if name == "x" and what != "the gradient's sign" else name for name in must_break]
    truth, reference, size = run(call.double(), "reference"), run(call, "reference"), sizes(call)
    assert compare(run(call, "native"), reference, truth, size, dtype) == []
    broken = {line.split(":")[0] for line in compare(run(mutate(call), "native"), reference, truth, size, dtype)}
    assert set(must_break) <= broken, set(must_break) - broken


@pytest.mark.parametrize("name", ["weight_norm", "merged_weight", "normalized_direction", "orthogonality_penalty"])
@pytest.mark.parametrize("what", ["the update", "its sign", "scaling"])
def test_the_weights_feel_every_term(name: str, what: str) -> None:
    call = draw(22)
    mutated = {
        "the update": without_update(call),
        "its sign": dataclasses.replace(call, scaling=-call.scaling),
        "scaling": dataclasses.replace(call, scaling=1.0),
    }[what]

    def value(which: Call, backend: str) -> torch.Tensor:
        rest = (which.magnitude,) if name == "merged_weight" else ()
        with bk.use_backend(backend):
            return getattr(bk.functional, name)(which.weight, which.lora_A, which.lora_B, *rest, which.scaling)

    expected = value(call.double(), "reference")
    assert torch.allclose(value(call, "native").double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(value(mutated, "native").double(), expected, rtol=1e-3, atol=1e-3)
