from __future__ import annotations

import pytest
import torch

from bidora_kernels.kernels._launch import LAUNCHES
from bidora_kernels.kernels.reduce_partials import Segment, launch_reduce_partials

from . import comparison  # noqa: F401 (skips this module without the interpreter)


def test_three_segments_in_one_launch() -> None:
    first, second, third = torch.rand(9, 300), torch.rand(1, 70), torch.rand(17, 5)
    norm = torch.tensor([2.0, 1e-19, 0.0, 1.0, 4.0])
    before = LAUNCHES["reduce_partials"]
    got = launch_reduce_partials(Segment(first, dtype=torch.bfloat16), Segment(second), Segment(third, norm=norm))
    assert LAUNCHES["reduce_partials"] == before + 1
    assert got[0].dtype == torch.bfloat16
    torch.testing.assert_close(got[0], first.double().sum(0).bfloat16(), rtol=0, atol=2**-7 * 8)
    torch.testing.assert_close(got[1], second[0])
    torch.testing.assert_close(got[2], torch.where(norm >= 1e-18, third.sum(0) / norm.clamp_min(1e-9), 0.0))


@pytest.mark.parametrize("parts", [0, 1, 7, 8, 9, 100])
@pytest.mark.parametrize("length", [0, 1, 127, 129, 512 * 64 + 3])
def test_sums(parts: int, length: int) -> None:
    partials = torch.rand(parts, length)
    (got,) = launch_reduce_partials(Segment(partials))
    expected = partials.double().sum(0)
    at_once = 8 if length >= 512 * 64 else 32
    additions = parts / at_once + 1 + at_once.bit_length()  # one per block of parts, and a tree within a block
    assert ((got - expected).abs() <= additions * 2.0**-24 * expected).all()


def test_a_plain_divisor_of_zero_gives_zero() -> None:
    partials, divisor = torch.ones(2, 3), torch.tensor([2.0, 0.0, -4.0])
    (got,) = launch_reduce_partials(Segment(partials, divisor=divisor))
    assert torch.equal(got, torch.tensor([1.0, 0.0, -0.5]))


def test_the_order_of_the_sum_is_fixed_by_the_shape() -> None:
    partials = torch.randn(33, 40) * 10.0 ** torch.randint(-6, 6, (33, 1))
    alone = launch_reduce_partials(Segment(partials))[0]
    beside = launch_reduce_partials(Segment(torch.rand(5, 70000)), Segment(partials))[1]
    assert torch.equal(alone, beside)


MUTATIONS = {
    "first part left out": lambda partials, by: partials[1:].sum(0) / by,
    "last part left out": lambda partials, by: partials[:-1].sum(0) / by,
    "a part counted twice": lambda partials, by: (partials.sum(0) + partials[4]) / by,
    "turned": lambda partials, by: -partials.sum(0) / by,
    "not divided": lambda partials, by: partials.sum(0),
    "multiplied": lambda partials, by: partials.sum(0) * by,
    "a thousandth off": lambda partials, by: partials.sum(0) * 1.001 / by,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_term_is_noticed(mutation: str) -> None:
    partials, by = torch.rand(9, 300) + 0.1, torch.rand(300) + 1.5
    exact, divisor = partials.double(), by.double()
    mutated, expected = MUTATIONS[mutation](exact, divisor), exact.sum(0) / divisor
    for segment in (Segment(partials, norm=by), Segment(partials, divisor=by)):
        (got,) = launch_reduce_partials(segment)
        allowed = (9 / 8 + 4 + 3) * 2.0**-24 * expected  # the sum, the inverse and the product
        assert ((got - expected).abs() <= allowed).all()
        assert not ((got - mutated).abs() <= allowed).any()


def test_a_norm_below_the_floor_is_noticed() -> None:
    partials, norm = torch.ones(2, 3), torch.tensor([0.9e-18, 1.1e-18, 0.0])
    (got,) = launch_reduce_partials(Segment(partials, norm=norm))
    assert got[[0, 2]].abs().max() == 0.0
    torch.testing.assert_close(got[1], 2.0 / norm[1])
