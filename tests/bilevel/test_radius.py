"""The length of a difference's perturbation where fp32 products keep fewer bits than fp32 has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bidora_kernels as bk
from bidora_kernels.bilevel.radius import fp32_product_resolution, relative_radius

from .problems import TRAIN, VALIDATION, bert_loss, bert_optimizer, flat, second_order, small_bert

CPU = torch.device("cpu")
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)


class Rounded(TorchDispatchMode):
    """fp32 matrix products whose operands are first rounded to so many bits of mantissa, as tf32's (10) and bf16's (7) are."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.dropped = 23 - bits

    def _round(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        half = 1 << (self.dropped - 1)
        return ((value.contiguous().view(torch.int32) + half) >> self.dropped << self.dropped).view(torch.float32)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            args = (*args[:-2], self._round(args[-2]), self._round(args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("bits", "dtype"), [(10, torch.float16), (7, torch.bfloat16)])
def test_products_are_asked_for_their_resolution(bits: int, dtype: torch.dtype) -> None:
    assert fp32_product_resolution(CPU) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert fp32_product_resolution(CPU) == torch.float32
    with Rounded(bits):
        assert fp32_product_resolution(CPU) == dtype


@pytest.mark.parametrize("make", [bk.CentralDifference, bk.ForwardDifference])
def test_the_default_radius_holds_where_fp32_products_run_in_tf32(make: Any) -> None:
    """With fp32's own radius, as a control, the second-order term is lost in rounding there."""
    central = make is bk.CentralDifference
    least = 0.99 if central else 0.95

    def q(dtype: torch.dtype, estimator: Any) -> Tensor:
        options: dict[str, Any] = {"estimator": estimator, "xi": 1.0, "unroll": "gradient"}
        return second_order(bert_optimizer(small_bert(dtype=dtype), **options), bert_loss, TRAIN, VALIDATION).double()

    def cosine(left: Tensor, right: Tensor) -> float:
        return float(left @ right / (left.norm() * right.norm()))

    exact = q(torch.float64, bk.DoubleBackward())
    with bk.use_backend("reference"), Rounded(10):
        assert cosine(q(torch.float32, make()), exact) >= least
        assert cosine(q(torch.float32, make(relative_radius=relative_radius(torch.float32, central))), exact) < least


def test_a_radius_is_a_fraction_of_the_directions() -> None:
    optimizer = bert_optimizer(small_bert(dtype=torch.float32), estimator=bk.ForwardDifference(), xi=1.0)
    length = float(flat(list(bk.split_parameters(optimizer.model)[0])).norm())
    with bk.use_backend("reference"), Rounded(10):
        assert optimizer.step(bert_loss, TRAIN, VALIDATION).radius == pytest.approx(
            length * relative_radius(torch.float16, central=False), rel=1e-4
        )
