"""Which modules of a model a `DoraConfig` names, and the replacement of those modules; PEFT's rules."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re

import torch
from torch import nn

from .config import DoraConfig
from .modules import FusedDoraConv1D, FusedDoraLinear

ALL_LINEAR = "all-linear"
CONFIG_ATTRIBUTE = "dora_config"  # where apply_dora leaves the configuration, for save_adapter
_HEAD_NAMES = ("score", "classifier")  # where PEFT looks for the head of a sequence classifier


@dataclasses.dataclass
class Plan:
    """What applying a configuration to a model would do: nothing has been changed yet."""

    config: DoraConfig
    targets: dict[str, nn.Module]
    heads: dict[str, nn.Module]
    skipped: dict[str, str]


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D (transformers is not imported for it)."""
    return any(base.__name__ == "Conv1D" and base.__module__.startswith("transformers") for base in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer, of a kind that can be adapted or not."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def dora_layers(model: nn.Module) -> dict[str, FusedDoraLinear]:
    """The DoRA layers of a model by name, in the order of `named_modules`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedDoraLinear)}


def _named(name: str, names: list[str] | str | None) -> bool:
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return name in names or any(name.endswith(f".{suffix}") for suffix in names)


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
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return "belongs to nn.MultiheadAttention, which reads its weight and never calls it"
    forward = type(module).forward
    if forward is not nn.Linear.forward and not (is_conv1d(module) and kind == "Conv1D"):
        return f"is a {kind}, which computes something else than its parent class"
    if not isinstance(module.weight, nn.Parameter) or not module.weight.is_floating_point():
        return f"is a {kind} whose weight is not a floating-point parameter"
    return None


def _output_head(model: nn.Module, config: DoraConfig) -> nn.Module | None:
    """The module that "all-linear" leaves out: the output embeddings, or a sequence classifier's head."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    if get_output_embeddings is None:
        return None
    if (head := get_output_embeddings()) is not None:
        return head
    if config.task_type == "SEQ_CLS":
        return next((head for name in _HEAD_NAMES if (head := getattr(model, name, None)) is not None), None)
    return None


def _head_modules(model: nn.Module, config: DoraConfig) -> dict[str, nn.Module]:
    """The modules to save by name; of modules inside one another only the outermost."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.endswith(end) for end in config.heads) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def plan(model: nn.Module, config: DoraConfig) -> Plan:
    """Return what applying `config` to `model` would do. Raises ValueError where that is not possible; changes nothing."""
    modules = dict(model.named_modules())
    modules.pop("", None)
    for name, module in modules.items():
        if isinstance(module, FusedDoraLinear):
            raise ValueError(f"the model has DoRA layers already ({name}): a layer holds one adapter")
        if type(module).__module__.startswith("peft."):
            raise ValueError(f"the model was wrapped by PEFT already ({name}): use accelerate_peft for it")
    if config.target_modules is None:
        raise ValueError('target_modules must be given: a list of names, a regular expression or "all-linear"')
    heads = _head_modules(model, config)
    if config.modules_to_save and not any(any(name.endswith(end) for end in config.modules_to_save) for name in heads):
        raise ValueError(f"modules_to_save matches no module: {_nearest(config.modules_to_save, list(modules))}")
    everything = isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR
    output_head = _output_head(model, config) if everything else None
    targets: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name, module in modules.items():
        wanted = is_linear(module) if everything else _named(name, config.target_modules)
        if _named(name, config.exclude_modules):
            reason = "in exclude_modules"
        elif _in_heads(name, config, heads):
            reason = "in modules_to_save"
        elif not wanted:
            reason = "not in target_modules"
        elif module is output_head:
            reason = "output head"
        elif not everything and not isinstance(config.target_modules, str) and not _layer_index_matches(config, name):
            reason = "not in layers_to_transform"
        elif (problem := _unsupported(model, name, module)) is None:
            targets[name] = module
            continue
        elif everything:
            reason = problem
        else:
            raise ValueError(f"target_modules: {name} {problem}")
        if is_linear(module):
            skipped[name] = reason
    for name, module in model.named_modules(remove_duplicate=False):
        if name and name not in modules and is_linear(module):
            first = next(other for other, candidate in modules.items() if candidate is module)
            skipped[name] = f"the same module as {first}, which alone is adapted"
    for name, module in targets.items():
        if module.weight.is_meta:  # magnitudes start as the norms of the loaded weight
            raise ValueError(f"{name} has its weight on the meta device: load the weights first")
    if not targets:
        raise ValueError(_no_match(config, modules, skipped))
    return Plan(config, targets, heads, skipped)


def _in_heads(name: str, config: DoraConfig, heads: dict[str, nn.Module]) -> bool:
    if any(re.match(rf"(^|.*\.){head}($|\..*)", name) for head in config.heads):
        return True
    return any(name == head or name.startswith(f"{head}.") for head in heads)


def _no_match(config: DoraConfig, modules: dict[str, nn.Module], skipped: dict[str, str]) -> str:
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or []
    left_out = [f"{name} is {reason}" for name, reason in skipped.items() if reason != "not in target_modules"]
    if left_out:
        return f"target_modules={config.target_modules!r} leaves no layer to adapt: {'; '.join(left_out[:3])}"
    linear = [name for name, module in modules.items() if is_linear(module)]
    return f"target_modules matches no module: {_nearest(wanted, linear)}"


def _nearest(wanted: list[str], names: list[str]) -> str:
    """Each wanted name with the nearest ones that exist: last parts of names first, else full names."""
    lasts = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    lasts = [last for last in lasts if not last.isdigit()]
    texts = []
    for name in wanted[:5]:
        near = difflib.get_close_matches(name, names if "." in name else lasts, n=3, cutoff=0.0)
        texts.append(f"{name!r} (nearest: {', '.join(near) if near else 'the model has no linear layers'})")
    return ", ".join(texts)


def replace(model: nn.Module, planned: Plan) -> dict[str, FusedDoraLinear]:
    """Carry out a plan: put the DoRA layers in, copy the modules to save, freeze everything else. All or nothing."""
    config = planned.config
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        layers = {name: _layer(name, module, config) for name, module in planned.targets.items()}
        heads = {name: copy.deepcopy(module) for name, module in planned.heads.items()}
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    for name, module in {**layers, **heads}.items():
        put(model, name, module)
    for head in heads.values():
        for parameter in head.parameters():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    setattr(model, CONFIG_ATTRIBUTE, copy.deepcopy(config))
    return layers


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Let `module` stand where the submodule of this name is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


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
