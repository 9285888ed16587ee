"""What apply_dora does with the linear layers that it only freezes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import bidora_kernels as bk
from bidora_kernels import native
from bidora_kernels.frozen import is_frozen
from bidora_kernels.ops import _skipped_tokens
from bidora_kernels.ops import frozen_linear as op

from .tiny_models import bert, gpt2, logits, padded_classifier_gradients, randomize, relative_error, tokens

CONFIG = bk.DoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")


def frozen(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_frozen(module)}


def reloaded(model: nn.Module) -> nn.Module:
    """The model from a file of all of it."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers of any size take the native path; the tokens of each of their products, forward and backward."""
    if native.why_unavailable() is not None:
        pytest.skip("the native library is not there")
    monkeypatch.setattr(op, "WORTH_FROM", 1)
    monkeypatch.setattr(_skipped_tokens, "SKIPS_FROM", 1)
    counts: list[int] = []
    output, tokens_with_gradient = op._output, op.tokens_with_gradient

    def forward(x: Tensor, *others: Tensor) -> Tensor:
        counts.append(x.numel() // x.shape[-1])
        return output(x, *others)

    def backward(grad: Tensor, weight: Tensor) -> Tensor | None:
        chosen = tokens_with_gradient(grad, weight)
        counts.append(grad.numel() // grad.shape[-1] if chosen is None else chosen.numel())
        return chosen

    monkeypatch.setattr(op, "_output", forward)
    monkeypatch.setattr(op, "tokens_with_gradient", backward)
    return counts


def test_which_layers() -> None:
    model = bert()
    before = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    bk.apply_dora(model, CONFIG)
    ours = frozen(model)
    assert set(ours) == {name for name in before if not name.endswith(("query", "value", "classifier"))}
    assert all(module is before[name] for name, module in ours.items())  # the same object: hooks and references hold
    assert type(model.classifier) is nn.Linear
    assert model.classifier.weight.requires_grad
    assert "FrozenLinear(in_features=16, out_features=24, bias=True)" in str(model)


def test_layers_with_a_forward_of_their_own_and_subclasses_are_left_alone() -> None:
    class Odd(nn.Linear):
        pass

    model = nn.ModuleDict({"query": nn.Linear(8, 8), "odd": Odd(8, 8), "patched": nn.Linear(8, 8), "plain": nn.Linear(8, 8)})
    model["patched"].forward = lambda x: x
    bk.apply_dora(model, bk.DoraConfig(r=2, target_modules=["query"]))
    assert set(frozen(model)) == {"plain"}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_classifier_with_padding(compiled: bool, served: list[int]) -> None:
    """The gradients are the reference's, and padding is left out; in the last layer all but the token that is read."""
    model = bert()
    bk.apply_dora(model, CONFIG)
    randomize(model)
    gradients, _ = padded_classifier_gradients(model, compiled)
    wanted = gradients("reference")
    assert served == []
    for ours, theirs in zip(gradients("native"), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    # forward: key, output, intermediate and output of a layer, the pooler, whose four tokens are too few to be searched
    # backward: in the last layer the first token of each text, but for its key; in the first all but the padding, and no key
    assert served == ([] if compiled else [*[64] * 8, 4, 4, 4, 4, 4, 30, 30, 30, 30])


def test_a_layer_that_is_trained_after_all(served: list[int]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    bk.apply_dora(model, bk.DoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(20, 8)
    model(x).sum().backward()
    assert served == [20, 20]
    model[1].weight.requires_grad_()
    model(x).sum().backward()
    assert model[1].weight.grad is not None
    assert served == [20, 20]


def test_merging_makes_them_plain_again() -> None:
    model = bert()
    bk.apply_dora(model, CONFIG)
    randomize(model)
    wanted = logits(model)
    merged = bk.merge_and_unload(model)
    assert frozen(merged) == {}
    assert not any(type(module).__module__.startswith("bidora_kernels") for module in merged.modules())
    assert relative_error(logits(merged), wanted) < 1e-5
    bk.apply_dora(merged, CONFIG)  # and all may begin again
    assert frozen(merged)


def test_a_frozen_layer_can_be_adapted_itself() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    bk.apply_dora(model, bk.DoraConfig(r=2, target_modules=["0"]))
    model[0] = model[0].to_linear()
    report = bk.apply_dora(model, bk.DoraConfig(r=2, target_modules=["1"]))
    assert report.replaced == ["1"]
    assert isinstance(bk.FusedDoraLinear.from_linear(frozen(model)["0"]), bk.FusedDoraLinear)


def test_copies_states_and_files() -> None:
    model = bert()
    plain = set(model.state_dict())
    bk.apply_dora(model, CONFIG)
    names = set(frozen(model))
    assert {f"{name}.weight" for name in names} <= plain & set(model.state_dict())
    assert set(frozen(copy.deepcopy(model))) == names
    loaded = reloaded(model)
    assert set(frozen(loaded)) == names
    assert relative_error(logits(loaded), logits(model)) < 1e-5


def test_hooks_still_run() -> None:
    model = bert()
    called: list[str] = []
    model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(lambda *args: called.append("hook"))
    bk.apply_dora(model, CONFIG)
    logits(model)
    assert called == ["hook"]


SLICES = bk.DoraConfig(r=2, fused_slices={"c_attn": ["query", "value"]})


def test_conv1d(served: list[int]) -> None:
    """GPT-2's layers and unadapted slices of its projection: the reference's gradients, and plain after merging."""
    model = gpt2()
    kinds = {name: type(module) for name, module in model.named_modules()}
    bk.apply_dora(model, SLICES)
    randomize(model)
    ours = frozen(model)
    names = {
        f"transformer.h.{i}.{part}" for i in range(2) for part in ("attn.c_attn.key", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert set(ours) == names | {"lm_head"}
    assert isinstance(ours["transformer.h.0.mlp.c_fc"], kinds["transformer.h.0.mlp.c_fc"])
    ids = tokens()
    labels = ids.masked_fill(torch.arange(7) < 4, -100)  # a prompt that is not trained on
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(backend: str) -> list[Tensor]:
        with bk.use_backend(backend):
            return list(torch.autograd.grad(model(input_ids=ids, labels=labels).loss, parameters))

    wanted = gradients("reference")
    assert served == []
    for found, theirs in zip(gradients("native"), wanted, strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-6)
    assert served[:9] == [21] * 9
    assert served[9:] == [9, *served[10:]]  # the output head's: three of seven tokens of a text are predicted
    assert len(served) == 17
    before = logits(model)
    loaded = reloaded(copy.deepcopy(model))
    assert set(frozen(loaded)) == set(ours)
    assert relative_error(logits(loaded), before) < 1e-5
    merged = bk.merge_and_unload(model)
    assert {name: type(module) for name, module in merged.named_modules()} == kinds
    assert relative_error(logits(merged), before) < 1e-5


def test_a_frozen_conv1d_can_be_adapted_itself() -> None:
    model = gpt2()
    bk.apply_dora(model, SLICES)
    frozen_layer = model.transformer.h[0].mlp.c_fc
    layer = bk.FusedDoraConv1D.from_conv1d(frozen_layer, r=2)
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), frozen_layer(x))
    model.transformer.h[0].attn.c_attn = model.transformer.h[0].attn.c_attn.to_plain()
    model.transformer.h[1].attn.c_attn = model.transformer.h[1].attn.c_attn.to_plain()
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert len(bk.apply_dora(model, bk.DoraConfig(r=2, target_modules=["c_fc", "c_attn"])).replaced) == 4
