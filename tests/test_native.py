"""The compiled library: that it is there where it can be, what it needs of torch and of the machine, and what it refuses."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import bidora_kernels
from bidora_kernels import native

LIBRARY = Path(bidora_kernels.__file__).parent / "_native.so"
HERE = native.why_unavailable() is None
ARM64_COMPILER = "aarch64-linux-gnu-g++"
# the torch symbols of the 2.10 stable ABI that the library imports, beside the constants of its enumerations, of which a compiler
# leaves more or fewer
CONSTANTS = re.compile(r"aoti_torch_(dtype|layout|device_type|memory_format)_\w+")
ABI_2_10 = {
    "aoti_torch_abi_version", "aoti_torch_delete_library_object", "aoti_torch_delete_tensor_object",
    "aoti_torch_get_device_type", "aoti_torch_get_dim", "aoti_torch_get_dtype",
    "aoti_torch_get_numel", "aoti_torch_get_size", "aoti_torch_get_stride", "aoti_torch_is_contiguous", "aoti_torch_library_def",
    "aoti_torch_library_init_def", "aoti_torch_library_init_impl",
    "aoti_torch_new_tensor_handle", "torch_call_dispatcher", "torch_delete_list", "torch_get_const_data_ptr",
    "torch_get_mutable_data_ptr", "torch_get_num_threads", "torch_library_impl", "torch_list_push_back",
    "torch_new_list_reserve_size", "torch_new_string_handle", "torch_parallel_for",
}  # fmt: skip


def test_it_was_built_where_a_compiler_is() -> None:
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    assert native.why_unavailable() is None


def test_a_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_LIBRARY", tmp_path / "_native.so")
    reason = native.why_unavailable.__wrapped__()
    assert reason is not None
    assert "--no-build-isolation" in reason
    (tmp_path / "_native.so").write_bytes(b"not a library")
    assert "does not load" in str(native.why_unavailable.__wrapped__())


def test_a_source_distribution_holds_what_a_build_needs(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "egg_info",
        "--egg-base",
        str(tmp_path),
        "sdist",
        "--dist-dir",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/csrc/" in name}
    sources = {str(path.relative_to(root)) for path in (root / "csrc").rglob("*") if path.suffix in {".cpp", ".h"}}
    assert sources
    assert sources <= held


def test_importing_the_package_loads_nothing() -> None:
    code = "import bidora_kernels, torch; assert not any('_native' in path for path in torch.ops.loaded_libraries)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not HERE or shutil.which("nm") is None, reason="no library or no nm")
def test_it_imports_no_newer_symbol_than_torch_2_10() -> None:
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    symbols = {line.split()[-1].split("@")[0] for line in listing.splitlines()}
    of_torch = {name for name in symbols if re.match(r"(aoti_)?torch_|_ZN(K)?(2at|3c10|5torch)", name)}
    assert of_torch, "the check would pass on an empty list"
    assert {name for name in of_torch if not CONSTANTS.fullmatch(name)} <= ABI_2_10
    header = Path(torch.__file__).parent / "include/torch/csrc/stable/c/shim.h"
    newer = header.read_text().split("TORCH_VERSION_2_11_0", 1)[1:]
    assert not of_torch & set(re.findall(r"\b(?:aoti_)?torch_\w+", "".join(newer)))
    assert not any(name.startswith(("Py", "_Py")) for name in symbols)


@pytest.mark.skipif(not HERE or shutil.which("objdump") is None, reason="no library or no objdump")
def test_wide_instructions_stay_in_their_own_functions() -> None:
    """What runs on every machine (registration, dispatch, the baseline kernels) has no AVX register in it."""
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", "-C", str(LIBRARY)], capture_output=True, text=True).stdout
    if "elf64-x86-64" not in listing:
        pytest.skip("not x86")
    name, wide, outside = "", 0, set()
    for line in listing.splitlines():
        if match := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = match.group(1)
        elif re.search(r"%[yz]mm", line):
            wide += 1
            if "avx2" not in name and "avx512" not in name:
                outside.add(name)
    assert wide > 1000, "the check would pass on a library without wide kernels"
    assert outside == set()


@pytest.mark.skipif(not HERE, reason="no library")
def test_the_widest_set_that_the_machine_has_is_taken() -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        assert native.instruction_set() == "baseline"
        return
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("the system does not list what the processor has")
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    has = set(flags.group(1).split()) if flags else set()
    levels = {"avx2": {"avx2", "fma"}, "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"}}
    assert native.instruction_set() == ["baseline", *(name for name, needs in levels.items() if needs <= has)][-1]


@pytest.mark.skipif(shutil.which(ARM64_COMPILER) is None, reason=f"there is no {ARM64_COMPILER}")
def test_the_baseline_kernels_become_neon(tmp_path: Path) -> None:
    """The sums of both dtypes, compiled for arm64 without a warning, are fused multiply-adds of whole NEON vectors."""
    source = Path(__file__).resolve().parents[1] / "csrc/cpu/table.cpp"
    out = tmp_path / "table.s"
    flags = ["-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
    flags += ["-DBIDORA_ISA=baseline", "-DBIDORA_VECTOR_BYTES=16"]
    subprocess.run([ARM64_COMPILER, *flags, "-S", str(source), "-o", str(out)], check=True)
    text = out.read_text()
    for width in ("4s", "2d"):
        assert len(re.findall(rf"\bfmla\s+v\d+\.{width}", text)) > 100


@pytest.mark.skipif(not HERE, reason="no library")
class TestRefusals:
    """The operators check before they touch memory, whoever calls them."""

    def operands(self) -> dict[str, torch.Tensor]:
        return {
            "weight": torch.randn(6, 8), "lora_A": torch.randn(2, 8), "lora_B": torch.randn(6, 2), "norm": torch.empty(6),
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("weight", torch.ones(6, 8, dtype=torch.long), "weight must be fp64, fp32, bf16 or fp16"),
            ("weight", torch.randn(6, 8, 2), "weight and lora_A must be matrices"),
            ("weight", torch.randn(6, 16)[:, ::2], "weight must have contiguous rows"),
            ("weight", torch.randn(8).expand(6, 8), "weight must have rows that do not overlap"),
            ("lora_A", torch.randn(2, 7), "lora_A must have 16 elements, got 14"),
            ("lora_A", torch.randn(2, 8).double(), "lora_A must be fp32"),
            ("lora_B", torch.randn(2, 6).t(), "lora_B must be contiguous"),
            ("norm", torch.empty(5), "norm must have 6 elements, got 5"),
            ("norm", torch.empty(6, dtype=torch.bfloat16), "norm must be fp32"),
        ],
    )
    def test_weight_norm(self, name: str, value: torch.Tensor, message: str) -> None:
        o = self.operands() | {name: value}
        with pytest.raises(RuntimeError, match=message):
            torch.ops.bidora_native.weight_norm(o["weight"], o["lora_A"], o["lora_B"], 1.0, o["norm"])

    def test_merged_weight(self) -> None:
        o = self.operands()
        arguments = (o["weight"], o["lora_A"], o["lora_B"], torch.ones(6), 1.0, o["norm"])
        for out, known, minus, dither, message in (
            (torch.empty(6, 7), False, False, False, r"out must be \[6, 8\]"),
            (torch.empty(8, 6).t(), False, False, False, "out must have contiguous rows"),
            (torch.empty(6, 8), False, True, False, "minus_weight needs the norm"),
            (torch.empty(6, 8), False, False, True, "dither needs an output in bf16"),
        ):
            with pytest.raises(RuntimeError, match=message):
                torch.ops.bidora_native.merged_weight(*arguments, known, minus, out, dither)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("x", torch.randn(3, 7), r"x must be \[3, 8\]"),
            ("x", torch.randn(3, 8).bfloat16(), "x must be fp32"),
            ("weight", torch.randn(8, 6).t(), "weight must have contiguous rows"),
            ("scale", torch.ones(5), "scale must have 6 elements, got 5"),
            ("out", torch.empty(2, 6), "out must have 18 elements, got 12"),
        ],
    )
    def test_few_tokens(self, name: str, value: torch.Tensor, message: str) -> None:
        o = self.operands() | {"x": torch.randn(3, 8), "scale": torch.ones(6), "out": torch.empty(3, 6)} | {name: value}
        with pytest.raises(RuntimeError, match=message):
            torch.ops.bidora_native.few_tokens(o["x"], o["weight"], o["lora_A"], o["lora_B"], o["scale"], None, 1.0, o["out"])

    @pytest.mark.parametrize("merged", [None, torch.empty(6, 8)], ids=["frozen", "merged"])
    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("rows", torch.randn(3, 7), r"must be \[\.\.\., "),
            ("rows", torch.randn(8), r"must be \[\.\.\., "),
            ("rows", "bf16", "must have the dtype that it is multiplied in"),
            ("lora_A", torch.randn(8, 2), r"lora_A and lora_B must be \[r, 8\] and \[6, r\]"),
            ("lora_B", torch.randn(2, 6), r"lora_A and lora_B must be \[r, 8\] and \[6, r\]"),
            ("norm", torch.ones(5), "norm must have 6 elements, got 5"),
            ("bias", torch.ones(5), "bias must have 6 elements|size of tensor|API call failed"),
        ],
    )
    def test_a_layer(self, name: str, value: Any, message: str, merged: torch.Tensor | None) -> None:
        o = self.operands() | {"rows": torch.randn(3, 8), "norm": torch.ones(6), "bias": None}
        o |= {name: o["rows"].bfloat16() if isinstance(value, str) else value}
        factors = o["lora_A"], o["lora_B"], torch.ones(6)
        with pytest.raises((RuntimeError, IndexError), match=message):
            native.dora_linear(o["rows"], o["weight"], *factors, o["bias"], 1.0, merged, o["norm"])
        if name == "bias":
            return  # which the backward reads for the magnitude's gradient alone
        if isinstance(value, str):
            o["rows"] = torch.randn(3, 6).bfloat16()
        elif name != "rows":
            o["rows"] = torch.randn(3, 6)
        x = torch.randn(3, 8)
        with pytest.raises((RuntimeError, IndexError), match=message):
            native.dora_linear_backward(
                o["rows"], x, None, o["weight"], *factors, o["norm"], None, 1.0, merged, needs_direction=False, needs_x=True
            )

    def test_a_layer_by_a_frozen_weight_of_16_bits(self) -> None:
        o, m = {name: value.bfloat16() for name, value in self.operands().items()}, torch.ones(6)
        with pytest.raises(RuntimeError, match="without merged the weight must be fp32 or fp64"):
            native.dora_linear(torch.randn(3, 8), o["weight"], o["lora_A"], o["lora_B"], m, None, 1.0, None)
