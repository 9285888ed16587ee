"""Rounds are interleaved in changing orders; intervals and ratios mean what they say."""

from __future__ import annotations

import time

import pytest

from benchmarks.timing import Candidate, bootstrap, distance, measure, quantiles, ratio


def _recording(name: str, log: list[str], sets: int = 1, iterations: int = 1, pause: float = 0.003) -> Candidate:
    def call(index: int) -> None:
        log.append(f"{name}{index}")
        time.sleep(pause)

    return Candidate(name, [lambda index=index: call(index) for index in range(sets)], dict, iterations=iterations)


def test_rounds_interleave_each_in_an_order_of_its_own() -> None:
    log: list[str] = []
    times = measure([_recording(name, log, pause=0.0) for name in "abcd"], "cpu", 24, 24, 0.0)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abcd", 24)


@pytest.mark.parametrize("start", [0, 7])
def test_every_round_has_everyone_and_neighbours_change(start: int) -> None:
    log: list[str] = []
    measure([_recording(name, log) for name in "abcd"], "cpu", 24, 24, 0.0, start)
    timed = [entry[0] for entry in log[-96:]]  # a block of these takes one call
    rounds = ["".join(timed[i : i + 4]) for i in range(0, 96, 4)]
    assert all(sorted(one) == list("abcd") for one in rounds)
    before = {name: {one[one.index(name) - 1] for one in rounds if one[0] != name} for name in "abcd"}
    assert all(len(neighbours) == 3 for neighbours in before.values())
    again: list[str] = []
    measure([_recording(name, again) for name in "abcd"], "cpu", 1, 1, 0.0, start + 5)
    assert "".join(entry[0] for entry in again[-4:]) == rounds[5]  # a later piece of the same case goes on with the same orders


def test_sets_are_taken_in_turn_and_all_warmed() -> None:
    log: list[str] = []
    measure([_recording("a", log, sets=3)], "cpu", 2, 2, 0.0)
    assert log == [f"a{index % 3}" for index in range(len(log))]
    assert len(log) >= 3 + 2


def test_time_is_per_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.CpuClock.seconds", lambda self, block: (block(), 1.0)[1])
    assert measure([_recording("a", [], iterations=4)], "cpu", 2, 2, 0.0) == {"a": [0.25, 0.25]}


def test_rounds_end_at_the_deadline_but_there_is_one() -> None:
    times = measure([_recording("a", [])], "cpu", 5, 5, 0.0, deadline=time.monotonic() - 1)
    assert len(times["a"]) == 1


def test_quantiles_interpolate() -> None:
    assert quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)
    assert quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_a_ratio_is_taken_within_rounds() -> None:
    floor = [1.0, 10.0, 3.0, 0.1]  # a disturbed machine
    value = ratio([2 * second for second in floor], floor)
    assert (value.median, value.low, value.high) == (2.0, 2.0, 2.0)
    left = distance([1.2 * second for second in floor], [2 * second for second in floor], floor)
    assert left.median == pytest.approx(0.2)
    assert left.low == pytest.approx(0.2)


def test_bootstrap_interval_holds_the_median_and_narrows() -> None:
    few, many = bootstrap([1.0, 1.1, 1.2, 1.3, 1.4]), bootstrap([1.0, 1.1, 1.2, 1.3, 1.4] * 20)
    assert few.low <= few.median == 1.2 <= few.high
    assert many.high - many.low < few.high - few.low
    assert bootstrap([1.0, 2.0, 3.0]) == bootstrap([1.0, 2.0, 3.0])
