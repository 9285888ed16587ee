"""Adapters on disk, in PEFT's files."""

from __future__ import annotations

import os

from torch import nn


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapter of `model` into `folder`."""
    raise NotImplementedError("save_adapter")


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Read the adapter in `folder` into `model`."""
    raise NotImplementedError("load_adapter")
