"""A small trained model and what a refused adapter folder must leave alone, for the tests of adapter files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bidora_kernels as bk

from .tiny_models import bert, randomize

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BERT_TARGETS = ["query", "value", "intermediate.dense"]


def trained(make: Callable[[], nn.Module] = bert, **fields: Any) -> nn.Module:
    model = make()
    bk.apply_dora(model, bk.DoraConfig(**({"r": 4, "target_modules": BERT_TARGETS} | fields)))
    randomize(model)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def without(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: value for name, value in tensors.items() if name != key}


def refuses(model: nn.Module, folder: Path, message: str, error: type[Exception] = ValueError) -> None:
    """The folder is refused with one readable line, and the model is as before."""
    before, kinds = state(model), [type(module) for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message) as raised:
        bk.load_adapter(model, folder)
    assert "\n" not in str(raised.value)
    assert [type(module) for module in model.modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == flags
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
