"""The expected values agree with the reference's own gradients, and a layer that drops a term is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bidora_kernels as bk
from benchmarks import oracle
from benchmarks.cases import LayerCase
from benchmarks.peers import Material
from benchmarks.timing import Disagreement

CASE = LayerCase(out_features=40, in_features=56, tokens=36, r=3)


@pytest.fixture(scope="module")
def material() -> Material:
    return Material(CASE, "cpu")


def _results(material: Material, rule: str, **changes: object) -> dict[str, Tensor]:
    """y and the gradients by autograd through the reference, in fp64; `changes` break it."""
    first, a = material.sets[0], material.adapter
    scaling = changes.get("scaling", a.scaling)
    x = first.x.detach().double().requires_grad_()
    lora_A, lora_B, magnitude = (t.double().requires_grad_() for t in (a.lora_A, a.lora_B, a.magnitude))
    weight = first.weight.double()
    assert first.bias is not None
    bias = None if changes.get("no_bias") else first.bias.double()
    if rule == "dora":
        y = bk.reference.dora_linear(x, weight, lora_A, lora_B, magnitude, scaling, bias)
        inputs = {"x": x, "lora_A": lora_A, "lora_B": lora_B, "magnitude": magnitude}
    elif rule == "lora":
        y = x @ weight.T + scaling * (x @ lora_A.T) @ lora_B.T + bias
        inputs = {"x": x, "lora_A": lora_A, "lora_B": lora_B}
    else:
        y, inputs = x @ weight.T + bias, {"x": x}
    grads = torch.autograd.grad(y, list(inputs.values()), first.grad.double())
    return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}


@pytest.mark.parametrize("rule", oracle.RULES)
def test_expected_values_are_the_references_gradients(material: Material, rule: str) -> None:
    oracle.compare(_results(material, rule), material.expected(rule), 1e-12)


@pytest.mark.parametrize("dtype", oracle.TOLERANCE)
@pytest.mark.parametrize("broken", ["no low rank", "no bias", "lora for dora", "lora_A", "lora_B", "magnitude", "x", "nan"])
def test_a_dropped_term_is_refused(material: Material, broken: str, dtype: torch.dtype) -> None:
    tolerance = oracle.TOLERANCE[dtype]
    results = _results(material, "dora")
    if broken == "no low rank":
        results = _results(material, "dora", scaling=0.0)
    elif broken == "no bias":
        results = _results(material, "dora", no_bias=True)
    elif broken == "lora for dora":
        results = _results(material, "lora")
    elif broken == "nan":
        results["y"][0, 0] = float("nan")
    else:
        results[broken] = 1.1 * results[broken]
    with pytest.raises(Disagreement, match="relative error above"):
        oracle.compare(results, material.expected("dora"), tolerance)
