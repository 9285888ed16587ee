"""A fused query-key-value projection of which only some slices are adapted (GPT-2's `c_attn`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .config import SLICES
from .frozen import use_plain_layers
from .modules import FusedDoraConv1D, FusedDoraLinear

# models whose fused projection holds all queries, then all keys, then all values; others interleave them by head
CONTIGUOUS_MODELS = ("gpt2", "openai-gpt", "decision_transformer", "imagegpt", "phi3")


def slice_sizes(model: nn.Module, name: str, out_features: int) -> dict[str, int]:
    """The rows of query, key and value in the projection called `name`, from the model's configuration.

    Raises ValueError for a model that is not known to keep the three slices whole and for sizes that do not add up.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type not in CONTIGUOUS_MODELS:
        known = ", ".join(CONTIGUOUS_MODELS)
        raise ValueError(f"fused_slices: {name} belongs to a {model_type} model; slices are known for {known}")
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    if out_features % (heads + 2 * key_value_heads):
        raise ValueError(f"fused_slices: {name} has {out_features} outputs, which {heads} heads do not divide into three slices")
    head_size = out_features // (heads + 2 * key_value_heads)
    return dict(zip(SLICES, (heads * head_size, key_value_heads * head_size, key_value_heads * head_size), strict=True))


class FusedDoraSlices(nn.Module):
    """A projection split into its query, key and value parts, some of them DoRA layers: y = [query(x), key(x), value(x)].

    Each part is a child module (`query`, `key`, `value`) with its own copy of the rows of the weight and bias; parts that are not
    adapted stay plain. Made by `apply_dora` for `DoraConfig.fused_slices`.
    """

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        """Hold the parts, in the order of their outputs."""
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] for x [..., in]."""
        return torch.cat([part(x) for part in self.children()], dim=-1)

    def to_plain(self) -> nn.Module:
        """Return the whole projection as one plain layer of the kind it was, with the merged weights."""
        plain = [plain_layer(part) for part in self.children()]
        along = 0 if isinstance(plain[0], nn.Linear) else 1
        weight = torch.cat([part.weight.detach() for part in plain], dim=along)
        bias = None if plain[0].bias is None else torch.cat([part.bias.detach() for part in plain])
        return _like(plain[0], weight, bias).train(self.training)


def plain_layer(module: nn.Module) -> Any:
    """The plain layer with the merged weight of a DoRA layer or of a set of slices; a plain layer itself."""
    if isinstance(module, FusedDoraSlices):
        return module.to_plain()
    if isinstance(module, FusedDoraConv1D):
        return module.to_conv1d()
    return module.to_linear() if isinstance(module, FusedDoraLinear) else module


def _like(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A plain, frozen layer of the same kind as `module` with this weight and bias."""
    if isinstance(module, nn.Linear):
        out_features, in_features = weight.shape
        layer: Any = nn.Linear(in_features, out_features, bias is not None, device="meta", dtype=weight.dtype)
    else:
        with torch.device("meta"):
            layer = type(module)(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    use_plain_layers(layer)
    return layer


def split(module: Any, sizes: dict[str, int]) -> dict[str, nn.Module]:
    """Cut a plain Linear or Conv1D into plain parts with copies of its rows; `module` is left alone."""
    along = 0 if isinstance(module, nn.Linear) else 1
    weights = module.weight.detach().split(list(sizes.values()), dim=along)
    biases = [None] * len(sizes) if module.bias is None else module.bias.detach().split(list(sizes.values()))
    parts = {}
    for name, weight, bias in zip(sizes, weights, biases, strict=True):
        part = _like(module, weight.clone(memory_format=torch.contiguous_format), None if bias is None else bias.clone())
        parts[name] = part.train(module.training)
    return parts
