"""An adapter folder that does not fit is refused in one readable line, and changes nothing."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor, nn

import bidora_kernels as bk

from .adapter_cases import CONFIG, WEIGHTS, edit, refuses, state, trained, without
from .tiny_models import bert, logits


def configure(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query."


def with_value(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {key: value}


def poisoned(key: str, value: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[key].view(-1)[-1] = value
        return tensors

    return change


BAD_WEIGHTS = {
    "missing": (without(QUERY + "lora_B.weight"), rf"lacks key '{QUERY}lora_B\.weight'$"),
    "missing magnitude": (without(QUERY + "lora_magnitude_vector"), rf"lacks key '{QUERY}lora_magnitude_vector'$"),
    "missing head": (without("base_model.model.classifier.bias"), r"lacks key 'base_model\.model\.classifier\.bias'$"),
    "no magnitudes": (
        lambda t: {k: v for k, v in t.items() if not k.endswith("vector")}, "has no magnitudes.*plain LoRA adapter",
    ),
    "empty": (lambda t: {}, "lacks key .* and 19 more"),
    "unexpected": (with_value("base_model.model.bert.pooler.dense.lora_A.weight", torch.ones(4, 16)), "unexpected key .*pooler"),
    "both magnitudes": (with_value(QUERY + "lora_magnitude_vector.weight", torch.ones(16)), "has both .*query"),
    "length": (
        with_value(QUERY + "lora_magnitude_vector", torch.ones(9)), rf"^{QUERY}lora_magnitude_vector must be \[16\], got \[9\]$",
    ),
    "rank": (with_value(QUERY + "lora_A.weight", torch.ones(5, 16)), r"lora_A\.weight must be \[4, 16\], got \[5, 16\]"),
    "matrix": (with_value(QUERY + "lora_magnitude_vector", torch.ones(1, 16)), r"must be \[16\], got \[1, 16\]"),
    "nan": (poisoned(QUERY + "lora_A.weight", float("nan")), rf"^{QUERY}lora_A\.weight holds NaN or inf$"),
    "inf": (poisoned(QUERY + "lora_magnitude_vector", float("inf")), "lora_magnitude_vector holds NaN or inf"),
    "nan in head": (poisoned("base_model.model.classifier.weight", float("nan")), "classifier.weight holds NaN or inf"),
    "integers": (
        with_value(QUERY + "lora_B.weight", torch.ones(16, 4, dtype=torch.int32)),
        "lora_B.weight must be fp64, fp32, bf16 or fp16, got int32",
    ),
    "overflow": (with_value(QUERY + "lora_B.weight", torch.full((16, 4), 1e300, dtype=torch.float64)), "holds NaN or inf"),
}  # fmt: skip


@pytest.mark.parametrize("fresh", [True, False], ids=["plain model", "model with layers"])
@pytest.mark.parametrize("bad", BAD_WEIGHTS)
def test_bad_weights_are_named_and_change_nothing(bad: str, fresh: bool, tmp_path: Path) -> None:
    change, message = BAD_WEIGHTS[bad]
    bk.save_adapter(trained(task_type="SEQ_CLS"), tmp_path)
    edit(tmp_path, change)
    refuses(bert() if fresh else trained(task_type="SEQ_CLS"), tmp_path, message)


BAD_CONFIGS = {
    "lora": ({"use_dora": False}, "use_dora must be true, got False"),
    "other method": ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
    "rank": ({"r": 0}, "r must be a positive integer, got 0"),
    "rank as text": ({"r": "4"}, "r must be a positive integer, got '4'"),
    "alpha": ({"lora_alpha": float("nan")}, "lora_alpha must be finite, got nan"),
    "regex": ({"target_modules": "(query"}, "is not a regular expression"),
    "no match": ({"target_modules": ["q_proj"]}, "target_modules matches no module: 'q_proj' .nearest: query"),
    "bias": ({"bias": "all"}, "bias='all' is not implemented"),
    "trainable tokens": ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] is not implemented"),
    "replication": ({"layer_replication": [[0, 1]]}, "layer_replication=.* is not implemented"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not implemented"),
}


@pytest.mark.parametrize("bad", BAD_CONFIGS)
def test_bad_configurations_are_named_and_change_nothing(bad: str, tmp_path: Path) -> None:
    fields, message = BAD_CONFIGS[bad]
    bk.save_adapter(trained(), tmp_path)
    configure(tmp_path, **fields)
    refuses(bert(), tmp_path, message)


DIFFERENT = {
    "r": ({"r": 8}, {}, "query has r=4, the adapter r=8"),
    "alpha": ({"lora_alpha": 3}, {}, "query has lora_alpha=8, the adapter lora_alpha=3"),
    "rslora": ({"use_rslora": True}, {}, "use_rslora=False, the adapter use_rslora=True"),
    "targets": ({"target_modules": ["query"]}, {}, "lacks key .*value"),
    "head in the file": ({"task_type": "SEQ_CLS"}, {}, "classifier is in the modules_to_save of the adapter only"),
    "head in the model": ({}, {"task_type": "SEQ_CLS"}, "classifier is in the modules_to_save of the model only"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_model_with_other_layers_refuses(name: str, tmp_path: Path) -> None:
    saved, own, message = DIFFERENT[name]
    bk.save_adapter(trained(**saved), tmp_path)
    refuses(trained(**own), tmp_path, message)


def test_a_merged_model_refuses(tmp_path: Path) -> None:
    model = trained()
    bk.save_adapter(model, tmp_path)
    model.bert.encoder.layer[1].attention.self.value.merge()
    refuses(model, tmp_path, "layer.1.attention.self.value is merged")


def with_header(folder: Path, header: bytes, data: bytes = b"") -> None:
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    bk.save_adapter(trained(), tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    entry = re.search(rb'"[^"]*layer\.0[^"]*query\.lora_A\.weight":\{[^}]*\}', header)
    assert entry
    with_header(tmp_path, header[:-1] + b"," + entry.group() + b"}", content[8 + length :])
    assert load_file(tmp_path / WEIGHTS)  # safetensors itself takes it
    refuses(bert(), tmp_path, "layer.0.attention.self.query.lora_A.weight' is there twice")


def test_duplicate_fields_are_refused(tmp_path: Path) -> None:
    bk.save_adapter(trained(), tmp_path)
    text = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text('{"lora_alpha": 1000,' + text.lstrip()[1:])
    refuses(bert(), tmp_path, "adapter_config.json: 'lora_alpha' is there twice")


HOSTILE = {
    "nothing": b"",
    "short": b"\x05\x00",
    "huge header": (2**62).to_bytes(8, "little") + b"{}",
    "negative": b"\xff" * 8,
    "not json": (4).to_bytes(8, "little") + b"oops",
    "not utf-8": (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "deep": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "cut off": save({QUERY + "lora_A.weight": torch.ones(4, 16)})[:-8],
    "a pickle": b"\x80\x04\x95" + b"\x00" * 40,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_weights_are_refused(name: str, tmp_path: Path) -> None:
    bk.save_adapter(trained(), tmp_path)
    (tmp_path / WEIGHTS).write_bytes(HOSTILE[name])
    refuses(bert(), tmp_path, "^adapter_model.safetensors: ")


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_edited_file_half_loads(data: st.DataObject, tmp_path: Path) -> None:
    """Whatever is changed in either file: it loads with finite values, or is refused in one line and changes nothing."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))

    model = make()
    bk.apply_dora(model, bk.DoraConfig(r=1, target_modules=["0"], modules_to_save=["1"]))
    bk.save_adapter(model, tmp_path)
    path = tmp_path / data.draw(st.sampled_from([WEIGHTS, CONFIG]))
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.sampled_from([start, start + 1, start + 8, len(content)]))
    inserted = data.draw(st.binary(max_size=9) | st.sampled_from([b"1e999", b"-1", b'"', b"}", b"[", b"NaN", b"null"]))
    path.write_bytes(content[:start] + inserted + content[end:])
    model = make()
    before = state(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bk.load_adapter(model, tmp_path)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message
        assert [type(module) for module in model] == [nn.Linear, nn.Linear]
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    else:
        assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"LORA"', b"\xff\xfe", b"[" * 100_000, b'{"r": 1e999}'])
def test_damaged_configurations_are_refused(content: bytes, tmp_path: Path) -> None:
    bk.save_adapter(trained(), tmp_path)
    (tmp_path / CONFIG).write_bytes(content)
    refuses(bert(), tmp_path, "^adapter_config.json: ")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    bk.save_adapter(trained(), tmp_path)
    (tmp_path / name).unlink()
    refuses(bert(), tmp_path, f"there is no {name} in ", FileNotFoundError)
    refuses(bert(), tmp_path / "nowhere", "there is no adapter folder ", FileNotFoundError)


# links -----------------------------------------------------------------------------------------------------------------


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    model = trained()
    bk.save_adapter(model, tmp_path / "real")
    (tmp_path / "real" / WEIGHTS).rename(tmp_path / "real" / "kept.safetensors")
    (tmp_path / "real" / WEIGHTS).symlink_to("kept.safetensors")
    (tmp_path / "alias").symlink_to(tmp_path / "real")  # the folder itself may be a link
    loaded = bert()
    bk.load_adapter(loaded, tmp_path / "alias")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_links_out_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    bk.save_adapter(trained(), folder)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(f"../{name}")
    refuses(bert(), folder, f"{name} in .* is a link that leads out of the folder")


def test_a_hub_cache_snapshot_may_link_into_its_blobs(tmp_path: Path) -> None:
    model = trained()
    repository = tmp_path / "models--someone--adapter"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    bk.save_adapter(model, snapshot)
    blobs.mkdir()
    for name in (WEIGHTS, CONFIG):
        (snapshot / name).rename(blobs / f"sha-{name}")
        (snapshot / name).symlink_to(f"../../blobs/sha-{name}")
    loaded = bert()
    bk.load_adapter(loaded, snapshot)
    assert torch.equal(logits(loaded), logits(model))
    (blobs / f"sha-{WEIGHTS}").rename(repository / "elsewhere")
    (blobs / f"sha-{WEIGHTS}").symlink_to("../elsewhere")
    refuses(bert(), snapshot, "is a link that leads out of the folder")
