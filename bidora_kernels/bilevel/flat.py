"""Parameters in one contiguous buffer per dtype and device, so that perturbing and restoring them is one kernel each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._context import DirectionPoint, bump_parameter_epoch
from .sharding import local_part, shard_group, sharded_like, sum_over

ALIGNMENT = 64  # bytes between the starts of two parameters, so that every view is as aligned as a tensor of its own

Vector = list[Tensor]  # one flat tensor per buffer of a FlatParameters, in its order


class FlatParameters:
    """A list of parameters whose values lie in flat buffers, grouped by dtype and device; the parameters are views.

    The parameters stay what they were to everybody else: optimizers, `state_dict` and the model's code see the same objects.
    Padding between parameters is zero and stays zero. Sharded parameters (FSDP2) keep their storage: here the buffers hold a copy
    of this process's shards, `set` writes through them, and lengths and inner products are sums over all shards.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move the parameters' values into flat buffers. Raises ValueError for none, or for one that occurs twice."""
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError("a level needs at least one parameter, got none")
        if len({id(parameter) for parameter in self.parameters}) < len(self.parameters):
            raise ValueError("a parameter occurs twice in one level")
        self.group = shard_group(self.parameters)  # of the processes that hold the other shards, None without sharding
        for parameter in self.parameters:
            if not parameter.is_floating_point() or parameter.layout != torch.strided:
                raise TypeError(
                    "parameters must be dense and floating-point, got "
                    f"{type(parameter.data).__name__} of dtype {str(parameter.dtype).removeprefix('torch.')}"
                )
        self._numbers = {id(parameter): number for number, parameter in enumerate(self.parameters)}
        self._shapes = [parameter.shape for parameter in self.parameters]
        self.buffers: list[Tensor] = []
        self._alias()

    def _alias(self) -> None:
        """Lay out buffers for the parameters as they are now, copy the values, and make unsharded parameters views."""
        values = self._values()
        self._part_shapes = [value.shape for value in values]
        pieces: dict[tuple[torch.dtype, torch.device], list[int]] = {}  # the lengths of values and of the padding between
        self._places: list[tuple[int, int]] = []  # buffer, piece of it
        for value in values:
            key = (value.dtype, value.device)
            lengths = pieces.setdefault(key, [])
            self._places.append((list(pieces).index(key), len(lengths)))
            quantum = ALIGNMENT // value.element_size()
            lengths += [value.numel(), -value.numel() % quantum]
        self._pieces = list(pieces.values())
        self.buffers = [torch.zeros(sum(lengths), dtype=dtype, device=device) for (dtype, device), lengths in pieces.items()]
        views = self.views(self.buffers)
        copy_all(views, values)
        if self.group is None:
            for parameter, view in zip(self.parameters, views, strict=True):
                parameter.data = view
        self._addresses = [view.data_ptr() for view in views]
        bump_parameter_epoch()

    def _values(self) -> list[Tensor]:
        """The values of the parameters, or of this process's shards of them, in their own memory."""
        return [local_part(parameter.detach()) for parameter in self.parameters]

    def refresh(self) -> bool:
        """Alias again, values kept, where a parameter's storage was replaced since; returns whether that was so.

        Raises ValueError where a shape changed.
        """
        moved = False
        for parameter, shape, address, (buffer, _) in zip(
            self.parameters, self._shapes, self._addresses, self._places, strict=True
        ):
            if parameter.shape != shape:
                raise ValueError(
                    f"a parameter must be {list(shape)}, as when the BilevelOptimizer was made, got {list(parameter.shape)}"
                )
            moved |= self.group is None and (
                parameter.data_ptr() != address
                or parameter.dtype != self.buffers[buffer].dtype
                or parameter.device != self.buffers[buffer].device
                or not parameter.is_contiguous()
            )
        if moved:
            self._alias()
        return moved

    def views(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """The parts of a vector, one per parameter, in its shape (in its shard's shape)."""
        pieces = [part.split_with_sizes(lengths) for part, lengths in zip(vector, self._pieces, strict=True)]
        return [pieces[buffer][piece].view(shape) for (buffer, piece), shape in zip(self._places, self._part_shapes, strict=True)]

    def tensors(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """The parts of a vector as tensors that are sharded where their parameters are."""
        return [sharded_like(parameter, view) for parameter, view in zip(self.parameters, self.views(vector), strict=True)]

    def point(self, start: Vector | None = None, vector: Vector | None = None, scale: float = 0.0) -> DirectionPoint | None:
        """A name for where the parameters are, or for `start + scale * vector`; None where they are sharded.

        A sharded layer computes with parameters gathered for the pass, which cannot be told by identity.
        """
        if self.group is not None:
            return None
        if start is None or vector is None:
            return DirectionPoint(lambda tensor: tensor if id(tensor) in self._numbers else None)
        starts, slopes = self.views(start), self.views(vector)

        def value_of(tensor: Tensor) -> Tensor | None:
            number = self._numbers.get(id(tensor))
            return None if number is None else torch.add(starts[number], slopes[number], alpha=scale)

        return DirectionPoint(value_of)

    def zeros(self) -> Vector:
        """A vector of zeros."""
        return [torch.zeros_like(buffer) for buffer in self.buffers]

    def gather(self, tensors: Sequence[Tensor | None]) -> Vector:
        """A new vector with one tensor per parameter, None being zero."""
        vector = self.zeros()
        pairs = [(view, tensor) for view, tensor in zip(self.views(vector), tensors, strict=True) if tensor is not None]
        copy_all([view for view, _ in pairs], [local_part(tensor) for _, tensor in pairs])
        return vector

    def clone(self) -> Vector:
        """A copy of the values."""
        if self.group is not None:
            return self.gather(self._values())
        return [buffer.clone() for buffer in self.buffers]

    def dot(self, left: Vector, right: Vector) -> Tensor:
        """The inner product of two vectors, a scalar in fp64 on the first buffer's device."""
        device = self.buffers[0].device
        parts = [(a.double() * b.double()).sum().to(device) for a, b in zip(left, right, strict=True)]
        return sum_over(self.group, torch.stack(parts).sum())

    def norm(self, vector: Vector) -> Tensor:
        """The length of a vector, a scalar in fp64 on the first buffer's device."""
        device = self.buffers[0].device
        parts = [torch.linalg.vector_norm(part, dtype=torch.float64).square().to(device) for part in vector]
        return sum_over(self.group, torch.stack(parts).sum()).sqrt()

    @torch.no_grad()
    def set(self, point: Vector, vector: Vector | None = None, scale: float = 0.0) -> None:
        """Write `point`, or `point + scale * vector`, into the parameters."""
        for number, buffer in enumerate(self.buffers):
            if vector is None:
                buffer.copy_(point[number])
            else:
                torch.add(point[number], vector[number], alpha=scale, out=buffer)
        if self.group is not None:
            copy_all(self._values(), self.views(self.buffers))
        torch.clear_autocast_cache()
        bump_parameter_epoch()


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into its target, in few kernels, which take tensors of one kind."""
    alike: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        kind = (target.dtype, target.device, source.dtype, source.device)
        group = alike.setdefault(kind, ([], []))
        group[0].append(target)
        group[1].append(source)
    with torch.no_grad():
        for members in alike.values():
            torch._foreach_copy_(*members)


def is_finite(vector: Vector) -> bool:
    """Whether every value is finite."""
    return all(bool(torch.isfinite(part).all()) for part in vector)


def add(left: Vector, right: Vector, scale: float = 1.0) -> Vector:
    """left + scale * right, new."""
    return [torch.add(a, b, alpha=scale) for a, b in zip(left, right, strict=True)]


def scaled(vector: Vector, factor: float) -> Vector:
    """factor * vector, new."""
    return [part * factor for part in vector]
