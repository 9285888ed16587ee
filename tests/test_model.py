"""apply_dora chooses, freezes and replaces as PEFT does; merging leaves plain layers."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import bidora_kernels as bk

from .tiny_models import VOCABULARY, bert, gpt2, gpt2_classifier, logits, randomize, relative_error


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Names(nn.Module):
    """Names that a looser match would confuse."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.aq, self.q2, self.score, self.pre_score = (nn.Linear(4, 4) for _ in range(5))
        layer = nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2))})
        self.model = nn.ModuleDict({"layers": nn.ModuleList(copy.deepcopy(layer) for _ in range(2))})


MODELS = {"bert": bert, "gpt2": gpt2, "gpt2 classifier": gpt2_classifier, "llama": llama, "names": Names}
CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"target_modules": ["query", "value"]}),
    ("bert", {"target_modules": ["attention.output.dense"]}),
    ("bert", {"target_modules": ["dense", "bert.encoder.layer.0.attention.self.query"], "exclude_modules": ["pooler.dense"]}),
    ("bert", {"target_modules": ["query", "no_such_name"]}),
    ("bert", {"target_modules": r"bert\.encoder\.layer\.[01]\.attention\.self\.(query|key)", "exclude_modules": r".*layer\.1.*"}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "ALL-LINEAR", "task_type": "SEQ_CLS", "exclude_modules": ["value"]}),
    ("bert", {"target_modules": ["dense", "classifier"], "modules_to_save": ["pooler"]}),
    ("bert", {"target_modules": ["query", "dense"], "task_type": "TOKEN_CLS"}),
    ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["fier"]}),
    ("bert", {"target_modules": ["query"], "layers_to_transform": 1}),
    ("bert", {"target_modules": ["query", "bert.pooler.dense"], "layers_to_transform": [0], "layers_pattern": "layer"}),
    ("bert", {"target_modules": ["query"], "layers_to_transform": []}),
    ("bert", {"target_modules": ["query", "value"], "rank_pattern": {"layer.0.attention.self.query": 2, "value": 5}}),
    ("bert", {"target_modules": ["query", "value"], "alpha_pattern": {r".*\.1\..*": 2, "^value": 7}, "use_rslora": True}),
    ("bert", {"target_modules": ["query"], "init_lora_weights": "gaussian", "lora_dropout": 0.25}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    ("gpt2", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    ("gpt2", {"target_modules": ["mlp.c_proj"], "modules_to_save": ["lm_head"]}),
    ("gpt2 classifier", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("gpt2 classifier", {"target_modules": ["c_fc"], "task_type": "SEQ_CLS"}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2], "layers_pattern": ["layers"]}),
    ("names", {"target_modules": ["q"]}),
    ("names", {"target_modules": "q"}),
    ("names", {"target_modules": ["q"], "exclude_modules": "q"}),
    ("names", {"target_modules": ["q"], "layers_to_transform": [0]}),
    ("names", {"target_modules": ["q", "q2"], "rank_pattern": {"q": 2}, "alpha_pattern": {"2": 3}}),
    ("names", {"target_modules": ["q", "q2"], "modules_to_save": ["aq", "q."]}),
    ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["input_layernorm", "lm_head"]}),
]


@pytest.mark.parametrize(("model_name", "fields"), CHOICES, ids=[f"{name} {fields}" for name, fields in CHOICES])
def test_choice_ranks_and_trainable_parameters_are_pefts(model_name: str, fields: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(MODELS[model_name](), LoraConfig(use_dora=True, r=4, **copy.deepcopy(fields)))
    model = MODELS[model_name]()
    report = bk.apply_dora(model, bk.DoraConfig(r=4, **fields))
    wanted = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in peft_model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, bk.FusedDoraLinear)}
    assert {name: (layer.r, layer.scaling) for name, layer in layers.items()} == wanted
    assert report.replaced == list(layers)

    def plain(name: str) -> str:
        for part in ("base_model.model.", "base_layer.", "modules_to_save.default.", ".default", ".weight"):
            name = name.replace(part, "", 1) if part != ".weight" or "lora_" in name else name
        return name.replace("lora_magnitude_vector", "magnitude")

    theirs = {plain(name): p.shape for name, p in peft_model.named_parameters() if p.requires_grad}
    assert {name: p.shape for name, p in model.named_parameters() if p.requires_grad} == theirs


@pytest.mark.parametrize(("model_name", "fields"), [CHOICES[0], CHOICES[5], CHOICES[16], CHOICES[18]])
def test_the_model_computes_the_same_until_it_is_trained(model_name: str, fields: dict[str, Any]) -> None:
    model = MODELS[model_name]()
    before = logits(model)
    bk.apply_dora(model, bk.DoraConfig(**fields))
    assert relative_error(logits(model), before) <= 1e-6


def test_gaussian_initialisation_is_pefts() -> None:
    model = nn.Sequential(nn.Linear(400, 50))
    bk.apply_dora(model, bk.DoraConfig(r=50, target_modules=["0"], init_lora_weights="gaussian"))
    draws = 50 * model[0].lora_A.detach()
    assert abs(float(draws.std()) - 1) < 0.03  # 20,000 draws: 6 standard errors
    assert abs(float(draws.pow(4).mean()) - 3) < 0.25  # a uniform would have 1.8
    assert not model[0].lora_B.any()


def test_layers_keep_the_weights_mode_and_everything_else_is_frozen() -> None:
    model = bert()
    query = model.bert.encoder.layer[0].attention.self.query
    bk.apply_dora(model, bk.DoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    layer = model.bert.encoder.layer[0].attention.self.query
    assert layer.weight is query.weight
    assert layer.bias is query.bias
    assert not any(module.training for module in model.modules())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trainable} == {"lora_A", "lora_B", "magnitude", "weight", "bias"}
    assert {name for name in trainable if name.endswith(("weight", "bias"))} == {"classifier.weight", "classifier.bias"}


def test_a_saved_module_is_a_copy_so_that_tied_weights_stay() -> None:
    model = gpt2()
    tied = model.lm_head.weight
    assert tied is model.transformer.wte.weight
    bk.apply_dora(model, bk.DoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"]))
    assert model.transformer.wte.weight is tied
    assert not tied.requires_grad
    assert model.lm_head.weight.requires_grad
    assert model.lm_head.weight.data_ptr() != tied.data_ptr()


def test_a_module_to_save_is_never_a_target_whichever_rule_found_it() -> None:
    report = bk.apply_dora(model := Names(), bk.DoraConfig(r=2, target_modules=["q2", "pre_score"], modules_to_save=["score"]))
    assert report.replaced == ["q2"]
    assert report.saved == ["score", "pre_score"]
    assert type(model.pre_score) is nn.Linear
    assert report.skipped["pre_score"] == "in modules_to_save"


# errors ----------------------------------------------------------------------------------------------------------------


def refuses(model: nn.Module, config: bk.DoraConfig, message: str) -> None:
    kinds, flags = [type(module) for module in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message) as raised:
        bk.apply_dora(model, config)
    assert "\n" not in str(raised.value)
    assert [type(module) for module in model.modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not hasattr(model, "dora_config")


BAD: list[tuple[str, dict[str, Any]]] = [
    (r"target_modules must be given", {}),
    (r"matches no module: 'querry' \(nearest: query, ", {"target_modules": ["querry"]}),
    (r"'bert.encoder.layer.7.attention.self.query' \(nearest: bert.encoder.layer.\d.attention.self.query", {
        "target_modules": ["bert.encoder.layer.7.attention.self.query"]}),
    (r"matches no module: 'q_\.\*' ", {"target_modules": "q_.*"}),
    (r"leaves no layer to adapt: bert.encoder.layer.0.attention.self.query: in exclude_modules", {
        "target_modules": ["query"], "exclude_modules": ["query"]}),
    (r"leaves no layer to adapt: classifier: in modules_to_save", {
        "target_modules": ["classifier"], "task_type": "SEQ_CLS"}),
    (r": not in layers_to_transform", {"target_modules": ["query"], "layers_to_transform": [9]}),
    (r"modules_to_save matches no module: 'clasifier' \(nearest: classifier", {
        "target_modules": ["query"], "modules_to_save": ["clasifier"]}),
    (r"bert.embeddings.word_embeddings is a Embedding: only nn.Linear and Conv1D", {
        "target_modules": ["query", "word_embeddings"]}),
    (r"is a BertAttention: only nn.Linear and Conv1D can be adapted", {"target_modules": ["attention"]}),
    (r"fused_slices: .* belongs to a bert model; slices are known for gpt2", {"fused_slices": {"query": ["key"]}}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "fields"), BAD, ids=[message for message, _ in BAD])
def test_a_configuration_that_does_not_fit_is_named_and_changes_nothing(message: str, fields: dict[str, Any]) -> None:
    refuses(bert(), bk.DoraConfig(**fields), message)


def test_adapters_are_not_applied_twice() -> None:
    config = bk.DoraConfig(target_modules=["query"])
    model = bert()
    bk.apply_dora(model, config)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="has DoRA layers already"):
        bk.apply_dora(model, config)
    assert [type(module) for module in model.modules()] == before
    refuses(get_peft_model(bert(), LoraConfig(target_modules=["query"])), config, "was wrapped by PEFT already")


def test_a_bad_weight_late_in_the_model_changes_nothing() -> None:
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.value.weight[5, 2] = float("nan")
    refuses(model, bk.DoraConfig(target_modules=["query", "value"]), r"layer\.1\.attention\.self\.value: .*row 5")


class ScaledLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class RenamedLinear(nn.Linear):
    pass


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaled, self.renamed, self.plain = ScaledLinear(4, 4), RenamedLinear(4, 4), nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.again = self.plain


def test_layers_that_cannot_be_adapted_are_skipped_by_all_linear_and_refused_by_name() -> None:
    report = bk.apply_dora(Odd(), bk.DoraConfig(r=2, target_modules="all-linear"))
    assert report.replaced == ["renamed", "plain"]
    assert "computes something else" in report.skipped["scaled"]
    assert "nn.MultiheadAttention" in report.skipped["attention.out_proj"]
    assert "the same module as plain" in report.skipped["again"]
    refuses(Odd(), bk.DoraConfig(target_modules=["scaled"]), "scaled is a ScaledLinear, which computes something else")
    refuses(Odd(), bk.DoraConfig(target_modules=["out_proj"]), "belongs to nn.MultiheadAttention")
    encoder = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    report = bk.apply_dora(encoder, bk.DoraConfig(r=2, target_modules="all-linear"))
    assert report.replaced == ["0"]
    assert "belongs to nn.TransformerEncoderLayer, which reads its weight" in report.skipped["1.linear1"]
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda *_: None)
    refuses(hooked, bk.DoraConfig(target_modules=["0"]), "0 has hooks or a forward of its own")
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(4, 4))
    refuses(meta, bk.DoraConfig(target_modules=["0"]), "0 has its weight on the meta device: load the weights first")


def test_a_rank_larger_than_the_layer_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"r=17 is larger than the smaller side"):
        bk.apply_dora(bert(), bk.DoraConfig(r=17, target_modules=["query"]))


# the report ------------------------------------------------------------------------------------------------------------


def test_the_report_accounts_for_every_linear_layer() -> None:
    model = bert()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    report = bk.apply_dora(model, bk.DoraConfig(r=4, target_modules=["query", "no_such_name"], task_type="SEQ_CLS"))
    assert set(report.replaced) | set(report.skipped) - {"no_such_name"} == linear
    assert report.skipped["bert.pooler.dense"] == "not in target_modules"
    assert report.skipped["no_such_name"] == "in target_modules, but the model has no such module"
    assert report.saved == ["classifier"]
    assert (report.directions, report.magnitudes, report.other) == (2 * 2 * 4 * 16, 2 * 16, 3 * 16 + 3)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "what", "details"]
    assert [line.split()[0] for line in lines[2:-1]] == [
        *report.replaced, "classifier", *(name for name in report.skipped if name != "classifier"),
    ]  # fmt: skip
    assert lines[2].split()[:2] == ["bert.encoder.layer.0.attention.self.query", "DoRA"]
    assert "FusedDoraLinear [16, 16] r=4 scaling=2" in lines[2]
    assert lines[-1] == "2 DoRA layers; 339 trainable parameters: directions 256, magnitudes 32, other 51"


# parameter groups ------------------------------------------------------------------------------------------------------


def test_split_parameters_covers_every_trainable_parameter_once_in_module_order() -> None:
    model = bert()
    bk.apply_dora(model, bk.DoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))
    direction, magnitude = bk.split_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [names[id(p)] for p in magnitude] == [name for name in trainable if name.endswith(".magnitude")]
    assert [names[id(p)] for p in direction] == [name for name in trainable if not name.endswith(".magnitude")]
    assert len(magnitude) == 4
    model.bert.encoder.layer[0].attention.self.query.magnitude.requires_grad_(False)
    assert len(bk.split_parameters(model)[1]) == 3


def test_split_parameters_knows_pefts_magnitudes() -> None:
    model = get_peft_model(bert(), LoraConfig(use_dora=True, target_modules=["query"], task_type="SEQ_CLS"))
    direction, magnitude = bk.split_parameters(model)
    assert [p.shape for p in magnitude] == [(16,), (16,)]
    assert len(direction) + 2 == sum(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="the model has no magnitudes"):
        bk.split_parameters(bert())


# merging ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bert, gpt2, gpt2_classifier])
def test_merging_leaves_a_plain_model_that_computes_the_same(make: Callable[[], nn.Module]) -> None:
    model = make()
    original = {name: type(module) for name, module in model.named_modules()}
    start = logits(model)
    task_type = None if make is gpt2 else "SEQ_CLS"
    bk.apply_dora(model, bk.DoraConfig(r=4, target_modules="all-linear", task_type=task_type))
    randomize(model)
    adapted = logits(model)
    head = None if make is gpt2 else next(m for n, m in model.named_modules() if n in ("classifier", "score"))
    merged = bk.merge_and_unload(model)
    assert merged is model
    assert {name: type(module) for name, module in merged.named_modules()} == original
    assert relative_error(start, adapted) > 1e-2
    assert relative_error(logits(merged), adapted) <= 1e-5
    assert merged.state_dict().keys() == make().state_dict().keys()
    assert not any("bidora" in type(module).__module__ for module in merged.modules())
    assert not any("dora" in name for module in merged.modules() for name in vars(module))
    assert head is None or any(module is head for module in merged.modules())
    fresh = make()
    fresh.load_state_dict(merged.state_dict())
    if make is not gpt2:
        assert torch.equal(logits(fresh), logits(merged))


@pytest.mark.parametrize("fields", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}])
def test_a_merged_model_with_a_head_that_was_tied_survives_a_round_trip(fields: dict[str, Any], tmp_path: Path) -> None:
    model = gpt2()
    bk.apply_dora(model, bk.DoraConfig(**({"r": 4, "target_modules": ["c_attn"]} | fields)))
    randomize(model)
    merged = bk.merge_and_unload(model)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path).eval()), logits(merged))
    untouched = gpt2()
    bk.apply_dora(untouched, bk.DoraConfig(target_modules=["c_attn"]))
    assert bk.merge_and_unload(untouched).config.tie_word_embeddings is True


def test_merging_agrees_with_peft() -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    peft_model = get_peft_model(bert(), LoraConfig(use_dora=True, r=4, target_modules=["query", "dense"]))
    randomize(peft_model)
    model = bert()
    bk.apply_dora(model, bk.DoraConfig(r=4, target_modules=["query", "dense"]))
    tensors = get_peft_model_state_dict(peft_model)
    for name, layer in model.named_modules():
        if isinstance(layer, bk.FusedDoraLinear):
            prefix = f"base_model.model.{name}."
            with torch.no_grad():
                layer.lora_A.copy_(tensors[prefix + "lora_A.weight"])
                layer.lora_B.copy_(tensors[prefix + "lora_B.weight"])
                layer.magnitude.copy_(tensors[prefix + "lora_magnitude_vector"])
    set_peft_model_state_dict(peft_model, tensors)
    ours, theirs = bk.merge_and_unload(model).state_dict(), peft_model.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    assert max(relative_error(ours[name], theirs[name]) for name in ours if ours[name].is_floating_point()) <= 1e-6


def test_merging_a_bare_layer_returns_a_linear_and_nothing_to_merge_is_an_error() -> None:
    layer = bk.FusedDoraLinear.from_linear(nn.Linear(4, 3), r=2)
    assert type(bk.merge_and_unload(layer)) is nn.Linear
    with pytest.raises(ValueError, match="has no DoRA layers to merge"):
        bk.merge_and_unload(bert())


def test_safe_merging_refuses_what_is_not_finite_and_changes_nothing() -> None:
    model = bert()
    bk.apply_dora(model, bk.DoraConfig(r=4, target_modules=["query", "value"]))
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.value.magnitude[0] = float("inf")
    with pytest.raises(ValueError, match=r"layer\.1\.attention\.self\.value is not finite; nothing was merged"):
        bk.merge_and_unload(model, safe_merge=True)
    assert len(bk.split_parameters(model)[1]) == 4


def test_merging_merged_layers_is_the_same() -> None:
    model = bert()
    bk.apply_dora(model, bk.DoraConfig(r=4, target_modules=["query"]))
    randomize(model)
    twin = copy.deepcopy(model)
    for layer in twin.bert.encoder.layer:
        layer.attention.self.query.merge()
    ours, theirs = bk.merge_and_unload(model).state_dict(), bk.merge_and_unload(twin).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_whole_model_can_be_copied_and_its_state_saved() -> None:
    model = bert()
    bk.apply_dora(model, bk.DoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    randomize(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = bert(seed=3)
    bk.apply_dora(other, bk.DoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(logits(other), logits(model))


def test_a_child_whose_weight_its_parent_reads_is_refused() -> None:
    """WavLM's attention hands its projections' weights to a function: an adapter there would never be asked."""
    config = transformers.WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8,), conv_stride=(2,),
        conv_kernel=(3,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = transformers.WavLMModel(config)
    refuses(model, bk.DoraConfig(target_modules=["q_proj"]), "belongs to WavLMAttention, which reads its weight")
    report = bk.apply_dora(model, bk.DoraConfig(r=2, target_modules="all-linear"))
    assert not any("attention" in name and name.endswith("_proj") for name in report.replaced)
    assert any(name.endswith("intermediate_dense") for name in report.replaced)
