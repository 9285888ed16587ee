"""A run folder: summary.json, metrics.jsonl, adapter/ (model/ for full fine-tuning), checkpoints/ and curves.png.

Files and folders appear whole or not at all: each is written beside its place and renamed; a file is flushed to disk before.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import UserError

SCHEMA_VERSION = 1
HYPERGRADIENT_FIELDS = (  # of StepStats, on lines of a step with an upper part
    "direct_norm", "second_order_norm", "cosine", "ratio_capped", "radius", "passes", "pass_seconds",
)  # fmt: skip
METRIC_FIELDS = (
    "phase", "step", "train_loss", "validation_loss", "test_metric", "hypergradient_norm", "lr_lower", "lr_upper", "seconds",
    *HYPERGRADIENT_FIELDS,
)  # fmt: skip
_OWN = ("summary.json", "metrics.jsonl", "adapter", "model", "checkpoints", "curves.png", "hypergradient.png")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour of `path` (a file or a folder), then rename it into place."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    _remove(temporary)  # a killed run may have left one
    try:
        write(temporary)
        if temporary.is_file():
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        elif path.exists():
            _remove(path)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class RunFolder:
    """The places inside one run's folder."""

    def __init__(self, path: str | Path) -> None:
        """Name the folder; nothing is read or written yet."""
        self.path = Path(path)
        self.summary = self.path / "summary.json"
        self.metrics = self.path / "metrics.jsonl"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.checkpoint = self.path / "checkpoints" / "last.pt"
        self.curves = self.path / "curves.png"

    def held_run(self) -> bool:
        """Whether the folder holds a run, finished or not."""
        return any((self.path / name).exists() for name in _OWN)

    def check_new(self, overwrite: bool) -> None:
        """Raise UserError where a new run cannot start here; changes nothing."""
        nearest = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if os.path.exists(folder))
        if not nearest.is_dir():
            raise UserError(f"{nearest} is not a folder")
        if not os.access(nearest, os.W_OK):
            raise UserError(f"{nearest} cannot be written to")
        if self.held_run():
            if not overwrite:
                goes_on = "--resume continues it, " if self.checkpoint.exists() or self.summary.exists() else ""
                raise UserError(f"{self.path} already holds a run: {goes_on}--overwrite replaces it")
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no run; choose another --output")

    def start(self) -> None:
        """Make the folder, without anything of an earlier run in it."""
        try:
            for name in _OWN:
                _remove(self.path / name)
            self.checkpoint.parent.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{self.path} cannot be made: {error.strerror}") from error

    def read_summary(self) -> dict[str, Any]:
        """The summary of a finished run. Raises UserError where there is none, or one that is not readable."""
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except FileNotFoundError:
            state = f"has not finished (bidora train --resume {self.path})" if self.checkpoint.exists() else "holds no run"
            raise UserError(f"{self.path} {state}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.summary} cannot be read: {error}") from None
        whole = isinstance(summary, dict) and isinstance(summary.get("settings"), dict)
        if not whole or summary.get("schema_version") != SCHEMA_VERSION:
            raise UserError(f"{self.summary} must be a summary of schema_version {SCHEMA_VERSION}")
        return summary

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl."""
        with self.metrics.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


class MetricsWriter:
    """Appends lines to metrics.jsonl; `position` is the file's length in bytes, which a checkpoint keeps."""

    def __init__(self, path: Path, position: int = 0) -> None:
        """Open the file, cut to `position`: lines after it belong to steps that a resumed run does again."""
        self._file = path.open("ab")
        self._file.truncate(position)

    @property
    def position(self) -> int:
        """The length so far, on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def write(self, **values: Any) -> None:
        """Append one line with every field of METRIC_FIELDS, null where not given."""
        line = {"schema_version": SCHEMA_VERSION, **dict.fromkeys(METRIC_FIELDS), **values}
        self._file.write((json.dumps(line, allow_nan=False) + "\n").encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextlib.contextmanager
def metrics_writer(path: Path, position: int = 0) -> Iterator[MetricsWriter]:
    """A MetricsWriter that is closed at the end of the block."""
    writer = MetricsWriter(path, position)
    try:
        yield writer
    finally:
        writer.close()


def versions() -> dict[str, str | None]:
    """The versions of what a result depends on; None where a package is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("bidora-kernels", "torch", "triton", "transformers", "peft", "datasets", "accelerate"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """Where a run ran: the machine's kind, torch's threads, the GPU if there is one."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"platform": platform.platform(), "threads": torch.get_num_threads(), "gpu": gpu}


def source_commit() -> str | None:
    """The commit that this package runs from, "-dirty" where the files differ; None outside a repository of its own."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
