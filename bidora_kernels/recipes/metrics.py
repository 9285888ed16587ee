"""Test metrics over whole prediction lists: accuracy, macro F1, Matthews and Pearson correlation, each a float."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _confusion(predicted: Sequence[float], labels: Sequence[float]) -> Tensor:
    """counts[label, prediction] in fp64 over the classes that occur in either list."""
    if len(predicted) != len(labels) or len(labels) == 0:
        raise ValueError(f"predicted and labels must have the same length > 0, got {len(predicted)} and {len(labels)}")
    classes = {value: index for index, value in enumerate(sorted(set(predicted) | set(labels)))}
    counts = torch.zeros(len(classes), len(classes), dtype=torch.float64)
    for prediction, label in zip(predicted, labels, strict=True):
        counts[classes[label], classes[prediction]] += 1
    return counts


def accuracy(predicted: Sequence[float], labels: Sequence[float]) -> float:
    """The share of predictions that equal their label."""
    counts = _confusion(predicted, labels)
    return float(counts.trace() / counts.sum())


def macro_f1(predicted: Sequence[float], labels: Sequence[float]) -> float:
    """The mean over the occurring classes of F1 = 2 tp / (2 tp + fp + fn)."""
    counts = _confusion(predicted, labels)
    return float((2 * counts.diagonal() / (counts.sum(0) + counts.sum(1))).mean())


def matthews_correlation(predicted: Sequence[float], labels: Sequence[float]) -> float:
    """Matthews correlation for any number of classes (Gorodkin's R_K); 0 where either list is constant."""
    counts = _confusion(predicted, labels)
    per_label, per_prediction, total = counts.sum(1), counts.sum(0), counts.sum()
    covariance = counts.trace() * total - per_label @ per_prediction
    spread = (total**2 - per_prediction @ per_prediction) * (total**2 - per_label @ per_label)
    return float(covariance / spread.sqrt()) if spread > 0 else 0.0


def pearson_correlation(predicted: Sequence[float], labels: Sequence[float]) -> float:
    """Pearson correlation; 0 where either list is constant."""
    if len(predicted) != len(labels) or len(labels) == 0:
        raise ValueError(f"predicted and labels must have the same length > 0, got {len(predicted)} and {len(labels)}")
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (predicted, labels))
    x, y = x - x.mean(), y - y.mean()
    spread = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
    return float(x @ y) / spread if spread > 0 else 0.0


METRICS: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "matthews_correlation": matthews_correlation,
    "pearson_correlation": pearson_correlation,
}
