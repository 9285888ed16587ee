"""Where and on what a result was measured, and what the machine can do at best."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import bidora_kernels as bk

from .timing import clock_for

REPOSITORY = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "triton", "transformers", "peft", "numpy")


def _command(*words: str) -> str | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, cwd=REPOSITORY, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cache_bytes(device: str) -> int:
    """The size of the last-level cache: what rotated inputs have to exceed."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.rstrip("KM")) * (1 << 20 if text.endswith("M") else 1 << 10)
    except (OSError, ValueError):
        return 32 << 20


def describe(device: str) -> dict[str, Any]:
    """The machine and the versions on it; the same in every piece of one results file."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "device": device,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(memory / 2**30, 1),
        "cache_mib": round(cache_bytes(device) / 2**20, 1),
        "gpu": torch.cuda.get_device_name(0) if device == "cuda" else None,
        "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device == "cuda" else None,
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: version for package in _PACKAGES if (version := _version(package))},
        "bidora_kernels": bk.__version__,
    }


def label(machine: dict[str, Any]) -> str:
    """A short name for titles and file names."""
    return machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"


def commit() -> dict[str, Any]:
    """The commit of the checkout, and whether measured code differs from it."""
    status = _command("git", "status", "--porcelain", "--", "bidora_kernels", "csrc", "benchmarks") or ""
    changed = [line for line in status.splitlines() if "benchmarks/results" not in line]
    return {"commit": _command("git", "rev-parse", "HEAD") or "unknown", "modified": bool(changed)}


def source() -> dict[str, Any]:
    """What numbers that are no times come from: the latest commit that added some, the processor, PyTorch."""
    return {**commit(), "cpu": _cpu_name(), "instructions": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


def _clock_mhz(device: str) -> float | None:
    if device == "cuda":
        text = _command("nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits")
        return float(text.splitlines()[0]) if text else None
    try:
        found = re.findall(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        return None
    return round(statistics.mean(map(float, found)), 1) if found else None


def _best(block: Any, device: str, seconds: float) -> float:
    """The median time of a block over a stretch: a ceiling should hold while the suite runs, not once."""
    clock = clock_for(device)
    block()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - started < seconds and len(times) < 200):
        times.append(clock.seconds(block))
    return statistics.median(times)


def _copy_bandwidth(values: int, device: str, seconds: float) -> float:
    source = torch.empty(values, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device, seconds)


def ceilings(device: str, quick: bool = False) -> dict[str, float]:
    """Copy bandwidth (bytes read and written), matrix product rates and the cost of one small operator, measured now."""
    side = 1024 if quick else (8192 if device == "cuda" else 2048)
    values = (1 << 24) if quick else (1 << 28 if device == "cuda" else 1 << 26)
    seconds = 0.05 if quick else 0.6
    found = {"copy_gb_s": _copy_bandwidth(values, device, seconds) / 1e9}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        slow = dtype is torch.bfloat16 and device == "cpu" and not torch.cpu._is_avx512_bf16_supported()
        n = min(side, 512) if slow else side
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        found[f"matmul_{name}_gflop_s"] = 2 * n**3 / _best(lambda a=a, b=b: torch.mm(a, b), device, seconds) / 1e9
    small = torch.ones(8, device=device)

    def many() -> None:
        for _ in range(200):
            small.mul_(1.0)

    found["operator_us"] = _best(many, device, seconds / 4) / 200 * 1e6
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def piece(device: str, quick: bool = False) -> dict[str, Any]:
    """What is recorded once per stretch of measuring: when, at which commit, and the ceilings at that time."""
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **commit(),
        "backends": {name: f"{choice.backend} ({choice.reason})" for name, choice in bk.backends().items()},
        "clock_mhz": _clock_mhz(device),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "ceilings": ceilings(device, quick),
    }
