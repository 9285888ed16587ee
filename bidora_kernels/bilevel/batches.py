"""What a step's passes run over: a batch, its micro-batches, and the first share of either."""

from __future__ import annotations

import copy
import functools
from collections import UserDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

PLAIN = (str, bytes, int, float, complex, type(None), torch.Size)
REMEDY = "give MicroBatches, or a callable that returns the part"


class MicroBatches:
    """A batch in parts: every pass runs over them one after the other and averages their losses by weight.

    With weights w the loss is sum_i w_i loss_i / sum_i w_i; None weighs all alike. Only this class is a set of micro-batches: a
    list, a tuple or a dict is one batch and reaches `loss_fn` as it is. Raises ValueError for no parts, for another number of
    weights and for weights that are negative or all zero.
    """

    def __init__(self, batches: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        """Keep the parts and their weights, normalized."""
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("MicroBatches needs at least one batch, got none")
        given = [1.0] * len(self.batches) if weights is None else [float(weight) for weight in weights]
        if len(given) != len(self.batches):
            raise ValueError(f"weights must be one per batch, {len(self.batches)}, got {len(given)}")
        if min(given) < 0 or not 0 < sum(given) < float("inf"):
            raise ValueError(f"weights must be 0 or more, finite, and not all 0, got {given}")
        self.weights = [weight / sum(given) for weight in given]

    def __len__(self) -> int:
        """The number of parts."""
        return len(self.batches)


def parts_of(batch: Any) -> list[tuple[Any, float]]:
    """The parts of a batch with their normalized weights."""
    if isinstance(batch, MicroBatches):
        return list(zip(batch.batches, batch.weights, strict=True))
    return [(batch, 1.0)]


def first_share(batch: Any, share: float, alike: bool = False) -> tuple[MicroBatches, MicroBatches]:
    """The batch in parts, and the first of them, which hold that share of it.

    Of micro-batches whole parts are taken, as few as weigh the share. Another batch is cut by rows, `round(share * rows)` of them
    and at least one: tensors along their first dimension, lists and tuples without tensors by their items; mappings, lists and
    tuples of such things are gone through, single plain values are in both parts. There is one part, the whole batch, where the
    share is all rows, and where a mapping's "labels" are those of tokens (whole numbers in two dimensions or more), unless its
    rows weigh alike: then the loss is a mean over tokens. alike: processes must cut alike, so that what the labels are is not
    looked at, and such a batch is always whole.

    Raises TypeError for a batch with anything else in it and ValueError for parts of unequal length.
    """
    if isinstance(batch, MicroBatches):
        count, reached = 0, 0.0
        while reached < share * (1.0 - 1e-9):  # less the rounding of the weights' sum
            reached += batch.weights[count]
            count += 1
        return batch, MicroBatches(batch.batches[:count], batch.weights[:count])
    if _is_mean_over_tokens(batch) and (alike or not _rows_weigh_alike(batch)):
        return MicroBatches([batch]), MicroBatches([batch])
    rows = _rows(batch)
    first = max(1, round(share * rows))
    if first == rows:
        return MicroBatches([batch]), MicroBatches([batch])
    parts = [map_leaves(batch, functools.partial(_rows_of, cut)) for cut in (slice(0, first), slice(first, rows))]
    return MicroBatches(parts, [first, rows - first]), MicroBatches(parts[:1])


def _is_mean_over_tokens(batch: Any) -> bool:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and labels.ndim > 1 and not labels.is_floating_point()


def _rows_weigh_alike(batch: Mapping[Any, Any]) -> bool:
    """Whether a mean over a batch's labelled tokens is one over its rows, whichever tokens the loss counts.

    Those with a label that is not -100, with the first one or (as in a causal model) without, or those of a mask beside them.
    """
    labels = batch["labels"]
    counted = [labels != -100, labels[:, 1:] != -100]
    counted += [value != 0 for key, value in batch.items() if "mask" in str(key) and isinstance(value, Tensor) and value.ndim > 1]
    numbers = [tokens.flatten(1).sum(1) for tokens in counted]
    comparable = all((number.shape, number.device) == (numbers[0].shape, labels.device) for number in numbers)
    return comparable and bool(torch.stack(numbers).diff(dim=1).eq(0).all())


def _rows(batch: Any) -> int:
    """The length that everything of a batch has."""
    tensors: set[int] = set()
    lists: set[int] = set()

    def seen(leaf: Any) -> Any:
        if _is_scalar(leaf):
            return leaf
        (tensors if isinstance(leaf, Tensor) else lists).add(len(leaf))
        return leaf

    map_leaves(batch, seen)
    if not tensors:
        raise TypeError(f"a batch of which a share is taken must hold tensors, got {type(batch).__name__}: {REMEDY}")
    if len(tensors | lists) > 1:
        raise ValueError(
            f"a batch of which a share is taken must have rows of one number, got {sorted(tensors | lists)}: {REMEDY}"
        )
    if 0 in tensors:
        raise ValueError("a batch of which a share is taken must have rows, got none")
    return tensors.pop()


def _is_scalar(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim == 0


def _rows_of(rows: slice, leaf: Any) -> Any:
    return leaf if _is_scalar(leaf) else leaf[rows]


def map_leaves(batch: Any, take: Callable[[Any], Any]) -> Any:
    """The same structure with `take` of every tensor and of every sequence without tensors.

    Raises TypeError for a batch with anything else in it but plain values.
    """
    if isinstance(batch, Tensor) and batch.layout is torch.strided and not batch.is_nested:
        return take(batch)
    if isinstance(batch, PLAIN):
        return batch
    if isinstance(batch, Mapping):
        items = {key: map_leaves(value, take) for key, value in batch.items()}
        if isinstance(batch, UserDict):
            return type(batch)(items)
        same = copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
        for key, value in items.items():
            same[key] = value
        return same
    if isinstance(batch, tuple) and hasattr(batch, "_fields") and not isinstance(batch, PackedSequence):
        return type(batch)(*(map_leaves(item, take) for item in batch))
    if type(batch) in (list, tuple):
        if batch and _has_no_tensor(batch):
            return take(batch)
        if not any(isinstance(item, Mapping) for item in batch):
            return type(batch)(map_leaves(item, take) for item in batch)
    raise TypeError(f"a batch of which a share is taken must hold tensors and plain values, got {type(batch).__name__}: {REMEDY}")


def _has_no_tensor(value: Any) -> bool:
    """Whether it is a plain value, or lists and tuples of nothing else."""
    return isinstance(value, PLAIN) or (type(value) in (list, tuple) and all(map(_has_no_tensor, value)))
