"""Where parameters stood when something was computed from them: what every cache of a layer asks before it is used."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from ._context import parameter_epoch


def is_counted(tensors: Collection[Tensor | None]) -> bool:
    """Whether writes to these tensors show in their versions; those to inference tensors do not."""
    return not any(tensor is not None and tensor.is_inference() for tensor in tensors)


def _address(tensor: Tensor) -> int | None:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor made of others, as quantized ones are: its identity has to do
        return None


class ParameterState:
    """Tensors, their storages and versions, some plain values, and the number of writes that versions do not count."""

    __slots__ = ("_epoch", "_plain", "_seen")

    def __init__(self, tensors: Collection[Tensor | None], *plain: Any) -> None:
        """Remember them as they are. The alias of each tensor keeps its storage, whose address else becomes another's."""
        self._seen = [(None,) * 4 if t is None else (t, t.detach(), _address(t), t._version) for t in tensors]
        self._plain, self._epoch = plain, parameter_epoch()

    def is_current(self, tensors: Collection[Tensor | None], *plain: Any) -> bool:
        """Whether these are the same tensors and values, and nobody has written to them."""
        seen = self._seen
        if plain != self._plain or parameter_epoch() != self._epoch or len(tensors) != len(seen):
            return False
        for now, (then, _, address, version) in zip(tensors, seen, strict=True):
            if now is not then:
                return False
            if now is not None and (now._version != version or (address is not None and now.data_ptr() != address)):
                return False
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is of other tensors: it is never current, and holds none."""
        return ParameterState, ((),)
