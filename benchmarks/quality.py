"""Does a cheaper hypergradient cost quality? Paired runs of the recipe at equal gradient passes, against plain DoRA.

MiniLM-L6 on Reuters R8 and CoLA, 200 training and 500 test examples, every run with the same number of gradient passes. Per
task three learning rates are tried on seed 0, scored on a fifth of the training examples held out, by plain DoRA for itself and
by the first-order method for every bilevel one; then five seeds with the best one (the smaller of equal ones). Every bilevel
method searches with three quarters of the passes and retrains from the search. paper-code takes an upper step in every iteration
and a whole validation batch, as the authors do, and so half as many lower steps as the others; these differ in the hypergradient
alone. A run that is finished is not made again, one that was interrupted goes on; `bidora compare OUTPUT/runs/*` reads them.

    python -m benchmarks.quality --output runs/quality
    python -m benchmarks.quality --output runs/quality --budget 120   # start no further run after 120 s; exit code 3: not done
    python -m benchmarks.quality --output runs/quality --report       # the table of what is there
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bidora_kernels as bk
from bidora_kernels.recipes.presets import MINILM
from bidora_kernels.recipes.runs import RunFolder, machine, versions, write_json
from bidora_kernels.recipes.settings import TrainSettings

from .encoder import data_dir

TASKS = ("reuters-r8", "cola")
METHODS: dict[str, dict[str, Any]] = {
    "DoRA": {"method": "dora"},
    "first order": {"bilevel": "first-order"},
    "balanced, horizon 1": {"bilevel": "balanced", "horizon": 1},
    "balanced, horizon 5": {"bilevel": "balanced", "horizon": 5},
    "paper-code": {"bilevel": "paper-code"},
}
BASELINE, TUNED = "DoRA", ("DoRA", "first order")  # TUNED: the methods that learning rates are tried with
SEEDS = (0, 1, 2, 3, 4)
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
SEARCH_SHARE = 0.75  # of the passes
COMMON: dict[str, Any] = {
    "model": MINILM, "train_examples": 200, "batch_size": 8, "max_length": 24, "r": 4, "lora_alpha": 8.0, "device": "cpu",
    "checkpoint_every": 1000,
}  # fmt: skip
VALIDATION_BATCH = {"paper-code": 8}  # the train batch, as its authors' code has it; half of it for the others
TEST_EXAMPLES = 500  # at most
DEFAULT_PASSES = 400
NOT_DONE = 3  # exit code


def passes_per_step(bilevel: str) -> float:
    """Gradient passes of a search step, averaged over upper and other steps: lower, validation, differences."""
    options = bk.preset(bilevel).optimizer
    differences = {"first-order": 0, "balanced": 1, "paper-code": 2}[bilevel]
    return 1 + (1 + differences) / options.get("upper_every", 1)


def settings_for(task: str, method: str, lr: float, seed: int, passes: int, choosing: bool) -> TrainSettings:
    """The settings of one run, of `passes` gradient passes to within one pair of steps (a search may end on an upper step)."""
    chosen: dict[str, Any] = dict(METHODS[method])
    if "bilevel" in chosen:
        steps = int(passes * SEARCH_SHARE / passes_per_step(chosen["bilevel"]))
        chosen |= {
            "method": "bidora", "retrain_from": "search", "steps": steps, "retrain_steps": passes - round(passes * SEARCH_SHARE),
            "validation_batch_size": VALIDATION_BATCH.get(method, 4),
        }  # fmt: skip
    else:
        chosen |= {"steps": passes, "retrain_steps": 0}
    folder = data_dir() / "cola" if task == "cola" else None
    if folder is not None and not folder.is_dir():
        raise SystemExit("no real data: cola is not in BIDORA_DATA (default ../shared/data)")
    split: dict[str, Any] = {"hold_out": 0.2} if choosing else {"test_examples": TEST_EXAMPLES}
    return TrainSettings(
        task=task, lr=lr, seed=seed, data_dir=None if folder is None else str(folder.resolve()),
        **split, **COMMON, **chosen,
    )  # fmt: skip


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run, or None."""
    return RunFolder(folder).read_summary() if (folder / "summary.json").exists() else None


def make_run(folder: Path, settings: TrainSettings) -> dict[str, Any]:
    """Start the run, or go on with it."""
    from bidora_kernels.recipes.train import resume, train

    if RunFolder(folder).checkpoint.exists():
        return resume(folder)
    return train(settings, folder, overwrite=True)


class Plan:
    """Which runs there are, which have been made, and what they say."""

    def __init__(self, output: Path, tasks: list[str], seeds: list[int], passes: int) -> None:
        self.output, self.tasks, self.seeds, self.passes = output, tasks, seeds, passes
        settings = {"passes": passes, "common": COMMON, "learning_rates": list(LEARNING_RATES)}
        kept = output / "settings.json"
        if kept.exists() and json.loads(kept.read_text()) != settings:
            raise SystemExit(f"{output} holds runs with other settings ({kept}): choose another --output")
        output.mkdir(parents=True, exist_ok=True)
        write_json(kept, settings)

    def _name(self, task: str, method: str) -> str:
        return f"{task}-{method.lower().replace(', ', '-').replace(' ', '-')}"

    def trial(self, task: str, method: str, lr: float) -> Path:
        return self.output / "trials" / f"{self._name(task, method)}-lr{lr:g}"

    def run(self, task: str, method: str, seed: int) -> Path:
        return self.output / "runs" / f"{self._name(task, method)}-seed{seed}"

    def trials(self, task: str, method: str) -> dict[float, float | None]:
        """The held-out score of each learning rate, by the method that is tried for this one."""
        method = method if method in TUNED else TUNED[1]
        summaries = {lr: finished(self.trial(task, method, lr)) for lr in LEARNING_RATES}
        return {lr: None if summary is None else summary["score"] for lr, summary in summaries.items()}

    def rate(self, task: str, method: str) -> float | None:
        """The learning rate with the best held-out score, the smaller of equal ones; None while one is missing."""
        scores = self.trials(task, method)
        if None in scores.values():
            return None
        return max(scores, key=lambda lr: (scores[lr], -lr))

    def missing(self) -> Iterator[tuple[Path, TrainSettings]]:
        """The runs that are still to be made: the trials first, then task by task, seed by seed."""
        pairs = [(task, method) for task in self.tasks for method in METHODS]
        for task, method in pairs:
            for lr in LEARNING_RATES if method in TUNED else ():
                if finished(folder := self.trial(task, method, lr)) is None:
                    yield folder, settings_for(task, method, lr, 0, self.passes, choosing=True)
        for task, seed, method in itertools.product(self.tasks, self.seeds, METHODS):
            if finished(folder := self.run(task, method, seed)) is None and (rate := self.rate(task, method)) is not None:
                yield folder, settings_for(task, method, rate, seed, self.passes, choosing=False)

    def summary(self, task: str, method: str) -> dict[int, dict[str, Any]]:
        """The finished runs by seed."""
        found = {seed: finished(self.run(task, method, seed)) for seed in self.seeds}
        return {seed: summary for seed, summary in found.items() if summary is not None}


def paired(scores: dict[int, float], baseline: dict[int, float]) -> dict[str, Any] | None:
    """Mean of the differences over common seeds with the 95 % interval of Student's t; None for fewer than two seeds."""
    from scipy.stats import t

    seeds = sorted(scores.keys() & baseline.keys())
    if len(seeds) < 2:
        return None
    differences = [scores[seed] - baseline[seed] for seed in seeds]
    half = float(t.ppf(0.975, len(seeds) - 1)) * statistics.stdev(differences) / math.sqrt(len(seeds))
    mean = statistics.mean(differences)
    return {"seeds": seeds, "differences": differences, "mean": mean, "low": mean - half, "high": mean + half}


def results(plan: Plan) -> dict[str, Any]:
    """Everything as JSON types."""
    rows: list[dict[str, Any]] = []
    commits: set[str] = set()
    for task in plan.tasks:
        scores = {method: {seed: summary["score"] for seed, summary in plan.summary(task, method).items()} for method in METHODS}
        for method in METHODS:
            summaries = plan.summary(task, method)
            commits |= {str(summary["commit"]) for summary in summaries.values()}
            rows.append({
                "task": task,
                "method": method,
                "metric": next((summary["metric"] for summary in summaries.values()), None),
                "trials": {f"{lr:g}": score for lr, score in plan.trials(task, method).items()},
                "lr": plan.rate(task, method),
                "steps": next((summary["steps"] for summary in summaries.values()), None),
                "passes": next((summary["passes"] for summary in summaries.values()), None),
                "scores": {str(seed): score for seed, score in scores[method].items()},
                "mean": statistics.mean(scores[method].values()) if scores[method] else None,
                "spread": statistics.stdev(scores[method].values()) if len(scores[method]) > 1 else None,
                "to_dora": None if method == BASELINE else paired(scores[method], scores[BASELINE]),
                "seconds": [summary["seconds"] for summary in summaries.values()],
            })  # fmt: skip
    complete = all(len(row["scores"]) == len(plan.seeds) for row in rows)
    return {
        "schema_version": 1, "complete": complete, "passes": plan.passes, "seeds": plan.seeds, "common": COMMON, "rows": rows,
        "commits": sorted(commits), "versions": versions(), "machine": machine(),
    }  # fmt: skip


def lines(found: dict[str, Any]) -> list[str]:
    """The table."""
    out = []
    for task in dict.fromkeys(row["task"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["task"] == task]
        metric = next((row["metric"] for row in rows if row["metric"]), "score").replace("_", " ")
        out += [
            f"{task}: test {metric} in %, {found['passes']} gradient passes a run",
            f"{'method':20s}  {'lr':>6s}  {'runs':>4s}  {'mean':>6s}  {'s.d.':>5s}  {'to DoRA, 95 % interval':24s}  per seed",
        ]
        for row in rows:
            mean = "-" if row["mean"] is None else f"{100 * row['mean']:.1f}"
            spread = "-" if row["spread"] is None else f"{100 * row['spread']:.1f}"
            gap = row["to_dora"]
            text = "" if gap is None else f"{100 * gap['mean']:+.1f}  [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
            each = " ".join(f"{100 * score:.1f}" for score in row["scores"].values())
            rate = "-" if row["lr"] is None else f"{row['lr']:g}"
            out.append(f"{row['method']:20s}  {rate:>6s}  {len(row['scores']):4d}  {mean:>6s}  {spread:>5s}  {text:24s}  {each}")
        out.append("")
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--passes", type=int, default=DEFAULT_PASSES, help="gradient passes of a run, at most 400")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="start no run after so many seconds")
    parser.add_argument("--report", action="store_true", help="make no run")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args(argv)
    if not 20 <= arguments.passes <= 400:
        parser.error(f"--passes must be in 20 … 400, got {arguments.passes}")
    plan = Plan(arguments.output, arguments.tasks, arguments.seeds, arguments.passes)
    done = True
    if not arguments.report:
        started = time.monotonic()
        for folder, settings in plan.missing():
            if time.monotonic() - started > arguments.budget:
                done = False
                break
            summary = make_run(folder, settings)
            print(
                f"{folder.name:40s}  {summary['score']:.4f}  {summary['passes']:g} passes  {summary['seconds']:.0f} s", flush=True
            )
    found = results(plan)
    if done:
        print("\n".join(lines(found)))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if done else NOT_DONE


if __name__ == "__main__":
    sys.exit(main())
