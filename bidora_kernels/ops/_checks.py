"""One message format for what an argument must be: `lora_A must be [r, 4096], got [8, 4095]`."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_float(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor is fp64, fp32, bf16 or fp16."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be fp64, fp32, bf16 or fp16, got {str(tensor.dtype).removeprefix('torch.')}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Raise ValueError unless every integer of `expected` equals the tensor's size there; a string names a free size."""
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(isinstance(e, str) or e == s for e, s in zip(expected, shape, strict=True))
    if not fits:
        wanted = ", ".join(str(e) for e in expected)
        raise ValueError(f"{name} must be [{wanted}], got {list(shape)}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless the tensor lies on `device`, the weight's."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like weight, got {tensor.device}")


def check_direction(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Check the three tensors of V = weight + scaling * lora_B @ lora_A."""
    check_shape("weight", weight, ("out", "in"))
    out_features, in_features = weight.shape
    check_shape("lora_A", lora_A, ("r", in_features))
    check_shape("lora_B", lora_B, (out_features, lora_A.shape[0]))
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        check_float(name, tensor)
        check_device(name, tensor, weight.device)


def check_row_vector(name: str, tensor: Tensor, weight: Tensor) -> None:
    """Check a tensor with one value per output feature: magnitude, bias, norm."""
    check_shape(name, tensor, (weight.shape[0],))
    check_float(name, tensor)
    check_device(name, tensor, weight.device)


def check_input(name: str, x: Tensor, weight: Tensor) -> None:
    """Check an input [..., in] of a layer with this weight."""
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name} must be [..., {weight.shape[1]}], got {list(x.shape)}")
    check_float(name, x)
    check_device(name, x, weight.device)


def is_usual_call(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, bias: Tensor | None) -> bool:
    """Whether a layer's tensors pass every check above, found in one look; where they do not, the checks say why."""
    if weight.dim() != 2 or lora_A.dim() != 2:
        return False
    (out_features, in_features), device, r = weight.shape, weight.device, lora_A.shape[0]
    tensors = (x, weight, lora_A, lora_B, magnitude) if bias is None else (x, weight, lora_A, lora_B, magnitude, bias)
    return (
        lora_A.shape[1] == in_features
        and lora_B.shape == (out_features, r)
        and magnitude.shape == (out_features,)
        and (bias is None or bias.shape == (out_features,))
        and x.dim() > 0
        and x.shape[-1] == in_features
        and all(tensor.dtype in FLOATS and tensor.device == device for tensor in tensors)
    )
