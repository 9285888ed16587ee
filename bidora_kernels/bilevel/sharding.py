"""Parameters that FSDP2 has sharded (DTensor): the part that this process holds, and sums over the processes with the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "placements")


def local_part(tensor: Tensor) -> Tensor:
    """The part that this process holds, the same memory; a tensor that is not sharded is returned as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined,no-any-return]


def sharded_like(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """`part` as this process's part of a tensor that is sharded as `parameter` is."""
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    layout: Any = parameter
    with torch.no_grad():
        return DTensor.from_local(
            part, layout.device_mesh, layout.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )


def whole_value(scalar: Tensor) -> float:
    """The value of a scalar, DTensor or not."""
    return float(scalar.full_tensor()) if is_sharded(scalar) else float(scalar)  # type: ignore[attr-defined]


def shard_group(parameters: Sequence[nn.Parameter]) -> Any:
    """The process group over which parameters are sharded, None where they are not.

    Raises TypeError for a level of which only a part is sharded, and for any layout but one mesh dimension of shards (FSDP2's).
    """
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        return None
    if len(sharded) < len(parameters):
        raise TypeError("either all parameters of a level are sharded or none: call fully_shard on the whole model")
    meshes = {parameter.device_mesh for parameter in sharded}  # type: ignore[attr-defined]
    for parameter in sharded:
        placements = parameter.placements  # type: ignore[attr-defined]
        if len(meshes) > 1 or len(placements) != 1 or not placements[0].is_shard():
            raise TypeError(f"parameters must be sharded over one mesh of one dimension, as FSDP2 does, got {placements}")
    return meshes.pop().get_group()


def sum_over(group: Any, value: Tensor) -> Tensor:
    """The sum of a value over a group's processes, in place; nothing to do without a group."""
    if group is not None:
        dist.all_reduce(value, group=group)
    return value


def reshard(model: Any) -> None:
    """Drop what a pass that failed halfway has gathered, so that the next one gathers the parameters as they are then."""
    for module in model.modules():
        if callable(drop := getattr(module, "reshard", None)):
            drop()
