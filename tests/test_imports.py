"""The layers point one way, importing the package needs torch alone, and one place reads the environment."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bidora_kernels

PACKAGE = Path(bidora_kernels.__file__).parent
LAYERS = [  # a part may import what stands below it
    ("cli",),
    ("recipes",),
    ("integrations",),
    ("model", "bilevel"),
    ("adapter_files",),
    ("adapter_folder", "targets"),
    ("fused_slices",),
    ("modules", "frozen"),
    ("config",),
    ("functional",),
    ("ops",),
    ("reference", "native", "kernels"),
]
RANK = {part: len(LAYERS) - level for level, parts in enumerate(LAYERS) for part in parts}
BILEVEL_MAY_IMPORT = {"bilevel", "functional", "ops._context"}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(source: Path) -> set[str]:
    """Dotted names inside the package that a file imports, lazily or not (`ops._context`, `reference`, ...)."""
    package = ["bidora_kernels", *source.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{stem}.{alias.name}" for alias in node.names)
    names = set()
    for name in found:
        if name.startswith("bidora_kernels."):
            parts = name.split(".")[1:]
            while parts and not ((PACKAGE / Path(*parts)).is_dir() or (PACKAGE / Path(*parts)).with_suffix(".py").is_file()):
                parts.pop()  # a name inside a module
            if parts:
                names.add(".".join(parts))
    return names


def part_of(source: Path) -> str:
    return source.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(PACKAGE)))
def test_no_import_points_up(source: Path) -> None:
    own = part_of(source)
    if own == "__init__":
        return
    assert own in RANK, f"{own} has no place in the layers"
    for name in imported_modules(source):
        part = name.split(".")[0]
        assert part == own or RANK[part] < RANK[own], f"{source.name} imports {name}"
        if own == "bilevel":
            allowed = part == "bilevel" or name in BILEVEL_MAY_IMPORT
            assert allowed, f"bilevel knows models only as two groups of parameters, but {source.name} imports {name}"


def test_the_walk_sees_imports() -> None:
    assert "ops._context" in imported_modules(PACKAGE / "modules.py")
    assert "functional" in imported_modules(PACKAGE / "modules.py")


def test_importing_needs_torch_alone() -> None:
    code = (
        "import sys, bidora_kernels as bk, torch\n"
        "layer = bk.FusedDoraLinear.from_linear(torch.nn.Linear(4, 4), r=2)\n"
        "layer(torch.ones(1, 4)).sum().backward()\n"
        "optional = {'triton', 'transformers', 'peft', 'datasets', 'accelerate', 'sklearn', 'matplotlib', 'rich'}\n"
        "blocked = sorted(optional & set(sys.modules))\n"
        "print(','.join(blocked))\n"
    )
    baseline = subprocess.run(
        [sys.executable, "-c", "import sys, torch; print(','.join(sys.modules))"], capture_output=True, text=True
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded_by_torch = set(baseline.stdout.strip().split(","))
    assert set(filter(None, result.stdout.strip().split(","))) <= loaded_by_torch


def test_one_place_reads_the_environment() -> None:
    readers = {
        str(source.relative_to(PACKAGE))
        for source in SOURCES
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert readers == {"ops/_backend.py"}


def test_every_public_name_exists() -> None:
    for name in bidora_kernels.__all__:
        assert getattr(bidora_kernels, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        bidora_kernels.no_such_name  # noqa: B018
