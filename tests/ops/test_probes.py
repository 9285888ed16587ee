"""The estimated penalty: unbiased in value and gradient, and chosen where the exact one does not fit."""

from __future__ import annotations

import pytest
import torch

import bidora_kernels as bk
from bidora_kernels.ops import orthogonality

from .draws import draw


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
