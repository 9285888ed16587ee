"""Which plan a layer runs by on the triton backend, from the bytes and operations each would take.

Every plan is a list of steps (what, bytes moved, operations); a step takes the time of a launch plus the larger of its bytes
over the bandwidth and its operations over the peak. The rates are those of an NVIDIA H200, with the bandwidth that a copy
reaches; the model itself was not measured. What matters is the ratio of bandwidth to peak. The activation plan is the default:
another one must be modelled MARGIN times faster.

    activation        base = x weight^T, then one kernel over the output; one read of the weight for the norms
    weight            one kernel writes the merged weight W', then y = x W'^T; W' is written again for the backward
    weight, kept      the same with one W' for `reuse` passes: in inference, or micro-batches between two updates
"""

from __future__ import annotations

import dataclasses
import functools

MARGIN = 1.05
BANDWIDTH = 4.3e12  # bytes/s
PEAK = {2: 780e12, 4: 45e12}  # operations/s of a library product, by bytes of its operands; fp32 without tf32
LAUNCH = 1.5e-6  # seconds between two kernels inside a CUDA graph
PLANS = ("auto", "activation", "weight")

Step = tuple[str, float, float]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a layer runs: `name` ("activation" or "weight"), whether W' is `kept` between passes, and why."""

    name: str
    kept: bool
    reason: str

    def __str__(self) -> str:
        """The choice and its reason."""
        return f"{self.name} plan{', merged weight kept between passes' if self.kept else ''}: {self.reason}"


def steps(
    plan: str, tokens: int, out_features: int, in_features: int, r: int, size: int, trains: bool, norm_known: bool
) -> list[Step]:
    """The steps of a forward, with its backward where the layer trains; plan: "activation", "weight" or "merged" (W' at hand)."""
    y, x = float(size * tokens * out_features), float(size * tokens * in_features)
    weight = float(size * out_features * in_features)
    product = 2.0 * tokens * out_features * in_features
    skinny_in, skinny_out = 2.0 * tokens * in_features * r, 2.0 * tokens * out_features * r
    norms = [] if norm_known or plan == "merged" else [("norms", weight, 2.0 * out_features * in_features * r)]
    merging = [] if plan == "merged" else [("merged weight", 2 * weight, 2.0 * out_features * in_features * r)]
    hidden = [("x lora_A^T", x, skinny_in)]
    if plan == "activation":
        forward = [*norms, ("x weight^T", x + weight + y, product), *hidden, ("compose", 2 * y, skinny_out)]
        backward = [
            *hidden,
            ("compose_backward", 3 * y, 2 * skinny_out),
            ("grad weight", x + weight + y, product),
            ("grad_hidden lora_A", 2 * x, skinny_in),
            ("grad_lora_A", x, skinny_in),
        ]
    else:
        forward = [*norms, *merging, ("x W'^T", x + weight + y, product)]
        backward = [
            *hidden,
            ("compose_backward", 2 * y, 2 * skinny_out),
            *merging,
            ("grad W'", x + weight + y, product),
            ("grad_lora_A", x, skinny_in),
        ]
    return forward + (backward if trains else [])


def seconds(listed: list[Step], size: int) -> float:
    """The modelled time of steps that follow each other."""
    return sum(LAUNCH + max(moved / BANDWIDTH, operations / PEAK[size]) for _, moved, operations in listed)


@functools.lru_cache(maxsize=4096)
def choose(
    tokens: int,
    out_features: int,
    in_features: int,
    r: int,
    size: int,
    trains: bool = True,
    norm_known: bool = False,
    reuse: int = 1,
    forced: str = "auto",
) -> Plan:
    """The plan for `tokens` rows of x and operands of `size` bytes; `reuse`: how many passes one W' would serve.

    Raises ValueError for a plan that does not exist.
    """
    if forced not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {forced!r}")
    if forced != "auto":
        return Plan(forced, forced == "weight" and reuse > 1, "asked for by name")
    shape = (tokens, out_features, in_features, r, size, trains)
    times = {name: seconds(steps(name, *shape, norm_known), size) for name in ("activation", "weight", "merged")}
    once = [step for step in steps("weight", *shape, norm_known) if step[0] in ("norms", "merged weight")]
    writing = seconds(once[: 1 if norm_known else 2], size)
    times["merged"] += writing / reuse
    rebuilt, kept = times["activation"] / times["weight"], times["activation"] / times["merged"]
    microseconds = {name: f"{time * 1e6:.4g} us" for name, time in times.items()}
    told = f"modelled {microseconds['activation']} for the activation plan, {microseconds['weight']} for the weight plan"
    if reuse > 1:
        told += f", {microseconds['merged']} with one merged weight for {reuse} passes"
        if kept >= MARGIN and kept >= rebuilt:
            return Plan("weight", True, told)
    if rebuilt >= MARGIN:
        return Plan("weight", False, told)
    return Plan("activation", False, f"{told}; another plan must be {MARGIN} times faster")
