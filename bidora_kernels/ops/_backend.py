"""Which implementation serves an operation: auto | reference | native | triton. The only reader of environment variables."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Iterator

import torch

from ._context import PassMode, current_mode, pass_mode

BACKENDS = ("auto", "reference", "native", "triton")


@dataclasses.dataclass(frozen=True)
class BackendChoice:
    """What `auto` resolves to on one device type, and why."""

    device: str
    backend: str
    reason: str


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here."""


def environment_backend() -> str:
    """The backend named by BIDORA_BACKEND, or "auto"."""
    return _checked(os.environ.get("BIDORA_BACKEND", "auto"), "BIDORA_BACKEND")


def interpreting() -> bool:
    """Whether Triton kernels run under its interpreter (TRITON_INTERPRET=1), which also takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _missing(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot serve tensors on `device_type`, or None where it can."""
    return _look_for(backend, device_type)


_missing.__dict__["_dynamo_marked_constant"] = True  # as torch.compiler.assume_constant_result, without importing dynamo


@functools.cache
def _look_for(backend: str, device_type: str) -> str | None:
    if backend == "reference":
        return None
    if backend == "native":
        if device_type != "cpu":
            return f"the native backend runs on cpu, not on {device_type}"
        from .. import native

        return native.why_unavailable()
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if importlib.util.find_spec("bidora_kernels.kernels.weight_norm") is None:
        return "this version has no Triton kernels"
    if device_type == "cuda":
        return None
    return None if interpreting() else f"Triton has no kernels for {device_type} (under TRITON_INTERPRET=1 it takes cpu tensors)"


_PREFERENCE = {"cpu": ("native",), "cuda": ("triton",)}


def _auto(device_type: str) -> str:
    return next((known for known in _PREFERENCE.get(device_type, ()) if _missing(known, device_type) is None), "reference")


def auto_choice(device_type: str) -> BackendChoice:
    """What `auto` takes on a device type: the first backend of its preference that can run, else the reference."""
    backend = _auto(device_type)
    if backend == "reference":
        reasons = [f"{known}: {_missing(known, device_type)}" for known in _PREFERENCE.get(device_type, ())]
        return BackendChoice(device_type, backend, "; ".join(reasons) or f"no kernels for {device_type}")
    limit = "; layers in fp64 or with sizes that are not multiples of 8 take the reference" if backend == "triton" else ""
    return BackendChoice(device_type, backend, f"available{limit}")


def asked_for(mode: PassMode) -> str:
    """The backend that a mode names, else the environment's, or "auto"."""
    return mode.backend or environment_backend()


def resolve(device_type: str) -> str:
    """The backend for tensors on `device_type` under the current mode and environment.

    Raises BackendUnavailable where a backend was named (by `use_backend`, `pass_mode` or BIDORA_BACKEND) and cannot run there.
    """
    return backend_under(current_mode(), device_type)


def backend_under(mode: PassMode, device_type: str) -> str:
    """The same under a mode that is at hand."""
    name = asked_for(mode)
    if name == "auto":
        return _auto(device_type)
    reason = _missing(name, device_type)
    if reason is not None:
        raise BackendUnavailable(f"backend {name!r} was asked for, but {reason}")
    return name


def takes_native(mode: PassMode) -> bool:
    """Whether CPU tensors go to the native backend, for what may stay with PyTorch where a named backend cannot run."""
    return asked_for(mode) in ("auto", "native") and _missing("native", "cpu") is None


def backends() -> dict[str, BackendChoice]:
    """What `auto` resolves to for each device type at hand, and why."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {device: auto_choice(device) for device in devices}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operation inside the block with one backend: "auto", "reference", "native" or "triton".

    Under TRITON_INTERPRET=1 "triton" runs on CPU tensors. Raises ValueError for another name; an operation raises
    BackendUnavailable where the named backend cannot run.
    """
    with pass_mode(backend=_checked(name, "backend")):
        yield
