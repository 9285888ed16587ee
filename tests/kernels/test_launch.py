"""A launch past Triton's own look at its arguments: what is taken for equal must be equal to Triton."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from bidora_kernels.kernels import _launch
from bidora_kernels.kernels._launch import compiled_for
from bidora_kernels.kernels.tiles import Tile, forced_tile, tile_for

INTEGERS = (0, 1, 2, 8, 15, 16, 17, 32, 4096, 2**31 - 1, 2**31, 2**31 + 16, 2**32, 2**40)


def tensors() -> list[torch.Tensor]:
    whole = torch.empty(256, dtype=torch.uint8)
    start = -whole.data_ptr() % 16
    return [
        whole[start + offset : start + offset + 64].view(dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.uint8)
        for offset in (0, 4, 8, 16)
    ]


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="asks Triton's compiler, which the interpreter replaces")
def test_what_triton_tells_apart_is_told_apart() -> None:
    """Every pair of values that Triton compiles a kernel anew for has different keys here."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    specialize = getattr(jit, "native_specialize_impl", None)
    if specialize is None:
        pytest.skip("this Triton keeps its specialization elsewhere")
    values: list[Any] = [*INTEGERS, *tensors(), 0.5, 1.0]
    kinds = [specialize(backend, value, False, True, True) for value in values]
    assert len(set(kinds)) > 8  # Triton does tell them apart
    for (value, kind), (other, other_kind) in itertools.combinations(zip(values, kinds, strict=True), 2):
        if kind != other_kind:
            assert compiled_for([value]) != compiled_for([other]), (value, other)


class Recorded:
    """Stands in for a jitted kernel and for what it compiles to."""

    arg_names = ("first_ptr", "length", "scaling", "WIDTH")

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            self.compiled.append((grid, args, options))
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, owner: Recorded) -> None:
        self.owner = owner

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.owner.launched.append((grid, args))


def test_a_known_kind_of_launch_goes_to_the_compiled_kernel() -> None:
    kernel, x = Recorded(), torch.zeros(64)
    for length in (32, 64, 48, 7, 9):
        _launch._launch_compiled(kernel, 0, (3,), (x, length, 0.5), {"WIDTH": 128, "num_warps": 4})
    assert len(kernel.compiled) == 2  # multiples of 16, and others
    assert [args for _, args in kernel.launched] == [(x, 64, 0.5, 128), (x, 48, 0.5, 128), (x, 9, 0.5, 128)]
    assert {grid for grid, _ in kernel.launched} == {(3, 1, 1)}
    for changed in ({"WIDTH": 64, "num_warps": 4}, {"WIDTH": 128, "num_warps": 8}):
        _launch._launch_compiled(kernel, 0, (3,), (x, 32, 0.5), changed)
    _launch._launch_compiled(kernel, 1, (3,), (x, 32, 0.5), {"WIDTH": 128, "num_warps": 4})
    assert len(kernel.compiled) == 5  # other constants, another device


class OnGpu(torch.Tensor):
    """Stands in for a tensor of the first GPU."""

    is_cuda = True

    def get_device(self) -> int:
        return 0


def test_a_prepared_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", None)
    kernel, launches = Recorded(), _launch.LAUNCHES["recorded"]
    prepared = _launch.Prepared("recorded", kernel, (3, 2), (64, 0.5), WIDTH=128, num_warps=4)
    whole = torch.zeros(128)
    start = -whole.data_ptr() % 16 // 4
    aligned, odd = (whole[start + offset : start + offset + 64].as_subclass(OnGpu) for offset in (0, 1))
    for _ in range(3):
        prepared(aligned)
    assert len(kernel.compiled) == 1
    assert len(kernel.launched) == 2
    assert kernel.launched[-1] == ((3, 2, 1), (aligned.data_ptr(), 64, 0.5, 128))
    prepared(odd)
    prepared(aligned.to(torch.bfloat16).as_subclass(OnGpu))
    assert len(kernel.compiled) == 3  # another alignment, another dtype
    prepared(odd)
    assert len(kernel.compiled) == 3
    assert _launch.LAUNCHES["recorded"] == launches + 6


def test_a_forced_tile_is_never_kept() -> None:
    taken: list[int] = []

    @_launch.geometry
    def work(size: int) -> int:
        taken.append(size)
        return tile_for("compose", size, 2).get("BLOCK_T", 0)

    usual = work(16)
    assert (work(16), taken) == (usual, [16])
    with forced_tile("compose", Tile(BLOCK_T=16, BLOCK_OUT=16, BLOCK_R=16)):
        assert work(16) == 16
    assert work(16) == usual
