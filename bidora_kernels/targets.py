"""Which modules of a model a `DoraConfig` names, and the replacement of those modules; PEFT's rules."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .config import DoraConfig
from .frozen import is_frozen, use_frozen_layers
from .fused_slices import FusedDoraSlices, slice_sizes, split
from .modules import FusedDoraConv1D, FusedDoraLinear
from .ops.quantized import format_of, stand_in

ALL_LINEAR = "all-linear"
CONFIG_ATTRIBUTE = "dora_config"  # where apply_dora leaves the configuration, for save_adapter
NOT_NAMED = "not in target_modules"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclasses.dataclass
class Plan:
    """What applying a configuration to a model would do: nothing has been changed yet."""

    config: DoraConfig
    targets: dict[str, nn.Module]
    heads: dict[str, nn.Module]
    skipped: dict[str, str]
    slices: dict[str, dict[str, int]]  # sizes of query, key and value of the targets in fused_slices


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D (transformers is not imported for it)."""
    return any(base.__name__ == "Conv1D" and base.__module__.startswith("transformers") for base in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer, of a kind that can be adapted or not."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def dora_layers(model: nn.Module) -> dict[str, FusedDoraLinear]:
    """The DoRA layers of a model by name, in the order of `named_modules`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedDoraLinear)}


def names_all_linear(config: DoraConfig) -> bool:
    """Whether target_modules is the shorthand for every linear layer but the output head."""
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def features(module: Any) -> tuple[int, int]:
    """(out_features, in_features) of a Linear or Conv1D."""
    rows, columns = stand_in(module.weight).shape
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def fused_name(config: DoraConfig, name: str) -> str | None:
    """The key of `fused_slices` that names this module, or None."""
    return next((key for key in config.fused_slices or {} if is_named(name, [key])), None)


def _slices(config: DoraConfig, name: str) -> list[str]:
    return (config.fused_slices or {})[fused_name(config, name) or ""]


def is_named(name: str, names: list[str] | str | None) -> bool:
    """Whether a module's name is among names or ends in one, or matches a regular expression as a whole."""
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return name in names or any(name.endswith(f".{suffix}") for suffix in names)


# classes that read a child's weight instead of calling it, always or on their fast path: an adapter there would do nothing
READS_WEIGHT = {
    "MultiheadAttention": ("out_proj",),
    "TransformerEncoderLayer": ("linear1", "linear2"),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "DisentangledSelfAttention": ("in_proj",),
    "LSHSelfAttention": ("query_key", "value"),
    "TDNNLayer": ("kernel",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "DetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "MambaMixer": ("dt_proj", "x_proj", "out_proj"),
    "FalconMambaMixer": ("dt_proj", "x_proj", "out_proj"),
    "JambaMambaMixer": ("dt_proj",),
} | dict.fromkeys(
    ("BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer", "Mamba2Mixer", "NemotronHMamba2Mixer", "Zamba2MambaMixer"),
    ("out_proj",),
)


def _layer_index_matches(config: DoraConfig, name: str) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    given = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in given] if given else [r".*?\.[^.]*\.(\d+)\."]
    for pattern in patterns:
        if match := re.match(pattern, name):
            index = int(match.group(1))
            return index == wanted if isinstance(wanted, int) else index in wanted
    return False


def _unsupported(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why this module cannot be adapted, or None where it can."""
    kind = type(module).__name__
    if not is_linear(module):
        return f"is a {kind}: only nn.Linear and Conv1D can be adapted"
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    for owner in type(parent).__mro__:
        if child in READS_WEIGHT.get(owner.__name__, ()):
            prefix = "nn." if owner.__module__.startswith("torch.nn") else ""
            return f"belongs to {prefix}{owner.__name__}, which reads its weight instead of calling it"
    if isinstance(module.weight, torch.Tensor) and format_of(module.weight) is not None:
        return None
    forward = type(module).forward
    plain = forward is nn.Linear.forward or (is_conv1d(module) and kind == "Conv1D")
    if not plain and not is_frozen(module):
        return f"is a {kind}, which computes something else than its parent class"
    if "forward" in vars(module) or any(hooks for field, hooks in vars(module).items() if field in _HOOKS):
        return "has hooks or a forward of its own, which a DoRA layer in its place would not have"
    if not isinstance(module.weight, nn.Parameter) or not module.weight.is_floating_point():
        return f"is a {kind} whose weight is not a floating-point parameter"
    return None


def _output_head(model: nn.Module) -> nn.Module | None:
    """The module that "all-linear" leaves out; a sequence classifier's head is left out as a module to save."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    return None if get_output_embeddings is None else get_output_embeddings()


def head_modules(model: nn.Module, config: DoraConfig) -> dict[str, nn.Module]:
    """The modules to save by name; of modules inside one another only the outermost."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.endswith(end) for end in config.heads) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def why_not(config: DoraConfig, name: str, heads: Iterable[str]) -> str | None:
    """Why the configuration leaves the module of this name alone, or None where it names it ("all-linear" names every one)."""
    if is_named(name, config.exclude_modules):
        return "in exclude_modules"
    if _in_heads(name, config, heads):
        return "in modules_to_save"
    if fused_name(config, name) is not None or names_all_linear(config):
        return None
    if not is_named(name, config.target_modules):
        return NOT_NAMED
    if not isinstance(config.target_modules, str) and name not in (config.target_modules or []):
        return None if _layer_index_matches(config, name) else "not in layers_to_transform"
    return None


def plan(model: nn.Module, config: DoraConfig) -> Plan:
    """Return what applying `config` to `model` would do. Raises ValueError where that is not possible; changes nothing."""
    modules = dict(model.named_modules())
    modules.pop("", None)
    for name, module in modules.items():
        if isinstance(module, FusedDoraLinear):
            raise ValueError(f"the model has DoRA layers already ({name}): a layer holds one adapter")
        if type(module).__module__.startswith("peft."):
            way = "take the model without its wrapper, or save its adapter and use load_adapter"
            raise ValueError(f"the model was wrapped by PEFT already ({name}): {way}")
    if config.target_modules is None and not config.fused_slices:
        raise ValueError('target_modules must be given: a list of names, a regular expression or "all-linear"')
    heads = head_modules(model, config)
    if config.modules_to_save and not any(name.endswith(end) for name in heads for end in config.modules_to_save):
        raise ValueError(f"modules_to_save matches no module: {_nearest(config.modules_to_save, list(modules))}")
    everything = names_all_linear(config)
    output_head = _output_head(model) if everything else None
    planned = Plan(config, {}, heads, {}, {})
    for name, module in modules.items():
        reason = why_not(config, name, heads)
        if reason is None and everything:
            reason = "output head" if module is output_head else _unsupported(model, name, module)
        elif reason is None and (problem := _unsupported(model, name, module)):
            raise ValueError(f"target_modules: {name} {problem}")
        if reason is None:
            planned.targets[name] = module
        elif is_linear(module):
            planned.skipped[name] = reason
    for name, module in planned.targets.items():
        if module.weight.is_meta:  # magnitudes start as the norms of the loaded weight
            raise ValueError(f"{name} has its weight on the meta device: load the weights first")
        if fused_name(config, name) is not None:
            planned.slices[name] = slice_sizes(model, name, features(module)[0])
            left = [part for part in planned.slices[name] if part not in _slices(config, name)]
            planned.skipped |= {f"{name}.{part}": "not in fused_slices" for part in left}
    if not planned.targets:
        raise ValueError(_no_match(config, modules, planned.skipped))
    for key in config.fused_slices or {}:
        if not any(is_named(name, [key]) for name in planned.targets):
            raise ValueError(f"fused_slices matches no module: {_nearest([key], _linear_names(modules))}")
    _skip_shared(model, modules, planned)
    _note_unmatched(modules, planned)
    return planned


def _note_unmatched(modules: dict[str, nn.Module], planned: Plan) -> None:
    """Note the names of a list that match nothing, which PEFT passes over as long as another one matches."""
    targets = planned.config.target_modules
    for name in targets if isinstance(targets, list) else []:
        if not any(is_named(existing, [name]) for existing in modules):
            planned.skipped[name] = "in target_modules, but the model has no such module"
    for end in planned.config.modules_to_save or []:
        if not any(name.endswith(end) for name in planned.heads):
            planned.skipped[end] = "in modules_to_save, but the model has no such module"


def _skip_shared(model: nn.Module, modules: dict[str, nn.Module], planned: Plan) -> None:
    """Note the other names of a module that stands in several places: PEFT adapts the first alone, and so do we."""
    first = {id(module): name for name, module in modules.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and name not in modules and is_linear(module):
            planned.skipped[name] = f"the same module as {first[id(module)]}, the only one considered"


def layer_shapes(planned: Plan) -> dict[str, tuple[int, int, int]]:
    """(out_features, in_features, r) of every DoRA layer that a plan makes, by name."""
    config = planned.config
    shapes: dict[str, tuple[int, int, int]] = {}
    for name, module in planned.targets.items():
        out_features, in_features = features(module)
        outputs = {name: out_features}
        if name in planned.slices:
            outputs = {f"{name}.{part}": planned.slices[name][part] for part in _slices(config, name)}
        shapes |= {layer: (size, in_features, config.rank_of(layer)) for layer, size in outputs.items()}
    return shapes


def _in_heads(name: str, config: DoraConfig, heads: Iterable[str]) -> bool:
    if any(re.match(rf"(^|.*\.){head}($|\..*)", name) for head in config.heads):
        return True
    return any(name == head or name.startswith(f"{head}.") for head in heads)


def _no_match(config: DoraConfig, modules: dict[str, nn.Module], skipped: dict[str, str]) -> str:
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules or [])
    wanted += config.fused_slices or []
    everything = isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR
    named = [name for name in skipped if everything or is_named(name, config.target_modules)]
    left_out = [f"{name}: {skipped[name]}" for name in named if skipped[name] != NOT_NAMED]
    if left_out:
        return f"target_modules={config.target_modules!r} leaves no layer to adapt: {'; '.join(left_out[:3])}"
    return f"target_modules matches no module: {_nearest(wanted, _linear_names(modules))}"


def _linear_names(modules: dict[str, nn.Module]) -> list[str]:
    return [name for name, module in modules.items() if is_linear(module)]


def _nearest(wanted: list[str], names: list[str]) -> str:
    """Each wanted name with the nearest ones that exist: last parts of names first, else full names."""
    return ", ".join(f"{name!r} (nearest: {nearest(name, names) or 'the model has no linear layers'})" for name in wanted[:5])


def nearest(wanted: str, names: Iterable[str]) -> str:
    """The three nearest of some modules' names, "" for none: by their last parts, or whole where a whole one is wanted."""
    lasts = dict.fromkeys(name.rpartition(".")[2] for name in names)
    near = names if "." in wanted else [last for last in lasts if not last.isdigit()]
    return ", ".join(difflib.get_close_matches(wanted, list(near), n=3, cutoff=0.0))


def replace(model: nn.Module, planned: Plan) -> None:
    """Carry out a plan: put the DoRA layers in, copy the modules to save, freeze everything else. All or nothing."""
    config = planned.config
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        made = {name: _target(name, module, planned) for name, module in planned.targets.items()}
        heads = {name: copy.deepcopy(module) for name, module in planned.heads.items()}
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    for name, module in {**made, **heads}.items():
        put(model, name, module)
    for head in heads.values():
        for parameter in head.parameters():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    use_frozen_layers(model)
    setattr(model, CONFIG_ATTRIBUTE, copy.deepcopy(config))


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and `torch.compile` wrappers, whose names PEFT's files are about."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Let `module` stand where the submodule of this name is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _target(name: str, module: nn.Module, planned: Plan) -> nn.Module:
    if name not in planned.slices:
        return _layer(name, module, planned.config)
    parts = split(module, planned.slices[name])
    for part in _slices(planned.config, name):
        parts[part] = _layer(f"{name}.{part}", parts[part], planned.config)
    return FusedDoraSlices(parts).train(module.training)


def _layer(name: str, module: nn.Module, config: DoraConfig) -> FusedDoraLinear:
    make = FusedDoraConv1D.from_conv1d if is_conv1d(module) else FusedDoraLinear.from_linear
    r = config.rank_of(name)
    try:
        layer = make(module, r, config.alpha_of(name), config.lora_dropout, config.use_rslora, config.detach_norm)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if config.init_lora_weights == "gaussian":
        with torch.no_grad():
            layer.lora_A.normal_(std=1 / r)
    return layer
