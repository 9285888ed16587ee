"""Compile what a launcher would launch, for a GPU that is not here, and read the binary.

`recorded_launches` runs launchers on meta tensors and records their launches; `compile_launch` compiles one of them as Triton
would on first use: the same types, divisibility by 16, and ones made constants.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bidora_kernels.kernels import _launch

KERNEL_MODULES = [
    "_launch",
    "compose",
    "compose_backward",
    "direction_backward",
    "magnitude_gradient",
    "merged_weight",
    "orthogonality",
    "pieces",
    "reduce_partials",
    "weight_norm",
    "weight_norm_factors",
]
_POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SHARED_PER_SM = {80: 166912, 90: 232448, 100: 232448}


@dataclasses.dataclass
class Launch:
    name: str
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    launches: list[Launch] = []

    def record(name: str, kernel: Any, grid: tuple[int, ...], anchor: torch.Tensor, *args: Any, **options: Any) -> None:
        launches.append(Launch(name, kernel, args, options))

    modules = [importlib.import_module(f"bidora_kernels.kernels.{name}") for name in KERNEL_MODULES]
    modules = [module for module in modules if hasattr(module, "run")]
    originals = [module.run for module in modules]
    for module in modules:
        module.run = record
    try:
        yield launches
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.run = original


def launches_of(call: Callable[[], object], architecture: str = "default") -> list[Launch]:
    """The launches of a call with the tiles of an architecture like "sm_90" or "gfx942"."""
    modules = [importlib.import_module(f"bidora_kernels.kernels.{name}") for name in KERNEL_MODULES]
    modules = [module for module in modules if hasattr(module, "architecture_of")]
    original, hip = _launch.architecture_of, torch.version.hip
    for module in modules:
        module.architecture_of = lambda device: architecture
    if architecture.startswith("gfx"):
        torch.version.hip = "compiled for"  # what a build of torch for AMD says of itself
    try:
        with recorded_launches() as launches:
            call()
    finally:
        for module in modules:
            module.architecture_of = original
        torch.version.hip = hip
    return launches


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    names = launch.kernel.arg_names
    options = dict(launch.options)
    compile_options = {key: options.pop(key) for key in ("num_warps", "num_stages") if key in options}
    values = dict(zip(names, launch.args, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value, is_constant = values[name], launch.kernel.params[index].is_constexpr
        if is_constant or (isinstance(value, int) and value == 1 and not isinstance(value, bool)):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTER[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True, **compile_options})


@dataclasses.dataclass
class AmdReport:
    """What one code object for an AMD GPU uses; scratch: bytes of memory per thread that registers spill to."""

    registers: int
    scratch: int
    shared: int
    wide_loads: int
    tensor_core: bool
    float_atomics: list[str]


def amd_report(launch: Launch, architecture: str) -> AmdReport:
    compiled = compile_launch(launch, GPUTarget("hip", architecture, 64))
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return max(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", text))

    return AmdReport(
        registers=field("vgpr_count"),
        scratch=field("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        wide_loads=len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        tensor_core="v_mfma" in text,
        float_atomics=re.findall(r"\w+_atomic_(?:pk_)?(?:add|fadd|min|max)_(?:f16|f32|f64|bf16)", text),
    )


@dataclasses.dataclass
class Report:
    """What one binary uses; widths count global accesses by the bits each thread moves."""

    registers: int
    spills: int
    shared: int
    blocks_per_sm: int
    load_bits: dict[int, int]
    store_bits: dict[int, int]
    tensor_core: str
    float_atomics: list[str]
    instructions: int

    def __str__(self) -> str:
        widths = " ".join(
            f"{kind} " + ("/".join(f"{bits}:{n}" for bits, n in sorted(table.items(), reverse=True)) or "-")
            for kind, table in (("load", self.load_bits), ("store", self.store_bits))
        )
        return (
            f"registers {self.registers:3d} spills {self.spills:3d} shared {self.shared / 1024:5.1f}K "
            f"blocks/SM {self.blocks_per_sm:2d} {widths} {self.tensor_core} instructions {self.instructions}"
        )


def _tool(name: str, *arguments: str) -> str:
    result = subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def _width(operation: str) -> int:
    for bits, marks in ((128, (".128",)), (64, (".64",)), (16, (".U16", ".S16", ".16")), (8, (".U8", ".S8", ".8"))):
        if any(mark in operation.split("LDGSTS")[-1] for mark in marks):
            return bits
    return 32


def nvidia_report(launch: Launch, architecture: int) -> Report:
    compiled = compile_launch(launch, GPUTarget("cuda", architecture, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass, usage = _tool("cuobjdump", "-sass", file.name), _tool("cuobjdump", "-res-usage", file.name)
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    operations = collections.Counter(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.M))
    widths: dict[str, collections.Counter[int]] = {"load": collections.Counter(), "store": collections.Counter()}
    for operation, count in operations.items():
        if operation.startswith(("LDG", "LDGSTS")) and not operation.startswith("LDGDEPBAR"):
            # cp.async names its width last: LDGSTS.E.BYPASS.128
            widths["load"][_width(operation)] += count
        elif operation.startswith("STG"):
            widths["store"][_width(operation)] += count
    cores = {"HGMMA": "wgmma", "UTC": "tcgen05", "HMMA": "mma"}
    used = [
        name for mark, name in cores.items() if any(operation.startswith(mark) and "MMA" in operation for operation in operations)
    ]
    warps, shared = launch.options["num_warps"], compiled.metadata.shared
    per_block = (registers + 7) // 8 * 8 * 32 * warps
    room = _SHARED_PER_SM[architecture]
    blocks = min(64 // warps, 65536 // per_block, (room + 1024) // (shared + 1024)) if shared <= room else 0
    return Report(
        registers=registers,
        spills=sum(count for operation, count in operations.items() if operation.startswith(("STL", "LDL"))),
        shared=shared,
        blocks_per_sm=blocks,
        load_bits=dict(widths["load"]),
        store_bits=dict(widths["store"]),
        tensor_core=used[0] if used else "fma",
        float_atomics=re.findall(r"\b(?:atom|red)\.[\w.]*\.(?:f16|f32|f64|bf16)\w*", compiled.asm["ptx"]),
        instructions=sum(operations.values()),
    )
