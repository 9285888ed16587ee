"""Tiles as data: per architecture and kernel, the tile for ranks up to a bound.

A row is chosen by architecture ("default" where it has no table of its own), kernel, the widest operand in bytes, and the first
rank bound that holds r (ranks above the last bound use the last row, whose kernels loop over BLOCK_R). The default rows were
chosen from compiled sm_80, sm_90 and sm_100 code (registers, spills, shared memory), not measured; a measured row for a GPU goes
under its architecture.
"""

from __future__ import annotations

from typing import TypedDict


class Tile(TypedDict, total=False):
    """The block sizes and compile options of one kernel launch."""

    BLOCK_T: int
    BLOCK_OUT: int
    BLOCK_IN: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


_WEIGHT_16 = Tile(BLOCK_OUT=64, BLOCK_IN=64, BLOCK_R=16, num_warps=4, num_stages=3)
_WEIGHT_64 = Tile(BLOCK_OUT=64, BLOCK_IN=64, BLOCK_R=64, num_warps=4, num_stages=3)
_WEIGHT_LOOPED = Tile(BLOCK_OUT=64, BLOCK_IN=64, BLOCK_R=64, num_warps=4, num_stages=3)

TILES: dict[str, dict[str, dict[int, dict[int, Tile]]]] = {
    "default": {
        "weight_norm": {
            2: {16: _WEIGHT_16, 64: _WEIGHT_64},
            4: {16: _WEIGHT_16, 64: _WEIGHT_64},
        },
        "weight_norms": {2: {16: _WEIGHT_16, 64: _WEIGHT_64}, 4: {16: _WEIGHT_16, 64: _WEIGHT_64}},
        "weight_norm_factors": {2: {16: _WEIGHT_16, 64: _WEIGHT_64}, 4: {16: _WEIGHT_16, 64: _WEIGHT_64}},
        "weight_norm_factors_tail": {2: {16: _WEIGHT_16, 64: _WEIGHT_64}, 4: {16: _WEIGHT_16, 64: _WEIGHT_64}},
        "down_gradient": {2: {16: _WEIGHT_16, 64: _WEIGHT_64}, 4: {16: _WEIGHT_16, 64: _WEIGHT_64}},
        "row_projection": {2: {16: _WEIGHT_16, 64: _WEIGHT_64}, 4: {16: _WEIGHT_16, 64: _WEIGHT_64}},
        "merged_weight": {2: {16: _WEIGHT_16, 64: _WEIGHT_64}, 4: {16: _WEIGHT_16, 64: _WEIGHT_64}},
        "compose": {
            2: {
                16: Tile(BLOCK_T=64, BLOCK_OUT=64, BLOCK_R=16, num_warps=4, num_stages=1),
                64: Tile(BLOCK_T=64, BLOCK_OUT=64, BLOCK_R=64, num_warps=4, num_stages=1),
            },
            4: {
                16: Tile(BLOCK_T=64, BLOCK_OUT=64, BLOCK_R=16, num_warps=4, num_stages=1),
                64: Tile(BLOCK_T=64, BLOCK_OUT=64, BLOCK_R=64, num_warps=4, num_stages=1),
            },
        },
        "compose_backward": {
            2: {
                16: Tile(BLOCK_T=64, BLOCK_OUT=64, BLOCK_R=16, num_warps=4, num_stages=3),
                64: Tile(BLOCK_T=64, BLOCK_OUT=64, BLOCK_R=64, num_warps=4, num_stages=3),
            },
            4: {
                16: Tile(BLOCK_T=64, BLOCK_OUT=64, BLOCK_R=16, num_warps=4, num_stages=2),
                64: Tile(BLOCK_T=64, BLOCK_OUT=64, BLOCK_R=64, num_warps=4, num_stages=2),
            },
        },
        "orthogonality": {
            2: {
                16: Tile(BLOCK_OUT=64, BLOCK_IN=64, BLOCK_R=16, num_warps=4, num_stages=2),
                64: Tile(BLOCK_OUT=64, BLOCK_IN=64, BLOCK_R=64, num_warps=4, num_stages=2),
            },
            4: {
                16: Tile(BLOCK_OUT=64, BLOCK_IN=64, BLOCK_R=16, num_warps=4, num_stages=2),
                64: Tile(BLOCK_OUT=64, BLOCK_IN=64, BLOCK_R=64, num_warps=4, num_stages=2),
            },
        },
    }
}


def tile_for(kernel: str, r: int, widest: int, architecture: str = "default") -> Tile:
    """The tile of `kernel` for rank r and operands of at most `widest` bytes on an architecture like "sm_90"."""
    rows = TILES.get(architecture, {}).get(kernel) or TILES["default"][kernel]
    by_rank = rows[4 if widest > 2 else 2]
    for bound, tile in by_rank.items():
        if r <= bound:
            return tile
    return by_rank[max(by_rank)]
