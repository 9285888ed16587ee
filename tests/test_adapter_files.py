"""Adapters go to PEFT and come from PEFT unchanged; saving writes everything or nothing."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import bidora_kernels as bk

from .adapter_cases import BERT_TARGETS, CONFIG, WEIGHTS, edit, refuses, trained
from .tiny_models import bert, gpt2, gpt2_classifier, logits, randomize, relative_error

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (bert, {"r": 4, "lora_alpha": 12, "target_modules": BERT_TARGETS}),
    "regex": (bert, {"r": 4, "target_modules": r".*layer\.1\..*(query|dense)", "exclude_modules": ["output.dense"]}),
    "rslora": (bert, {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": BERT_TARGETS, "lora_dropout": 0.1}),
    "rank pattern": (
        bert, {"r": 4, "target_modules": BERT_TARGETS, "rank_pattern": {"layer.1.attention.self.query": 2, "value": 3}},
    ),
    "alpha pattern": (
        bert, {"r": 4, "target_modules": BERT_TARGETS, "alpha_pattern": {r"layer\.\d.*query": 40, "^bert.*value": 1}},
    ),
    "layers": (bert, {"r": 4, "target_modules": ["query"], "layers_to_transform": [1]}),
    "head": (bert, {"r": 4, "target_modules": BERT_TARGETS, "modules_to_save": ["classifier"]}),
    "task type": (bert, {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "conv1d": (gpt2, {"r": 4, "lora_alpha": 16, "target_modules": ["c_attn", "c_fc", "mlp.c_proj"], "task_type": "CAUSAL_LM"}),
    "all conv1d": (gpt2, {"r": 4, "target_modules": "all-linear"}),
    "tied head": (gpt2, {"r": 4, "target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
    "conv1d and head": (gpt2_classifier, {"r": 4, "target_modules": ["c_attn"], "task_type": "SEQ_CLS", "use_rslora": True}),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    return CASES[request.param]


def peft_trained(make: Callable[[], nn.Module], fields: dict[str, Any]) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out is set by PEFT itself
        model = get_peft_model(make(), LoraConfig(use_dora=True, **fields)).eval()
    randomize(model)
    return model


# round trips -----------------------------------------------------------------------------------------------------------


def test_peft_loads_what_is_saved_here(case: tuple[Callable[[], nn.Module], dict[str, Any]], tmp_path: Path) -> None:
    make, fields = case
    model = trained(make, **fields)
    bk.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys, unknown fields and a wrong fan_in_fan_out
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        loaded = PeftModel.from_pretrained(make(), tmp_path)
    wanted = logits(model)
    assert relative_error(logits(make()), wanted) > 1e-2
    assert relative_error(logits(loaded), wanted) <= 1e-5


def test_what_peft_saved_loads_here(case: tuple[Callable[[], nn.Module], dict[str, Any]], tmp_path: Path) -> None:
    make, fields = case
    peft_model = peft_trained(make, fields)
    peft_model.save_pretrained(tmp_path)
    model = make()
    bk.load_adapter(model, tmp_path)
    wanted = logits(peft_model)
    assert relative_error(logits(make()), wanted) > 1e-2
    assert relative_error(logits(model), wanted) <= 1e-5
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, peft_model)]
    assert counts[0] == counts[1]
    dropouts = {layer.lora_dropout for layer in model.modules() if isinstance(layer, bk.FusedDoraLinear)}
    assert dropouts == {fields.get("lora_dropout", 0.0)}


def test_files_are_the_ones_peft_writes(case: tuple[Callable[[], nn.Module], dict[str, Any]], tmp_path: Path) -> None:
    make, fields = case
    peft_trained(make, fields).save_pretrained(tmp_path / "peft")
    bk.save_adapter(trained(make, **fields), tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / who / WEIGHTS) for who in ("ours", "peft"))
    assert {key: (value.shape, value.dtype) for key, value in ours.items()} == {
        key: (value.shape, value.dtype) for key, value in theirs.items()
    }
    ours, theirs = (json.loads((tmp_path / who / CONFIG).read_text()) for who in ("ours", "peft"))
    for field, value in ours.items():
        wanted = theirs[field]
        if field in ("target_modules", "modules_to_save") and isinstance(value, list):
            value, wanted = set(value), set(wanted)
        assert value == wanted, field
    assert b'"format":"pt"' in (tmp_path / "ours" / WEIGHTS).read_bytes()


def test_a_second_save_has_the_same_bytes(tmp_path: Path) -> None:
    model = trained(task_type="SEQ_CLS", rank_pattern={"query": 2})
    bk.save_adapter(model, tmp_path / "first")
    again = bert()
    bk.load_adapter(again, tmp_path / "first")
    bk.save_adapter(again, tmp_path / "second")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_layers_made_by_hand_are_saved(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 6))
        return nn.Sequential(nn.Linear(6, 6), inner, nn.Linear(6, 3))

    model = make().requires_grad_(False)
    model[0] = bk.FusedDoraLinear.from_linear(model[0], r=3, lora_alpha=3)
    model[1][0] = bk.FusedDoraLinear.from_linear(model[1][0], r=2, lora_alpha=5)
    model[2] = bk.FusedDoraLinear.from_linear(model[2], r=2, lora_alpha=5)
    randomize(model)
    bk.save_adapter(model, tmp_path)  # as ends of names, "0" and "2" also match "1.0" and "1.2"
    x = torch.randn(4, 6)
    loaded, ours = PeftModel.from_pretrained(make(), tmp_path), make()
    bk.load_adapter(ours, tmp_path)
    wanted = model(x)
    assert relative_error(loaded(x), wanted) <= 1e-5
    assert relative_error(ours(x), wanted) <= 1e-5


def test_a_bf16_adapter_keeps_its_dtype_and_loads_into_fp32(tmp_path: Path) -> None:
    model = trained(task_type="SEQ_CLS").bfloat16()
    bk.save_adapter(model, tmp_path)
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    ours, loaded = bert(), PeftModel.from_pretrained(bert(), tmp_path)
    bk.load_adapter(ours, tmp_path)
    assert ours.bert.encoder.layer[0].attention.self.query.magnitude.dtype == torch.float32
    assert relative_error(logits(ours), logits(loaded)) <= 1e-5


def test_a_bf16_model_holds_and_saves_its_adapter_in_fp32_as_peft_does(tmp_path: Path) -> None:
    model = bert().bfloat16()
    bk.apply_dora(model, bk.DoraConfig(r=4, target_modules=BERT_TARGETS, task_type="SEQ_CLS"))
    bk.save_adapter(model, tmp_path / "ours")
    peft_model = get_peft_model(
        bert().bfloat16(), LoraConfig(use_dora=True, r=4, target_modules=BERT_TARGETS, task_type="SEQ_CLS")
    )
    peft_model.save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / who / WEIGHTS) for who in ("ours", "peft"))
    assert {key: value.dtype for key, value in ours.items()} == {key: value.dtype for key, value in theirs.items()}


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_both_spellings_of_the_magnitude_load(suffix: str, tmp_path: Path) -> None:
    model = trained()
    bk.save_adapter(model, tmp_path)
    edit(tmp_path, lambda t: {k + suffix if k.endswith("vector") else k: v for k, v in t.items()})
    loaded = bert()
    bk.load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_loading_over_existing_layers_replaces_values_and_trains_them(tmp_path: Path) -> None:
    saved = trained(lora_dropout=0.2, task_type="SEQ_CLS")
    bk.save_adapter(saved, tmp_path)
    model = trained(task_type="SEQ_CLS", detach_norm=False)
    layer = model.bert.encoder.layer[0].attention.self.query
    layer.magnitude.requires_grad_(False)
    logits(model)  # fills the cache of norms
    pointer = layer.lora_A.data_ptr()
    randomize(model, seed=5)
    bk.load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(saved))
    assert layer.magnitude.requires_grad
    assert layer.lora_dropout == 0.2
    assert layer.detach_norm is False
    assert layer.lora_A.data_ptr() == pointer


def test_wrapped_models_are_saved_and_loaded_under_their_own_names(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for index, wrap in enumerate((torch.compile, nn.parallel.DistributedDataParallel)):
            model, folder = trained(), tmp_path / str(index)
            bk.save_adapter(wrap(model), folder)
            assert all(key.startswith("base_model.model.bert.") for key in load_file(folder / WEIGHTS))
            loaded = bert()
            bk.load_adapter(wrap(loaded), folder)
            assert torch.equal(logits(loaded), logits(model))
    finally:
        torch.distributed.destroy_process_group()


def test_buffers_of_a_saved_module_travel(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    model = make()
    bk.apply_dora(model, bk.DoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    model(torch.randn(8, 4) + 3)
    bk.save_adapter(model, tmp_path)
    loaded = make()
    bk.load_adapter(loaded, tmp_path)
    assert int(loaded[1].num_batches_tracked) == 1
    assert torch.equal(loaded[1].running_mean, model[1].running_mean)


# saving ----------------------------------------------------------------------------------------------------------------


def test_saving_refuses_a_model_without_layers_and_non_finite_values(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no DoRA layers to save"):
        bk.save_adapter(bert(), tmp_path / "a")
    model = trained()
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.lora_B[3, 1] = float("nan")
    with pytest.raises(ValueError, match=r"layer\.0\.attention\.self\.query\.lora_B\.weight holds NaN or inf"):
        bk.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_saving_warns_of_what_it_leaves_out(tmp_path: Path) -> None:
    model = trained()
    model.bert.pooler.dense.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"not saved: bert\.pooler\.dense\.weight$"):
        bk.save_adapter(model, tmp_path)


def test_saving_refuses_settings_that_one_file_cannot_hold(tmp_path: Path) -> None:
    model = trained()
    model.bert.encoder.layer[0].attention.self.query.lora_dropout = 0.5
    with pytest.raises(ValueError, match="lora_dropout differs among the layers"):
        bk.save_adapter(model, tmp_path)


@pytest.mark.parametrize("moves", [0, 1])
def test_an_interrupted_overwrite_never_mixes_two_adapters(moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bk.save_adapter(trained(lora_alpha=8), tmp_path)
    from bidora_kernels import adapter_folder

    real, done = adapter_folder.os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target)
        real(source, target)

    monkeypatch.setattr(adapter_folder.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bk.save_adapter(trained(lora_alpha=16), tmp_path)
    monkeypatch.undo()
    refuses(bert(), tmp_path, "there is no adapter_config.json", FileNotFoundError)
    assert {path.name for path in tmp_path.iterdir()} <= {WEIGHTS}  # nothing left lying about
    bk.save_adapter(trained(lora_alpha=16), tmp_path)
    bk.load_adapter(bert(), tmp_path)


def test_a_failed_write_keeps_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bk.save_adapter(trained(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    from bidora_kernels import adapter_folder

    def full(path: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(adapter_folder, "_flush", full)
    with pytest.raises(OSError, match="no space"):
        bk.save_adapter(trained(lora_alpha=16), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_the_output_head_with_the_base_weights_that_peft_adds(tied: bool, tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=tied,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = peft_trained(make, {"r": 2, "target_modules": ["q_proj", "lm_head"]})
        peft_model.save_pretrained(tmp_path)
    assert any("base_layer" in key or "embed" in key for key in load_file(tmp_path / WEIGHTS))
    model, ids = make(), torch.arange(8)[None]
    bk.load_adapter(model, tmp_path)
    with torch.no_grad():
        assert relative_error(model(ids).logits, peft_model(ids).logits) <= 1e-5
        other = make()
        other.lm_head.weight.add_(1.0)
    with pytest.raises(ValueError, match="is a weight of the base model"):
        bk.load_adapter(other, tmp_path)
    assert not any(isinstance(module, bk.FusedDoraLinear) for module in other.modules())


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    layer = bk.FusedDoraLinear.from_linear(nn.Linear(12, 8), r=2)
    with pytest.raises(ValueError, match="the model is a DoRA layer itself, which has no name"):
        bk.save_adapter(layer, tmp_path / "bare")
    model = nn.Sequential(layer)
    bk.save_adapter(model, tmp_path / "kept")
    layer.scaling = 9.0
    with pytest.raises(ValueError, match=r"0.scaling is 9 where its lora_alpha and r say 4"):
        bk.save_adapter(model, tmp_path / "changed")
    assert not (tmp_path / "bare").exists()
    assert not (tmp_path / "changed").exists()
