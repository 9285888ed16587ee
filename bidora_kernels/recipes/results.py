"""What a finished run says: its closing lines, the comparison of several runs, and predictions on new texts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import UserError
from .models import Encoded, load_trained
from .presets import PRESETS
from .progress import duration
from .runs import RunFolder
from .tasks import Examples


def closing_lines(summary: dict[str, Any], run: RunFolder) -> list[str]:
    """The lines a run ends with: metric, trainable counts, wall time, and where things lie."""
    counts = summary["trainable"]
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count or name != "backbone")
    metric = summary["metric"].replace("_", " ")
    by_phase = "; ".join(f"after {phase} {scores[summary['metric']]:.4f}" for phase, scores in summary["scores"].items())
    trained = run.model if summary["method"] == "full" else run.adapter
    scored_on = "held-out" if summary["settings"].get("hold_out") else "test"
    return [
        f"{scored_on} {metric}: {summary['score']:.4f}  ({by_phase}; {summary['examples']['test']:,} examples)",
        f"trained values: {sum(counts.values()):,} ({parts})",
        f"wall time: {duration(summary['seconds'])}  ({summary['passes']:g} forward and backward passes)",
        f"{'model' if summary['method'] == 'full' else 'adapter'}: {trained}",
        f"metrics: {run.metrics}   summary: {run.summary}   curves: {run.curves}",
        f'try it: bidora predict {run.path} "some text"',
    ]


def compare(paths: Sequence[str | Path]) -> dict[str, Any]:
    """The summaries of runs side by side, and mean and spread over seeds by task, model, method and its settings.

    Runs belong together where their settings and their whole corpus (of which older versions kept no hash) are the same. A second
    run of a seed is listed, and marked `repeats`, but not counted. The spread is the sample standard deviation; None for a single
    run. Raises UserError for a folder without a finished run.
    """
    runs = []
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for path in paths:
        summary = RunFolder(path).read_summary()
        settings = summary["settings"]
        row = {
            "run": str(path),
            "task": summary["task"],
            "model": settings["model"],
            "method": summary["method"],
            "bilevel": summary["bilevel"],
            "horizon": settings.get("horizon"),
            "retrain_from": settings["retrain_from"],
            "steps": sum(summary["steps"].values()),
            "seed": summary["seed"],
            "metric": summary["metric"],
            "score": summary["score"],
            "passes": summary["passes"],
            "seconds": summary["seconds"],
            "trained": sum(summary["trainable"].values()),
            "repeats": None,
        }
        runs.append(row)
        same = {name: value for name, value in settings.items() if name not in _MAY_DIFFER}
        same["corpus_sha256"] = summary.get("corpus_sha256")
        group = groups.setdefault(tuple(sorted((name, str(value)) for name, value in same.items())), [])
        row["repeats"] = next((other["run"] for other in group if other["seed"] == row["seed"]), None)
        if row["repeats"] is None:
            group.append(row)
    return {"runs": runs, "groups": [_group(rows) for rows in groups.values()]}


_MAY_DIFFER = ("seed", "data_dir", "eval_every", "checkpoint_every", "eval_batch_size", "device", "preset")
_GROUP_FIELDS = ("task", "model", "method", "bilevel", "horizon", "retrain_from", "steps", "metric")


def _group(rows: list[dict[str, Any]]) -> dict[str, Any]:
    scores = [row["score"] for row in rows]
    return {
        **{name: rows[0][name] for name in _GROUP_FIELDS},
        "seeds": sorted(row["seed"] for row in rows),
        "mean": statistics.mean(scores),
        "spread": statistics.stdev(scores) if len(scores) > 1 else None,
        "passes": statistics.mean(row["passes"] for row in rows),
        "seconds": statistics.mean(row["seconds"] for row in rows),
        "paper": _paper_score(rows[0]),
    }


def _paper_score(row: dict[str, Any]) -> float | None:
    """The paper's number for the same task, model and method, where a preset carries one."""
    preset = PRESETS.get(f"paper/{row['model']}/{row['task']}")
    return None if preset is None else preset.paper_scores.get(row["method"])


def comparison_lines(comparison: dict[str, Any]) -> list[str]:
    """`compare` as two tables."""
    runs = [
        (
            row["run"], row["task"], _method(row), row["steps"], row["seed"], f"{row['score']:.4f}", f"{row['passes']:g}",
            duration(row["seconds"]), f"{row['trained']:,}",
        )
        for row in comparison["runs"]
    ]  # fmt: skip
    groups = [
        (
            row["task"], _method(row), row["steps"], len(row["seeds"]), f"{row['mean']:.4f}",
            "-" if row["spread"] is None else f"{row['spread']:.4f}", f"{row['passes']:g}", duration(row["seconds"]),
            "-" if row["paper"] is None else f"{row['paper']:g}",
        )
        for row in comparison["groups"]
    ]  # fmt: skip
    metrics = ", ".join(sorted({row["metric"].replace("_", " ") for row in comparison["runs"]}))
    repeated = [f"not counted: {row['run']} repeats {row['repeats']}" for row in comparison["runs"] if row["repeats"]]
    return [
        *table(("run", "task", "method", "steps", "seed", "score", "passes", "time", "trained"), runs),
        *repeated,
        "",
        *table(("task", "method", "steps", "runs", "mean", "spread", "passes", "time", "paper"), groups),
        f"score: {metrics}; spread: sample standard deviation over seeds; paper: its score in %, where there is one",
    ]


def _method(row: dict[str, Any]) -> str:
    if row["bilevel"] is None:
        return row["method"]
    horizon = "" if row["horizon"] is None else f", horizon {row['horizon']}"
    return f"{row['method']} ({row['bilevel']}{horizon}{'' if row['retrain_from'] is None else ', from ' + row['retrain_from']})"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a text table; numbers are set to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(header), *cells]) for column in range(len(header))]
    right = [
        bool(cells)
        and all(
            row[column].replace(",", "").replace(".", "").replace(":", "").strip("-").isdigit() or row[column] == "-"
            for row in cells
        )
        for column in range(len(header))
    ]

    def line(row: Sequence[str]) -> str:
        places = (
            cell.rjust(width) if at_right else cell.ljust(width) for cell, width, at_right in zip(row, widths, right, strict=True)
        )
        return "  ".join(places).rstrip()

    return [line(list(header)), "  ".join("-" * width for width in widths), *(line(row) for row in cells)]


@torch.no_grad()
def predict(path: str | Path, texts: Sequence[str], batch_size: int = 32) -> list[dict[str, Any]]:
    """Predictions of a finished run, in the order of `texts`: label and probability, or the value of a regression.

    For a task about pairs a text holds both, separated by a TAB. Raises UserError for an empty list or a text without its pair.
    """
    if not texts:
        raise UserError("there is no text to predict")
    run = RunFolder(path)
    model, tokenizer, summary = load_trained(run)
    pairs = None
    if summary["pairs"]:
        halves = [text.split("\t") for text in texts]
        if bad := next((text for text, half in zip(texts, halves, strict=True) if len(half) != 2), None):
            raise UserError(f"{summary['task']} is about pairs: a text must be two, separated by a TAB, got {bad!r}")
        texts, pairs = [half[0] for half in halves], [half[1] for half in halves]
    names = summary["label_names"]
    encoded = Encoded(
        Examples(list(texts), [0] * len(texts), pairs), tokenizer, summary["settings"]["max_length"], torch.device("cpu")
    )
    order = sorted(range(len(texts)), key=encoded.lengths.__getitem__)
    predictions: list[dict[str, Any]] = [{} for _ in texts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = encoded.batch(chosen)
        batch.pop("labels")
        for place, logits in zip(chosen, model(**batch).logits.float(), strict=True):
            if names:
                best = int(logits.argmax())
                predictions[place] = {"text": texts[place], "label": names[best], "probability": float(logits.softmax(-1)[best])}
            else:
                predictions[place] = {"text": texts[place], "value": float(logits[0])}
    return predictions
