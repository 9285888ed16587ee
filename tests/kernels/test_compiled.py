"""Compiled, not run: registers, spills, shared memory, access widths and the absence of float atomics, per kernel and GPU.

Runs without TRITON_INTERPRET. The budgets are those of the tiles in kernels/tiles.py at N = K = T = 4096.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("compiles kernels: runs without TRITON_INTERPRET", allow_module_level=True)

from bidora_kernels.kernels.compose import launch_compose  # noqa: E402
from bidora_kernels.kernels.compose_backward import launch_compose_backward  # noqa: E402
from bidora_kernels.kernels.direction_backward import launch_down_gradient, launch_row_projection  # noqa: E402
from bidora_kernels.kernels.magnitude_gradient import launch_magnitude_gradient  # noqa: E402
from bidora_kernels.kernels.merged_weight import launch_merged_weight  # noqa: E402
from bidora_kernels.kernels.orthogonality import launch_orthogonality  # noqa: E402
from bidora_kernels.kernels.weight_norm import launch_weight_norm_and_scale, launch_weight_norms  # noqa: E402
from bidora_kernels.kernels.weight_norm_factors import launch_weight_norm_factors  # noqa: E402

from .compile_report import amd_report, launches_of, nvidia_report  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32
SIZE = 4096


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def calls(r: int, dtype: torch.dtype, adapter: torch.dtype) -> dict[str, Callable[[], object]]:
    weight, vector = meta(SIZE, SIZE, dtype=dtype), meta(SIZE)
    a, b = meta(r, SIZE, dtype=adapter), meta(SIZE, r, dtype=adapter)
    base, hidden, bias = meta(SIZE, SIZE, dtype=dtype), meta(SIZE, r, dtype=dtype), meta(SIZE, dtype=dtype)
    only_magnitude = {"needs_base": False, "needs_hidden": False, "needs_lora_B": False}
    return {
        "weight_norm": lambda: launch_weight_norm_and_scale(weight, a, b, vector, 0.5),
        "weight_norms": lambda: launch_weight_norms(weight, [(a, b)] * 3, 0.5),
        "merged_weight": lambda: launch_merged_weight(weight, a, b, vector, 0.5, norm=vector),
        "merged_weight dithered": lambda: launch_merged_weight(weight, a, b, vector, 0.5, norm=vector, dither_seed=3),
        "compose": lambda: launch_compose(base, hidden, b, vector, 0.5, bias, output=base),
        "compose dropout": lambda: launch_compose(base, hidden, b, vector, 0.5, bias, base_dropped=base),
        "compose_backward": lambda: launch_compose_backward(base, hidden, b, vector, vector, 0.5, base=base),
        "compose_backward direction": lambda: launch_compose_backward(
            base, hidden, b, vector, vector, 0.5, needs_magnitude=False
        ),
        "compose_backward magnitude": lambda: launch_compose_backward(
            base, hidden, b, vector, vector, 0.5, base=base, **only_magnitude
        ),
        "weight_norm_factors": lambda: launch_weight_norm_factors(weight, a, b, 0.5),
        "down_gradient": lambda: launch_down_gradient(weight, a, b, 0.5, meta(SIZE, r), weight, vector),
        "row_projection": lambda: launch_row_projection(weight, a, b, 0.5, weight),
        "magnitude_gradient": lambda: launch_magnitude_gradient(vector, base, base, weight, a, b, vector, vector, 0.5),
        "orthogonality": lambda: launch_orthogonality(weight, a, b, 0.5, meta(SIZE, SIZE)),
        "orthogonality value": lambda: launch_orthogonality(weight, a, b, 0.5, meta(SIZE, SIZE), False),
    }


# registers, KiB of shared memory, and resident blocks per SM that a tile must leave room for, on sm_90 in bf16
BUDGETS = {
    ("weight_norm", 16): (96, 40, 5), ("weight_norm", 64): (128, 72, 3),
    ("merged_weight", 16): (112, 40, 4), ("merged_weight", 64): (144, 72, 3),
    ("compose", 16): (112, 24, 4), ("compose", 64): (144, 24, 3),
    ("compose_backward", 16): (192, 48, 2), ("compose_backward", 64): (176, 80, 1),  # of 8 warps
    ("compose_backward direction", 16): (136, 48, 3), ("compose_backward direction", 64): (176, 80, 2),
    ("compose_backward magnitude", 16): (144, 48, 3), ("compose_backward magnitude", 64): (176, 80, 2),
}  # fmt: skip


@pytest.mark.parametrize(("name", "r"), BUDGETS, ids=lambda value: str(value))
def test_budget_on_sm_90(name: str, r: int) -> None:
    registers, shared, blocks = BUDGETS[name, r]
    for launch in launches_of(calls(r, BF16, BF16)[name]):
        report = nvidia_report(launch, 90)
        assert report.spills == 0, (launch.name, str(report))
        assert not report.float_atomics
        if launch.name in ("reduce_partials", "row_scale"):
            continue
        assert report.registers <= registers, str(report)
        assert report.shared <= shared * 1024, str(report)
        assert report.blocks_per_sm >= blocks, str(report)
        assert report.load_bits.get(128, 0) > 0, str(report)
        assert 16 not in report.load_bits, str(report)
        if name.startswith(("compose", "merged")) and "magnitude" not in name:
            assert report.store_bits.get(128, 0) > 0, str(report)
        assert report.tensor_core == "wgmma"


# the same of each launch beyond compose and the weight's passes, with 16-bit layers and fp32 adapters of rank 16
OTHER_BUDGETS = {
    "weight_norms": {"weight_norm": (144, 48, 3)},
    "weight_norm_factors": {"weight_projection": (144, 36, 3), "weight_norm_factors": (128, 24, 4)},
    "down_gradient": {"down_gradient": (168, 24, 3)},
    "row_projection": {"row_projection": (168, 24, 3)},
    "magnitude_gradient": {"magnitude_gradient": (128, 12, 4)},
    "orthogonality": {"orthogonality": (255, 60, 2)},
}


@pytest.mark.parametrize("name", OTHER_BUDGETS)
def test_budget_of_the_other_kernels_on_sm_90(name: str) -> None:
    own = [launch for launch in launches_of(calls(16, BF16, FP32)[name]) if launch.name in OTHER_BUDGETS[name]]
    assert {launch.name for launch in own} == set(OTHER_BUDGETS[name])
    for launch in own:
        registers, shared, blocks = OTHER_BUDGETS[name][launch.name]
        report = nvidia_report(launch, 90)
        assert report.spills == 0, (launch.name, str(report))
        assert not report.float_atomics
        assert report.registers <= registers, str(report)
        assert report.shared <= shared * 1024, str(report)
        assert report.blocks_per_sm >= blocks, str(report)
        if not launch.options.get("CANCELLING"):
            assert report.load_bits.get(128, 0) > 0, str(report)


@pytest.mark.parametrize("architecture", [80, 100])
@pytest.mark.parametrize("name", ["weight_norm", "merged_weight", "compose", "compose_backward"])
def test_no_spills_and_no_float_atomics_elsewhere(name: str, architecture: int) -> None:
    for launch in launches_of(calls(16, BF16, BF16)[name], f"sm_{architecture}"):
        report = nvidia_report(launch, architecture)
        assert report.spills == 0, (launch.name, str(report))
        assert not report.float_atomics
        if launch.name not in ("pieces", "reduce_partials", "row_scale"):  # these multiply no matrices
            assert report.load_bits.get(128, 0) > 0, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP32, FP32)], ids=["bf16", "bf16, fp32 adapters", "fp32"])
@pytest.mark.parametrize("r", [16, 64, 384])
@pytest.mark.parametrize("name", calls(16, BF16, BF16))
def test_every_tile_without_spills(name: str, r: int, dtypes: tuple[torch.dtype, torch.dtype], architecture: int) -> None:
    for launch in launches_of(calls(r, *dtypes)[name], f"sm_{architecture}"):
        report = nvidia_report(launch, architecture)
        assert report.spills == 0, (launch.name, str(report))
        assert not report.float_atomics


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP32, FP32)], ids=["bf16", "bf16, fp32 adapters", "fp32"])
@pytest.mark.parametrize("r", [16, 64])
@pytest.mark.parametrize("name", calls(16, BF16, BF16))
def test_every_tile_for_gfx942(name: str, r: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for launch in launches_of(calls(r, *dtypes)[name], "gfx942"):
        report = amd_report(launch, "gfx942")
        assert report.scratch == 0, (launch.name, report)
        assert not report.float_atomics
        assert report.shared <= 64 * 1024, (launch.name, report)
        if launch.name not in ("pieces", "reduce_partials", "row_scale"):  # these multiply no matrices
            assert report.tensor_core, launch.name
            # tiles of 32 x 32 and less leave a lane of 64 too little for 128 bits
            small = launch.name == "magnitude_gradient" or launch.options.get("CANCELLING")
            assert report.wide_loads > 0 or small, launch.name
