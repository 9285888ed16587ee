"""Which plan a layer runs by on the triton backend, from the bytes and operations each would take.

Every plan is a list of steps (what, bytes moved, operations, launches); a step takes the time of its launches plus the larger of
its bytes over the bandwidth it reaches and its operations over the peak. The rates were measured on an NVIDIA H200, inside CUDA
graphs, at 4096 x 4096 and rank 16 (benchmarks/results). What matters is the ratio of bandwidth to peak. The activation plan is
the default: another one must be modelled MARGIN times faster.

    activation        base = x weight^T, then one kernel over the output; one read of the weight for the norms
    weight            one kernel writes the merged weight W', then y = x W'^T; W' is written again for the backward
    weight, kept      the same with one W' for `reuse` passes: in inference, or micro-batches between two updates
"""

from __future__ import annotations

import dataclasses
import functools

MARGIN = 1.05
BANDWIDTH = 4.2e12  # bytes/s that a copy reaches
REACHED = {  # bytes/s, the fixed cost of a launch included, where a step reaches less
    "norms": 2.4e12,
    "merged weight": 2.4e12,
    "bias": 1.5e12,
    "compose": 3.2e12,
    "compose_backward": 2.3e12,
    "x lora_A^T": 2.1e12,
    "grad_hidden lora_A": 3.2e12,
    "grad_lora_A": 2.1e12,
}
PEAK = {2: 780e12, 4: 45e12}  # operations/s of a library product, by bytes of its operands; fp32 without tf32
LAUNCH = 2e-6  # seconds between two kernels inside a CUDA graph, and what a short kernel takes at least
LIBRARY_RANK = 32  # from this rank on two library products move less than the partial sums of `compose_backward`
PLANS = ("auto", "activation", "weight")

Step = tuple[str, float, float, int]


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
    plan: str,
    tokens: int,
    out_features: int,
    in_features: int,
    r: int,
    size: int,
    trains: bool,
    norm_known: bool,
    has_bias: bool,
) -> list[Step]:
    """The steps of a forward, with its backward where the layer trains; plan: "activation", "weight" or "merged" (W' at hand)."""
    y, x = float(size * tokens * out_features), float(size * tokens * in_features)
    weight = float(size * out_features * in_features)
    product = 2.0 * tokens * out_features * in_features
    skinny_in, skinny_out = 2.0 * tokens * in_features * r, 2.0 * tokens * out_features * r
    norms = [] if norm_known or plan == "merged" else [("norms", weight, 2.0 * out_features * in_features * r, 3)]
    merging = [] if plan == "merged" else [("merged weight", 2 * weight, 2.0 * out_features * in_features * r, 1)]
    hidden = [("x lora_A^T", x, skinny_in, 1)]
    products = 2 * y if r >= LIBRARY_RANK else 0.0  # instead of its partial sums
    if plan == "activation":
        forward = [*norms, ("x weight^T", x + weight + y, product, 1), *hidden, ("compose", 2 * y, skinny_out, 1)]
        backward = [
            ("compose_backward", 3 * y + products, 2 * skinny_out, 3),
            ("grad weight", x + weight + y, product, 1),
            ("grad_hidden lora_A", 2 * x, skinny_in, 1),
            ("grad_lora_A", x, skinny_in, 1),
        ]
    else:
        # the backward needs the output without it
        bias = [("bias", 2 * y, 0.0, 1)] if has_bias and trains else []
        forward = [*norms, *merging, ("x W'^T", x + weight + y, product, 1), *bias]
        backward = [
            *hidden,
            ("compose_backward", 2 * y + products, 2 * skinny_out, 4),
            *merging,
            ("grad W'", x + weight + y, product, 1),
            ("grad_lora_A", x, skinny_in, 1),
        ]
    return forward + (backward if trains else [])


def seconds(listed: list[Step], size: int) -> float:
    """The modelled time of steps that follow each other."""
    return sum(
        LAUNCH * launches + max(moved / REACHED.get(what, BANDWIDTH), operations / PEAK[size])
        for what, moved, operations, launches in listed
    )


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
    has_bias: bool = False,
) -> Plan:
    """The plan for `tokens` rows of x and operands of `size` bytes; `reuse`: how many passes one W' would serve.

    Raises ValueError for a plan that does not exist.
    """
    if forced not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {forced!r}")
    if forced != "auto":
        return Plan(forced, forced == "weight" and reuse > 1, "asked for by name")
    shape = (tokens, out_features, in_features, r, size, trains)
    times = {name: seconds(steps(name, *shape, norm_known, has_bias), size) for name in ("activation", "weight", "merged")}
    once = [step for step in steps("weight", *shape, norm_known, has_bias) if step[0] in ("norms", "merged weight")]
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
