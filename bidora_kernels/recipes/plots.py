"""The curves of a run, and its hypergradient, as pictures."""

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


def draw_hypergradient(steps: Sequence[Mapping[str, Any]], found: Mapping[str, Any], path: Path) -> None:
    """Draw what each upper step of the search saw: losses, both terms' lengths, their cosine, the radius, passes and seconds."""
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 8.2), layout="constrained")
    axes = figure.subplots(3, 2, sharex=True)
    numbers = [line["step"] for line in steps]
    _draw_losses(axes[0, 0], steps)
    axes[0, 0].set_ylabel("loss")
    for field, color, label in (
        ("direct_norm", "tab:blue", "first-order term"),
        ("second_order_norm", "tab:red", "second-order term"),
        ("hypergradient_norm", "tab:green", "hypergradient"),
    ):
        known = [(step, value) for step, value in zip(*_points(steps, field), strict=True) if value > 0]  # a logarithmic axis
        if known:
            axes[0, 1].plot(*zip(*known, strict=True), color=color, linewidth=1.0, label=label)
    capped = [(line["step"], line["second_order_norm"]) for line in steps if line["ratio_capped"]]
    if capped:
        axes[0, 1].plot(*zip(*capped, strict=True), "kx", markersize=4, label="cut by max_ratio")
    axes[0, 1].set_yscale("log")
    axes[0, 1].set_ylabel("length")
    axes[0, 1].legend(fontsize=8)
    _draw_one(axes[1, 0], steps, "cosine", "cosine of the two terms")
    axes[1, 0].set_ylim(-1.05, 1.05)
    axes[1, 0].axhline(0.0, color="black", linewidth=0.6)
    _draw_one(axes[1, 1], steps, "radius", "radius of the difference")
    _draw_one(axes[2, 0], steps, "passes", "passes of the step")
    axes[2, 0].set_ylim(bottom=0)
    for kind in found["pass_seconds"]:
        axes[2, 1].plot(numbers, [1e3 * line["pass_seconds"].get(kind, 0.0) for line in steps], linewidth=0.9, label=kind)
    axes[2, 1].set_ylim(bottom=0)
    axes[2, 1].set_ylabel("milliseconds by kind of pass")
    axes[2, 1].legend(fontsize=8)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in axes[2]:
        axis.set_xlabel("step of the search (upper steps only)")
    ratio = "" if found["second_over_direct"] is None else f", second over first term {found['second_over_direct']:.2g} (median)"
    figure.suptitle(f"{Path(found['run']).name}: {found['upper_steps']} upper steps{ratio}", fontsize=11)
    figure.savefig(path, dpi=130)


def _draw_one(axis: Any, steps: Sequence[Mapping[str, Any]], field: str, label: str) -> None:
    numbers, values = _points(steps, field)
    if values:
        axis.plot(numbers, values, ".-", color="tab:purple", linewidth=0.9, markersize=3)
    else:
        axis.text(0.5, 0.5, "none: no second-order term", transform=axis.transAxes, ha="center", color="tab:gray")
    axis.set_ylabel(label)
