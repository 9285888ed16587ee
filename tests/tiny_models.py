"""Small random models of transformers, built in code, and the helpers that several tests share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import bidora_kernels as bk

VOCABULARY = 40


def bert(seed: int = 0, layers: int = 2) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=3, initializer_range=0.4,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def _gpt2_config() -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16, num_labels=3, pad_token_id=0,
        bos_token_id=1, eos_token_id=1, initializer_range=0.4,
    )  # fmt: skip


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(_gpt2_config()).eval()


def gpt2_classifier(seed: int = 0) -> GPT2ForSequenceClassification:
    torch.manual_seed(seed)
    return GPT2ForSequenceClassification(_gpt2_config()).eval()


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def padded_classifier_gradients(model: nn.Module, compiled: bool) -> tuple[Callable[[str], list[Tensor]], int]:
    """(The gradients of what trains, by backend, on four texts of 3 to 12 tokens padded to 16; how many tokens are real)."""
    ids, mask = torch.randint(3, VOCABULARY, (4, 16)), torch.ones(4, 16, dtype=torch.long)
    for row, length in enumerate((3, 6, 9, 12)):
        mask[row, length:] = 0
    parameters = [p for p in model.parameters() if p.requires_grad]
    run_model = torch.compile(model, backend="aot_eager") if compiled else model

    def gradients(backend: str) -> list[Tensor]:
        with bk.use_backend(backend):
            loss = run_model(input_ids=ids, attention_mask=mask, labels=torch.arange(4) % 2).loss
            return list(torch.autograd.grad(loss, parameters))

    return gradients, int(mask.sum())


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 1) -> None:
    """Move every trainable parameter away from its start, magnitudes away from the norms by up to a half."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.rand(parameter.shape, generator=generator).to(parameter)
        if "magnitude" in name:
            parameter.mul_(0.75 + 0.75 * noise)
        else:
            parameter.copy_(noise - 0.5)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach(), wanted.detach()
    return float((got - wanted).abs().max() / wanted.abs().max())
