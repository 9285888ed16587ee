"""`bidora bench --tune` end to end at toy sizes, and the tables it feeds."""

from __future__ import annotations

import re

import pytest

from benchmarks import tune
from bidora_kernels import cli
from bidora_kernels.kernels import tiles
from bidora_kernels.kernels.tiles import TILES, Tile, tile_for

from . import comparison  # noqa: F401 (skips this module without the interpreter)


@pytest.mark.parametrize("pattern", ["compose", "orthogonality", pytest.param("", marks=pytest.mark.slow)])
def test_tuning_prints_a_row(pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--tune", "--tiny", "--filter", pattern]) == 0
    printed = capsys.readouterr().out
    assert "says nothing about speed" in printed
    row = printed[printed.index('    "default": {') :]
    found = eval("{" + row + "}", {"Tile": Tile})["default"]
    assert list(found) == [kernel for kernel in TILES["default"] if pattern in kernel]
    for kernel, by_width in found.items():
        assert by_width.keys() == TILES["default"][kernel].keys()
        for width, by_rank in by_width.items():
            assert by_rank[3].keys() == tile_for(kernel, 3, width).keys()
    assert len(re.findall(r"best of [12]: ", printed)) == sum(len(by_width) for by_width in found.values())


def test_a_mistyped_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--tune", "--tiny", "--filter", "no such kernel"]) == 2
    assert "no kernel matches 'no such kernel'; there are weight_norm," in capsys.readouterr().err


def test_a_candidate_that_computes_something_else_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tune.Problem("compose", 3, 4, 24, "cpu")
    real, lines, calls = problem.call(), [], []

    def wrong_at_first() -> object:
        calls.append(1)
        return 2.0 * real() if len(calls) == 3 else real()  # the expected value, the default tile, the next tile

    monkeypatch.setattr(tune.Problem, "call", lambda self: wrong_at_first)
    tune.tune(problem, 0.0, 2, lines.append)
    assert any("left out, Disagreement: differs from the default tile" in line for line in lines)
    assert any("best of 1" in line for line in lines)


def test_a_row_of_an_architecture_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Tile(BLOCK_T=16, BLOCK_OUT=16, BLOCK_R=16, num_warps=4, num_stages=1)
    monkeypatch.setitem(TILES, "sm_90", {"compose": {2: {16: measured}}})
    assert tile_for("compose", 4, 2, "sm_90") == measured
    assert tile_for("compose", 4, 2, "sm_80") != measured
    assert tile_for("weight_norm", 4, 2, "sm_90") == TILES["default"]["weight_norm"][2][16]
    with tiles.forced_tile("compose", Tile(BLOCK_T=32)):
        assert tile_for("compose", 4, 2, "sm_90") == Tile(BLOCK_T=32)
    assert tile_for("compose", 4, 2, "sm_90") == measured
