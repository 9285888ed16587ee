"""DoRA on the query and value slices of GPT-2's fused projection: the layer, its merging, and its files."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers.pytorch_utils import Conv1D

import bidora_kernels as bk

from .adapter_cases import edit, refuses, without
from .tiny_models import gpt2, logits, randomize, relative_error


@pytest.mark.parametrize("slices", [["query", "value"], ["value"], ["query", "key", "value"]])
def test_slices_of_a_fused_projection(slices: list[str]) -> None:
    model = gpt2()
    before, weight = logits(model), model.transformer.h[0].attn.c_attn.weight.detach().clone()
    report = bk.apply_dora(model, bk.DoraConfig(r=2, fused_slices={"c_attn": slices}))
    assert report.replaced == [f"transformer.h.{i}.attn.c_attn.{part}" for i, part in itertools.product(range(2), slices)]
    assert set(report.skipped) >= {f"transformer.h.0.attn.c_attn.{part}" for part in {"query", "key", "value"} - set(slices)}
    assert relative_error(logits(model), before) <= 1e-6
    c_attn = model.transformer.h[0].attn.c_attn
    assert {name for name, p in c_attn.named_parameters() if p.requires_grad} == {
        f"{part}.{name}" for part in slices for name in ("lora_A", "lora_B", "magnitude")
    }
    randomize(model)
    wanted = weight.clone()
    for index, part in enumerate(("query", "key", "value")):
        if part in slices:
            layer, columns = c_attn.get_submodule(part), slice(16 * index, 16 * (index + 1))
            terms = layer.lora_A, layer.lora_B, layer.magnitude, layer.scaling
            wanted[:, columns] = bk.reference.merged_weight(weight[:, columns].t(), *terms).t()
    adapted = logits(model)
    merged = bk.merge_and_unload(model)
    assert type(merged.transformer.h[0].attn.c_attn) is Conv1D
    assert relative_error(merged.transformer.h[0].attn.c_attn.weight, wanted) <= 1e-6
    assert relative_error(before, adapted) > 1e-2
    assert relative_error(logits(merged), adapted) <= 1e-5
    assert merged.state_dict().keys() == gpt2().state_dict().keys()


def test_slices_go_beside_other_targets_and_have_ranks_of_their_own() -> None:
    model = gpt2()
    config = bk.DoraConfig(
        r=4, target_modules=["c_attn", "c_fc"], fused_slices={"c_attn": ["query"]}, rank_pattern={"c_attn.query": 2}
    )
    bk.apply_dora(model, config)
    ranks = {name: layer.r for name, layer in model.transformer.h[0].named_modules() if isinstance(layer, bk.FusedDoraLinear)}
    assert ranks == {"attn.c_attn.query": 2, "mlp.c_fc": 4}
    with pytest.raises(ValueError, match="fused_slices matches no module: 'qkv'"):
        bk.apply_dora(gpt2(), bk.DoraConfig(target_modules=["c_fc"], fused_slices={"qkv": ["query"]}))


def test_fused_slices_have_a_format_of_their_own(tmp_path: Path) -> None:
    model = gpt2()
    bk.apply_dora(model, bk.DoraConfig(r=2, fused_slices={"c_attn": ["query", "value"]}, modules_to_save=["ln_f"]))
    randomize(model)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn has adapters on slices, for which PEFT has no keys"):
        bk.save_adapter(model, tmp_path)
    assert not any(tmp_path.iterdir())
    bk.save_adapter(model, tmp_path, format="bidora")
    loaded = gpt2()
    bk.load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    bk.load_adapter(model, tmp_path)
    with pytest.raises(Exception, match="BIDORA"):
        PeftModel.from_pretrained(gpt2(), tmp_path)
    edit(tmp_path, without("base_model.model.transformer.h.1.attn.c_attn.value.lora_magnitude_vector"))
    refuses(gpt2(), tmp_path, r"lacks key '.*c_attn\.value\.lora_magnitude_vector'")
    with pytest.raises(ValueError, match="format must be 'peft' or 'bidora', got 'gguf'"):
        bk.save_adapter(model, tmp_path, format="gguf")
