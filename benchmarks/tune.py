"""`bidora bench --tune`: time candidate tiles of every kernel on the GPU at hand and print a row for kernels/tiles.py.

A candidate must give the result of the default tile (to rounding) before it is timed; one that the compiler or the GPU refuses is
left out. Nothing is written: the printed row is pasted under its architecture.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bidora_kernels.kernels import _launch, tiles
from bidora_kernels.kernels.compose import launch_compose
from bidora_kernels.kernels.compose_backward import launch_compose_backward
from bidora_kernels.kernels.direction_backward import launch_down_gradient, launch_row_projection
from bidora_kernels.kernels.magnitude_gradient import launch_magnitude_gradient
from bidora_kernels.kernels.merged_weight import launch_merged_weight
from bidora_kernels.kernels.orthogonality import launch_orthogonality
from bidora_kernels.kernels.weight_norm import launch_weight_norm, launch_weight_norms
from bidora_kernels.kernels.weight_norm_factors import launch_weight_norm_factors
from bidora_kernels.ops._backend import interpreting

from .timing import Candidate, Disagreement, measure

RANKS = (16, 64, 384)  # the bounds of the printed row
WIDTHS = {2: torch.bfloat16, 4: torch.float32}  # by bytes of the widest operand
CANDIDATES = 24  # per kernel, rank and width
Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One kernel at one rank and width."""

    kernel: str
    r: int
    width: int
    size: int
    device: str

    def call(self) -> Callable[[], Any]:
        """The launch that is timed, on fresh random inputs."""
        generator, dtype, n = torch.Generator(self.device).manual_seed(0), WIDTHS[self.width], self.size

        def normal(*shape: int, of: torch.dtype = dtype, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, device=self.device, generator=generator).mul_(std).to(of)

        weight, x, grad = normal(n, n, std=n**-0.5), normal(n, n), normal(n, n)
        a, b = normal(self.r, n, std=n**-0.5), normal(n, self.r, std=self.r**-0.5)
        ones, hidden = torch.ones(n, device=self.device), normal(n, self.r)
        factor, single = normal(n, self.r, of=torch.float32), weight.float()
        if self.kernel.startswith("orthogonality"):
            return functools.partial(launch_orthogonality, weight, a, b, 0.5, single @ single.t())
        calls: dict[str, Callable[[], Any]] = {
            "weight_norm": lambda: launch_weight_norm(weight, a, b, 0.5),
            "weight_norms": lambda: launch_weight_norms(weight, [(a, b), (b.t().contiguous(), b), (a, b)], 0.5),
            "merged_weight": lambda: launch_merged_weight(weight, a, b, ones, 0.5, norm=ones),
            "weight_norm_factors": lambda: launch_weight_norm_factors(weight, a, b, 0.5),
            "weight_norm_factors_tail": lambda: launch_weight_norm_factors(weight, a, b, 0.5),
            "down_gradient": lambda: launch_down_gradient(weight, a, b, 0.5, factor, grad, ones),
            "row_projection": lambda: launch_row_projection(weight, a, b, 0.5, grad),
            "magnitude_gradient": lambda: launch_magnitude_gradient(
                torch.zeros(n, device=self.device), grad, x, weight, a, b, 0.0 * ones, ones, 0.5
            ),
            "compose": lambda: launch_compose(x, hidden, b, ones, 0.5),
            "compose_backward": lambda: tuple(
                launch_compose_backward(grad, hidden, b, ones, ones, 0.5, base=x, hidden_dtype=torch.float32)
            ),
        }
        return calls[self.kernel]


def candidates(default: tiles.Tile) -> Iterator[tiles.Tile]:
    """The default tile, then tiles around it, nearest first: each block halved or doubled, other warps and stages."""
    choices: dict[str, list[int]] = {}
    for name, value in default.items():
        assert isinstance(value, int)
        if name == "num_warps":
            choices[name] = [4, 8]
        elif name == "num_stages":
            choices[name] = [2, 3, 4] if value > 1 else [1, 2, 3]
        else:
            choices[name] = [block for block in (value, value // 2, value * 2) if 16 <= block <= 128]
    combined = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    combined.sort(key=lambda tile: sum(tile[name] != value for name, value in default.items()))
    for tile in combined[:CANDIDATES]:
        yield tiles.Tile(**tile)  # type: ignore[typeddict-item]


def tune(problem: Problem, seconds: float, limit: int, log: Log) -> tiles.Tile:
    """The fastest candidate for a problem, measured interleaved for about `seconds`."""
    architecture = _launch.architecture_of(problem.device)
    default = tiles.tile_for(problem.kernel, problem.r, problem.width, architecture)
    call = problem.call()
    expected = _flat(call())
    ready, chosen = [], {}
    for tile in itertools.islice(candidates(default), limit):
        name = ", ".join(f"{key}={value}" for key, value in tile.items())
        around = functools.partial(tiles.forced_tile, problem.kernel, tile)
        try:
            with around():
                got = _flat(call())
            for value, want in zip(got, expected, strict=True):
                error = (value.double() - want.double()).norm()
                if not error <= 1e-2 * want.double().norm() + 1e-6:
                    raise Disagreement(f"differs from the default tile by {error:.3g}")
        except Exception as error:  # too much shared memory, or a layout that the compiler has no code for
            log(f"  {name}: left out, {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        ready.append(Candidate(name, [call], dict, around))
        chosen[name] = tile
    times = measure(ready, problem.device, 3, 100, seconds, deadline=time.monotonic() + 10 * seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(medians, key=lambda name: medians[name])
    first = next(iter(medians))
    log(f"  best of {len(medians)}: {best}: {medians[best] * 1e6:.1f} us (default {medians[first] * 1e6:.1f} us)")
    return chosen[best]


def _flat(results: Any) -> list[Tensor]:
    items = results if isinstance(results, (tuple, list)) else [results]
    return [item.clone() for item in items if isinstance(item, Tensor)]


def row(device: str, pattern: str | None, seconds: float, tiny: bool, log: Log) -> dict[str, dict[int, dict[int, tiles.Tile]]]:
    """Tuned tiles by kernel, width and rank, in the form of `kernels.tiles.TILES[architecture]`."""
    found: dict[str, dict[int, dict[int, tiles.Tile]]] = {}
    ranks, size, limit = ((3,), 24, 2) if tiny else (RANKS, 4096, CANDIDATES)
    for kernel, by_width in tiles.TILES["default"].items():
        if pattern is not None and pattern not in kernel:
            continue
        for width in by_width:
            for r in ranks:
                problem = Problem(kernel, r, width, size, device)
                log(f"{kernel}, r={r}, {WIDTHS[width]}")
                found.setdefault(kernel, {}).setdefault(width, {})[r] = tune(problem, seconds, limit, log)
    if not found:
        raise ValueError(f"no kernel matches {pattern!r}; there are {', '.join(tiles.TILES['default'])}")
    return found


def source(architecture: str, found: dict[str, dict[int, dict[int, tiles.Tile]]]) -> str:
    """The row as Python for kernels/tiles.py."""
    lines = [f'    "{architecture}": {{']
    for kernel, by_width in found.items():
        lines.append(f'        "{kernel}": {{')
        for width, by_rank in by_width.items():
            lines.append(f"            {width}: {{")
            for r, tile in by_rank.items():
                lines.append(f"                {r}: Tile({', '.join(f'{name}={value}' for name, value in tile.items())}),")
            lines.append("            },")
        lines.append("        },")
    return "\n".join([*lines, "    },"])


def main(device: str, pattern: str | None, tiny: bool, budget: float | None, log: Log = print) -> None:
    """Tune, then print the row; `budget` seconds for all kernels together (by default 2 s for each problem)."""
    if device == "cpu" and not (tiny and interpreting()):
        raise ValueError("--tune needs a GPU; with --tiny it runs at toy sizes under TRITON_INTERPRET=1")
    problems = sum(len(by_width) for by_width in tiles.TILES["default"].values()) * len(RANKS)
    seconds = 0.0 if tiny else 2.0 if budget is None else budget / problems / 2
    found = row(device, pattern, seconds, tiny, log)
    if tiny:
        log("toy sizes: this proves that everything runs, and says nothing about speed")
    log(source(_launch.architecture_of(device), found))
