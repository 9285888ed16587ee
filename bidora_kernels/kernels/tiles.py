"""Tiles as data: per architecture and kernel, the tile for ranks up to a bound.

A tile is chosen by architecture ("default" where it has no table of its own), kernel, the widest operand in bytes, and the first
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


def _weight(out: int, columns: int, ranks: int, warps: int = 4, stages: int = 3) -> Tile:
    return Tile(BLOCK_OUT=out, BLOCK_IN=columns, BLOCK_R=ranks, num_warps=warps, num_stages=stages)


def _tokens(tokens: int, out: int, ranks: int, warps: int = 4, stages: int = 3) -> Tile:
    return Tile(BLOCK_T=tokens, BLOCK_OUT=out, BLOCK_R=ranks, num_warps=warps, num_stages=stages)


_PASS_OVER_WEIGHT = {
    2: {16: _weight(64, 64, 16), 64: _weight(64, 64, 64), 512: _weight(64, 64, 64)},
    4: {16: _weight(64, 64, 16), 64: _weight(64, 64, 64), 512: _weight(32, 64, 64)},
}
_TWO_PRODUCTS = {
    2: {16: _weight(64, 64, 16), 64: _weight(32, 64, 32, stages=2)},
    4: {16: _weight(32, 64, 16, stages=2), 64: _weight(32, 32, 32, stages=2)},
}

# architecture -> kernel -> bytes of the widest operand (2 or 4) -> largest rank -> tile
TILES: dict[str, dict[str, dict[int, dict[int, Tile]]]] = {
    "default": {
        "weight_norm": _PASS_OVER_WEIGHT,
        "weight_norms": {
            2: {16: _weight(64, 64, 16), 64: _weight(64, 64, 64), 512: _weight(32, 64, 32, stages=2)},
            4: {16: _weight(64, 64, 16, stages=2), 64: _weight(32, 64, 32, stages=2)},
        },
        "merged_weight": _PASS_OVER_WEIGHT,
        "weight_norm_factors": _PASS_OVER_WEIGHT,
        "weight_norm_factors_tail": _TWO_PRODUCTS,
        "down_gradient": _TWO_PRODUCTS,
        "row_projection": _TWO_PRODUCTS,
        "orthogonality": {4: {16: _weight(64, 32, 16, stages=2), 64: _weight(32, 32, 32, stages=2)}},
        "compose": {
            2: {16: _tokens(64, 64, 16, stages=1), 64: _tokens(64, 64, 64, stages=1)},
            4: {16: _tokens(64, 64, 16, stages=1), 64: _tokens(64, 64, 64, stages=1)},
        },
        "compose_backward": {
            2: {16: _tokens(64, 64, 16), 64: _tokens(64, 64, 64)},
            4: {16: _tokens(64, 32, 16, stages=2), 64: _tokens(32, 32, 32, stages=2)},
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
