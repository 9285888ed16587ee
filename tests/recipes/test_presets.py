from __future__ import annotations

import json
from pathlib import Path

import pytest

from bidora_kernels.recipes import UserError
from bidora_kernels.recipes.presets import PRESETS, preset_settings
from bidora_kernels.recipes.settings import TrainSettings


def test_the_papers_hyperparameters_are_those_of_its_tables(data_dir: Path) -> None:
    tables = json.loads((data_dir / "paper" / "hyperparameters.json").read_text())
    common = tables["common"]
    for model in ("roberta-base", "roberta-large"):
        for task, row in tables[model].items():
            settings = PRESETS[f"paper/{model}/{task}"].settings
            own = {"lower_lr": "lr", "lower_weight_decay": "weight_decay"}
            assert {name: settings[own.get(name, name)] for name in row} == row, task
            assert {name: settings[name] for name in ("r", "lora_alpha", "batch_size", "partition")} == {
                name: common[name] for name in ("r", "lora_alpha", "batch_size", "partition")
            }
            assert list(settings["target_modules"]) == common["target_modules"]
            assert settings["warmup"] == common["warmup_ratio"]
            retraining = tables["retraining"][model].get(task) or {}
            for name in ("lr", "steps", "weight_decay"):
                assert settings[f"retrain_{name}"] == retraining.get(name), task
    gpt2 = tables["gpt2-medium-e2e"]
    settings = PRESETS["paper/gpt2-medium/e2e"].settings
    assert {name: settings[name] for name in settings.keys() & gpt2.keys()} == {
        name: gpt2[name] for name in settings.keys() & gpt2.keys()
    }
    assert {
        "beams": settings["beams"],
        "length_penalty": settings["length_penalty"],
        "no_repeat_ngram": settings["no_repeat_ngram"],
    } == gpt2["decoding"]


def test_the_papers_scores_are_those_of_its_table(data_dir: Path) -> None:
    glue = json.loads((data_dir / "paper" / "results.json").read_text())["glue"]
    for model in ("roberta-base", "roberta-large"):
        for task in glue[model]["bidora"].keys() - {"average"}:
            scores = PRESETS[f"paper/{model}/{task}"].paper_scores
            assert scores == {method: glue[model][method][task] for method in ("full", "lora", "dora", "bidora")}


def test_a_value_that_nobody_gives_stays_open_until_the_user_gives_it() -> None:
    name = "paper/roberta-base/mrpc"
    assert PRESETS[name].not_given == ("retrain_lr", "retrain_steps", "retrain_weight_decay")
    with pytest.raises(UserError, match=r"gives no retrain_lr and no retrain_steps .*pass --retrain-lr, --retrain-steps"):
        preset_settings(name, {})
    settings = TrainSettings(**preset_settings(name, {"retrain_lr": 1e-5, "retrain_steps": 7}))
    assert (settings.retrain_steps, settings.retrain_weight_decay) == (7, None)
    assert TrainSettings(**preset_settings(name, {"method": "dora"})).retrain_steps == 0


def test_what_cannot_be_run_says_why() -> None:
    with pytest.raises(UserError, match="token classification is not implemented"):
        preset_settings("paper/roberta-base/conll2003", {})
    with pytest.raises(UserError, match="did you mean paper/roberta-base/cola"):
        preset_settings("paper/roberta-base/colla", {})


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.unavailable is None])
def test_every_runnable_preset_makes_settings(name: str) -> None:
    settings = TrainSettings(**preset_settings(name, {"retrain_lr": 1e-4, "retrain_steps": 3}))
    assert TrainSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be a positive integer, got 0"),
        ("lr", float("nan"), "lr must be a positive number, got nan"),
        ("r", -1, "r must be a positive integer, got -1"),
        ("warmup", 1.0, r"warmup must be in \[0, 1\), got 1.0"),
        ("method", "adapter", "method must be one of full, lora, dora, bidora"),
        ("retrain_from", "middle", "retrain_from must be one of init, search"),
        ("weight_decay", -0.1, "weight_decay must be 0 or more"),
        ("partition", 0.5, r"partition must be in 0\.6 … 1\.0"),
    ],
)
def test_a_setting_out_of_range_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainSettings(task="tsv", model="m", **{field: value})


def test_a_penalty_needs_dora_layers() -> None:
    with pytest.raises(UserError, match="the method lora has none"):
        TrainSettings(task="tsv", model="m", method="lora", penalty=1e-5)
