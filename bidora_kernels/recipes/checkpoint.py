"""Checkpoints of a run: everything that the next step depends on, in one file that torch.load reads with weights_only=True."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import torch

from . import UserError
from .runs import write_atomically

CHECKPOINT_VERSION = 1


def rng_state() -> dict[str, Any]:
    """The state of torch's (every device's), Python's and numpy's generators, in plain types."""
    import numpy

    numpy_state: Any = numpy.random.get_state()
    name, keys, position, has_gauss, gauss = numpy_state
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss_next],
        "numpy": [name, torch.from_numpy(keys.astype("int64")), int(position), int(has_gauss), float(gauss)],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    import numpy

    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, gauss))


def seed_everything(seed: int) -> None:
    """Seed torch's, Python's and numpy's generators."""
    import numpy

    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint atomically; a reader sees the old one or the new one."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.save({"checkpoint_version": CHECKPOINT_VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint. Raises UserError where there is none, it is damaged, or another version wrote it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint to resume from: {path} (--overwrite starts the run again)") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the checkpoint {path} cannot be read: {reason}") from None
    if not isinstance(state, dict) or state.get("checkpoint_version") != CHECKPOINT_VERSION:
        raise UserError(f"the checkpoint {path} must have checkpoint_version {CHECKPOINT_VERSION}")
    return state
