"""A BERT of a few thousand weights with its tokenizer, and a task of two easy classes and a rare one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="the extra [train] is not installed")

WORDS = {"grain": ["wheat", "corn", "crop", "harvest"], "money": ["bank", "rate", "loan", "bond"], "rare": ["ship", "port"]}
COMMON = ["the", "a", "of", "rose", "fell", "report", "said"]


def write_rows(path: Path, counts: dict[str, int], seed: int) -> None:
    rng = random.Random(seed)
    lines = []
    for label, count in counts.items():
        for _ in range(count):
            words = rng.choices(WORDS[label], k=2) + rng.choices(COMMON, k=rng.randint(1, 8))
            rng.shuffle(words)
            lines.append(f"{label}\t{' '.join(words)}")
    rng.shuffle(lines)
    path.write_text("\n".join(lines) + "\n")


def change_weights(folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """Write `change(name, value)` over each weight of a saved model."""
    weights = folder / "model.safetensors"
    save_file({name: change(name, value) for name, value in load_file(weights).items()}, weights, {"format": "pt"})


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a tiny run; runs made in module fixtures draw."""
    from bidora_kernels.recipes import train

    monkeypatch.setattr(train, "draw_curves", lambda lines, summary, path: path.write_bytes(b""))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.tsv", {"grain": 40, "money": 30, "rare": 2}, 0)
    write_rows(folder / "test.tsv", {"grain": 15, "money": 12, "rare": 2}, 1)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COMMON, *(word for words in WORDS.values() for word in words)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder
