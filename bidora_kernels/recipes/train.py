"""The recipe: search (directions on one split, magnitudes on the other), then retrain the directions on the union.

Every method goes through the same loop; one without a search has the single phase "train". A run can be stopped after any step
and resumed with the same result, bit for bit, on the same machine's CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bilevel.schedule import TwoPhases
from ..ops._backend import resolve
from . import UserError
from .checkpoint import load_checkpoint, rng_state, save_checkpoint, seed_everything, set_rng_state
from .interruption import Interrupted, StopSignals
from .metrics import METRICS, macro_f1
from .models import Encoded, build_model, check_base, save_trained
from .phases import Order, Phase, plan_phases, retrain_from, validation_batch_size
from .plots import draw_curves
from .progress import Estimate, Silent
from .runs import (
    HYPERGRADIENT_FIELDS,
    SCHEMA_VERSION,
    MetricsWriter,
    RunFolder,
    machine,
    metrics_writer,
    source_commit,
    versions,
    write_atomically,
    write_json,
)
from .settings import TrainSettings
from .tasks import TaskData, load_task
from .updates import BilevelUpdate, PlainUpdate


class NonFinite(UserError):
    """A loss or a trained value that is not finite; the run stopped before it could do harm."""


class Training:
    """A run in memory: the model, the position in the phases, and what a checkpoint has to hold."""

    def __init__(self, settings: TrainSettings, run: RunFolder, progress: Silent) -> None:
        """Load the data, build the model and the first phase; writes nothing. Raises UserError for a mistake in the settings."""
        self.settings, self.run, self.progress = settings, run, progress
        self.data: TaskData = load_task(
            settings.task, settings.data_dir, settings.train_examples, settings.test_examples, settings.seed, settings.hold_out
        )
        self.data_sha256 = self.data.sha256()
        self.phases = plan_phases(settings, self.data.train.labels, not self.data.regression)
        seed_everything(settings.seed)
        self.trained, warnings = build_model(settings, self.data.label_names)
        self.warnings = [*self.data.warnings, *warnings]
        self.device = _device(settings.device)
        self.model = self.trained.model.to(self.device).train()
        if settings.method == "bidora" and not self.phases[0].validation:
            for parameter in self.trained.magnitudes.values():
                parameter.requires_grad_(False)
        self.train_set, self.test_set = (
            Encoded(part, self.trained.tokenizer, settings.max_length, self.device) for part in (self.data.train, self.data.test)
        )
        self.initial = {name: parameter.detach().clone() for name, parameter in self.trained.lower.items()}
        self.passes, self.seconds_before = 0.0, 0.0
        self.scores: dict[str, dict[str, float]] = {}
        self._started = time.monotonic()
        self._begin(0)

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self.phases[self.index]

    @property
    def seconds(self) -> float:
        """Wall time so far, without the time between an interruption and its resumption."""
        return self.seconds_before + time.monotonic() - self._started

    def _begin(self, index: int) -> None:
        """Set up a phase: its optimizers, its order of examples, and for the retraining the directions it starts from."""
        self.index, self.step, self.upper_steps, self.evaluation_due = index, 0, 0, False
        phase, settings = self.phase, self.settings
        lower, magnitudes = list(self.trained.lower.values()), list(self.trained.magnitudes.values())
        if phase.name == "retrain":
            plan = TwoPhases(settings.steps, settings.retrain_steps, retrain_from(settings))
            plan.begin_retraining(lower, magnitudes, list(self.initial.values()))
            # out of the search's flat buffers: a BLAS may sum in another order at another alignment, and a resumed run has none
            for parameter in (*lower, *magnitudes):
                parameter.data = parameter.data.clone()
        self.update: BilevelUpdate | PlainUpdate
        if phase.validation:
            self.update = BilevelUpdate(self.model, settings, lower, magnitudes, phase.steps)
        else:
            parameters = lower + [parameter for parameter in magnitudes if parameter.requires_grad]
            self.update = PlainUpdate(self.model, settings, parameters, phase.steps, phase.name == "retrain")
        self._train_order = Order(phase.train, settings.batch_size, settings.seed, phase.name, "train")
        if phase.validation:
            self._validation_order = Order(
                phase.validation, validation_batch_size(settings), settings.seed, phase.name, "validation"
            )

    def state(self, metrics_position: int) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "settings": self.settings.to_dict(),
            "data_sha256": self.data_sha256,
            "base_sha256": self.trained.base_sha256,
            "phase": self.index,
            "step": self.step,
            "upper_steps": self.upper_steps,
            "evaluation_due": self.evaluation_due,
            "parameters": _copies({**self.trained.lower, **self.trained.magnitudes}),
            "initial": _copies(self.initial),
            "update": self.update.state_dict(),
            "rng": rng_state(),
            "passes": self.passes,
            "seconds": self.seconds,
            "scores": self.scores,
            "metrics_position": metrics_position,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state. Raises UserError where the task's data has changed since."""
        if state["data_sha256"] != self.data_sha256:
            raise UserError(f"the data of {self.settings.task} differs from the data that {self.run.path} was trained on")
        check_base(self.trained.base_sha256, state.get("base_sha256"), self.settings.model, self.run)
        for name, value in state["initial"].items():
            self.initial[name].copy_(value)
        self._begin(state["phase"])
        with torch.no_grad():
            for name, parameter in {**self.trained.lower, **self.trained.magnitudes}.items():
                parameter.copy_(state["parameters"][name])
        self.update.load_state_dict(state["update"])
        self.step, self.upper_steps, self.evaluation_due = state["step"], state["upper_steps"], state["evaluation_due"]
        self.passes, self.seconds_before, self.scores = state["passes"], state["seconds"], dict(state["scores"])
        set_rng_state(state["rng"])

    def _save(self, metrics: MetricsWriter) -> None:
        for name, parameter in {**self.trained.lower, **self.trained.magnitudes}.items():
            if not bool(torch.isfinite(parameter).all()):
                raise NonFinite(
                    f"{name} is not finite after step {self.step} of the phase {self.phase.name}; {self._last_good()}"
                )
        save_checkpoint(self.run.checkpoint, self.state(metrics.position))

    def _last_good(self) -> str:
        return f"the last good checkpoint is {self.run.checkpoint} (a smaller --lr may help)"

    def _loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            loss = model(**batch).loss
        if not math.isfinite(loss.item()):
            place = f"step {self.step + 1} of the phase {self.phase.name}"
            raise NonFinite(f"the loss is {loss.item()} in {place}: the step was not taken; {self._last_good()}")
        return loss

    def train(self, metrics: MetricsWriter) -> None:
        """Run to the end. Raises Interrupted after a signal and NonFinite for a value that is not; a checkpoint is there then."""
        self.progress.begin([(p.name, p.steps, self._done(number)) for number, p in enumerate(self.phases)])
        left = sum(phase.cost * (phase.steps - self._done(number)) for number, phase in enumerate(self.phases))
        estimate = Estimate()
        upper: tuple[float | None, float | None] = (None, None)
        with StopSignals() as signals:
            if not self.run.checkpoint.exists():
                self._save(metrics)
            while True:
                if self.evaluation_due:
                    self._evaluate(metrics, signals)
                if self.step == self.phase.steps:
                    if self.index + 1 == len(self.phases):
                        return
                    self._begin(self.index + 1)
                record = self._take_step(metrics)
                left -= self.phase.cost
                eta = estimate.after(self.phase.cost, left)
                if record.validation_loss is not None or not self.phase.validation:
                    upper = record.validation_loss, record.hypergradient_norm  # shown until the next upper step
                self.progress.step(self.phase.name, self.step, record.train_loss, *upper, eta)
                due = self.step == self.phase.steps or self.step % self.settings.checkpoint_every == 0
                if due or self.evaluation_due or signals.received is not None:
                    self._save(metrics)
                self._stop_if_asked(signals)

    def _done(self, number: int) -> int:
        return self.phases[number].steps if number < self.index else self.step if number == self.index else 0

    def _stop_if_asked(self, signals: StopSignals) -> None:
        if signals.received is not None:
            raise Interrupted(signals.received, self.run.path)

    def _take_step(self, metrics: MetricsWriter) -> Any:
        lr_lower, lr_upper = self.update.rates
        validation_batch = None
        if self.update.needs_validation:
            validation_batch = self.train_set.batch(self._validation_order.batch(self.upper_steps))
        record = self.update.step(self._loss, self.train_set.batch(self._train_order.batch(self.step)), validation_batch)
        if not math.isfinite(record.hypergradient_norm or 0.0):
            place = f"step {self.step + 1} of the phase {self.phase.name}"
            raise NonFinite(f"the hypergradient is not finite in {place}; {self._last_good()}")
        self.upper_steps += validation_batch is not None
        self.step += 1
        self.passes += record.passes
        self.evaluation_due = self._evaluates_now()
        metrics.write(
            phase=self.phase.name,
            step=self.step,
            train_loss=record.train_loss,
            validation_loss=record.validation_loss,
            hypergradient_norm=record.hypergradient_norm,
            lr_lower=lr_lower,
            lr_upper=lr_upper if validation_batch is not None else None,
            seconds=round(self.seconds, 3),
            **{} if record.stats is None else {field: getattr(record.stats, field) for field in HYPERGRADIENT_FIELDS},
        )
        return record

    def _evaluates_now(self) -> bool:
        """At the end of the run; with `eval_every` also at the end of every phase, and between."""
        phase_ends, every = self.step == self.phase.steps, self.settings.eval_every
        if every == 0:
            return phase_ends and self.index + 1 == len(self.phases)
        return phase_ends or self.step % every == 0

    def _evaluate(self, metrics: MetricsWriter, signals: StopSignals) -> None:
        self.scores = {**self.scores, self.phase.name: self._test(signals)}
        score = self.scores[self.phase.name][self.data.metric]
        metrics.write(phase=self.phase.name, step=self.step, test_metric=score, seconds=round(self.seconds, 3))
        self.evaluation_due = False

    def _test(self, signals: StopSignals) -> dict[str, float]:
        """Test metrics; batches hold examples of like length, and predictions go back into the test set's order."""
        order = sorted(range(len(self.test_set)), key=self.test_set.lengths.__getitem__)
        predictions: list[float] = [0.0] * len(order)
        size = self.settings.eval_batch_size
        self.model.eval()
        try:
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                for place, value in zip(chosen, self._predict(self.test_set.batch(chosen)), strict=True):
                    predictions[place] = value
                self.progress.evaluating(start + len(chosen), len(order))
                self._stop_if_asked(signals)
        finally:
            self.model.train()
        labels = self.data.test.labels
        scores = {self.data.metric: METRICS[self.data.metric](predictions, labels)}
        if not self.data.regression:
            scores["macro_f1"] = macro_f1(predictions, labels)
        return scores

    @torch.no_grad()
    def _predict(self, batch: dict[str, Tensor]) -> list[float]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            logits = self.model(**batch).logits
        return (logits.squeeze(-1) if self.data.regression else logits.argmax(-1)).tolist()

    def finish(self) -> dict[str, Any]:
        """Write what was trained, the curves, and last the summary, which is returned."""
        save_trained(self.run, self.trained, self.settings.method)
        counts = self.trained.counts()
        if self.settings.method == "bidora" and not self.phases[0].validation:
            counts["magnitudes"] = 0
        settings, last = self.settings, self.scores[self.phases[-1].name]
        summary = {
            "schema_version": SCHEMA_VERSION,
            "task": settings.task,
            "method": settings.method,
            "preset": settings.preset,
            "bilevel": settings.bilevel if settings.method == "bidora" else None,
            "seed": settings.seed,
            "metric": self.data.metric,
            "score": last[self.data.metric],
            "scores": self.scores,
            "trainable": counts,
            "passes": self.passes,
            "steps": {phase.name: phase.steps for phase in self.phases},
            "examples": {
                "train": len(self.data.train) - len(self.phases[0].validation),
                "validation": len(self.phases[0].validation),
                "test": len(self.data.test),
            },
            "seconds": round(self.seconds, 3),
            "pairs": self.data.train.pairs is not None,
            "label_names": list(self.data.label_names),
            "warnings": self.warnings,
            "versions": versions(),
            "machine": machine(),
            "commit": source_commit(),
            "data_sha256": self.data_sha256,
            "corpus_sha256": self.data.corpus_sha256,
            "base_sha256": self.trained.base_sha256,
            "settings": settings.to_dict(),
        }
        lines = self.run.read_metrics()
        write_atomically(self.run.curves, lambda path: draw_curves(lines, summary, path))
        write_json(self.run.summary, summary)
        return summary


def _device(name: str) -> torch.device:
    """The device by its name, a backend for it included. UserError where it, or the backend asked for, is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
        resolve(device.type)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"device {name}: {str(error).splitlines()[0]}") from error
    return device


def _copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


def train(settings: TrainSettings, output: str | Path, overwrite: bool = False, progress: Silent | None = None) -> dict[str, Any]:
    """Train from the start into the folder `output` and return the summary.

    The folder is made only once data and model are ready. Raises UserError for a user's mistake, NonFinite and Interrupted as
    `Training.train` does.
    """
    run, progress = RunFolder(output), progress or Silent()
    run.check_new(overwrite)
    training = Training(settings, run, progress)
    run.start()
    return _run(training, 0)


def resume(output: str | Path, given: Mapping[str, Any] | None = None, progress: Silent | None = None) -> dict[str, Any]:
    """Go on with an interrupted run from its last checkpoint; a finished run's summary is returned as it is.

    `given` are settings that must agree with the run's. Raises UserError where they differ, where there is no checkpoint, and
    where the data has changed; otherwise as `train`.
    """
    run, progress = RunFolder(output), progress or Silent()
    state = None if run.summary.exists() else load_checkpoint(run.checkpoint)
    stored = run.read_summary()["settings"] if state is None else state["settings"]
    settings = TrainSettings.from_dict(stored)
    for name, value in (given or {}).items():
        if value != getattr(settings, name):
            raise UserError(
                f"{run.path} was started with {name} {getattr(settings, name)}, not {value}; --resume keeps its settings"
            )
    if state is None:
        return run.read_summary()
    training = Training(settings, run, progress)
    training.restore(state)
    return _run(training, state["metrics_position"])


def _run(training: Training, metrics_position: int) -> dict[str, Any]:
    for line in training.warnings:
        training.progress.message(f"warning: {line}")
    try:
        with metrics_writer(training.run.metrics, metrics_position) as metrics:
            training.train(metrics)
        return training.finish()
    finally:
        training.progress.end()


__all__ = ["Interrupted", "NonFinite", "Training", "resume", "train"]
