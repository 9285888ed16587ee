"""DoraConfig: what to adapt and how, in PEFT's words and with PEFT's rules for names."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_TASK_HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}
SLICES = ("query", "key", "value")

# adapter_config.json: fields that say nothing about the layers
_DESCRIPTIVE = {"auto_mapping", "inference_mode", "peft_version", "revision", "runtime_config", "peft_type", "use_dora"}
# fields of PEFT 0.21 that are not implemented here: they may only hold their default
_ONLY_DEFAULT: dict[str, tuple[Any, ...]] = {
    "lora_bias": (False,),
    "loftq_config": ({}, None),
    "megatron_config": (None,),
    "megatron_core": ("megatron.core", None),
    "trainable_token_indices": (None,),
    "eva_config": (None,),
    "corda_config": (None,),
    "lora_ga_config": (None,),
    "velora_config": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "monteclora_config": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "ensure_weight_tying": (False,),
}
_IGNORED_WITHOUT_SWITCH = {"qalora_group_size", "fan_in_fan_out"}  # the first belongs to use_qalora; layers know the second


@dataclasses.dataclass
class DoraConfig:
    """Which layers of a model become DoRA layers, and with which settings; fields, defaults and matching are PEFT's.

    r, lora_alpha, lora_dropout, use_rslora: as in `FusedDoraLinear.from_linear`.
    target_modules: a list of names or dotted suffixes; a string is a regular expression that must match the full name, or
        "all-linear" (every nn.Linear and Conv1D but the output head).
    exclude_modules: the same two forms; wins over target_modules.
    rank_pattern, alpha_pattern: regular expressions of a name's end to another r or lora_alpha; the first match counts.
    modules_to_save: ends of names of modules that are trained whole and saved with the adapter (a task head).
    layers_to_transform, layers_pattern: with a list of target_modules, only layers with these indices; the pattern (a name or
        several) is what stands before an index, by default PEFT's usual ones.
    bias: only "none", biases stay frozen. base_model_name_or_path: what a saved file says of its base.
    init_lora_weights: True (lora_A Kaiming-uniform) or "gaussian" (standard deviation 1 / r); lora_B starts at 0.
    task_type: one of PEFT's; "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS" add the usual heads to modules_to_save.
    fused_slices: fused projections of which only some slices are adapted: {"c_attn": ["query", "value"]}.
    detach_norm: False differentiates the norm (not a field of PEFT's; not saved).

    Raises TypeError for a value of the wrong type or an unknown field, ValueError for a value out of range.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_lora_weights: bool | str = True
    bias: str = "none"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    fused_slices: dict[str, list[str]] | None = None
    detach_norm: bool = True

    def __post_init__(self) -> None:
        """Check every field and bring lists, tuples and sets to lists."""
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        if not _is_number(self.lora_dropout):
            raise TypeError(f"lora_dropout must be a number, got {self.lora_dropout!r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        for name in ("use_rslora", "detach_norm"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self.target_modules = _names_or_regex("target_modules", self.target_modules)
        self.exclude_modules = _names_or_regex("exclude_modules", self.exclude_modules)
        if self.target_modules is not None and not self.target_modules and not self.fused_slices:
            raise ValueError("target_modules must name at least one module, got an empty one")
        self.modules_to_save = _names("modules_to_save", self.modules_to_save)
        for name in self.modules_to_save or []:
            _check_regex("modules_to_save", name)
        self._check_patterns()
        self._check_layers()
        self._check_choices()
        self._check_slices()

    def _check_patterns(self) -> None:
        for field in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, field)
            if not isinstance(patterns, Mapping):
                raise TypeError(f"{field} must be a dict from name patterns to values, got {patterns!r}")
            for pattern, value in patterns.items():
                _check_regex(field, pattern)
                (_check_rank if field == "rank_pattern" else _check_alpha)(f"{field}[{pattern!r}]", value)
            setattr(self, field, dict(patterns))

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is not None and not _is_integer(layers):
            if isinstance(layers, (str, Mapping)) or not isinstance(layers, Iterable) or not all(map(_is_integer, layers)):
                raise TypeError(f"layers_to_transform must be an index or a list of indices, got {layers!r}")
            self.layers_to_transform = list(layers)
        if self.layers_pattern is not None and not isinstance(self.layers_pattern, str):
            self.layers_pattern = _names("layers_pattern", self.layers_pattern)
        for pattern in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []:
            _check_regex("layers_pattern", pattern)
        if self.layers_pattern and layers is None:
            raise ValueError("layers_pattern needs layers_to_transform")
        if layers is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs a list of target_modules; put the indices into the regular expression")

    def _check_choices(self) -> None:
        if self.task_type is not None:
            self.task_type = str(getattr(self.task_type, "value", self.task_type))
            if self.task_type not in TASK_TYPES:
                raise ValueError(f"task_type must be one of {', '.join(TASK_TYPES)}, got {self.task_type!r}")
        if self.bias != "none":
            raise ValueError(f"bias={self.bias!r} is not implemented: biases stay frozen (bias='none')")
        if self.init_lora_weights is not True and self.init_lora_weights != "gaussian":
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r} is not implemented: use True or 'gaussian'")

    def _check_slices(self) -> None:
        if self.fused_slices is None:
            return
        if not isinstance(self.fused_slices, Mapping):
            raise TypeError(f"fused_slices must be a dict from module names to slices, got {self.fused_slices!r}")
        checked = {}
        for name, slices in self.fused_slices.items():
            chosen = _names(f"fused_slices[{name!r}]", slices)
            if not chosen or not set(SLICES).issuperset(chosen):
                raise ValueError(f"fused_slices[{name!r}] must name some of {', '.join(SLICES)}, got {slices!r}")
            checked[name] = [part for part in SLICES if part in chosen]
        self.fused_slices = checked

    @property
    def heads(self) -> list[str]:
        """The modules to save: those named, then those that the task type implies."""
        return list(dict.fromkeys([*(self.modules_to_save or []), *_TASK_HEADS.get(self.task_type or "", [])]))

    def rank_of(self, name: str) -> int:
        """The r of the layer with this name."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        """The lora_alpha of the layer with this name."""
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DoraConfig:
        """Return the configuration that the fields of an `adapter_config.json` describe.

        Raises ValueError, naming the field, where the file is not a DoRA adapter's or uses something that is not implemented
        here; warns of fields it does not know, as PEFT does.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"an adapter's configuration must be a JSON object, got {type(fields).__name__}")
        if fields.get("peft_type", "LORA") != "LORA":
            raise ValueError(f"peft_type must be 'LORA', got {fields['peft_type']!r}")
        if fields.get("use_dora") is not True:
            raise ValueError(f"use_dora must be true, got {fields.get('use_dora')!r}: this is not a DoRA adapter")
        for name, defaults in _ONLY_DEFAULT.items():
            if name in fields and not any(type(fields[name]) is type(d) and fields[name] == d for d in defaults):
                raise ValueError(f"{name}={fields[name]!r} is not implemented")
        own = {field.name for field in dataclasses.fields(cls)} - {"fused_slices", "detach_norm"}
        unknown = sorted(set(fields) - own - _DESCRIPTIVE - set(_ONLY_DEFAULT) - _IGNORED_WITHOUT_SWITCH)
        if any(fields[name] for name in unknown):
            warnings.warn(f"unknown fields of the adapter's configuration are ignored: {', '.join(unknown)}", stacklevel=2)
        given = {name: value for name, value in fields.items() if name in own}
        if given.get("init_lora_weights") in (False, "orthogonal"):  # the file's own values take the place of any beginning
            given["init_lora_weights"] = True
        for name in ("rank_pattern", "alpha_pattern"):  # null in some files
            if given.get(name, {}) is None:
                del given[name]
        return cls(**given)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_rank(name: str, value: Any) -> None:
    if not _is_integer(value):
        raise TypeError(f"{name} must be a positive integer, got {value!r}")
    if value <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value}")


def _check_alpha(name: str, value: Any) -> None:
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _check_regex(name: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{name} must hold strings, got {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression ({error})") from None


def _names(field: str, value: Any) -> list[str] | None:
    """A list of names from any collection of strings (a set in sorted order)."""
    if value is None:
        return None
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{field} must be a list of names, got {value!r}")
    names = list(value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{field} must be a list of names, got {name!r} in it")
    return sorted(names) if isinstance(value, (set, frozenset)) else names


def _names_or_regex(field: str, value: Any) -> list[str] | str | None:
    if isinstance(value, str):
        _check_regex(field, value)
        return value
    return _names(field, value)


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
