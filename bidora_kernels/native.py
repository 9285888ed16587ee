"""Loads the compiled csrc library, or says why it is absent and how to get it."""

from __future__ import annotations


def why_unavailable() -> str | None:
    """Why the native library cannot be used here, or None where it can."""
    return "this version has no native library"
