"""Adapters on disk, in PEFT's files: `adapter_model.safetensors` and `adapter_config.json`.

Keys are `base_model.model.<module>.` + `lora_A.weight` [r, in], `lora_B.weight` [out, r], `lora_magnitude_vector` [out], and the
modules to save under their own names. A file is read completely and checked before the model is touched.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import re
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_folder import CONFIG_FILE, WEIGHTS_FILE, read_config, read_tensors, write_files
from .config import DoraConfig
from .fused_slices import FusedDoraSlices
from .modules import FusedDoraConv1D, FusedDoraLinear, scaling_of
from .ops._checks import FLOATS
from .targets import CONFIG_ATTRIBUTE, dora_layers, head_modules, layer_shapes, plan, replace, unwrap, why_not

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
OWN_TYPE = "BIDORA"  # peft_type in the format of our own, for what PEFT's files cannot say
FORMAT_VERSION = "0.21.2"  # the version of PEFT whose files these are


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], *, format: str = "peft") -> None:
    """Write the adapter of `model` (DoRA layers and modules to save) into `folder`, which is made if missing.

    format: "peft", or "bidora" for a model with fused slices, which PEFT's files cannot describe and PEFT does not read.
    Each tensor keeps its dtype. The files appear complete or not at all; an interrupted overwrite never leaves new weights beside
    an old configuration.

    Raises ValueError, writing nothing, for a model without DoRA layers, a NaN or inf, layers whose settings one PEFT file cannot
    hold, and fused slices with format="peft"; warns of trainable parameters that belong to no adapter.
    """
    model = unwrap(model)
    if format not in ("peft", "bidora"):
        raise ValueError(f"format must be 'peft' or 'bidora', got {format!r}")
    layers = dora_layers(model)
    if not layers:
        raise ValueError("the model has no DoRA layers to save")
    fused = [name for name, module in model.named_modules() if isinstance(module, FusedDoraSlices)]
    if fused and format == "peft":
        raise ValueError(f"{fused[0]} has adapters on slices, for which PEFT has no keys: save it with format='bidora'")
    config = _describe(model, layers)
    heads = head_modules(model, config)
    tensors = {}
    for key, value in {**_layer_tensors(layers), **_head_tensors(heads)}.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{key} holds NaN or inf: nothing was saved")
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
    _warn_of_unsaved(model, layers.values(), heads.values())
    fields = _config_fields(model, config, layers, OWN_TYPE if format == "bidora" else "LORA")
    write_files(Path(folder), fields, tensors)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load the adapter in `folder`, saved here or by PEFT, into `model`, in place.

    A model without DoRA layers gets the folder's configuration applied first (as `apply_dora` does); one with layers must have
    the same layers, r, scaling and modules to save. The loaded parameters are trainable; dropout comes from the file. Values are
    converted to the dtype of the parameters they go to.

    Raises FileNotFoundError for a missing file and ValueError, naming the field or key, for everything in the files that does not
    fit: missing or unexpected keys, base weights that are not the model's, wrong shapes, NaN or inf, an adapter without
    magnitudes, duplicate keys, links that lead out of the folder, settings that are not implemented. The model is unchanged
    whenever something raises.
    """
    model = unwrap(model)
    folder = Path(folder)
    config = _parse_config(read_config(folder))
    tensors = _canonical_keys(read_tensors(folder))
    layers = dora_layers(model)
    if layers:
        planned = None
        shapes = {name: (layer.out_features, layer.in_features, layer.r) for name, layer in layers.items()}
        heads = head_modules(model, config)
        config = _check_same_settings(model, layers, heads, config)
    else:
        planned = plan(model, config)
        shapes, heads = layer_shapes(planned), planned.heads
    expected: dict[str, tuple[int, ...]] = {
        PREFIX + name + suffix: shape
        for name, (out, inner, r) in shapes.items()
        for suffix, shape in ((".lora_A.weight", (r, inner)), (".lora_B.weight", (out, r)), (f".{MAGNITUDE}", (out,)))
    }
    destinations = _head_tensors(heads)
    expected |= {key: tuple(value.shape) for key, value in destinations.items()}
    tensors = _without_base_weights(model, tensors, expected)
    _check_keys(expected, tensors)
    for key, shape in expected.items():
        _check_tensor(key, tensors[key], shape, destinations.get(key))
    if planned is not None:
        replace(model, planned)
    _fill(model, config, tensors)


@torch.no_grad()
def _fill(model: nn.Module, config: DoraConfig, tensors: dict[str, Tensor]) -> None:
    """Write checked values into a model that has the right layers."""
    layers, heads = dora_layers(model), head_modules(model, config)
    for key, parameter in {**_layer_tensors(layers), **_head_tensors(heads)}.items():
        parameter.copy_(tensors[key])
        if parameter.is_floating_point() and isinstance(parameter, nn.Parameter):
            parameter.requires_grad_(True)
    for layer in layers.values():
        layer.lora_dropout = config.lora_dropout
        layer.clear_cache()
    setattr(model, CONFIG_ATTRIBUTE, config)


def _layer_tensors(layers: dict[str, FusedDoraLinear]) -> dict[str, Tensor]:
    return {
        PREFIX + name + suffix: parameter
        for name, layer in layers.items()
        for suffix, parameter in (
            (".lora_A.weight", layer.lora_A),
            (".lora_B.weight", layer.lora_B),
            (f".{MAGNITUDE}", layer.magnitude),
        )
    }


def _head_tensors(heads: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{name}.{key}": value for name, head in heads.items() for key, value in head.state_dict(keep_vars=True).items()
    }


def _warn_of_unsaved(model: nn.Module, layers: Iterable[nn.Module], heads: Iterable[nn.Module]) -> None:
    saved = {id(parameter) for module in (*layers, *heads) for parameter in module.parameters()}
    left = [name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in saved]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        warnings.warn(f"trainable, but in no adapter and so not saved: {', '.join(left[:3])}{more}", stacklevel=3)


def _describe(model: nn.Module, layers: dict[str, FusedDoraLinear]) -> DoraConfig:
    """The configuration that makes these layers out of the plain model: the one they were made with, corrected where needed."""
    if "" in layers:
        raise ValueError("the model is a DoRA layer itself, which has no name: an adapter's file needs a model that holds it")
    for name, layer in layers.items():
        usual = scaling_of(layer.lora_alpha, layer.r, layer.use_rslora)
        if not math.isclose(layer.scaling, usual, rel_tol=1e-6):
            raise ValueError(
                f"{name}.scaling is {layer.scaling:g} where its lora_alpha and r say {usual:g}; a file holds only those"
            )
    given: DoraConfig = getattr(model, CONFIG_ATTRIBUTE, None) or DoraConfig()
    common: dict[str, Any] = {}
    for field in ("lora_dropout", "use_rslora"):
        values = {getattr(layer, field) for layer in layers.values()}
        if len(values) > 1:
            raise ValueError(f"{field} differs among the layers ({sorted(values)}), and an adapter's configuration holds one")
        common[field] = values.pop()
    config = dataclasses.replace(given, **common)
    if any(config.rank_of(name) != layer.r or config.alpha_of(name) != layer.lora_alpha for name, layer in layers.items()):
        config = dataclasses.replace(config, **_patterns(layers))
    if config.fused_slices is None and _named_here(model, config) != set(layers):
        config = dataclasses.replace(config, layers_to_transform=None, layers_pattern=None, target_modules=sorted(layers))
        if _named_here(model, config) != set(layers):  # a full name may also be the end of another one
            names = "|".join(re.escape(name) for name in sorted(layers))
            config = dataclasses.replace(config, target_modules=f"(?:{names})", exclude_modules=None)
    return config


def _named_here(model: nn.Module, config: DoraConfig) -> set[str]:
    """The modules that PEFT would adapt for this configuration; for "all-linear" none, because it looks at classes too."""
    if not config.target_modules or config.target_modules == "all-linear":
        return set()
    heads = head_modules(model, config)
    return {name for name, _ in model.named_modules() if name and why_not(config, name, heads) is None}


def _patterns(layers: dict[str, FusedDoraLinear]) -> dict[str, Any]:
    """r and lora_alpha as the most common value plus exact patterns for the others."""
    fields: dict[str, Any] = {}
    for value_field, pattern_field, attribute in (("r", "rank_pattern", "r"), ("lora_alpha", "alpha_pattern", "lora_alpha")):
        values = {name: getattr(layer, attribute) for name, layer in layers.items()}
        fields[value_field] = collections.Counter(values.values()).most_common(1)[0][0]
        fields[pattern_field] = {f"^{re.escape(name)}": value for name, value in values.items() if value != fields[value_field]}
    return fields


def _config_fields(model: nn.Module, config: DoraConfig, layers: dict[str, FusedDoraLinear], peft_type: str) -> dict[str, Any]:
    """The contents of adapter_config.json."""
    fields = dataclasses.asdict(config)
    fields["modules_to_save"] = config.heads or None
    fields["base_model_name_or_path"] = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    del fields["detach_norm"]
    if peft_type == "LORA":
        del fields["fused_slices"]
    auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return fields | {
        "auto_mapping": auto_mapping if config.task_type is None else None,
        "fan_in_fan_out": all(isinstance(layer, FusedDoraConv1D) for layer in layers.values()),
        "inference_mode": True,
        "lora_bias": False,
        "peft_type": peft_type,
        "peft_version": FORMAT_VERSION,
        "revision": None,
        "use_dora": True,
    }


def _parse_config(fields: Any) -> DoraConfig:
    slices = None
    if isinstance(fields, dict) and fields.get("peft_type") == OWN_TYPE:
        fields = fields | {"peft_type": "LORA"}
        slices = fields.pop("fused_slices", None)
    try:
        return dataclasses.replace(DoraConfig.from_dict(fields), fused_slices=slices)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{CONFIG_FILE}: {error}") from None


def _canonical_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the `.weight` that some files have after the magnitude's key."""
    canonical = {}
    for key, tensor in tensors.items():
        name = key.removesuffix(".weight") if key.endswith(f".{MAGNITUDE}.weight") else key
        if name in canonical:
            raise ValueError(f"{WEIGHTS_FILE} has both {name!r} and {name + '.weight'!r}: one magnitude is too many")
        canonical[name] = tensor
    return canonical


def _check_same_settings(
    model: nn.Module, layers: dict[str, FusedDoraLinear], heads: dict[str, nn.Module], config: DoraConfig
) -> DoraConfig:
    """Raise ValueError unless the model's layers are those of `config`; return it with what no file holds."""
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged: unmerge it before loading an adapter")
        in_file = {"r": config.rank_of(name), "lora_alpha": config.alpha_of(name), "use_rslora": config.use_rslora}
        for field, value in in_file.items():
            if getattr(layer, field) != value:
                raise ValueError(f"{name} has {field}={getattr(layer, field)}, the adapter {field}={value}")
    given: DoraConfig | None = getattr(model, CONFIG_ATTRIBUTE, None)
    own_heads = head_modules(model, given) if given else heads
    for name in heads.keys() ^ own_heads.keys():
        where = "the adapter" if name in heads else "the model"
        raise ValueError(f"{name} is in the modules_to_save of {where} only")
    for name, head in heads.items():
        if not all(p.requires_grad for p in head.parameters()):
            raise ValueError(f"the adapter trains {name} whole, but in the model it is frozen")
    return dataclasses.replace(config, detach_norm=next(iter(layers.values())).detach_norm)


def _without_base_weights(model: nn.Module, tensors: dict[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Leave out the base weights that PEFT adds to a file whose targets include the output head or the embeddings.

    Raises ValueError where one is not the model's own, as after a change of the vocabulary: this function loads adapters.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    kept = {}
    for key, tensor in tensors.items():
        parameter = own.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
        if key in expected or parameter is None:
            kept[key] = tensor
        elif tensor.shape != parameter.shape or not torch.equal(tensor.to(parameter.dtype), parameter.detach().cpu()):
            raise ValueError(
                f"{key} in {WEIGHTS_FILE} is a weight of the base model, {list(tensor.shape)}, and not this model's, "
                f"{list(parameter.shape)}: load the base model that the adapter was trained on, its vocabulary resized as there"
            )
    return kept


def _check_keys(expected: Iterable[str], tensors: dict[str, Tensor]) -> None:
    magnitudes = [key for key in expected if key.endswith(MAGNITUDE)]
    if not any(key in tensors for key in magnitudes) and any(key.endswith(".lora_A.weight") for key in tensors):
        raise ValueError(f"{WEIGHTS_FILE} has no magnitudes ({magnitudes[0]!r} and so on): this is a plain LoRA adapter")
    for what, keys in (
        ("lacks", [key for key in expected if key not in tensors]),
        ("has the unexpected", sorted(tensors.keys() - set(expected))),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{WEIGHTS_FILE} {what} key {keys[0][:200]!r}{more}")


def _check_tensor(key: str, tensor: Tensor, shape: tuple[int, ...], destination: Tensor | None) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{key} must be {list(shape)}, got {list(tensor.shape)}")
    wanted = torch.float32 if destination is None else destination.dtype
    if tensor.dtype not in FLOATS if wanted.is_floating_point else tensor.dtype != wanted:
        names = "fp64, fp32, bf16 or fp16" if wanted.is_floating_point else str(wanted).removeprefix("torch.")
        raise ValueError(f"{key} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")
    if not bool(torch.isfinite(tensor.to(wanted)).all()):
        raise ValueError(f"{key} holds NaN or inf")
