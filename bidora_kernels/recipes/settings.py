"""The settings of a run: every one is written into its checkpoints and its summary."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..bilevel import Sama, preset
from . import UserError

METHODS = ("full", "lora", "dora", "bidora")
BILEVEL = ("balanced", "first-order", "paper", "paper-code")
PRECISIONS = ("fp32", "bf16")

_POSITIVE_INTEGERS = ("steps", "batch_size", "validation_batch_size", "eval_batch_size", "max_length", "r", "horizon")
_COUNTS = ("retrain_steps", "eval_every", "seed")
_RATES = ("lr", "upper_lr", "retrain_lr")
_DECAYS = ("weight_decay", "upper_weight_decay", "retrain_weight_decay", "penalty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What `train` does; the command line has an option of the same name for each field.

    Directions (lora_A, lora_B and the head) train with `lr`, magnitudes with `upper_lr` (None: `lr`); the method dora, which has
    one level, trains both with `lr` and `weight_decay`. `steps` counts the search
    and `retrain_steps` the retraining; a method without a search trains for their sum. `retrain_lr` and `retrain_weight_decay`:
    None takes the search's. `validation_batch_size` and `retrain_from`: None takes what the bilevel preset says.
    `horizon` is Sama's, where the bilevel preset's estimator is Sama; None takes the preset's. `hold_out` keeps a share of the
    training examples out of training and scores on them instead of the test set, to choose settings by.
    `max_norm` clips the lower gradient. `eval_every` tests every so many steps and after each phase (0: at the end only).
    """

    task: str
    model: str
    method: str = "bidora"
    preset: str | None = None
    bilevel: str = "balanced"
    horizon: int | None = None
    data_dir: str | None = None
    seed: int = 0
    partition: float = 0.8
    steps: int = 300
    retrain_steps: int = 0
    retrain_from: str | None = None
    batch_size: int = 32
    validation_batch_size: int | None = None
    eval_batch_size: int = 64
    max_length: int = 128
    lr: float = 1e-3
    upper_lr: float | None = None
    retrain_lr: float | None = None
    weight_decay: float = 0.0
    upper_weight_decay: float = 0.0
    retrain_weight_decay: float | None = None
    warmup: float = 0.06
    max_norm: float | None = None
    penalty: float = 0.0
    r: int = 4
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ("query", "value")
    train_examples: int | None = None
    test_examples: int | None = None
    hold_out: float = 0.0
    eval_every: int = 0
    checkpoint_every: int = 50
    precision: str = "fp32"
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check every value; UserError names the option."""
        for name, choices in (
            ("method", METHODS),
            ("bilevel", BILEVEL),
            ("precision", PRECISIONS),
            ("retrain_from", (None, "init", "search")),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} must be one of {', '.join(c for c in choices if c)}, got {getattr(self, name)!r}")
        for name in _POSITIVE_INTEGERS:
            self._check(name, lambda value: value >= 1, "a positive integer")
        for name in _COUNTS:
            self._check(name, lambda value: value >= 0, "0 or more")
        for name in ("train_examples", "test_examples", "checkpoint_every"):
            self._check(name, lambda value: value >= 1, "a positive integer")
        self._check("seed", lambda value: value < 2**63, "below 2**63")
        for name in _RATES:
            self._check(name, lambda value: value > 0, "a positive number")
        for name in _DECAYS:
            self._check(name, lambda value: value >= 0, "0 or more")
        self._check("max_norm", lambda value: value > 0, "a positive number")
        self._check("warmup", lambda value: 0 <= value < 1, "in [0, 1)")
        self._check("lora_dropout", lambda value: 0 <= value < 1, "in [0, 1)")
        self._check("partition", lambda value: 0.6 <= value <= 1, "in 0.6 … 1.0")
        self._check("hold_out", lambda value: 0 <= value <= 0.4, "in 0 … 0.4")
        if self.horizon is not None and not isinstance(preset(self.bilevel).optimizer["estimator"], Sama):
            raise UserError(f"horizon is Sama's: the bilevel preset {self.bilevel} takes another estimator")
        if self.penalty and self.method not in ("dora", "bidora"):
            raise UserError(f"penalty needs DoRA layers: the method {self.method} has none")

    def _check(self, name: str, valid: Any, wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not (math.isfinite(value) and valid(value)):
            raise UserError(f"{name} must be {wanted}, got {value}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        fields = dataclasses.asdict(self)
        if not isinstance(self.target_modules, str):
            fields["target_modules"] = list(self.target_modules)
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TrainSettings:
        """The settings that `to_dict` wrote."""
        targets = fields.get("target_modules", ())
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise UserError(f"this version knows no setting {', '.join(unknown)}: another one wrote the run")
        return cls(**{**fields, "target_modules": targets if isinstance(targets, str) else tuple(targets)})
