"""Which second-order term tells the upper level what it wants to know: each estimator against K real AdamW steps.

The truth is dL_val(V_K(M), M)/dM, differentiated in fp64 through K real AdamW steps of the lower level, each on its own train
batch. MiniLM-L6 with DoRA (r 4, query and value) on CoLA text, at several stages of training and learning rates. Truth and
estimates share one norm (`--norm`): differentiated by default, so that the truth is the derivative of a map that exists;
"detached" is what the layers do by default. `second`: the second-order term; `whole`: the whole hypergradient; `ratio`: a length
over the truth's; `error`: of the whole hypergradient, relative. Rows with a smaller validation batch or a `difference_batch` are
held to the same truth, that of the whole validation batch.

    python -m benchmarks.usefulness --quick
    python -m benchmarks.usefulness --json usefulness.json                            # everything; goes on where it stopped
    python -m benchmarks.usefulness --json usefulness.json --lrs 2e-4 --stages 30     # a part; the file keeps the others
    python -m benchmarks.usefulness --json usefulness.json --table                    # every state, and medians over them
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bidora_kernels as bk

from . import machine
from .encoder import Batch, Batches, cosine, double_copy, encoder, flat, loss_fn, relative_error, stages

UNLIMITED: dict[str, Any] = {"max_ratio": math.inf}
ESTIMATORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "first order": (bk.FirstOrder(), {}),
    "paper (xi = lr)": (bk.CentralDifference(), {"xi": "lr"}),
    "paper-code (xi = 1)": (bk.CentralDifference(at="after"), {"xi": 1.0}),
    "Sama, horizon 1": (bk.Sama(horizon=1, **UNLIMITED), {}),
    "Sama, horizon 5": (bk.Sama(horizon=5, **UNLIMITED), {}),
    "Sama, horizon 10": (bk.Sama(horizon=10, **UNLIMITED), {}),
    "Sama, horizon 5, max_ratio 1": (bk.Sama(horizon=5), {}),
    "Sama, horizon 10, max_ratio 1": (bk.Sama(horizon=10), {}),
}
# the cheaper settings: name -> (estimator, share of the validation batch, share of the train batch in the difference)
CHEAPER = {
    "first order, validation 1/4": ("first order", 0.25, 1.0),
    "first order, validation 1/8": ("first order", 0.125, 1.0),
    "first order, validation 1/16": ("first order", 0.0625, 1.0),
    "Sama, horizon 1, validation 1/4": ("Sama, horizon 1", 0.25, 1.0),
    "Sama, horizon 1, validation 1/16": ("Sama, horizon 1", 0.0625, 1.0),
    "Sama, horizon 1, difference 1/2": ("Sama, horizon 1", 1.0, 0.5),
    "Sama, horizon 1, difference 1/4": ("Sama, horizon 1", 1.0, 0.25),
    "Sama, horizon 5, max_ratio 1, difference 1/2": ("Sama, horizon 5, max_ratio 1", 1.0, 0.5),
    "Sama, horizon 5, max_ratio 1, validation 1/4": ("Sama, horizon 5, max_ratio 1", 0.25, 1.0),
    "Sama, horizon 5, max_ratio 1, validation 1/4, difference 1/2": ("Sama, horizon 5, max_ratio 1", 0.25, 0.5),
    "Sama, horizon 5, max_ratio 1, validation 1/8": ("Sama, horizon 5, max_ratio 1", 0.125, 1.0),
    "Sama, horizon 5, max_ratio 1, validation 1/8, difference 1/2": ("Sama, horizon 5, max_ratio 1", 0.125, 0.5),
    "Sama, horizon 5, max_ratio 1, validation 1/16": ("Sama, horizon 5, max_ratio 1", 0.0625, 1.0),
    "Sama, horizon 5, max_ratio 1, validation 1/16, difference 3/4": ("Sama, horizon 5, max_ratio 1", 0.0625, 0.75),
    "Sama, horizon 5, max_ratio 1, validation 1/16, difference 2/3": ("Sama, horizon 5, max_ratio 1", 0.0625, 2 / 3),
    "Sama, horizon 5, max_ratio 1, validation 1/16, difference 5/8": ("Sama, horizon 5, max_ratio 1", 0.0625, 0.625),
    "Sama, horizon 5, max_ratio 1, validation 1/16, difference 1/2": ("Sama, horizon 5, max_ratio 1", 0.0625, 0.5),
}

WIDTH = 2 + max(map(len, (*ESTIMATORS, *CHEAPER)))
SHOWN = (
    *list(ESTIMATORS)[:4],
    "Sama, horizon 5, max_ratio 1",
    "Sama, horizon 10",
    "first order, validation 1/16",
    "Sama, horizon 5, max_ratio 1, validation 1/16, difference 3/4",  # "balanced" takes 2/3
)


def part_of(batch: Batch, share: float) -> Batch:
    """The first rows of a batch."""
    rows = max(1, round(len(batch["labels"]) * share))
    return {key: value[:rows] for key, value in batch.items()}


class FunctionalAdamW:
    """The optimizer's step as differentiable operations on (values, moments), from its state now."""

    def __init__(self, optimizer: torch.optim.Optimizer, direction: list[nn.Parameter]) -> None:
        group = optimizer.param_groups[0]
        (self.beta1, self.beta2), self.lr, self.eps = group["betas"], group["lr"], group["eps"]
        states = [optimizer.state.get(parameter, {}) for parameter in direction]
        self.count = max((int(state["step"]) for state in states if state), default=0)
        zeros = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in direction]
        self.first, self.second = (
            [state[name].double() if state else zero for state, zero in zip(states, zeros, strict=True)]
            for name in ("exp_avg", "exp_avg_sq")
        )

    def step(self, values: list[Tensor], grads: tuple[Tensor, ...]) -> list[Tensor]:
        self.count += 1
        self.first = [self.beta1 * old + (1 - self.beta1) * g for old, g in zip(self.first, grads, strict=True)]
        self.second = [self.beta2 * old + (1 - self.beta2) * g * g for old, g in zip(self.second, grads, strict=True)]
        moved = []
        for value, m, s in zip(values, self.first, self.second, strict=True):
            positive = s > 0
            root = torch.where(positive, torch.where(positive, s, 1.0).sqrt(), 0.0) / math.sqrt(1 - self.beta2**self.count)
            moved.append(value - self.lr * (m / (1 - self.beta1**self.count)) / (root + self.eps))
        return moved


class Unrolled:
    """L_val after each of the lower level's real steps, as a function of the magnitudes."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, source: nn.Module) -> None:
        """Start from `optimizer`'s moments, which belong to the parameters of `source`; `model` is its fp64 copy."""
        self.model = model
        self.direction, self.magnitude = (list(group) for group in bk.split_parameters(model))
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._optimizer, self._source = optimizer, list(bk.split_parameters(source)[0])

    def _loss(self, values: list[Tensor], batch: Batch) -> Tensor:
        replaced = {self._names[id(p)]: value for p, value in zip(self.direction, values, strict=True)}
        return torch.func.functional_call(self.model, replaced, (), dict(batch)).loss

    def losses(self, trains: list[Batch], validation: Batch, differentiable: bool) -> Iterator[Tensor]:
        """The validation loss after 1, 2, … steps."""
        adamw, values = FunctionalAdamW(self._optimizer, self._source), list[Tensor](self.direction)
        for batch in trains:
            grads = torch.autograd.grad(self._loss(values, batch), values, create_graph=differentiable)
            values = adamw.step(values, grads)
            if not differentiable:
                values = [value.detach().requires_grad_() for value in values]
            yield self._loss(values, validation)

    def truths(self, trains: list[Batch], validation: Batch, at: list[int]) -> dict[int, Tensor]:
        """dL_val(V_K(M), M)/dM for each K of `at`."""
        found = {}
        for number, loss in enumerate(self.losses(trains, validation, differentiable=True), 1):
            if number in at:
                found[number] = flat(list(torch.autograd.grad(loss, self.magnitude, retain_graph=True)))
        return found

    def check(self, trains: list[Batch], validation: Batch, truth: Tensor) -> float:
        """How far `truth` is off along itself, relative, when the magnitudes are moved and the real steps are taken again."""
        starts = [p.detach().clone() for p in self.magnitude]
        width, unit, ends = 1e-5, truth / truth.norm(), []
        for sign in (1.0, -1.0):
            offset = 0
            with torch.no_grad():
                for p, start in zip(self.magnitude, starts, strict=True):
                    p.copy_(start + sign * width * unit[offset : offset + p.numel()])
                    offset += p.numel()
            ends.append([float(loss.detach()) for loss in self.losses(trains, validation, differentiable=False)][-1])
        with torch.no_grad():
            for p, start in zip(self.magnitude, starts, strict=True):
                p.copy_(start)
        return abs((ends[0] - ends[1]) / (2 * width) / float(truth.norm()) - 1.0)


def estimate(
    model: nn.Module, lower: torch.optim.Optimizer, lr: float, name: str, train: Batch, validation: Batch
) -> tuple[Tensor, Tensor]:
    """(first-order term, second-order term after `max_ratio`)."""
    estimator_name, share, part = CHEAPER.get(name, (name, 1.0, 1.0))
    estimator, options = ESTIMATORS[estimator_name]
    direction, magnitude = bk.split_parameters(model)
    copy = torch.optim.AdamW(direction, lr=lr, weight_decay=0.0)
    copy.load_state_dict(lower.state_dict())
    if part < 1.0:
        options = {**options, "difference_batch": part}
    optimizer = bk.BilevelOptimizer(
        model, lower=copy, upper=torch.optim.SGD(magnitude, lr=lr), estimator=estimator, **options
    )  # fmt: skip
    direct, second = (flat(t) for t in optimizer.hypergradient(loss_fn, train, part_of(validation, share), terms=True))
    limit = getattr(estimator, "max_ratio", math.inf) * float(direct.norm())
    return direct, second * min(1.0, limit / max(float(second.norm()), 1e-300))


def measure(lr: float, arguments: argparse.Namespace, done: set[tuple[Any, ...]]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each state and draw that is not done yet."""
    wanted = [(stage, draw) for stage in sorted(arguments.stages) for draw in range(arguments.draws)]
    wanted = [(stage, draw) for stage, draw in wanted if (lr, stage, draw, arguments.norm) not in done]
    if not wanted:
        return
    with bk.pass_mode(differentiate_norm=arguments.norm == "differentiated", backend="reference"):
        model = encoder(arguments.r, "query+value", attention="eager")
        steps = sorted({stage for stage, _ in wanted})
        for stage, (lower, _) in stages(model, Batches(arguments.seed), steps, lr, arguments.batch_size):
            for draw in [draw for at, draw in wanted if at == stage]:
                yield list(_rows(model, lower, lr, stage, draw, arguments))


def _rows(
    model: nn.Module, lower: torch.optim.Optimizer, lr: float, stage: int, draw: int, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    batches = Batches(arguments.seed, draws=(stage, draw))
    validation = batches.draw("validation", arguments.validation_size)
    trains = [batches.draw("train", arguments.batch_size) for _ in range(max(arguments.steps))]
    names = [*ESTIMATORS, *CHEAPER]
    estimates = {name: estimate(double_copy(model), lower, lr, name, trains[0], validation) for name in names}
    unrolled = Unrolled(double_copy(model), lower, model)
    direct = estimates["Sama, horizon 1"][0]
    truths = unrolled.truths(trains, validation, arguments.steps)
    check = unrolled.check(trains, validation, truths[max(arguments.steps)]) if draw == 0 else None
    for steps, whole in truths.items():
        second = whole - direct
        for name, (own, term) in estimates.items():
            row = {
                "lr": lr, "stage": stage, "draw": draw, "norm": arguments.norm, "K": steps, "estimator": name,
                "truth_second_over_direct": float(second.norm() / direct.norm()),
                "second_cosine": cosine(term, second), "second_ratio": float(term.norm() / second.norm()),
                "whole_cosine": cosine(own + term, whole), "whole_ratio": float((own + term).norm() / whole.norm()),
                "whole_error": relative_error(own + term, whole),
                "truth_off_when_rerun": check if steps == max(arguments.steps) else None,
            }  # fmt: skip
            print(
                f"{lr:7.0e}  {stage:5d}  {draw:4d}  {steps:3d}  {name:{WIDTH}s}  {row['truth_second_over_direct']:11.1e}  "
                f"{row['second_cosine']:7.3f}  {row['second_ratio']:8.2e}  "
                f"{row['whole_cosine']:7.3f}  {row['whole_ratio']:7.2f}  {row['whole_error']:7.2f}",
                flush=True,
            )
            yield row


def states(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: per state and draw the lengths of the second-order terms and their cosines, then the whole one's errors by K."""
    ks, shown = sorted({row["K"] for row in rows}), list(ESTIMATORS)[1:6]
    found = {(row["lr"], row["stage"], row["draw"], row["K"], row["estimator"]): row for row in rows}
    draws = sorted({key[:3] for key in found})
    joined = " / ".join(map(str, ks))

    def each(draw: tuple[Any, ...], name: str, value: Callable[[dict[str, Any]], float], form: str) -> str:
        cells = [value(found[(*draw, k, name)]) for k in ks]
        return " / ".join("-" if math.isnan(cell) else f"{cell:{form}}" for cell in cells)

    lines = [
        "Length of the second-order term, the first-order one being 1; cosine of Sama's and of xi = 1's with the truth's", "",
        f"| learning rate, step, draw | truth, K = {joined} | {' | '.join(shown)} | cosine of Sama, K = {joined} | of xi = 1 |",
        "|---" * (len(shown) + 4) + "|",
    ]  # fmt: skip
    for draw in draws:
        truth = each(draw, "Sama, horizon 1", lambda row: row["truth_second_over_direct"], ".2g")
        row = [found[(*draw, ks[0], name)] for name in shown]
        lengths = [f"{one['second_ratio'] * one['truth_second_over_direct']:.2g}" for one in row]
        cosines = [
            each(draw, name, lambda row: row["second_cosine"], ".2f") for name in ("Sama, horizon 1", "paper-code (xi = 1)")
        ]
        lines.append(f"| {draw[0]:g}, {draw[1]}, {draw[2]} | {truth} | {' | '.join([*lengths, *cosines])} |")
    lines += ["", "Relative error of the whole hypergradient", ""]
    lines.append(f"| learning rate, step, draw | K | {' | '.join(SHOWN)} |")
    lines.append("|---" * (len(SHOWN) + 2) + "|")
    for draw in draws:
        for k in ks:
            errors = [f"{found[(*draw, k, name)]['whole_error']:.3f}" for name in SHOWN]
            lines.append(f"| {draw[0]:g}, {draw[1]}, {draw[2]} | {k} | {' | '.join(errors)} |")
    return [*lines, ""]


def first_order_of(name: str) -> str:
    """The first-order row from the same validation rows; of the first-order rows themselves that of all of them."""
    part = next((part for part in name.split(", ") if part.startswith("validation")), None)
    return "first order" if part is None or name.startswith("first order") else f"first order, {part}"


def against_first_order(rows: list[dict[str, Any]]) -> list[str]:
    """Each estimator's error against the most real steps as a share of the first order's, over the draws after step 0."""
    most = max(row["K"] for row in rows)
    errors: dict[str, dict[tuple[Any, ...], float]] = {}
    for row in rows:
        if row["K"] == most and row["stage"] > 0:
            errors.setdefault(row["estimator"], {})[row["lr"], row["stage"], row["draw"]] = row["whole_error"]
    if not errors:
        return []
    draws = len(errors["first order"])
    lines = [
        f"Error of the whole hypergradient against {most} real steps over that of the first order from the same validation rows",
        f"(of the first order from fewer rows: over that from all), {draws} draws after step 0",
        f"{'':{WIDTH}s}{'geometric mean':>16s}{'nearer in':>11s}{'best':>7s}{'worst':>7s}{'mean error':>12s}",
    ]
    for name, own in errors.items():
        first = errors[first_order_of(name)]
        shares = [own[draw] / first[draw] for draw in first]
        mean = math.exp(statistics.fmean(math.log(share) for share in shares))
        lines.append(
            f"{name:{WIDTH}s}{mean:16.2f}{sum(share < 1 for share in shares) if name != 'first order' else '-':>11}"
            f"{min(shares):7.2f}{max(shares):7.2f}{statistics.fmean(own.values()):12.3f}"
        )
    return [*lines, ""]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Medians over draws and states, by learning rate and K; and where a longer horizon is worse than none."""
    lines = [*states(rows), *against_first_order(rows)]
    for lr in sorted({row["lr"] for row in rows}):
        ks = sorted({row["K"] for row in rows})
        lines.append(f"lr {lr:g}: whole hypergradient against K real steps, median cosine / relative error; states after step 0")
        lines.append(" " * WIDTH + "".join(f"{f'K = {k}':>16s}" for k in ks))
        for name in dict.fromkeys(row["estimator"] for row in rows):
            cells = ""
            for k in ks:
                own = [r for r in rows if (r["lr"], r["K"], r["estimator"]) == (lr, k, name) and r["stage"] > 0]
                if not own:
                    cells += f"{'-':>16s}"
                else:
                    middle = [statistics.median(r[key] for r in own) for key in ("whole_cosine", "whole_error")]
                    cells += f"{f'{middle[0]:.3f} / {middle[1]:.2f}':>16s}"
            lines.append(f"{name:{WIDTH}s}{cells}")
        lines.append("")
    key = ("lr", "stage", "draw", "K")
    first = {tuple(r[k] for k in key): r["whole_error"] for r in rows if r["estimator"] == "first order"}
    for name in [name for name in ESTIMATORS if name != "first order"]:
        worse: dict[tuple[float, int], set[int]] = {}
        for r in rows:
            if r["estimator"] == name and r["whole_error"] > first[tuple(r[k] for k in key)] * 1.02:
                worse.setdefault((r["lr"], r["stage"]), set()).add(r["K"])
        where = [f"lr {lr:g} step {stage}, K {' '.join(map(str, sorted(ks)))}" for (lr, stage), ks in sorted(worse.items())]
        lines.append(f"{name}: a larger error than first order (by over 2 %) {'at' if where else 'nowhere'}")
        lines += [f"    {text}" for text in where]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one learning rate, steps 0 and 20, K = 1 and 5, small batches")
    parser.add_argument("--lrs", type=float, nargs="+", default=[2e-4, 5e-3])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 30, 100, 300], help="steps of training")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 10], help="K, the real lower steps of the truth")
    parser.add_argument("--draws", type=int, default=3, help="draws of train and validation batches per state")
    parser.add_argument("--norm", choices=("differentiated", "detached"), default="differentiated")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--validation-size", type=int, default=64)
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="add the rows to this file, state by state; what it has is not done again")
    parser.add_argument("--table", action="store_true", help="measure nothing: the tables of --json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.lrs, arguments.stages, arguments.steps, arguments.draws = [1e-3], [0, 20], [1, 5], 1
        arguments.batch_size, arguments.validation_size = 8, 16
    rows: list[dict[str, Any]] = []
    if arguments.json and arguments.json.exists():
        document = json.loads(arguments.json.read_text())
        if not arguments.table and document["settings"] != _settings(arguments):
            raise SystemExit(f"{arguments.json} holds results of other settings: {document['settings']}")
        rows = document["rows"]
    if arguments.table:
        print("\n".join(table([row for row in rows if row["norm"] == arguments.norm])))
        return
    print(f"{'lr':>7s}  {'step':>5s}  {'draw':>4s}  {'K':>3s}  {'estimator':{WIDTH}s}  {'|2nd|/|1st|':>11s}  {'cos 2nd':>7s}  "
          f"{'ratio':>8s}  {'cos h':>7s}  {'ratio':>7s}  {'error':>7s}")  # fmt: skip
    done = {(row["lr"], row["stage"], row["draw"], row["norm"]) for row in rows}
    for lr in arguments.lrs:
        for more in measure(lr, arguments, done):
            rows += more
            if arguments.json:
                document = {"schema_version": 1, **machine.source(), "settings": _settings(arguments), "rows": rows}
                arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    print("\n" + "\n".join(table([row for row in rows if row["norm"] == arguments.norm])))


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("r", "seed", "batch_size", "validation_size", "steps")}


if __name__ == "__main__":
    main()
