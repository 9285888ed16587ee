"""How a time is taken: providers interleaved in one process, each round in an order of its own, and compared within a round."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


@dataclasses.dataclass
class Candidate:
    """A provider ready to run one case.

    calls: one callable per set of inputs; each runs `iterations` iterations. They are taken in turn, so that no set of inputs
    and weights is still in the cache when it comes round again.
    verify: compares one call's results with the expected ones and returns relative errors by name; raises Disagreement.
    around: entered around every call (a backend, autocast).
    """

    name: str
    calls: Sequence[Callable[[], Any]]
    verify: Callable[[], dict[str, float]]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    iterations: int = 1
    position: int = 0

    def run(self, calls: int) -> None:
        """Run so many calls, going on where the last ones ended."""
        for _ in range(calls):
            self.calls[self.position % len(self.calls)]()
            self.position += 1


class Disagreement(AssertionError):
    """A provider computes something else than the case says; it gets no time."""


class CpuClock:
    """Wall time of a block."""

    shortest = 2e-3  # seconds; shorter blocks are repeated

    def seconds(self, block: Callable[[], Any]) -> float:
        """Run the block once and return how long it took."""
        start = time.perf_counter()
        block()
        return time.perf_counter() - start


class CudaClock:
    """Time between two events around a block, on the current stream.

    A block begins on an idle device, so its first launches wait for the host; it lasts long enough to make that small.
    """

    shortest = 1e-2

    def seconds(self, block: Callable[[], Any]) -> float:
        """Run the block once and return how long the device took for it."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        block()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def clock_for(device: str) -> CpuClock | CudaClock:
    """The clock of a device type."""
    return CudaClock() if device == "cuda" else CpuClock()


WARM_UP = 1.0  # seconds; a provider whose calls are long has run twice by now, to be checked and for its memory


def _warm_up(candidate: Candidate, clock: CpuClock | CudaClock) -> int:
    """Run every set of inputs, for WARM_UP at most, and return how many calls make a block long enough to time."""
    times: list[float] = []
    with candidate.around():
        while len(times) < max(2, len(candidate.calls)) and sum(times) < WARM_UP:
            times.append(clock.seconds(functools.partial(candidate.run, 1)))
    return max(1, min(200, round(clock.shortest / max(min(times), 1e-9) + 0.5)))


def measure(
    candidates: Sequence[Candidate],
    device: str,
    min_rounds: int,
    max_rounds: int,
    seconds: float,
    start_round: int = 0,
    deadline: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds per iteration of every candidate, one value a round; all lists have the same length.

    Rounds end at `max_rounds`, or earlier when `seconds` have passed and there are `min_rounds`, or after the first round that
    ends past `deadline` (of time.monotonic). Each round has a random order, always the same for its number, so that no candidate
    has the same neighbour before it again and again.
    """
    clock = clock_for(device)
    repeats = {candidate.name: _warm_up(candidate, clock) for candidate in candidates}
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    started = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - started > seconds:
            break
        if done > 0 and time.monotonic() > deadline:
            break
        for candidate in random.Random(start_round + done).sample(list(candidates), len(candidates)):
            count = repeats[candidate.name]
            with candidate.around():
                taken = clock.seconds(functools.partial(candidate.run, count))
            times[candidate.name].append(taken / (count * candidate.iterations))
    return times


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(p20, p50, p80), linearly interpolated."""
    ordered = sorted(values)

    def at(share: float) -> float:
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return at(0.2), at(0.5), at(0.8)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The median over rounds of one provider's time over another's, with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


def bootstrap(values: Sequence[float], draws: int = 1000, seed: int = 0) -> Ratio:
    """The median of `values` with the 95 % percentile interval of its resampled medians."""
    generator = random.Random(seed)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return Ratio(statistics.median(values), medians[round(0.025 * (draws - 1))], medians[round(0.975 * (draws - 1))])


def ratio(times: Sequence[float], to: Sequence[float]) -> Ratio:
    """How many times as long `times` took as `to`, compared within each round."""
    return bootstrap([mine / other for mine, other in zip(times, to, strict=True)])


def distance(times: Sequence[float], other: Sequence[float], floor: Sequence[float]) -> Ratio:
    """(times - floor) / (other - floor) per round: the share of the other's overhead that is left."""
    return bootstrap([(a - c) / (b - c) for a, b, c in zip(times, other, floor, strict=True) if b != c])
