"""A run that was stopped or killed anywhere and resumed ends as one that never was: the same bits everywhere but in the times."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from bidora_kernels.recipes import UserError
from bidora_kernels.recipes.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from bidora_kernels.recipes.progress import Silent
from bidora_kernels.recipes.runs import MetricsWriter, RunFolder, write_atomically
from bidora_kernels.recipes.settings import TrainSettings
from bidora_kernels.recipes.train import Interrupted, resume, train

from .conftest import change_weights

STEPS = {"search": 12, "retrain": 9}


@pytest.fixture(scope="module")
def settings(tiny_model: Path, tiny_data: Path) -> dict[str, Any]:
    return {
        "task": "tsv", "model": str(tiny_model), "data_dir": str(tiny_data), "device": "cpu", "batch_size": 8, "max_length": 16,
        "steps": STEPS["search"], "retrain_steps": STEPS["retrain"], "lr": 1e-2, "lora_dropout": 0.1, "checkpoint_every": 5,
    }  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    runs = {}
    for start in ("init", "search"):
        runs[start] = RunFolder(tmp_path_factory.mktemp("runs") / start)
        train(TrainSettings(**settings, retrain_from=start), runs[start].path)
    return runs


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if not name.endswith("seconds")} for line in lines]


def flattened(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: leaf for part, inner in value.items() for key, leaf in flattened(inner, f"{name}/{part}").items()}
    if isinstance(value, (list, tuple)):
        return {key: leaf for part, inner in enumerate(value) for key, leaf in flattened(inner, f"{name}/{part}").items()}
    return {name: value}


def assert_same_run(run: RunFolder, expected: RunFolder) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run.adapter / name).read_bytes() == (expected.adapter / name).read_bytes()
    assert timeless(run.read_metrics()) == timeless(expected.read_metrics())
    found, wanted = (flattened(load_checkpoint(folder.checkpoint)) for folder in (run, expected))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name in ("/seconds", "/metrics_position") or name.endswith("pass_seconds"):
            continue
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name
    again, once = (folder.read_summary() for folder in (run, expected))
    assert again == {**once, "seconds": again["seconds"], "commit": again["commit"]}  # the tree may be edited in between


class SignalAt(Silent):
    """Sends this process a signal after a given step, or during the test."""

    def __init__(self, phase: str, step: int, number: int = signal.SIGINT) -> None:
        self.at, self.number = (phase, step), number

    def step(self, phase: str, step: int, *numbers: object) -> None:
        if (phase, step) == self.at:
            os.kill(os.getpid(), self.number)

    def evaluating(self, done: int, total: int) -> None:
        self.step("test", 0)


@pytest.mark.parametrize(
    ("start", "phase", "step"),
    [
        ("init", "search", 7),
        ("init", "search", 12),
        ("search", "search", 12),
        ("search", "retrain", 4),
        ("init", "retrain", 9),
        ("init", "test", 0),
    ],
)
def test_a_stopped_and_resumed_run_is_bit_identical(
    uninterrupted: dict[str, RunFolder], settings: dict[str, Any], tmp_path: Path, start: str, phase: str, step: int
) -> None:
    run = RunFolder(tmp_path / "run")
    with pytest.raises(Interrupted, match=r"stopped by SIGINT; go on with: bidora train --resume \S+run"):
        train(TrainSettings(**settings, retrain_from=start), run.path, progress=SignalAt(phase, step))
    assert not run.summary.exists()
    assert load_checkpoint(run.checkpoint)["step"] == (step or STEPS["retrain"])
    torch.manual_seed(99)
    random.seed(99)
    numpy.random.seed(99)
    resume(run.path)
    assert_same_run(run, uninterrupted[start])


def test_a_run_may_be_stopped_after_every_third_step(
    uninterrupted: dict[str, RunFolder], settings: dict[str, Any], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")

    class Often(Silent):
        count = 0

        def step(self, *numbers: object) -> None:
            Often.count += 1
            if Often.count % 3 == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(TrainSettings(**settings, retrain_from="search"), run.path, progress=Often())
    for _ in range(20):
        try:
            resume(run.path, progress=Often())
            break
        except Interrupted:
            continue
    assert Often.count == sum(STEPS.values())
    assert_same_run(run, uninterrupted["search"])


@pytest.fixture(scope="module")
def killed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunFolder, dict[str, Any]]]:
    """Two real processes, killed with SIGKILL while they train, one in each phase."""
    runs, processes = {}, {}
    for phase, steps, lines in (("search", 60, 20), ("retrain", 5, 25)):
        longer = {**settings, "steps": steps, "retrain_steps": 100, "checkpoint_every": 7}
        run = RunFolder(tmp_path_factory.mktemp("killed") / phase)
        runs[phase] = run, longer
        options = [f"--{name.replace('_', '-')}={value}" for name, value in longer.items()]
        command = [sys.executable, "-m", "bidora_kernels.cli", "train", "--json", f"--output={run.path}", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        processes[phase] = subprocess.Popen(command, env=environment), run, lines
    deadline = time.monotonic() + 400  # a busy machine imports slowly
    waiting = dict(processes)
    try:
        while waiting and time.monotonic() < deadline:
            for phase, (process, run, lines) in list(waiting.items()):
                if process.poll() is not None or (run.metrics.exists() and run.metrics.read_bytes().count(b"\n") >= lines):
                    process.kill()
                    del waiting[phase]
            time.sleep(0.002)
    finally:
        for process, _, _ in processes.values():
            process.kill()
            process.wait()
    assert {process.returncode for process, _, _ in processes.values()} == {-signal.SIGKILL}
    return runs


@pytest.mark.parametrize("phase", ["search", "retrain"])
def test_a_killed_and_resumed_run_is_bit_identical(
    killed: dict[str, tuple[RunFolder, dict[str, Any]]], tmp_path: Path, phase: str
) -> None:
    run, longer = killed[phase]
    assert not run.summary.exists()
    state = load_checkpoint(run.checkpoint)
    assert (state["phase"], state["step"] > 0) == (0 if phase == "search" else 1, True)
    resume(run.path)
    expected = RunFolder(tmp_path / "expected")
    train(TrainSettings(**longer), expected.path)
    assert_same_run(run, expected)


def test_a_line_broken_by_a_kill_is_cut_away(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(phase="search", step=1)
    position = writer.position
    writer.write(phase="search", step=2)
    writer.close()
    with path.open("ab") as file:
        file.write(b'{"phase": "sea')
    writer = MetricsWriter(path, position)
    writer.write(phase="search", step=2)
    writer.close()
    run = RunFolder(tmp_path)
    assert [line["step"] for line in run.read_metrics()] == [1, 2]


def test_resuming_a_finished_run_returns_its_summary(uninterrupted: dict[str, RunFolder]) -> None:
    run = uninterrupted["init"]
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    assert resume(run.path) == run.read_summary()
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_resume_refuses_what_does_not_fit(settings: dict[str, Any], tiny_data: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.tsv", "test.tsv"):
        (data / name).write_text((tiny_data / name).read_text())
    base = tmp_path / "base"
    shutil.copytree(settings["model"], base)
    with pytest.raises(UserError, match="there is no checkpoint to resume from"):
        resume(run.path)
    with pytest.raises(Interrupted):
        train(TrainSettings(**{**settings, "data_dir": str(data), "model": str(base)}), run.path, progress=SignalAt("search", 2))
    with pytest.raises(UserError, match="was started with seed 0, not 3"):
        resume(run.path, {"seed": 3})
    (data / "test.tsv").write_text("grain\twheat\n")
    with pytest.raises(UserError, match="the data of tsv differs"):
        resume(run.path)
    (data / "test.tsv").write_text((tiny_data / "test.tsv").read_text())
    weights = base / "model.safetensors"
    original = weights.read_bytes()
    change_weights(base, lambda name, value: value + 1e-3 if "query" in name else value)
    with pytest.raises(UserError, match=f"the weights of {base} differ from those that {run.path} was trained on"):
        resume(run.path)
    weights.write_bytes(original)
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:-200])
    with pytest.raises(UserError, match="cannot be read"):
        resume(run.path)
    torch.save({"checkpoint_version": 0}, run.checkpoint)
    with pytest.raises(UserError, match="must have checkpoint_version 1"):
        resume(run.path)


def test_every_generator_comes_back() -> None:
    state = rng_state()

    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.randn()

    first = draw()
    draw()
    set_rng_state(state)
    assert draw() == first


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})

    def fails(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fails)
    assert load_checkpoint(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]
