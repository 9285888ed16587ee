"""Builds the native CPU library (csrc/) beside the Python package where torch and a C++ compiler are there.

The library talks to torch through LibTorch's stable ABI, so it is no Python extension module: one file serves every Python and
every torch from 2.10 on. Without torch or without a compiler the package installs without it; a build that fails is an error.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TARGET_TORCH = "0x020a000000000000"  # 2.10
X86_LEVELS = {  # name -> vector bytes, compiler flags
    "avx2": (32, ["-mavx2", "-mfma", "-mf16c"]),
    "avx512": (64, ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"]),
}


def why_not_built() -> str | None:
    """What is missing for a build, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not installed where the build runs (pip install --no-build-isolation)"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    if os.name != "posix":
        return f"there is no build for {platform.system()} yet"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++").split()[0], "g++", "clang++")):
        return "there is no C++ compiler"
    return None


class BuildNative(build_ext):
    """Compiles the kernels once per instruction set and links one library without Python symbols."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link `bidora_kernels/_native.so`."""
        import torch

        library = Path(torch.__file__).parent / "lib"
        headers = ["-isystem", str(Path(torch.__file__).parent / "include")]
        compiler = next(
            name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and shutil.which(name.split()[0])
        ).split()
        self.compiler.set_executables(compiler_so=compiler, compiler_cxx=compiler, linker_so=[*compiler, "-shared"])
        if hasattr(self.compiler, "compiler_so_cxx"):
            self.compiler.set_executables(compiler_so_cxx=compiler, linker_so_cxx=[*compiler, "-shared"])
        extra = os.environ.get("BIDORA_CXXFLAGS", "").split()  # a sanitizer build adds its flags here
        common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
        common += ["-Wall", "-Wextra", "-Wno-psabi", f"-DTORCH_TARGET_VERSION={TARGET_TORCH}", *extra]
        x86 = platform.machine().lower() in {"x86_64", "amd64"}
        levels = {"baseline": (16, [])} | (X86_LEVELS if x86 else {})
        objects = []

        def compile_(source: str, name: str, flags: list[str]) -> None:
            directory = str(Path(self.build_temp) / name)
            arguments = [*common, *flags]
            objects.extend(self.compiler.compile([source], output_dir=directory, extra_postargs=arguments))

        for name, (width, flags) in levels.items():
            defines = [f"-DBIDORA_ISA={name}", f"-DBIDORA_VECTOR_BYTES={width}"]
            compile_("csrc/cpu/table.cpp", name, [*defines, *flags])
        compile_("csrc/cpu/dispatch.cpp", "any", ["-DBIDORA_HAS_X86_LEVELS"] if x86 else [])
        for source in ext.sources:
            compile_(source, "any", headers)
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), libraries=["torch_cpu"], library_dirs=[str(library)], extra_postargs=extra
        )

    def get_ext_filename(self, fullname: str) -> str:
        """The same name for every Python: the library has no Python symbol."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))


def options() -> dict[str, object]:
    """The arguments of `setup` that depend on the machine."""
    reason = why_not_built()
    if reason is not None:
        print(f"bidora-kernels installs without its native CPU library: {reason}")
        return {}
    depends = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".h", ".md"})
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    extension = Extension("bidora_kernels._native", sources=sources, depends=depends)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildNative}}


setup(**options())
