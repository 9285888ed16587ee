from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bidora_kernels.bilevel.sama import kappa
from bidora_kernels.recipes import UserError
from bidora_kernels.recipes.checkpoint import load_checkpoint
from bidora_kernels.recipes.models import export_merged
from bidora_kernels.recipes.progress import Silent
from bidora_kernels.recipes.results import closing_lines, compare, comparison_lines, predict
from bidora_kernels.recipes.runs import METRIC_FIELDS, RunFolder
from bidora_kernels.recipes.settings import TrainSettings
from bidora_kernels.recipes.train import NonFinite, Training, train

from .conftest import change_weights

TINY: dict[str, Any] = {
    "task": "tsv", "steps": 10, "retrain_steps": 6, "batch_size": 8, "max_length": 16, "lr": 1e-2, "upper_lr": 1e-2,
    "device": "cpu",
}  # fmt: skip


@pytest.fixture
def settings(tiny_model: Path, tiny_data: Path):
    def make(**changes: Any) -> TrainSettings:
        return TrainSettings(**{"model": str(tiny_model), "data_dir": str(tiny_data), **TINY, **changes})

    return make


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path) -> dict[str, RunFolder]:
    """A finished run of every method."""
    runs = {}
    for method in ("full", "lora", "dora", "bidora"):
        if method == "lora":
            pytest.importorskip("peft", reason="the extra [peft] is not installed")
        runs[method] = RunFolder(tmp_path_factory.mktemp("runs") / method)
        changes = {"method": method, "model": str(tiny_model), "data_dir": str(tiny_data), "eval_every": 5}
        train(TrainSettings(**{**TINY, **changes}), runs[method].path)
    return runs


@pytest.mark.parametrize("method", ["full", "lora", "dora", "bidora"])
def test_a_run_leaves_its_folder_complete(finished: dict[str, RunFolder], method: str) -> None:
    run = finished[method]
    summary = run.read_summary()
    phases = {"search": 10, "retrain": 6} if method == "bidora" else {"train": 16}
    assert summary["steps"] == phases
    assert summary["method"] == method
    assert 0 <= summary["score"] <= 1
    assert summary["trainable"]["head"] == 16 * 3 + 3
    assert summary["trainable"]["directions"] == (0 if method == "full" else 2 * 2 * 2 * 16 * 4)
    assert summary["trainable"]["magnitudes"] == (2 * 2 * 16 if "dora" in method else 0)
    assert len(summary["data_sha256"]) == 64
    assert {path.name for path in run.path.iterdir()} == {
        "summary.json", "metrics.jsonl", "checkpoints", "curves.png", "model" if method == "full" else "adapter",
    }  # fmt: skip
    assert run.curves.read_bytes().startswith(b"\x89PNG")

    lines = run.read_metrics()
    assert all(set(METRIC_FIELDS) < set(line) and line["schema_version"] == 1 for line in lines)
    trained = [line for line in lines if line["train_loss"] is not None]
    assert [(line["phase"], line["step"]) for line in trained] == [(name, k + 1) for name, n in phases.items() for k in range(n)]
    tested = [line for line in lines if line["test_metric"] is not None]
    assert [(line["phase"], line["step"]) for line in tested] == (
        [("search", 5), ("search", 10), ("retrain", 5), ("retrain", 6)]
        if method == "bidora"
        else [("train", 5), ("train", 10), ("train", 15), ("train", 16)]
    )
    assert tested[-1]["test_metric"] == summary["score"]
    searched = [line for line in trained if line["phase"] == "search"]
    assert any(line["hypergradient_norm"] > 0 for line in searched if line["hypergradient_norm"] is not None) == (
        method == "bidora"
    )
    assert any(line["validation_loss"] is not None for line in searched) == (method == "bidora")
    text = "\n".join(closing_lines(summary, run))
    assert f"{summary['score']:.4f}" in text
    assert str(run.path) in text


@pytest.mark.parametrize("method", ["full", "lora", "dora", "bidora"])
def test_predictions_score_what_the_run_reported(finished: dict[str, RunFolder], method: str, tiny_data: Path) -> None:
    rows = [line.split("\t") for line in (tiny_data / "test.tsv").read_text().splitlines()]
    predictions = predict(finished[method].path, [text for _, text in rows], batch_size=5)
    right = sum(prediction["label"] == label for prediction, (label, _) in zip(predictions, rows, strict=True))
    assert right / len(rows) == finished[method].read_summary()["score"]
    assert all(0 < prediction["probability"] <= 1 for prediction in predictions)


@pytest.mark.parametrize("method", ["full", "lora", "dora", "bidora"])
def test_an_export_loads_anywhere_and_predicts_the_same(finished: dict[str, RunFolder], method: str, tmp_path: Path) -> None:
    import transformers

    export_merged(finished[method], tmp_path / "merged")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    texts = ["wheat crop rose", "the bank said", "a port report of the ship"]
    with torch.no_grad():
        probabilities = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1)
    for row, prediction in zip(probabilities, predict(finished[method].path, texts), strict=True):
        assert model.config.id2label[int(row.argmax())] == prediction["label"]
        assert float(row.max()) == pytest.approx(prediction["probability"], rel=1e-4)
    with pytest.raises(UserError, match="not an empty folder"):
        export_merged(finished[method], tmp_path / "merged")


def test_peft_loads_the_adapter_with_its_head(finished: dict[str, RunFolder], tiny_model: Path) -> None:
    peft = pytest.importorskip("peft", reason="the extra [peft] is not installed")
    import transformers

    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    model = peft.PeftModel.from_pretrained(base, str(finished["bidora"].adapter)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    with torch.no_grad():
        logits = model(**tokenizer(["wheat crop rose"], return_tensors="pt")).logits
    (prediction,) = predict(finished["bidora"].path, ["wheat crop rose"])
    assert float(logits.softmax(-1).max()) == pytest.approx(prediction["probability"], rel=1e-4)


def test_comparison_groups_runs_over_seeds(finished: dict[str, RunFolder], settings: Any, tmp_path: Path) -> None:
    train(settings(method="dora", seed=1), tmp_path / "dora1")
    table = compare([run.path for run in finished.values()] + [tmp_path / "dora1"])
    groups = {group["method"]: group for group in table["groups"]}
    scores = [row["score"] for row in table["runs"] if row["method"] == "dora"]
    assert groups["dora"]["seeds"] == [0, 1]
    assert groups["dora"]["mean"] == pytest.approx(sum(scores) / 2)
    assert groups["dora"]["spread"] == pytest.approx(abs(scores[0] - scores[1]) / math.sqrt(2))
    assert groups["bidora"]["spread"] is None
    assert any(str(tmp_path / "dora1") in line for line in comparison_lines(table))


def test_a_comparison_keeps_corpora_apart_and_counts_a_seed_once(settings: Any, tiny_data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.tsv").write_text((tiny_data / "train.tsv").read_text())
    (other / "test.tsv").write_text("grain\twheat\nmoney\tbank\n")
    shorter = {"method": "dora", "steps": 2, "retrain_steps": 0}
    for name, changes in {"a": {}, "again": {}, "b": {"seed": 1}, "c": {"data_dir": str(other)}}.items():
        train(settings(**shorter, **changes), tmp_path / name)
    table = compare([tmp_path / name for name in ("a", "again", "b", "c")])
    assert [group["seeds"] for group in table["groups"]] == [[0, 1], [0]]
    assert [row["repeats"] for row in table["runs"]] == [None, str(tmp_path / "a"), None, None]
    assert f"not counted: {tmp_path / 'again'} repeats {tmp_path / 'a'}" in comparison_lines(table)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["full", "lora", "dora", "bidora"])
def test_a_16_bit_checkpoint_trains_in_fp32(
    dtype: torch.dtype, method: str, settings: Any, tiny_model: Path, tmp_path: Path
) -> None:
    if method == "lora":
        pytest.importorskip("peft", reason="the extra [peft] is not installed")
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    change_weights(base, lambda name, value: value.to(dtype))
    for precision in ("fp32", "bf16"):
        train(settings(method=method, model=str(base), steps=2, retrain_steps=0, precision=precision), tmp_path / precision)
    run = RunFolder(tmp_path / "fp32")
    file = run.model / "model.safetensors" if method == "full" else run.adapter / "adapter_model.safetensors"
    assert {value.dtype for value in load_file(file).values()} == {torch.float32}


def test_a_head_for_other_labels_starts_anew(settings: Any, tiny_model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=7, problem_type="regression")
    model.save_pretrained(base)
    summary = train(settings(model=str(base), steps=2, retrain_steps=1), tmp_path / "run")
    assert "the pretrained classifier had another size, and starts anew for this task's labels" in summary["warnings"]
    assert summary["trainable"]["head"] == 16 * 3 + 3
    assert len(predict(tmp_path / "run", ["wheat"])) == 1


def test_an_encoder_of_another_size_is_refused(settings: Any, tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(UserError, match="has another size than its configuration says"):
        train(settings(model=str(base)), tmp_path / "run")


def test_positions_behind_the_paddings_are_counted(settings: Any, tiny_model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base = tmp_path / "roberta"
    shutil.copytree(tiny_model, base)
    words = len((base / "vocab.txt").read_text().splitlines())
    config = transformers.RobertaConfig(
        vocab_size=words,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=34,
        pad_token_id=0,
    )
    transformers.RobertaModel(config).save_pretrained(base)
    with pytest.raises(UserError, match="at most the model's 33 positions, got 34"):
        train(settings(model=str(base), max_length=34), tmp_path / "run")


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_a_target_that_no_layer_has_is_named(method: str, settings: Any, tmp_path: Path) -> None:
    if method == "lora":
        pytest.importorskip("peft", reason="the extra [peft] is not installed")
    with pytest.raises(UserError, match=r"no layer is called 'valeu', which target_modules names \(nearest: value"):
        train(settings(method=method, target_modules=("query", "valeu")), tmp_path / "run")


def test_a_base_that_changed_is_not_predicted_with(settings: Any, tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    train(settings(model=str(base), steps=2, retrain_steps=0), tmp_path / "run")
    change_weights(base, lambda name, value: value * 2 if "value" in name else value)
    with pytest.raises(UserError, match="differ from those that"):
        predict(tmp_path / "run", ["wheat"])


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(settings: Any, tmp_path: Path) -> None:
    adapters = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(settings(seed=seed), tmp_path / name)
        adapters.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1] != adapters[2]


def test_magnitudes_learn_in_the_search_and_rest_in_the_retraining(settings: Any, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    training = Training(settings(), run, Silent())
    start = {name: p.detach().clone() for name, p in training.trained.magnitudes.items()}
    run.start()
    seen: dict[str, dict[str, torch.Tensor]] = {}

    class Watch(Silent):
        def step(self, phase: str, step: int, *numbers: object) -> None:
            seen[phase] = {name: p.detach().clone() for name, p in training.trained.magnitudes.items()}

    training.progress = Watch()
    from bidora_kernels.recipes.train import _run

    _run(training, 0)
    for name, value in start.items():
        assert not torch.equal(value, seen["search"][name])
        assert torch.equal(seen["search"][name], seen["retrain"][name])


def test_the_retraining_starts_from_where_it_is_told(settings: Any, tmp_path: Path) -> None:
    """With one retraining step at a rate of 1e-30 the directions stay where the retraining started."""
    kept: dict[str, dict[str, torch.Tensor]] = {}
    for start in ("init", "search"):
        run = RunFolder(tmp_path / start)
        train(settings(retrain_from=start, retrain_steps=1, retrain_lr=1e-30), run.path)
        state = load_checkpoint(run.checkpoint)
        kept[start] = {name: state["parameters"][name] for name in state["initial"]}
        if start == "init":
            assert all(torch.allclose(value, state["initial"][name], rtol=0, atol=1e-20) for name, value in kept["init"].items())
    assert any(not torch.equal(value, kept["init"][name]) for name, value in kept["search"].items())
    assert any("classifier" in name for name in kept["init"])


def test_without_a_validation_split_magnitudes_stay_and_nothing_is_searched(settings: Any, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    summary = train(settings(partition=1.0, retrain_from="init"), run.path)
    assert summary["steps"] == {"retrain": 6}
    assert summary["trainable"]["magnitudes"] == 0
    assert summary["examples"] == {"train": 72, "validation": 0, "test": 29}
    run = RunFolder(tmp_path / "search")
    assert train(settings(partition=1.0, retrain_from="search"), run.path)["steps"] == {"search": 10, "retrain": 6}
    assert all(line["validation_loss"] is None for line in run.read_metrics())


def test_the_validation_split_has_a_fifth_of_each_class_that_is_large_enough(settings: Any, tmp_path: Path) -> None:
    training = Training(settings(), RunFolder(tmp_path / "run"), Silent())
    search, retrain = training.phases
    assert (len(search.train), len(search.validation), len(retrain.train)) == (58, 14, 72)
    rare = training.data.label_names.index("rare")
    assert all(training.data.train.labels[i] != rare for i in search.validation)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("method", "lr"), [("dora", 1e30), ("bidora", 1e30)])
def test_a_loss_that_is_not_finite_stops_the_run_with_a_good_checkpoint(
    settings: Any, tmp_path: Path, method: str, lr: float
) -> None:
    run = RunFolder(tmp_path / "run")
    with pytest.raises(NonFinite, match=r"step \d+ of the phase (search|train).*the last good checkpoint is"):
        train(settings(method=method, lr=lr, checkpoint_every=1), run.path)
    assert all(bool(torch.isfinite(value).all()) for value in load_checkpoint(run.checkpoint)["parameters"].values())
    assert not run.summary.exists()
    assert not run.adapter.exists()
    for line in run.metrics.read_text().splitlines():
        json.loads(line)


def test_a_step_whose_loss_is_not_finite_changes_nothing(settings: Any, tmp_path: Path) -> None:
    training = Training(settings(), RunFolder(tmp_path / "run"), Silent())
    loss = training._loss

    def poisoned(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        batch = {**batch, "labels": batch["labels"]}
        with torch.no_grad():
            training.model.classifier.bias.add_(float("inf"))
        try:
            return loss(model, batch)
        finally:
            with torch.no_grad():
                training.model.classifier.bias.zero_()

    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    with pytest.raises(NonFinite, match="in step 1 of the phase search"):
        training.update.step(poisoned, training.train_set.batch([0, 1]), training.train_set.batch([2]))
    assert all(
        torch.equal(value, before[name]) for name, value in training.model.state_dict().items() if name != "classifier.bias"
    )


def test_wide_ranks_and_test_only_classes_are_warned_of(settings: Any, tiny_data: Path, tmp_path: Path) -> None:
    lines: list[str] = []

    class Listen(Silent):
        def message(self, text: str) -> None:
            lines.append(text)

    data = tmp_path / "data"
    data.mkdir()
    (data / "train.tsv").write_text((tiny_data / "train.tsv").read_text())
    (data / "test.tsv").write_text("grain\twheat\nnew\tport\n")
    summary = train(settings(r=17, data_dir=str(data), steps=2, retrain_steps=1), tmp_path / "run", progress=Listen())
    assert summary["label_names"] == ["grain", "money", "new", "rare"]
    assert any(line.startswith("warning: classes in the test set only: new (1 test examples") for line in lines)
    assert any(line.startswith("warning: r=17 is larger than the smaller side") for line in lines)


def test_a_penalty_and_clipping_change_the_run(settings: Any, tmp_path: Path) -> None:
    adapters = set()
    for name, changes in {"plain": {}, "penalty": {"penalty": 1e-2}, "clipped": {"max_norm": 1e-3}}.items():
        train(settings(steps=3, retrain_steps=2, **changes), tmp_path / name)
        adapters.add((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert len(adapters) == 3


def test_bf16_autocast_trains_fp32_parameters(settings: Any, tmp_path: Path) -> None:
    train(settings(steps=3, retrain_steps=2, precision="bf16"), tmp_path / "run")
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}


def test_pairs_and_values_go_through_the_same_loop(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra [train] is not installed")
    rows = {"sentence1": ["wheat rose", "bank"] * 10, "sentence2": ["corn fell", "the port"] * 10, "label": [4.5, 1.0] * 10}
    part = datasets.Dataset.from_dict(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=part, validation=part))
    summary = train(settings(task="stsb", data_dir=None), tmp_path / "run")
    assert summary["metric"] == "pearson_correlation"
    assert summary["score"] > 0.9
    (prediction,) = predict(tmp_path / "run", ["bank\tthe port"])
    assert prediction["value"] < 3
    with pytest.raises(UserError, match="two, separated by a TAB, got 'bank'"):
        predict(tmp_path / "run", ["bank"])


def test_the_horizon_reaches_the_optimizer_and_only_sama_has_one(settings: Any, tmp_path: Path) -> None:
    norms = {}
    for horizon in (None, 1, 5):
        run = RunFolder(tmp_path / str(horizon))
        summary = train(settings(horizon=horizon, steps=4, retrain_steps=0), run.path)
        lines = [line for line in run.read_metrics() if line["second_order_norm"] is not None]
        assert len(lines) == 2
        assert all(line["passes"] == 3 and set(line["pass_seconds"]) == {"lower", "validation", "difference"} for line in lines)
        norms[horizon] = lines[0]["second_order_norm"]
        assert summary["settings"]["horizon"] == horizon
    assert norms[None] == norms[5]
    assert norms[5] == pytest.approx(kappa(0.9, 5) * norms[1], rel=1e-3)
    with pytest.raises(UserError, match="horizon is Sama's: the bilevel preset paper"):
        settings(horizon=2, bilevel="paper")
    rows = compare([tmp_path / "1", tmp_path / "5"])
    assert len(rows["groups"]) == 2
    assert any("balanced, horizon 5" in line for line in comparison_lines(rows))
