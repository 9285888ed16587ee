"""The paper's experiments as one training recipe: search, then retrain; started by the `bidora` command."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake in what the user gave: the command line prints it as one line and exits with code 2."""


def require(module: str, extra: str = "train") -> None:
    """Raise UserError naming the extra where an optional package is not installed."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise UserError(f'the package {module} is not installed: pip install "bidora-kernels[{extra}]"')


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence the hub client's reports of its retries inside the block; what it raises in the end says enough."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
