"""The curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import require

_TITLES = {"search": "search", "retrain": "retraining", "train": "training"}


def _smoothed(values: Sequence[float], weight: float = 0.1) -> list[float]:
    """An exponential moving average without the bias of its start."""
    average, total, smooth = 0.0, 0.0, []
    for value in values:
        average, total = (1 - weight) * average + weight * value, (1 - weight) * total + weight
        smooth.append(average / total)
    return smooth


def draw_curves(lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], path: Path) -> None:
    """Draw the losses of every phase, each phase in its own column, and below the hypergradient's norm and the learning rates."""
    require("matplotlib")
    from matplotlib.figure import Figure

    phases = list(summary["steps"])
    figure = Figure(figsize=(2.5 + 4.2 * len(phases), 6.2), layout="constrained")
    axes = figure.subplots(
        2, len(phases), squeeze=False, sharey="row", gridspec_kw={"height_ratios": [3, 2], "width_ratios": _widths(summary)}
    )
    for column, phase in enumerate(phases):
        steps = [line for line in lines if line["phase"] == phase]
        _draw_losses(axes[0, column], steps)
        _draw_rates(axes[1, column], steps)
        axes[0, column].set_title(_TITLES[phase] + _score(summary, phase), fontsize=10)
        axes[1, column].set_xlabel("step")
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("hypergradient norm, learning rate")
    figure.suptitle(f"{summary['task']}, {summary['method']}, seed {summary['seed']}", fontsize=11)
    figure.savefig(path, dpi=130)


def _widths(summary: Mapping[str, Any]) -> list[float]:
    longest = max(summary["steps"].values())
    return [max(0.5, steps / longest) for steps in summary["steps"].values()]


def _score(summary: Mapping[str, Any], phase: str) -> str:
    if phase not in summary["scores"]:
        return ""
    return f": test {summary['metric'].replace('_', ' ')} {summary['scores'][phase][summary['metric']]:.4f}"


def _points(lines: Sequence[Mapping[str, Any]], field: str) -> tuple[list[int], list[float]]:
    known = [(line["step"], line[field]) for line in lines if line[field] is not None]
    return [step for step, _ in known], [value for _, value in known]


def _draw_losses(axis: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    for field, color, label in (("train_loss", "tab:blue", "train"), ("validation_loss", "tab:orange", "validation")):
        steps, values = _points(lines, field)
        if steps:
            axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            axis.plot(steps, _smoothed(values), color=color, linewidth=1.6, label=label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _draw_rates(axis: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    for field, style, label in (
        ("hypergradient_norm", {"color": "tab:green", "linewidth": 0.9}, "hypergradient norm"),
        ("lr_lower", {"color": "tab:gray", "linewidth": 1.2}, "learning rate, lower"),
        ("lr_upper", {"color": "tab:purple", "linewidth": 1.2, "linestyle": "--"}, "learning rate, upper"),
    ):
        steps, values = _points(lines, field)
        if steps:
            axis.plot(steps, values, label=label, **style)
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
