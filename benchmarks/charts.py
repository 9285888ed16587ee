"""Results as pictures: time by provider, roofline, memory, cost per bilevel iteration, growth with the sizes of a case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from . import predict
from .machine import label
from .tables import case_ceilings, measured, of_kind, our_provider
from .timing import quantiles, ratio

Document = dict[str, Any]
COLORS = {"frozen": "#9a9a9a", "merged": "#9a9a9a", "PEFT LoRA": "#4c78a8", "PEFT DoRA": "#e45756", "Eq. 8": "#e45756"}
OURS_COLOR, OTHER_COLOR = "#2a9d5c", "#b8a26a"
SHOWN = ("frozen linear", "PEFT LoRA", "PEFT DoRA", "plain function")


def _color(name: str) -> str:
    if "bidora" in name:
        return OURS_COLOR
    return next((color for prefix, color in COLORS.items() if name.startswith(prefix)), OTHER_COLOR)


def _plain_ticks(axis: Axis, at: Sequence[float] | None = None) -> None:
    """Numbers as they are on a logarithmic axis: 1, 2 and 5 of each decade, or `at`."""
    if at is None:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    else:
        axis.set_ticks(list(at))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(labelsize=8)


def _bars(axes: Axes, values: Sequence[tuple[str, float, float, float]], unit: str) -> None:
    """Horizontal bars with intervals, in the order given from the top."""
    names = [name for name, *_ in values]
    middle = [value for _, value, _, _ in values]
    errors = [[value - low for _, value, low, _ in values], [high - value for _, value, _, high in values]]
    axes.barh(range(len(values)), middle, color=[_color(name) for name in names], xerr=errors, error_kw={"lw": 0.8, "capsize": 2})
    axes.set_yticks(range(len(values)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(high for *_, high in values) * 1.12)
    for row, (_, value, _, high) in enumerate(values):
        axes.text(high + max(middle) * 0.01, row, f" {value:.2f}", va="center", fontsize=7)
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _ratios(entry: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    times = measured(entry)
    floor = times[entry["floor"]]
    found = [(name, ratio(seconds, floor)) for name, seconds in times.items()]
    return [(name, value.median, value.low, value.high) for name, value in found]


def _stacked(
    entries: dict[str, Any], title: str, unit: str, bars: Callable[[Any], list[tuple[str, float, float, float]]]
) -> Figure | None:
    if not entries:
        return None
    rows = [bars(entry) for entry in entries.values()]
    heights = [len(row) + 2 for row in rows]
    figure = Figure(figsize=(7.5, 0.22 * sum(heights) + 0.6), layout="constrained")
    for axes, name, row in zip(
        figure.subplots(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0], entries, rows, strict=True
    ):
        _bars(axes, row, unit)
        axes.set_title(name, fontsize=9, loc="left")
    figure.suptitle(title, fontsize=10)
    return figure


def _most_telling(document: Document) -> dict[str, Any]:
    """The widest rank-16 layers of each model at the most tokens, and the decode cases of the widest layer."""
    found: dict[str, Any] = {}
    for name, entry in of_kind(document, "layer").items():
        if entry["case"]["tokens"] == max(e["case"]["tokens"] for e in of_kind(document, "layer").values()):
            found[name] = entry
    keep = sorted(found, key=lambda name: (found[name]["case"]["r"] != 16, found[name]["case"]["out_features"]))[:5]
    decode = sorted(of_kind(document, "decode").items(), key=lambda item: -item[1]["case"]["out_features"])[:2]
    return {**{name: found[name] for name in keep}, **dict(decode)}


def time_chart(document: Document) -> Figure | None:
    """Layers: times as long as the frozen linear."""
    return _stacked(_most_telling(document), f"Layers, {label(document['machine'])}", "times the frozen linear", _ratios)


def step_chart(document: Document) -> Figure | None:
    """Training steps: times as long as the frozen model."""
    entries = {name: entry for name, entry in of_kind(document, "step").items() if entry["case"]["layers"] in (3, 8, 12, 1)}
    title = f"Training step with AdamW, {label(document['machine'])}"
    return _stacked(dict(list(entries.items())[:4]), title, "times the frozen model", _ratios)


def iteration_chart(document: Document) -> Figure | None:
    """Bilevel iterations: times as long as one step of the frozen model."""
    title = f"One bilevel iteration, {label(document['machine'])}"
    return _stacked(of_kind(document, "bilevel"), title, "times one step of the frozen model", _ratios)


def memory_chart(document: Document) -> Figure | None:
    """Peak memory of a step."""

    def peaks(entry: dict[str, Any]) -> list[tuple[str, float, float, float]]:
        sizes = {name: entry["providers"][name]["peak_bytes"] / 2**20 for name in measured(entry)}
        return [(name, size, size, size) for name, size in sizes.items()]

    entries = {name: entry for name, entry in of_kind(document, "step").items() if entry["case"]["layers"] in (3, 8, 1)}
    title = f"Peak memory of a step above the model, {label(document['machine'])}"
    return _stacked(dict(list(entries.items())[:2]), title, "MiB", peaks)


def roofline_chart(document: Document) -> Figure | None:
    """Achieved operations per second against operations per byte, of layers and operations, under the measured ceilings."""
    points: dict[str, list[tuple[float, float]]] = {}
    for entry in (*of_kind(document, "layer").values(), *of_kind(document, "decode").values()):
        times, shape = measured(entry), predict.case_shape(entry["case"])
        ours = our_provider(times)
        for name in (*SHOWN, ours):
            if name in times and name in predict.PLANS:
                counted = predict.counts(predict.PLANS[name](shape))
                achieved = counted.operations / quantiles(times[name])[1]
                points.setdefault(name, []).append((counted.operations / counted.bytes, achieved))
    for entry in of_kind(document, "operation").values():
        counted, times = predict.operation_counts(entry["case"]), measured(entry)
        ours = our_provider(times)
        if ours:
            at = (counted.operations / counted.bytes, counted.operations / quantiles(times[ours])[1])
            points.setdefault(f"{ours}, one operation", []).append(at)
    if not points:
        return None
    entry = next(entry for entry in document["cases"].values() if entry["pieces"])
    ceilings = case_ceilings(document, entry)
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    every = [x for values in points.values() for x, _ in values]
    low, high = min(every) / 2, max(every) * 2
    dtypes = sorted({e["case"]["dtype"] for e in document["cases"].values()})
    for dtype in dtypes:
        roof = ceilings[f"matmul_{dtype}_gflop_s"] * 1e9
        grid = [low * (high / low) ** (step / 100) for step in range(101)]
        axes.plot(grid, [min(roof, x * ceilings["copy_gb_s"] * 1e9) / 1e9 for x in grid], color="#555", lw=1)
        axes.text(high, roof / 1e9 * 1.06, f"{dtype} product", ha="right", fontsize=7)
    markers = iter("os^Dvx*P")
    for name, values in points.items():
        xs, ys = [x for x, _ in values], [y / 1e9 for _, y in values]
        axes.scatter(xs, ys, s=16, label=name, color=_color(name), marker=next(markers), alpha=0.75)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    axes.set_xlabel("counted operations per byte", fontsize=9)
    axes.set_ylabel("GFLOP/s achieved", fontsize=9)
    axes.legend(fontsize=7)
    axes.set_title(f"Roofline, {label(document['machine'])}", fontsize=10)
    return figure


def _growth(document: Document, kind: str, field: str) -> dict[str, list[tuple[float, float]]]:
    """By provider: (value of `field`, ms) of the largest group of cases that differ in that field alone."""
    groups: dict[str, list[dict[str, Any]]] = {}
    ignored = {field, "min_rounds", "max_rounds", "max_sets", "seconds", "compiled", "plans", "without"}
    for entry in of_kind(document, kind).values():
        key = repr(sorted((name, value) for name, value in entry["case"].items() if name not in ignored))
        groups.setdefault(key, []).append(entry)
    group = max(groups.values(), key=len, default=[])
    if len(group) < 2:
        return {}
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in sorted(group, key=lambda entry: entry["case"][field]):
        times = measured(entry)
        for name in (entry["floor"], "PEFT LoRA", "PEFT DoRA", our_provider(times)):
            if name in times:
                curves.setdefault(name, []).append((entry["case"][field], quantiles(times[name])[1] * 1e3))
    return curves


def growth_chart(document: Document) -> Figure | None:
    """Time against tokens and rank of a layer, and layers, rank and batch of a model."""
    panels = [
        ("layer", "tokens"), ("layer", "r"), ("decode", "tokens"), ("step", "layers"), ("step", "r"), ("step", "batch"),
    ]  # fmt: skip
    drawn = [(kind, field, curves) for kind, field in panels if (curves := _growth(document, kind, field))]
    if not drawn:
        return None
    figure = Figure(figsize=(3.6 * len(drawn), 3.4), layout="constrained")
    for axes, (kind, field, curves) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for name, values in curves.items():
            axes.plot(*zip(*values, strict=True), marker="o", ms=3, color=_color(name), label=name)
        axes.tick_params(labelsize=8)
        if field in ("tokens", "r"):
            axes.set_xscale("log", base=2)
        _plain_ticks(axes.xaxis, sorted({value for points in curves.values() for value, _ in points}))
        if field == "tokens":
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(field, fontsize=9)
        axes.set_title(f"{kind}, ms", fontsize=9)
        axes.legend(fontsize=6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


CHARTS: dict[str, Callable[[Document], Figure | None]] = {
    "time": time_chart,
    "step": step_chart,
    "iteration": iteration_chart,
    "memory": memory_chart,
    "roofline": roofline_chart,
    "growth": growth_chart,
}


def draw(document: Document, folder: Path) -> list[Path]:
    """Draw every chart that the results have data for; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, build in CHARTS.items():
        figure = build(document)
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=130, metadata={"Software": None})
            drawn.append(path)
    return drawn
