"""Predicted against measured, the gap by name, and what the plans say about machines that were not measured.

python -m benchmarks.predictions                 print the whole page from the committed results
python -m benchmarks.predictions RESULTS.json    the same from another results file
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import results
from .cases import GPU_COLUMNS, MODELS
from .machine import label
from .predict import (
    MODELLED_H200,
    PLANS,
    Ceilings,
    Plan,
    Shape,
    case_shape,
    counts,
    frozen,
    peft_dora,
    peft_dora_fp32,
    peft_lora,
    seconds,
    triton_activation_plan,
    triton_kept_plan,
    triton_weight_plan,
)
from .tables import case_ceilings, markdown, measured, milliseconds, of_kind, our_provider
from .timing import quantiles

Document = dict[str, Any]
Entry = dict[str, Any]


def measured_ceilings(document: Document, entry: Entry) -> Ceilings:
    """The ceilings of the pieces that measured a case."""
    found = case_ceilings(document, entry)
    return Ceilings(
        found["copy_gb_s"] * 1e9, found[f"matmul_{entry['case']['dtype']}_gflop_s"] * 1e9, found["operator_us"] * 1e-6
    )


def _layers(document: Document) -> dict[str, Entry]:
    return {**of_kind(document, "layer"), **of_kind(document, "decode")}


def _ratio(document: Document, entry: Entry, provider: str, plan: Callable[[Shape], Plan]) -> float:
    """Measured over predicted time."""
    wanted = seconds(plan(case_shape(entry["case"])), measured_ceilings(document, entry))
    return quantiles(measured(entry)[provider])[1] / wanted


def predicted_table(document: Document) -> list[str]:
    """Measured over predicted time of every layer case and provider that has a plan."""
    entries = _layers(document)
    used = [name for name in PLANS if any(name in measured(entry) for entry in entries.values())]
    rows = []
    for name, entry in entries.items():
        times, ceilings, shape = measured(entry), measured_ceilings(document, entry), case_shape(entry["case"])
        row = [name]
        for provider in used:
            if provider not in times:
                row.append("")
                continue
            wanted, middle = seconds(PLANS[provider](shape), ceilings), quantiles(times[provider])[1]
            row.append(f"{milliseconds(wanted)} → {milliseconds(middle)} ({middle / wanted:.2f})")
        rows.append(row)
    return markdown(["case (predicted → measured ms, ratio)", *used], rows) if rows else []


def summary_table(document: Document) -> list[str]:
    """How far the prediction is off, by provider: median, least and most of measured over predicted."""
    rows = []
    for kind, many in (("layer", False), ("layer", True), ("decode", None)):
        entries = [e for e in of_kind(document, kind).values() if many is None or (e["case"]["tokens"] > 512) == many]
        for provider, plan in PLANS.items():
            ratios = sorted(
                quantiles(measured(entry)[provider])[1]
                / seconds(plan(case_shape(entry["case"])), measured_ceilings(document, entry))
                for entry in entries
                if provider in measured(entry)
            )
            if ratios:
                what = kind if many is None else f"{kind}, {'over' if many else 'up to'} 512 tokens"
                row = [what, provider, f"{len(ratios)}", f"{statistics.median(ratios):.2f}"]
                rows.append([*row, f"{ratios[0]:.2f}", f"{ratios[-1]:.2f}"])
    return markdown(["measured / predicted", "provider", "cases", "median", "least", "most"], rows) if rows else []


def _parts(plan: Plan, ceilings: Ceilings) -> tuple[float, float, float]:
    """Seconds of the full matrix products, of everything else, and of launching the operators."""
    products = rest = 0.0
    for kernel in plan:
        taken = max(kernel.bytes / ceilings.bandwidth, kernel.operations / ceilings.arithmetic)
        if kernel.full_product:
            products += taken
        else:
            rest += taken
    return products, rest, len(plan) * ceilings.operator


def gap_table(document: Document) -> list[str]:
    """Where this library's time goes: what the plan explains, the products' own gap (the floor's), and what is left."""
    rows = []
    for name, entry in _layers(document).items():
        times = measured(entry)
        ours = our_provider(times)
        if ours not in PLANS or entry["floor"] not in times:
            continue
        ceilings, shape = measured_ceilings(document, entry), case_shape(entry["case"])
        plan = PLANS[ours](shape)
        total, middle, counted = sum(_parts(plan, ceilings)), quantiles(times[ours])[1], counts(plan)
        of_products = quantiles(times[entry["floor"]])[1] - seconds(frozen(shape), ceilings)
        cells = [*_parts(plan, ceilings), total, middle, middle - total, of_products, middle - total - of_products]
        rows.append(
            [
                name,
                f"{counted.bytes / 1e6:,.1f}",
                f"{counted.operations / 1e9:,.2f}",
                *map(_signed, cells),
                f"{middle / total:.2f}",
            ]
        )
    header = [
        "bidora, ms", "MB", "GFLOP", "products", "everything else", "launches", "predicted", "measured", "gap",
        "of it the products'", "of it the rest", "ratio",
    ]  # fmt: skip
    return markdown(header, rows) if rows else []


def _signed(value: float) -> str:
    return "-" + milliseconds(-value) if value < 0 else milliseconds(value)


def _columns() -> list[tuple[str, Shape]]:
    return [
        (f"T={tokens} {MODELS[model][layer][0]}x{MODELS[model][layer][1]} r={r}", Shape(tokens, *MODELS[model][layer], r, 2))
        for model, layer, tokens, r in GPU_COLUMNS
    ]


def plans_table(documents: Sequence[Document]) -> list[str]:
    """Modelled forward and backward times of every plan on an H200, µs; what was measured by hand is in benchmarks/README.md."""
    plans = {
        "frozen linear": frozen,
        "PEFT LoRA": peft_lora,
        "PEFT DoRA, bf16 adapters": peft_dora,
        "PEFT DoRA, fp32 adapters": peft_dora_fp32,
        "bidora (triton), activation plan": triton_activation_plan,
        "bidora (triton), weight plan": triton_weight_plan,
        "bidora (triton), weight plan, W' kept": triton_kept_plan,
    }
    rows = []
    for name, plan in plans.items():
        cells = [f"{seconds(plan(shape), MODELLED_H200) * 1e6:,.0f}" for _, shape in _columns()]
        first = plan(_columns()[0][1])
        total = counts(first)
        rows.append([name, *cells, f"{len(first)}", f"{total.bytes / 1e6:,.0f}", f"{total.operations / 1e9:,.0f}"])
    header = ["modelled µs", *(name for name, _ in _columns()), "kernels", "MB (first column)", "GFLOP (first column)"]
    return markdown(header, rows)


# bytes per second and GPU that collectives reach: 80 % of 450 GB/s inside a node, of 400 Gb/s outside
NVLINK, NETWORK = 360e9, 40e9
GPUS_PER_NODE = 8
LLAMA_7B = {"q_proj": 4, "gate_proj": 2, "down_proj": 1}  # k, v and o have q's shape, up has gate's
LAYERS, HIDDEN, VOCABULARY, TOKENS, RANK = 32, 4096, 32000, 4096, 16
GAP_CASE = f"layer/llama-2-7b.q_proj/4096x4096-T{TOKENS}-r{RANK}-bf16"
PROJECTED: dict[str, tuple[str, Callable[[Shape], Plan]]] = {  # column: provider of a layer case, its plan
    "PEFT LoRA": ("PEFT LoRA", peft_lora),
    "PEFT DoRA, default": ("PEFT DoRA, fp32 adapters", peft_dora_fp32),
    "bidora": ("bidora (triton)", triton_activation_plan),
}


def step_seconds(plan: Callable[[Shape], Plan], ceilings: Ceilings, gap: float = 1.0) -> float:
    """Forward and backward of a Llama-2-7B with every linear adapted, TOKENS per GPU: `gap` times the plan, attention, head."""
    linears = sum(
        count * seconds(plan(Shape(TOKENS, *MODELS["llama-2-7b"][layer], RANK, 2)), ceilings) for layer, count in LLAMA_7B.items()
    )
    # causal; forward 1, backward 2.5; 60 % of the product's rate
    attention = 3.5 * 2.0 * TOKENS**2 * HIDDEN / ceilings.arithmetic / 0.6
    elements = 20 * 2.0 * TOKENS * HIDDEN / ceilings.bandwidth  # norms, rotary embedding, activation, residuals
    head = seconds(frozen(Shape(TOKENS, VOCABULARY, HIDDEN, RANK, 2)), ceilings)
    return LAYERS * (gap * linears + attention + elements) + head


def basis(documents: Sequence[Document]) -> tuple[str, Ceilings, dict[str, float]]:
    """(in words, ceilings, measured over predicted by column) from the first GPU's results that have GAP_CASE, else modelled."""
    for document in documents:
        entry = document["cases"].get(GAP_CASE)
        if document["machine"]["device"] != "cuda" or document["tiny"] or entry is None or not entry["pieces"]:
            continue
        ceilings, times, shape = measured_ceilings(document, entry), measured(entry), case_shape(entry["case"])
        gaps = {
            column: quantiles(times[provider])[1] / seconds(plan(shape), ceilings) if provider in times else 1.0
            for column, (provider, plan) in PROJECTED.items()
        }
        said = ", ".join(f"{column} {gap:.2f}" for column, gap in gaps.items())
        words = (
            f"Single-GPU terms from {label(document['machine'])}: its measured ceilings, and measured over predicted of "
            f"`{GAP_CASE}` ({said}). The collectives are assumed."
        )
        return words, ceilings, gaps
    words = (
        "No layer was measured by the suite on a GPU: ceilings assumed for an H200, every plan taken at its prediction. "
        "The collectives are assumed too."
    )
    return words, MODELLED_H200, dict.fromkeys(PROJECTED, 1.0)


def projection_table(documents: Sequence[Document]) -> list[str]:
    """Step time and communication of FSDP2: weights gathered twice a pass, adapters' gradients reduced."""
    words, ceilings, gaps = basis(documents)
    sizes = [(count, *MODELS["llama-2-7b"][name]) for name, count in LLAMA_7B.items()]
    weights = 2.0 * LAYERS * sum(count * n * k for count, n, k in sizes)
    trained = 4.0 * LAYERS * sum(count * (RANK * (n + k) + n) for count, n, k in sizes)
    rows = []
    for gpus in (8, 64, 512):
        for sharding in ("all GPUs", "one node")[: 1 if gpus == GPUS_PER_NODE else 2]:
            inside = gpus == GPUS_PER_NODE or sharding == "one node"
            link, group = (NVLINK, GPUS_PER_NODE) if inside else (NETWORK, gpus)
            gather = 2 * weights * (group - 1) / group / link
            reduce = 2 * trained * (gpus - 1) / gpus / (NVLINK if gpus == GPUS_PER_NODE else NETWORK)
            row = [f"{gpus}", sharding, f"{weights / group / 2**30:.2f}", f"{gather * 1e3:,.1f}", f"{reduce * 1e3:,.2f}"]
            for column, (_, plan) in PROJECTED.items():
                compute = step_seconds(plan, ceilings, gaps[column])
                total = max(compute, gather) + gather / 2 / LAYERS + reduce
                row.append(f"{compute * 1e3:,.0f} → {total * 1e3:,.0f}")
            rows.append(row)
    header = ["GPUs", "weights sharded over", "weights per GPU, GiB", "gather ms", "reduce ms"]
    return [words, "", *markdown([*header, *(f"{column}: compute → step, ms" for column in PROJECTED)], rows)]


TABLES: dict[str, Callable[[Document], list[str]]] = {  # of one results file
    "gap-summary": summary_table,
    "gap": gap_table,
    "predicted": predicted_table,
}
MODELLED: dict[str, Callable[[Sequence[Document]], list[str]]] = {  # of all of them, and without any
    "plans": plans_table,
    "projection": projection_table,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print benchmarks/PREDICTIONS.md from the committed results, or from the one named."""
    from .report import PAGES, filled

    parser = argparse.ArgumentParser(prog="python -m benchmarks.predictions", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", help="results files; without one, every committed one")
    arguments = parser.parse_args(argv)
    try:
        documents = [results.load(path) for path in arguments.results or results.committed()]
    except (ValueError, OSError) as error:
        print(f"benchmarks.predictions: {error}", file=sys.stderr)
        return 2
    print(filled(PAGES[-1].read_text(), documents))
    return 0


if __name__ == "__main__":
    sys.exit(main())
