"""A recording on the CPU that repeats PyTorch's operations between the same tensors, without the Python that asked for them.

As a CUDA graph does with kernels: a value that Python read while it was recorded, or memory that was replaced since, shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        result = func(*args, **given[1])
        storages = {tensor.untyped_storage().data_ptr() for tensor in _tensors(given)}
        in_place = func._schema.is_mutable
        is_view = all(tensor.untyped_storage().data_ptr() in storages for tensor in _tensors(result))
        if in_place or not is_view:
            self.operations.append((func, *tree_map(_plain, given), [tensor.detach() for tensor in _tensors(result)], in_place))
        return result


def record(run: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
    """Stands in for `bilevel.graphs.record`: what was drawn while recording is given back, as nothing was run."""
    drawn, log = torch.get_rng_state(), _Log()
    with log:
        run()
    torch.set_rng_state(drawn)

    def replay() -> None:
        with torch.no_grad():
            for func, args, kwargs, results, in_place in log.operations:
                new = func(*args, **kwargs)
                if not in_place:
                    for result, value in zip(results, _tensors(new), strict=True):
                        result.copy_(value)

    return replay
