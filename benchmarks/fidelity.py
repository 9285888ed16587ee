"""How well each estimator gives the second-order term q and the hypergradient h: against double backward in fp64.

MiniLM-L6 with DoRA on CoLA text, at several stages of training; unroll="gradient", xi=1. `q` is the second-order term, `h` the
whole hypergradient; each estimator's own validation gradient is part of what is compared.

    python -m benchmarks.fidelity --quick
    python -m benchmarks.fidelity --json fidelity.json            # goes on where it stopped
    python -m benchmarks.fidelity --radii 1e-4 1e-3 1e-2          # sweep the radius, as a fraction of the directions' length
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bidora_kernels as bk

from . import machine
from .encoder import (
    TARGETS,
    Batch,
    Batches,
    bf16_loss_fn,
    cosine,
    double_copy,
    encoder,
    flat,
    loss_fn,
    relative_error,
    stages,
)

COMPUTE = {"fp32": loss_fn, "bf16": bf16_loss_fn}
GATES = {("fp32", "central"): 0.999, ("fp32", "one-sided"): 0.999, ("bf16", "central"): 0.99, ("bf16", "one-sided"): 0.95}


def terms(model: nn.Module, estimator: Any, loss: Any, train: Batch, validation: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    direction, magnitude = bk.split_parameters(model)
    optimizer = bk.BilevelOptimizer(
        model, lower=torch.optim.SGD(direction, lr=1.0), upper=torch.optim.SGD(magnitude, lr=1.0),
        estimator=estimator, xi=1.0, unroll="gradient",
    )  # fmt: skip
    direct, second_order = optimizer.hypergradient(loss, train, validation, terms=True)
    return flat(second_order), flat(direct) + flat(second_order)


def estimators(radii: list[float] | None) -> dict[str, Any]:
    if not radii:
        return {"central": bk.CentralDifference(), "one-sided": bk.ForwardDifference()}
    chosen: dict[str, Any] = {}
    for radius in radii:
        chosen[f"central {radius:g}"] = bk.CentralDifference(relative_radius=radius)
        chosen[f"one-sided {radius:g}"] = bk.ForwardDifference(relative_radius=radius)
    return chosen


def measure(r: int, targets: str, arguments: argparse.Namespace, done: set[int]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each stage that is not done yet; the batches of a stage do not depend on which others are measured."""
    wanted = [step for step in sorted(arguments.stages) if step not in done]
    if not wanted:
        return
    model = encoder(r, targets)
    for step, _ in stages(model, Batches(arguments.seed), wanted, arguments.lr):
        batches = Batches(arguments.seed, draws=(step,))
        train, validation = (batches.draw(part, arguments.batch_size) for part in ("train", "validation"))
        rows = []
        exact_q, exact_h = terms(double_copy(model), bk.DoubleBackward(), loss_fn, train, validation)
        for compute in arguments.compute:
            for name, estimator in estimators(arguments.radii).items():
                q, h = terms(model, estimator, COMPUTE[compute], train, validation)
                row = {
                    "r": r, "targets": targets, "step": step, "compute": compute, "estimator": name,
                    "q_cosine": cosine(q, exact_q), "q_error": relative_error(q, exact_q),
                    "h_cosine": cosine(h, exact_h), "h_error": relative_error(h, exact_h),
                    "q_over_direct": float(exact_q.norm() / (exact_h - exact_q).norm()),
                }  # fmt: skip
                print(
                    f"{r:3d}  {targets:11s}  {step:5d}  {compute:7s}  {name:16s}  {row['q_cosine']:8.5f}  {row['q_error']:8.1e}  "
                    f"{row['h_cosine']:8.5f}  {row['h_error']:8.1e}  {row['q_over_direct']:8.2e}",
                    flush=True,
                )
                rows.append(row)
        yield rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: by rank, targets and compute, cosine and relative error of q and of h over the stages, for each estimator."""
    stages_shown = sorted({row["step"] for row in rows})
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    lines = [
        f"Over {' / '.join(map(str, stages_shown))} steps of training", "",
        "| r, targets, compute | estimator | cosine of q | error of q | cosine of h | error of h |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r, targets, compute in dict.fromkeys((row["r"], row["targets"], row["compute"]) for row in rows):
        for name in names:
            own = {
                row["step"]: row
                for row in rows
                if (row["r"], row["targets"], row["compute"], row["estimator"]) == (r, targets, compute, name)
            }
            cells = [
                " / ".join(f"{own[step][key]:{form}}" if step in own else "-" for step in stages_shown)
                for key, form in (("q_cosine", ".5f"), ("q_error", ".1e"), ("h_cosine", ".5f"), ("h_error", ".1e"))
            ]
            lines.append(f"| {r}, {targets}, {compute} | {name} | {' | '.join(cells)} |")
    return lines


def gates(rows: list[dict[str, Any]]) -> list[str]:
    """The least cosine of q at the default radius over everything measured, beside what it must be."""
    lines = []
    for (compute, estimator), least in GATES.items():
        cosines = [row["q_cosine"] for row in rows if (row["compute"], row["estimator"]) == (compute, estimator)]
        if cosines:
            verdict = "holds" if min(cosines) >= least else "FAILS"
            lines.append(
                f"gate {compute}, {estimator}: cosine of q >= {least}: {min(cosines):.5f}, {len(cosines)} states  {verdict}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="r 4 on query+value, steps 0 and 20")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 100, 400], help="steps of training (default: 0 100 400)")
    parser.add_argument("--compute", nargs="+", choices=list(COMPUTE), default=list(COMPUTE))
    parser.add_argument("--radii", type=float, nargs="+", help="relative radii to sweep instead of the default")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the training between the stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="add the rows to this file, stage by stage; what it has is not done again")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.ranks, arguments.targets, arguments.stages = [4], ["query+value"], [0, 20]
    print(f"{'r':>3s}  {'targets':11s}  {'step':>5s}  {'compute':7s}  {'estimator':16s}  {'cos q':>8s}  {'err q':>8s}  "
          f"{'cos h':>8s}  {'err h':>8s}  {'|q|/|d|':>8s}")  # fmt: skip
    rows: list[dict[str, Any]] = []
    if arguments.json and arguments.json.exists():
        document = json.loads(arguments.json.read_text())
        if document["settings"] != _settings(arguments):
            raise SystemExit(f"{arguments.json} holds results of other settings: {document['settings']}")
        rows = document["rows"]
    for r in arguments.ranks:
        for targets in arguments.targets:
            done = {row["step"] for row in rows if (row["r"], row["targets"]) == (r, targets)}
            for more in measure(r, targets, arguments, done):
                rows += more
                if arguments.json:
                    document = {"schema_version": 1, **machine.source(), "settings": _settings(arguments), "rows": rows}
                    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    print("\n".join(["", *table(rows), "", *gates(rows)]))


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("seed", "batch_size", "lr", "compute", "radii")}


if __name__ == "__main__":
    main()
