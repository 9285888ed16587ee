"""Programs that go over several tiles each, as on large layers: at the sizes of these tests every program has one."""

from __future__ import annotations

import pytest
import torch

from bidora_kernels.kernels import compose_backward, merged_weight, weight_norm
from bidora_kernels.kernels.tiles import Tile, forced_tile

from .comparison import DTYPES
from .test_weight_plan import check


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("plan", ["activation", "weight"])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("r", [3, 16, 24, 100])
def test_a_program_of_several_tiles(r: int, splits: int, plan: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: list[int] = []

    def few(blocks: int, steps: int, programs: int = 0, least_steps: int = 0) -> int:
        tiles.append(steps)
        return splits

    for module in (compose_backward, merged_weight, weight_norm):
        monkeypatch.setattr(module, "splits_for", few)
    with forced_tile("no kernel", Tile()):  # nothing that was worked out before is taken
        check((136, 330, r), dtype, plan, r != 16, r != 3, tokens=150)
    assert min(tiles) > splits  # every loop runs more than once
