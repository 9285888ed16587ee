"""Where parameters stood when something was computed from them: what every cache of a layer asks before it is used."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ._context import parameter_epoch


def is_counted(tensors: Collection[Tensor | None]) -> bool:
    """Whether writes to these tensors show in their versions; those to inference tensors do not."""
    return not any(tensor is not None and tensor.is_inference() for tensor in tensors)


Seen = tuple[weakref.ref[Tensor], StorageWeakRef | None, int, int]


def _seen(tensor: Tensor) -> Seen:
    try:
        return weakref.ref(tensor), StorageWeakRef(tensor.untyped_storage()), tensor.data_ptr(), tensor._version
    except RuntimeError:  # a tensor made of others, as quantized ones are: its identity has to do
        return weakref.ref(tensor), None, 0, tensor._version


class ParameterState:
    """Tensors, their storages and versions, some plain values, and the number of writes that versions do not count.

    None of the tensors is kept alive: weights may be offloaded.
    """

    __slots__ = ("_epoch", "_plain", "_seen")

    def __init__(self, tensors: Collection[Tensor | None], *plain: Any) -> None:
        """Remember them as they are."""
        self._seen = [None if tensor is None else _seen(tensor) for tensor in tensors]
        self._plain, self._epoch = plain, parameter_epoch()

    def is_current(self, tensors: Collection[Tensor | None], *plain: Any) -> bool:
        """Whether these are the same tensors and values, and nobody has written to them."""
        seen = self._seen
        if plain != self._plain or parameter_epoch() != self._epoch or len(tensors) != len(seen):
            return False
        for now, then in zip(tensors, seen, strict=True):
            if now is None or then is None:
                if now is not then:
                    return False
                continue
            tensor, storage, address, version = then
            if now is not tensor() or now._version != version:
                return False
            if storage is not None and (storage.expired() or now.data_ptr() != address):  # another's may have its address
                return False
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is of other tensors: it is never current, and holds none."""
        return ParameterState, ((),)
