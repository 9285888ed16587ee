"""What DoraConfig accepts, and how it reads the fields of an adapter_config.json."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, TaskType
from peft.utils.other import get_pattern_key

from bidora_kernels import DoraConfig
from bidora_kernels.config import TASK_TYPES

PEFT_FIELDS = LoraConfig(use_dora=True, target_modules=["query"]).to_dict()


def test_defaults_are_pefts() -> None:
    ours, theirs = DoraConfig(), LoraConfig()
    for field in (
        "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "rank_pattern", "alpha_pattern",
        "modules_to_save", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias", "task_type",
        "base_model_name_or_path",
    ):  # fmt: skip
        assert getattr(ours, field) == getattr(theirs, field), field
    assert tuple(TaskType) == TASK_TYPES


WRONG: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "r must be a positive integer, got 0", {"r": 0}),
    (ValueError, "r must be a positive integer, got -3", {"r": -3}),
    (TypeError, "r must be a positive integer, got 8.0", {"r": 8.0}),
    (TypeError, "r must be a positive integer, got True", {"r": True}),
    (TypeError, "lora_alpha must be a number, got '16'", {"lora_alpha": "16"}),
    (ValueError, "lora_alpha must be finite, got inf", {"lora_alpha": float("inf")}),
    (ValueError, r"lora_dropout must be in \[0, 1\), got 1.0", {"lora_dropout": 1.0}),
    (ValueError, r"lora_dropout must be in \[0, 1\), got nan", {"lora_dropout": float("nan")}),
    (TypeError, "lora_dropout must be a number, got None", {"lora_dropout": None}),
    (TypeError, "use_rslora must be True or False, got 1", {"use_rslora": 1}),
    (TypeError, "target_modules must be a list of names, got 3", {"target_modules": 3}),
    (TypeError, "target_modules must be a list of names, got None in it", {"target_modules": ["a", None]}),
    (ValueError, "target_modules must name at least one module", {"target_modules": []}),
    (ValueError, r"target_modules: '\(q' is not a regular expression", {"target_modules": "(q"}),
    (ValueError, r"exclude_modules: '\*' is not a regular expression", {"exclude_modules": "*"}),
    (TypeError, "modules_to_save must be a list of names, got 'classifier'", {"modules_to_save": "classifier"}),
    (ValueError, r"rank_pattern\['q'\] must be a positive integer, got 0", {"rank_pattern": {"q": 0}}),
    (TypeError, r"alpha_pattern\['q'\] must be a number, got None", {"alpha_pattern": {"q": None}}),
    (TypeError, "rank_pattern must be a dict", {"rank_pattern": [("q", 4)]}),
    (ValueError, r"alpha_pattern: '\[' is not a regular expression", {"alpha_pattern": {"[": 4}}),
    (TypeError, "layers_to_transform must be an index", {"layers_to_transform": "12"}),
    (ValueError, "layers_pattern needs layers_to_transform", {"layers_pattern": "layer"}),
    (ValueError, "layers_to_transform needs a list", {"layers_to_transform": [1], "target_modules": ".*"}),
    (ValueError, "task_type must be one of SEQ_CLS, .*, got 'CLS'", {"task_type": "CLS"}),
    (ValueError, "bias='lora_only' is not implemented", {"bias": "lora_only"}),
    (ValueError, "init_lora_weights='olora' is not implemented", {"init_lora_weights": "olora"}),
    (ValueError, "init_lora_weights=False is not implemented", {"init_lora_weights": False}),
    (ValueError, r"fused_slices\['c_attn'\] must name some of query, key, value", {"fused_slices": {"c_attn": ["q"]}}),
    (ValueError, r"fused_slices\['c_attn'\] must name some of", {"fused_slices": {"c_attn": []}}),
    (TypeError, "unexpected keyword argument 'rank'", {"rank": 8}),
]


@pytest.mark.parametrize(("error", "message", "fields"), WRONG, ids=[str(fields) for _, _, fields in WRONG])
def test_wrong_fields_are_named(error: type[Exception], message: str, fields: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        DoraConfig(**fields)


def test_collections_become_lists() -> None:
    config = DoraConfig(
        target_modules={"b", "a"}, exclude_modules=("c",), task_type=TaskType.SEQ_CLS, layers_to_transform=range(2)
    )
    assert config.target_modules == ["a", "b"]
    assert config.exclude_modules == ["c"]
    assert config.layers_to_transform == [0, 1]
    assert config.task_type == "SEQ_CLS"
    assert type(config.task_type) is str
    assert DoraConfig(fused_slices={"c_attn": ("value", "query")}).fused_slices == {"c_attn": ["query", "value"]}


def test_a_configuration_does_not_share_its_arguments() -> None:
    names, ranks = ["query"], {"query": 2}
    config = DoraConfig(target_modules=names, rank_pattern=ranks)
    names.append("value")
    ranks["value"] = 3
    assert config.target_modules == ["query"]
    assert config.rank_pattern == {"query": 2}


def test_task_types_imply_heads() -> None:
    assert DoraConfig(task_type="SEQ_CLS", modules_to_save=["score", "pooler"]).heads == ["score", "pooler", "classifier"]
    assert DoraConfig(task_type="QUESTION_ANS").heads == ["qa_outputs"]
    assert DoraConfig(task_type="CAUSAL_LM").heads == []


NAMES = st.lists(st.sampled_from(["q", "v", "0", "1", "layer", "ab", "b"]), min_size=1, max_size=4).map(".".join)


@settings(deadline=None)
@example(patterns=["b"], name="ab")
@example(patterns=["q|v"], name="layer.v")
@given(patterns=st.lists(NAMES | st.sampled_from(["^q", "^layer.0", "la.*", r"\d", "q|v"]), max_size=4), name=NAMES)
def test_patterns_match_as_in_peft(patterns: list[str], name: str) -> None:
    config = DoraConfig(rank_pattern={pattern: 10 + index for index, pattern in enumerate(patterns)}, r=3)
    assert config.rank_of(name) == config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), 3)


def test_every_field_of_peft_is_known() -> None:
    DoraConfig.from_dict(PEFT_FIELDS)  # a warning would be an unknown field with a value


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", sorted(PEFT_FIELDS))
def test_no_field_of_peft_is_passed_over_in_silence(name: str) -> None:
    """Each field with a value of its own either is taken over, or says nothing about the layers, or is refused by name."""
    descriptive = {"auto_mapping", "revision", "peft_version", "inference_mode", "fan_in_fan_out", "qalora_group_size"}
    values = {
        "r": 2, "lora_alpha": 3, "lora_dropout": 0.5, "target_modules": ["a"], "exclude_modules": ["a"], "use_rslora": True,
        "rank_pattern": {"a": 1}, "alpha_pattern": {"a": 1}, "modules_to_save": ["a"], "layers_to_transform": [1],
        "init_lora_weights": "gaussian", "task_type": "CAUSAL_LM", "base_model_name_or_path": "b",
    }  # fmt: skip
    if name in values:
        config = DoraConfig.from_dict(PEFT_FIELDS | {name: values[name]})
        assert getattr(config, name) == values[name]
    elif name in descriptive:
        assert DoraConfig.from_dict(PEFT_FIELDS | {name: "other"}) == DoraConfig.from_dict(PEFT_FIELDS)
    else:
        with pytest.raises(ValueError, match=name):
            DoraConfig.from_dict(PEFT_FIELDS | {name: "other"})


@pytest.mark.parametrize("value", [0, 1, None, "true", False])
def test_a_file_without_dora_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="use_dora must be true"):
        DoraConfig.from_dict(PEFT_FIELDS | {"use_dora": value})


def test_unknown_fields_with_a_value_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="unknown fields of the adapter's configuration are ignored: use_next_year"):
        config = DoraConfig.from_dict(PEFT_FIELDS | {"use_next_year": True})
    assert config == DoraConfig.from_dict(PEFT_FIELDS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=50)
@given(name=st.sampled_from(sorted(PEFT_FIELDS)), value=JSON)
def test_no_value_of_a_file_gets_past_the_checks(name: str, value: Any) -> None:
    try:
        config = DoraConfig.from_dict(PEFT_FIELDS | {name: value})
    except (TypeError, ValueError):
        return
    assert isinstance(config.rank_of("layer.0.query"), int)
    assert config.rank_of("layer.0.query") > 0
    assert 0.0 <= config.lora_dropout < 1.0


@pytest.mark.parametrize("value", [False, "orthogonal"])
def test_a_file_may_have_begun_in_another_way(value: object) -> None:
    """Its own values take the place of any beginning, where the base weights stayed what they were."""
    assert DoraConfig.from_dict(PEFT_FIELDS | {"init_lora_weights": value}) == DoraConfig.from_dict(
        PEFT_FIELDS | {"init_lora_weights": True}
    )
