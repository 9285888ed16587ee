"""Which second-order term tells the upper level what it wants to know: each estimator against K real AdamW steps.

The truth is dL_val(V_K(M), M)/dM, differentiated in fp64 through K real AdamW steps of the lower level, each on its own train
batch. Every pass, training included, differentiates the norm, so that truth and estimates see one gradient. MiniLM-L6 with DoRA
(r 4, query and value) on CoLA text, at several stages of training and learning rates. `second`: the second-order term; `whole`:
the whole hypergradient; `ratio`: the length of the term over the truth's.

    python benchmarks/usefulness.py --quick
    python benchmarks/usefulness.py --json usefulness.json
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from encoder import Batch, Batches, cosine, double_copy, encoder, flat, loss_fn, stages
from torch import Tensor, nn

import bidora_kernels as bk

ESTIMATORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "first order": (bk.FirstOrder(), {}),
    "paper (xi = lr)": (bk.CentralDifference(), {"xi": "lr"}),
    "paper-code (xi = 1)": (bk.CentralDifference(at="after"), {"xi": 1.0}),
    "Sama, horizon 1": (bk.Sama(horizon=1, max_ratio=math.inf), {}),
    "Sama, horizon 5": (bk.Sama(horizon=5, max_ratio=math.inf), {}),
    "Sama, horizon 10": (bk.Sama(horizon=10, max_ratio=math.inf), {}),
}


def functional_adamw(optimizer: torch.optim.Optimizer, direction: list[nn.Parameter]) -> Any:
    """The optimizer's step as differentiable operations on (values, moments), from its state now."""
    group = optimizer.param_groups[0]
    (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
    states = [optimizer.state.get(parameter, {}) for parameter in direction]
    count = max((int(state["step"]) for state in states if state), default=0)
    zeros = [torch.zeros_like(parameter) for parameter in direction]
    first = [state["exp_avg"].double() if state else zero for state, zero in zip(states, zeros, strict=True)]
    second = [state["exp_avg_sq"].double() if state else zero for state, zero in zip(states, zeros, strict=True)]

    def step(values: list[Tensor], grads: tuple[Tensor, ...]) -> list[Tensor]:
        nonlocal count, first, second
        count += 1
        first = [beta1 * old + (1 - beta1) * g for old, g in zip(first, grads, strict=True)]
        second = [beta2 * old + (1 - beta2) * g * g for old, g in zip(second, grads, strict=True)]
        moved = []
        for value, m, s in zip(values, first, second, strict=True):
            positive = s > 0
            root = torch.where(positive, torch.where(positive, s, 1.0).sqrt(), 0.0) / math.sqrt(1 - beta2**count)
            moved.append(value - lr * (m / (1 - beta1**count)) / (root + eps))
        return moved

    return step


def truth(
    model: nn.Module, optimizer: torch.optim.Optimizer, source: nn.Module, trains: list[Batch], validation: Batch
) -> Tensor:
    """dL_val(V_K(M), M)/dM through len(trains) steps."""
    direction, magnitude = (list(group) for group in bk.split_parameters(model))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    step = functional_adamw(optimizer, list(bk.split_parameters(source)[0]))
    values: list[Tensor] = list(direction)

    def loss(batch: Batch) -> Tensor:
        replaced = {names[id(p)]: value for p, value in zip(direction, values, strict=True)}
        return torch.func.functional_call(model, replaced, (), dict(batch)).loss

    for batch in trains:
        values = step(values, torch.autograd.grad(loss(batch), values, create_graph=True))
    return flat(list(torch.autograd.grad(loss(validation), magnitude)))


def estimate(
    model: nn.Module, lower: torch.optim.Optimizer, lr: float, name: str, train: Batch, validation: Batch
) -> tuple[Tensor, Tensor]:
    direction, magnitude = bk.split_parameters(model)
    copy = torch.optim.AdamW(direction, lr=lr, weight_decay=0.0)
    copy.load_state_dict(lower.state_dict())
    estimator, options = ESTIMATORS[name]
    optimizer = bk.BilevelOptimizer(
        model, lower=copy, upper=torch.optim.SGD(magnitude, lr=lr), estimator=estimator, **options
    )  # fmt: skip
    direct, second = optimizer.hypergradient(loss_fn, train, validation, terms=True)
    return flat(direct), flat(second)


def measure(lr: float, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    with bk.pass_mode(differentiate_norm=True, backend="reference"):
        return _measure(lr, arguments)


def _measure(lr: float, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    model, batches, rows = encoder(arguments.r, "query+value", attention="eager"), Batches(arguments.seed), []
    for stage, (lower, _) in stages(model, batches, arguments.stages, lr, arguments.batch_size):
        for draw in range(arguments.draws):
            trains = [batches.draw("train", arguments.batch_size) for _ in range(max(arguments.steps))]
            validation = batches.draw("validation", arguments.validation_size)
            estimates = {name: estimate(double_copy(model), lower, lr, name, trains[0], validation) for name in ESTIMATORS}
            direct = estimates["Sama, horizon 1"][0]
            for steps in arguments.steps:
                whole = truth(double_copy(model), lower, model, trains[:steps], validation)
                second = whole - direct
                for name, (own, term) in estimates.items():
                    row = {
                        "lr": lr, "stage": stage, "draw": draw, "K": steps, "estimator": name,
                        "truth_second_over_direct": float(second.norm() / direct.norm()),
                        "second_cosine": cosine(term, second), "second_ratio": float(term.norm() / second.norm()),
                        "whole_cosine": cosine(own + term, whole), "whole_ratio": float((own + term).norm() / whole.norm()),
                    }  # fmt: skip
                    rows.append(row)
                    print(
                        f"{lr:7.0e}  {stage:5d}  {draw:4d}  {steps:3d}  {name:20s}  {row['truth_second_over_direct']:7.1e}  "
                        f"{row['second_cosine']:7.3f}  {row['second_ratio']:8.2e}  "
                        f"{row['whole_cosine']:7.3f}  {row['whole_ratio']:7.2f}",
                        flush=True,
                    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one learning rate, steps 0 and 20, K = 1 and 5, small batches")
    parser.add_argument("--lrs", type=float, nargs="+", default=[2e-4, 5e-3])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 30, 100, 300], help="steps of training")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 10], help="K, the real lower steps of the truth")
    parser.add_argument("--draws", type=int, default=3, help="draws of batches per state")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--validation-size", type=int, default=64)
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.lrs, arguments.stages, arguments.steps, arguments.draws = [1e-3], [0, 20], [1, 5], 1
        arguments.batch_size, arguments.validation_size = 8, 16
    print(f"{'lr':>7s}  {'step':>5s}  {'draw':>4s}  {'K':>3s}  {'estimator':20s}  {'|2nd|/|1st|':>7s}  {'cos 2nd':>7s}  "
          f"{'ratio':>8s}  "
          f"{'cos h':>7s}  {'ratio':>7s}")  # fmt: skip
    rows = [row for lr in arguments.lrs for row in measure(lr, arguments)]
    if arguments.json:
        arguments.json.write_text(json.dumps({"schema_version": 1, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
