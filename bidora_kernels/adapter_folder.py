"""The two files of an adapter folder: written whole or not at all, read with suspicion."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from torch import Tensor

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_HEADER_LIMIT = 100_000_000  # bytes; safetensors' own limit


def write_files(folder: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files under other names, then move them into place.

    Where the configuration changes, the old one goes first: whoever interrupts the moves leaves a folder that does not load,
    never new weights under old settings.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    weights, config = folder / f".{WEIGHTS_FILE}.{token}", folder / f".{CONFIG_FILE}.{token}"
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
        config.write_text(text, encoding="utf-8")
        for path in (weights, config):
            _flush(path)
        if not _holds(folder / CONFIG_FILE, text.encode()):
            (folder / CONFIG_FILE).unlink(missing_ok=True)
        os.replace(weights, folder / WEIGHTS_FILE)
        os.replace(config, folder / CONFIG_FILE)
    finally:
        for path in (weights, config):
            path.unlink(missing_ok=True)


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except FileNotFoundError:
        return False


def _flush(path: Path) -> None:
    """Have the file's bytes on the disk before its name is."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def read_config(folder: Path) -> Any:
    """The contents of adapter_config.json. Raises FileNotFoundError, or ValueError for what is not JSON with unique names."""
    content = _inside(folder, CONFIG_FILE).read_bytes()
    try:
        return json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG_FILE}: {_one_line(error)}") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of adapter_model.safetensors, on the CPU. Raises FileNotFoundError, or ValueError for a damaged file."""
    from safetensors.torch import load_file

    path = _inside(folder, WEIGHTS_FILE)
    try:
        _check_header(path)
        return load_file(path)
    except OSError:
        raise
    except Exception as error:  # safetensors raises its own class, and KeyError, TypeError and others from torch
        raise ValueError(f"{WEIGHTS_FILE}: {_one_line(error)}") from None


def _inside(folder: Path, name: str) -> Path:
    """The real path of a file of the folder, which links may not lead out of, except into the blobs of a hub cache snapshot."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no adapter folder {str(folder)!r}")
    root = Path(os.path.realpath(folder))
    path = Path(os.path.realpath(root / name))
    blobs = next((up.parent / "blobs" for up in root.parents if up.name == "snapshots"), None)
    if not path.is_relative_to(root) and (blobs is None or path.parent != blobs):
        raise ValueError(f"{name} in {str(folder)!r} is a link that leads out of the folder")
    if not path.is_file():
        raise FileNotFoundError(f"there is no {name} in {str(folder)!r}")
    return path


def _check_header(path: Path) -> None:
    """Raise ValueError where the header names a tensor twice, which safetensors accepts in silence."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_HEADER_LIMIT, path.stat().st_size - 8):
            raise ValueError(f"the header claims {length} bytes, more than the file has")
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:200]!r} is there twice")
    return fields


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
