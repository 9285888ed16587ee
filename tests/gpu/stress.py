"""Random layers on the triton backend against fp64: any shape, dtype, rank, plan, layout and set of needed gradients."""

from __future__ import annotations

import dataclasses
import random
import time

import torch
from torch import Tensor

import bidora_kernels as bk

from ..ops.draws import Call, draw, run, violations

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# what compute-sanitizer looks at: one shape per path, small enough for its slowdown
FIXED = [  # out, in, r, tokens, dtype, plan, dropped, detach_norm
    (72, 104, 1, 33, torch.float32, "activation", False, True),
    (72, 104, 16, 33, torch.bfloat16, "activation", False, False),
    (1, 8, 3, 1, torch.float32, "weight", False, True),
    (77, 333, 5, 70, torch.float16, "activation", True, True),
    (130, 72, 130, 40, torch.bfloat16, "activation", False, True),
    (72, 104, 16, 33, torch.bfloat16, "weight", False, True),
    (133, 57, 64, 129, torch.float32, "weight", False, False),
]


def moved(call: Call, device: str) -> Call:
    """The call with its tensors on a device."""
    fields = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
    return Call(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in fields.items()})


def run_plan(call: Call, plan: str, needs: tuple[str, ...] = ("direction", "magnitude")) -> dict[str, Tensor]:
    """As `draws.run` on the triton backend, with a plan by name."""
    original = bk.functional.dora_linear

    def planned(*args: object, **kwargs: object) -> Tensor:
        return original(*args, **kwargs, plan=plan)

    bk.functional.dora_linear = planned
    try:
        return run(call, "triton", needs)
    finally:
        bk.functional.dora_linear = original


def check_fixed(index: int, device: str) -> list[str]:
    """One shape of FIXED against fp64; returns what is outside the bound."""
    out_features, in_features, r, tokens, dtype, plan, dropped, detach_norm = FIXED[index]
    call = draw(index, out_features, in_features, r, (tokens,), dtype, dropped=dropped, detach_norm=detach_norm)
    call = moved(call, device)
    return violations(call, run_plan(call, plan))


def check_random(seed: int, device: str, largest: int) -> tuple[str, list[str]]:
    """(a description, what is outside the bound) of one random layer; sizes are up to `largest`, mostly small."""
    pick = random.Random(seed)

    def size() -> int:
        return max(1, min(largest, int(2 ** pick.uniform(0, largest.bit_length()))))

    out_features, in_features, tokens = size(), size(), pick.choice([0, 1, size(), size()])
    r = pick.choice([1, 2, 3, 8, 16, 17, 64, 100, 128, 256, 512])
    dtype, plan = pick.choice(DTYPES), pick.choice(["activation", "weight", "auto"])
    call = draw(
        seed, out_features, in_features, r, (tokens,), dtype, bias=pick.random() < 0.5, dropped=pick.random() < 0.25,
        detach_norm=pick.random() < 0.5, layout=pick.choice(["rows", "transposed", "sliced", "strided"]),
        norm_known=pick.random() < 0.25,
    )  # fmt: skip
    needs = pick.choice([("direction", "magnitude"), ("direction",), ("magnitude",)])
    text = f"seed {seed}: [{out_features}, {in_features}] r={r} tokens={tokens} {dtype} {plan} needs {needs}"
    call = moved(call, device)
    return text, violations(call, run_plan(call, plan, needs))


def stress(seconds: float, device: str, largest: int, first: int = 0) -> tuple[int, list[str]]:
    """(how many random layers there was time for, what is outside the bound)."""
    started, seed, wrong = time.monotonic(), first, []
    while time.monotonic() - started < seconds:
        text, found = check_random(seed, device, largest)
        wrong += [f"{text}: {line}" for line in found]
        seed += 1
    return seed - first, wrong
