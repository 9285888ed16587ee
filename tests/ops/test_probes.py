"""The estimated penalty: unbiased in value and gradient, and chosen where the exact one does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bidora_kernels as bk
from bidora_kernels.ops import orthogonality

from .draws import draw
from .quantized_rows import quantized_linear, trained


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_estimate_is_unbiased(backend: str) -> None:
    call = draw(1, out_features=20, in_features=30, r=3)
    call.weight[4], call.lora_B[4] = 0.0, 0.0  # a row that is left out
    leaves = [call.lora_A.requires_grad_(), call.lora_B.requires_grad_()]
    exact = bk.reference.orthogonality_penalty(call.weight, *leaves, call.scaling)
    wanted = [exact.detach(), *torch.autograd.grad(exact, leaves)]
    sums, squares, rounds = [0.0] * 3, 0.0, 40
    for _ in range(rounds):
        with bk.use_backend(backend):
            value = bk.functional.orthogonality_penalty(call.weight, *leaves, call.scaling, probes=4000)
        for index, part in enumerate([value.detach(), *torch.autograd.grad(value, leaves)]):
            sums[index] = sums[index] + part.double() / rounds
        squares += (value.item() - wanted[0].item()) ** 2 / rounds
    assert abs(sums[0].item() - wanted[0].item()) < 4 * (squares / rounds) ** 0.5
    assert squares**0.5 < 0.1 * wanted[0].item()
    for got, want in zip(sums[1:], wanted[1:], strict=True):
        assert (got - want).norm() < 0.05 * want.norm()


def test_auto_estimates_beyond_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    orthogonality.clear_gram_cache()
    call = draw(2)
    arguments = (call.weight, call.lora_A, call.lora_B, call.scaling)
    exact = bk.reference.orthogonality_penalty(*arguments)
    torch.testing.assert_close(bk.functional.orthogonality_penalty(*arguments, probes="auto"), exact, rtol=1e-4, atol=1e-4)
    assert orthogonality.penalty_plan(call.weight, "auto").startswith("exact, from weight @ weight^T cached once")
    monkeypatch.setattr(orthogonality, "CACHE_BYTES", 0)
    orthogonality.clear_gram_cache()
    assert orthogonality.penalty_plan(call.weight, "auto") == "estimated from 16 pairs of random probes"
    assert "multiplied out at every call" in orthogonality.penalty_plan(call.weight)
    first, second = (bk.functional.orthogonality_penalty(*arguments, probes="auto") for _ in range(2))
    assert first != second
    torch.manual_seed(3)
    third = bk.functional.orthogonality_penalty(*arguments, probes=16)
    torch.manual_seed(3)
    assert torch.equal(third, bk.functional.orthogonality_penalty(*arguments, probes="auto"))


@pytest.mark.parametrize("probes", [-1, True, 1.5, "many"])
def test_what_is_no_number_of_probes(probes: object) -> None:
    call = draw(3)
    with pytest.raises(ValueError, match="probes must be 0"):
        bk.functional.orthogonality_penalty(call.weight, call.lora_A, call.lora_B, call.scaling, probes=probes)


def dora_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 40))
    bk.apply_dora(model, bk.DoraConfig(r=2, target_modules=["0", "1"]))
    for layer in model:
        nn.init.normal_(layer.lora_B, std=0.3)
    return model


def test_the_penalty_of_a_model_is_exact_where_the_budget_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    orthogonality.clear_gram_cache()
    model, penalty = dora_model(), bk.OrthogonalPenalty(0.3)
    terms = [layer.direction_terms() for layer in model]
    exact = 0.3 * sum(bk.reference.orthogonality_penalty(*term) for term in terms)
    assert all(text.startswith("exact, from weight @ weight^T cached once") for text in penalty.plan(model).values())
    torch.testing.assert_close(penalty(model), exact, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(orthogonality, "CACHE_BYTES", 2000)  # the first layer's product takes 1024 bytes, the second's 6400
    orthogonality.clear_gram_cache()
    torch.manual_seed(3)
    found = penalty(model)
    plan = penalty.plan(model)
    assert list(plan) == ["0", "1"]
    assert plan["0"].startswith("exact, from weight @ weight^T cached once")
    assert plan["1"] == "estimated from 16 pairs of random probes"
    torch.manual_seed(3)
    parts = [bk.functional.orthogonality_penalty(*term, probes=probes) for term, probes in zip(terms, (0, 16), strict=True)]
    torch.testing.assert_close(found, 0.3 * sum(parts))
    assert abs(found - exact) > 1e-4 * exact
    always = bk.OrthogonalPenalty(0.3, probes=0)
    assert "multiplied out at every call" in always.plan(model)["1"]
    torch.testing.assert_close(always(model), exact, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(found, [layer.lora_A for layer in model])
    assert all(float(gradient.norm()) > 0 for gradient in gradients)


def test_what_a_penalty_refuses_and_says() -> None:
    assert repr(bk.OrthogonalPenalty(0.5)) == "OrthogonalPenalty(0.5)"
    assert repr(bk.OrthogonalPenalty(0.5, probes=4)) == "OrthogonalPenalty(0.5, probes=4)"
    with pytest.raises(ValueError, match="probes must be 0"):
        bk.OrthogonalPenalty(0.5, probes="some")
    for call in (bk.OrthogonalPenalty(0.5), bk.OrthogonalPenalty(0.5).plan):
        with pytest.raises(ValueError, match="no DoRA layer"):
            call(nn.Linear(2, 2))


def test_the_product_of_a_quantized_weight_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    orthogonality.clear_gram_cache()
    layer, penalty, products = trained(quantized_linear(24, 40)), bk.OrthogonalPenalty(1.0), []
    original = orthogonality._product

    def counted(weight: Tensor) -> Tensor:
        products.append(weight.shape)
        return original(weight)

    monkeypatch.setattr(orthogonality, "_product", counted)
    with bk.use_backend("native"):
        first = penalty(layer)
        assert penalty(layer) == first
        torch.testing.assert_close(first, bk.reference.orthogonality_penalty(*layer.direction_terms()), rtol=1e-5, atol=1e-5)
        assert products == [(24, 40)]
        assert orthogonality.gram_cache_bytes() == 24 * 24 * 4
        assert penalty.plan(layer)[""].startswith("exact, from weight @ weight^T cached once")
        with torch.no_grad():
            layer.weight.mul_(2)
        penalty(layer)
    assert len(products) == 2
