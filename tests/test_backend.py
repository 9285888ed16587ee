"""Choosing a backend: what `auto` says, and that a named one never falls back in silence."""

from __future__ import annotations

import pytest
import torch

import bidora_kernels as bk
from bidora_kernels.ops import _backend


def test_backends_gives_a_reason_for_every_choice() -> None:
    choices = bk.backends()
    assert choices["cpu"].backend in ("native", "reference")
    assert all(choice.reason for choice in choices.values())


def test_a_named_backend_that_cannot_run_raises() -> None:
    if _backend.interpreting():
        pytest.skip("Triton's interpreter is on in this process")
    layer = bk.FusedDoraLinear.from_linear(torch.nn.Linear(8, 8), r=2)
    with bk.use_backend("triton"), pytest.raises(bk.BackendUnavailable, match="'triton' was asked for"):
        layer(torch.ones(1, 8))
    layer(torch.ones(1, 8))  # and the choice ended with its block


def test_the_environment_names_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIDORA_BACKEND", "reference")
    assert _backend.resolve("cpu") == "reference"
    monkeypatch.setenv("BIDORA_BACKEND", "fastest")
    with pytest.raises(ValueError, match="BIDORA_BACKEND must be one of auto, reference, native, triton, got 'fastest'"):
        _backend.resolve("cpu")


def test_use_backend_refuses_another_name() -> None:
    with pytest.raises(ValueError, match="backend must be one of"), bk.use_backend("cuda"):
        pass


def test_an_inner_choice_wins_and_ends() -> None:
    with bk.use_backend("triton"):
        with bk.use_backend("reference"):
            assert _backend.resolve("cpu") == "reference"
        if not _backend.interpreting():
            with pytest.raises(bk.BackendUnavailable):
                _backend.resolve("cpu")
