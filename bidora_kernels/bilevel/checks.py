"""What a bilevel optimizer is given and cannot take: said by name, before anything is computed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from .estimators import Estimator
from .sama import Sama, check_lower_optimizer

if TYPE_CHECKING:
    from .optimizer import BilevelOptimizer


def check_settings(owner: BilevelOptimizer) -> None:
    """Raise TypeError or ValueError for settings that do not fit together."""
    if not isinstance(owner.estimator, Estimator):
        raise TypeError(f"estimator must be one of this library's estimators, got {type(owner.estimator).__name__}")
    if owner.unroll not in ("optimizer", "gradient"):
        raise ValueError(f'unroll must be "optimizer" or "gradient", got {owner.unroll!r}')
    if not owner.estimator.takes_xi and (owner.xi is not None or owner.unroll != "optimizer"):
        raise ValueError(f"{type(owner.estimator).__name__} takes neither xi nor unroll")
    if not (owner.xi is None or owner.xi == "lr" or _is_in_range(owner.xi, 0.0, sys.float_info.max)):
        raise ValueError(f'xi must be None, "lr" or a number of 0 or more, got {owner.xi!r}')
    if not isinstance(owner.upper_every, int) or isinstance(owner.upper_every, bool) or owner.upper_every < 1:
        raise ValueError(f"upper_every must be a positive integer, got {owner.upper_every!r}")
    for name in ("lower_max_norm", "upper_max_norm"):
        value = getattr(owner, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be a positive number or None, got {value}")
    if not ((share := owner.difference_batch) is None or callable(share) or (share != 0 and _is_in_range(share, 0.0, 1.0))):
        raise ValueError(f"difference_batch must be a share over 0 and up to 1, a callable or None, got {share!r}")
    if owner.compute_dtype is not None and not owner.compute_dtype.is_floating_point:
        raise TypeError(f"compute_dtype must be a floating-point dtype, got {owner.compute_dtype}")
    if isinstance(owner.estimator, Sama):
        check_lower_optimizer(owner.lower)


def check_sharding(owner: BilevelOptimizer) -> None:
    """Raise TypeError or ValueError for what sharded parameters do not allow."""
    if isinstance(getattr(owner.model, "_orig_mod", owner.model), nn.DataParallel):
        raise TypeError("nn.DataParallel's threads do not know what a pass is for: take DistributedDataParallel")
    if (owner._direction.group is None) != (owner._magnitude.group is None):
        raise TypeError("the parameters of both levels must be sharded, or of neither")
    if owner._direction.group is None:
        return
    if owner.estimator.differentiates_twice:
        raise TypeError(
            f"{owner.estimator!r} differentiates twice, which sharded parameters do not allow: take Sama(), "
            "ForwardDifference() or CentralDifference()"
        )
    for name in ("penalty", "grad_scaler", "process_group"):
        if getattr(owner, name) is not None:
            raise ValueError(f"{name} is not supported with sharded parameters")


def check_graphs(owner: BilevelOptimizer) -> None:
    """Raise TypeError or ValueError for what passes recorded as CUDA graphs do not allow."""
    if not isinstance(owner.model, nn.Module):
        raise TypeError(f"cuda_graphs needs the model as an nn.Module, got {type(owner.model).__name__}")
    devices = {str(tensor.device) for tensor in (*owner._direction.buffers, *owner._magnitude.buffers, *owner.model.parameters())}
    if len(devices) != 1 or not devices.pop().startswith("cuda"):
        raise ValueError("cuda_graphs needs the model and the parameters of both levels on one CUDA device")
    if owner.grad_scaler is not None and owner.grad_scaler.is_enabled():
        raise ValueError("cuda_graphs and grad_scaler do not go together: take bfloat16, which needs none")
    if owner._distributed or owner._direction.group is not None:
        raise ValueError("cuda_graphs is for one process")


def check_levels(owner: BilevelOptimizer) -> None:
    """Raise ValueError for a DoRA layer whose magnitude is in the lower level, or whose directions are in the upper one.

    The lower level's passes compute no gradient of magnitudes, the difference passes none of directions.
    """
    lower, upper = ({id(parameter) for parameter in level.parameters} for level in (owner._direction, owner._magnitude))
    for name, layer in dora_layers(owner.model).items():
        if id(layer.magnitude) in lower:
            raise ValueError(f"{name}.magnitude is in the lower optimizer: magnitudes are trained at the upper level or frozen")
        if id(layer.lora_A) in upper or id(layer.lora_B) in upper:
            raise ValueError(
                f"a direction of {name} is in the upper optimizer: directions are trained at the lower level or frozen"
            )


def check_groups(owner: BilevelOptimizer) -> None:
    """Raise ValueError where an optimizer has other parameters than when the bilevel optimizer was made."""
    for name, optimizer, level in (("lower", owner.lower, owner._direction), ("upper", owner.upper, owner._magnitude)):
        now = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        if now != [id(parameter) for parameter in level.parameters]:
            raise ValueError(f"the {name} optimizer's parameters have changed: make a new BilevelOptimizer")


def dora_layers(model: Any) -> dict[str, Any]:
    """The modules with a magnitude and both low-rank factors, by name; known by these parts, for this package knows no layers."""
    if not isinstance(model, nn.Module):
        return {}
    parts = ("magnitude", "lora_A", "lora_B")
    return {
        name: module for name, module in model.named_modules()
        if all(isinstance(getattr(module, part, None), nn.Parameter) for part in parts)
    }  # fmt: skip


def _is_in_range(value: Any, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
