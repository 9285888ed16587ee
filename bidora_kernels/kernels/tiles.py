"""Tiles as data: per architecture and kernel, the tile for ranks up to a bound.

A tile is chosen by architecture ("default" where it has no table of its own), kernel, the widest operand in bytes, and the first
rank bound that holds r (ranks above the last bound use the last row, whose kernels loop over BLOCK_R). The rows were chosen from
compiled code (registers, spills, shared memory), the default ones for sm_90, but for compose_backward's up to rank 16, which was
the fastest on an H200. A measured row for a GPU goes under its architecture: `bidora bench --tune` prints one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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


def _both(out: int, columns: int, tokens: int, ranks: int) -> Tile:
    return Tile(BLOCK_T=tokens, BLOCK_OUT=out, BLOCK_IN=columns, BLOCK_R=ranks, num_warps=4, num_stages=2)


_PASS_OVER_WEIGHT = {
    2: {16: _weight(64, 64, 16), 64: _weight(64, 64, 64), 512: _weight(64, 64, 64)},
    4: {16: _weight(64, 64, 16), 64: _weight(64, 64, 64), 512: _weight(64, 32, 32)},
}
_PASS_ON_SM_80 = {
    2: _PASS_OVER_WEIGHT[2],
    4: {16: _weight(64, 64, 16), 64: _weight(32, 32, 32, stages=2), 512: _weight(64, 32, 32)},
}
_PASS_ON_SM_100 = {
    2: _PASS_OVER_WEIGHT[2],
    4: {16: _weight(64, 64, 16), 64: _weight(64, 64, 64, warps=8), 512: _weight(64, 32, 32)},
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
        "weight_norm_factors_tail": {4: {16: _weight(64, 32, 16, stages=2), 512: _weight(64, 32, 32, stages=2)}},
        "down_gradient": _TWO_PRODUCTS,
        "row_projection": {2: _TWO_PRODUCTS[2], 4: {512: _weight(64, 32, 16, stages=2)}},
        "orthogonality": {4: {16: _weight(64, 32, 16, stages=2), 512: _weight(32, 32, 16, stages=2)}},
        "orthogonality_cancelling": {4: {512: _weight(16, 16, 16, stages=1)}},
        "magnitude_gradient": {
            2: {16: _both(32, 64, 32, 16), 64: _both(32, 64, 32, 32)},
            4: {16: _both(32, 32, 32, 16), 64: _both(32, 32, 32, 32)},
        },
        "compose": {
            2: {16: _tokens(64, 64, 16, stages=1), 64: _tokens(64, 64, 64, stages=1)},
            4: {16: _tokens(64, 64, 16, stages=1), 64: _tokens(64, 64, 64, stages=1)},
        },
        "compose_backward": {
            2: {16: _tokens(32, 128, 16), 64: _tokens(64, 64, 64, warps=8), 512: _tokens(64, 64, 64, warps=8, stages=2)},
            4: {512: _tokens(32, 64, 16, stages=2)},
        },
    },
    # where the default rows spill on a chip
    "sm_80": {
        "weight_norm": _PASS_ON_SM_80,
        "weight_norms": {
            2: {16: _weight(64, 64, 16), 64: _weight(64, 64, 64, stages=2), 512: _weight(32, 64, 32, stages=2)},
            4: {16: _weight(64, 64, 16, stages=2), 64: _weight(32, 64, 32, stages=2), 512: _weight(32, 64, 32, stages=1)},
        },
        "merged_weight": _PASS_ON_SM_80,
        "weight_norm_factors": _PASS_ON_SM_80,
        "down_gradient": {2: _TWO_PRODUCTS[2], 4: {16: _weight(32, 64, 16), 64: _weight(32, 32, 32)}},
        "magnitude_gradient": {
            2: {16: _both(32, 64, 32, 16), 64: _both(32, 64, 32, 32)},
            4: {512: _both(32, 32, 32, 16)},
        },
        "compose_backward": {
            2: {16: _tokens(32, 128, 16), 64: _tokens(64, 32, 64), 512: _tokens(32, 64, 32)},
            4: {512: _tokens(32, 64, 16, stages=2)},
        },
        "orthogonality_cancelling": {4: {16: _weight(16, 16, 16, stages=1), 512: _weight(16, 16, 32, stages=1)}},
        "compose": {
            2: {
                16: _tokens(64, 64, 16, stages=1),
                64: _tokens(64, 64, 64, warps=8, stages=1),
                512: _tokens(64, 64, 64, stages=1),
            },
            4: {16: _tokens(64, 64, 16, stages=1), 512: _tokens(64, 64, 32, stages=1)},
        },
    },
    "sm_100": {
        "weight_norm": _PASS_ON_SM_100,
        "merged_weight": _PASS_ON_SM_100,
        "weight_norm_factors": {
            2: _PASS_OVER_WEIGHT[2],
            4: {16: _weight(64, 64, 16), 64: _weight(64, 64, 64, stages=2), 512: _weight(64, 32, 32)},
        },
        "weight_norm_factors_tail": {
            4: {
                16: _weight(64, 32, 16, stages=2),
                64: _weight(64, 32, 32, warps=8, stages=2),
                512: _weight(64, 32, 32, stages=2),
            }
        },
        "row_projection": {2: _TWO_PRODUCTS[2], 4: {512: _weight(64, 32, 16, warps=8, stages=2)}},
        "orthogonality": {4: {16: _weight(64, 32, 16, warps=8, stages=2), 512: _weight(32, 32, 16, stages=2)}},
        "compose_backward": {
            2: {16: _tokens(32, 64, 16), 64: _tokens(64, 64, 64, warps=8), 512: _tokens(64, 64, 64, warps=8, stages=2)},
            4: {512: _tokens(32, 64, 16, stages=2)},
        },
        "compose": {
            2: {16: _tokens(64, 64, 16, stages=1), 64: _tokens(64, 64, 64, stages=1)},
            4: {16: _tokens(64, 64, 16, stages=1), 64: _tokens(64, 64, 64, stages=1), 512: _tokens(64, 64, 32, stages=1)},
        },
    },
    "gfx942": {
        "orthogonality": {4: {512: _weight(32, 32, 16, stages=2)}},
    },
}


_FORCED: dict[str, Tile] = {}


@contextlib.contextmanager
def forced_tile(kernel: str, tile: Tile) -> Iterator[None]:
    """Run one kernel with this tile whatever the tables say: how a row is measured."""
    _FORCED[kernel] = tile
    try:
        yield
    finally:
        del _FORCED[kernel]


def any_forced() -> bool:
    """Whether a tile is forced at the moment."""
    return bool(_FORCED)


def tile_for(kernel: str, r: int, widest: int, architecture: str = "default") -> Tile:
    """The tile of `kernel` for rank r and operands of at most `widest` bytes on an architecture like "sm_90"."""
    if kernel in _FORCED:
        return _FORCED[kernel]
    rows = TILES.get(architecture, {}).get(kernel) or TILES["default"][kernel]
    by_rank = rows.get(4 if widest > 2 else 2) or rows[max(rows)]
    for bound, tile in by_rank.items():
        if r <= bound:
            return tile
    return by_rank[max(by_rank)]
