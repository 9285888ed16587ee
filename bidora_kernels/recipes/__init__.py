"""The paper's experiments as one training recipe: search, then retrain; started by the `bidora` command."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: the command line prints it as one line and exits with code 2."""


def require(module: str, extra: str = "train") -> None:
    """Raise UserError naming the extra where an optional package is not installed."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise UserError(f'the package {module} is not installed: pip install "bidora-kernels[{extra}]"')
