"""DoRA for a whole model: apply it, group its parameters, merge it away, save and load it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from . import functional
from .adapter_files import load_adapter, save_adapter
from .config import DoraConfig
from .frozen import use_plain_layers
from .fused_slices import FusedDoraSlices, plain_layer
from .modules import FusedDoraLinear
from .targets import CONFIG_ATTRIBUTE, dora_layers, plan, put, replace, unwrap

__all__ = ["DoraReport", "apply_dora", "load_adapter", "merge_and_unload", "save_adapter", "split_parameters"]


@dataclasses.dataclass
class DoraReport:
    """What was done to a model: the replaced layers, and each skipped one with its reason; `print` shows a table."""

    replaced: list[str]
    skipped: dict[str, str]
    saved: list[str] = dataclasses.field(default_factory=list)
    directions: int = 0
    magnitudes: int = 0
    other: int = 0
    layers: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """One line per linear layer, then what trains."""
        rows = [("layer", "what", "details")]
        rows += [(name, "DoRA", self.layers.get(name, "")) for name in self.replaced]
        rows += [(name, "trained whole", "modules_to_save") for name in self.saved]
        rows += [(name, "skipped", reason) for name, reason in self.skipped.items() if name not in self.saved]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{name:<{widths[0]}}  {what:<{widths[1]}}  {details}".rstrip() for name, what, details in rows]
        lines.insert(1, "  ".join("-" * width for width in (*widths, max(len(row[2]) for row in rows))))
        total = self.directions + self.magnitudes + self.other
        counts = f"directions {self.directions:,}, magnitudes {self.magnitudes:,}, other {self.other:,}"
        lines.append(f"{len(self.replaced)} DoRA layers; {total:,} trainable parameters: {counts}")
        return "\n".join(lines)


def apply_dora(model: nn.Module, config: DoraConfig) -> DoraReport:
    """Turn the layers that `config` names into DoRA layers, in place, and return a report of every linear layer.

    Everything else is frozen, its plain `nn.Linear` and `Conv1D` layers as `FrozenLinear` and its twin, except the modules of
    `config.modules_to_save`, which are replaced by trained copies (so that a tied weight stays frozen at its other places). The
    configuration is kept on the model as `dora_config`.

    Raises ValueError where nothing matches `target_modules` (with the nearest names), where a matched module cannot be adapted,
    and where the model has adapters already. The model is unchanged whenever something raises.
    """
    model = unwrap(model)
    planned = plan(model, config)
    replace(model, planned)
    return report(model, planned.heads, planned.skipped)


def report(model: nn.Module, heads: Iterable[str], skipped: dict[str, str]) -> DoraReport:
    """Describe a model whose DoRA layers are in place."""
    layers = dora_layers(model)
    direction, magnitude = split_parameters(model)
    adapters = {id(p) for layer in layers.values() for p in (layer.lora_A, layer.lora_B)}
    sizes = [(id(p) in adapters, p.numel()) for p in direction]
    return DoraReport(
        replaced=list(layers),
        skipped=dict(skipped),
        saved=list(heads),
        directions=sum(size for adapted, size in sizes if adapted),
        magnitudes=sum(p.numel() for p in magnitude),
        other=sum(size for adapted, size in sizes if not adapted),
        layers={
            name: f"{type(layer).__name__} [{layer.out_features}, {layer.in_features}] r={layer.r} scaling={layer.scaling:g}"
            + ("" if (reason := functional.left_to_reference(layer.weight)) is None else f" in plain PyTorch: {reason}")
            for name, layer in layers.items()
        },
    )


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (direction, magnitude): every trainable parameter once, in the order of `named_modules`.

    `magnitude` holds the magnitudes of this library's layers and of PEFT's DoRA layers; `direction` holds everything else that
    trains, a task head included. A frozen parameter is in neither. Raises ValueError where the model has no magnitude at all.
    """
    direction: list[nn.Parameter] = []
    magnitude: list[nn.Parameter] = []
    seen: set[int] = set()
    found = False
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            own = isinstance(module, FusedDoraLinear) and name == "magnitude"
            is_magnitude = own or "lora_magnitude_vector" in f"{module_name}.{name}".split(".")
            found |= is_magnitude
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                (magnitude if is_magnitude else direction).append(parameter)
    if not found:
        raise ValueError("the model has no magnitudes: apply_dora(model, config) comes first")
    return direction, magnitude


def merge_and_unload(model: nn.Module, safe_merge: bool = False) -> nn.Module:
    """Return the model with plain layers that hold the merged weights; nothing of this library remains in it.

    The change is in place; use the returned model, which is another one only where `model` itself was a DoRA layer. Trained
    copies of `modules_to_save` stay; where one of them, or a merged layer, was tied to the input embeddings, the model's config
    gets `tie_word_embeddings=False`, so that it can be saved and loaded.

    Raises ValueError, and changes nothing, where there is no DoRA layer and, with `safe_merge`, where a merged weight is not
    finite.
    """
    inner = unwrap(model)
    layers = dora_layers(inner)
    if not layers:
        raise ValueError("the model has no DoRA layers to merge")
    for name, layer in layers.items() if safe_merge else ():
        if not bool(layer.merged_weight().isfinite().all()):
            raise ValueError(f"the merged weight of {name or 'the layer'} is not finite; nothing was merged")
    fused = {name: module for name, module in inner.named_modules() if isinstance(module, FusedDoraSlices)}
    for name, module in {**layers, **fused}.items():
        if name.rpartition(".")[0] in fused:
            continue
        plain = plain_layer(module)
        if not name:
            return plain
        put(inner, name, plain)
    use_plain_layers(inner)
    if hasattr(inner, CONFIG_ATTRIBUTE):
        delattr(inner, CONFIG_ATTRIBUTE)
    _untie(inner)
    return model


def _untie(model: Any) -> None:
    """Have a transformers model's config say so where training has left the output head with a weight of its own."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False) and hasattr(model, "get_output_embeddings"):
        ends = [getattr(end, "weight", None) for end in (model.get_input_embeddings(), model.get_output_embeddings())]
        if all(end is not None for end in ends) and ends[0] is not ends[1]:
            config.tie_word_embeddings = False
