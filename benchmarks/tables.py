"""Results to Markdown tables: what one file measured, every ratio taken within rounds, losing cases kept."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from . import predict
from .machine import label
from .timing import Ratio, distance, quantiles, ratio

Document = dict[str, Any]
Entry = dict[str, Any]
OURS = ("bidora (triton)", "bidora (native)", "bidora (reference)")


def measured(entry: Entry) -> dict[str, list[float]]:
    """Times by provider, of those that were timed."""
    return {name: value["seconds"] for name, value in entry["providers"].items() if value["status"] == "ok"}


def our_provider(times: Iterable[str], kind: str = "") -> str | None:
    """The provider that `auto` takes: the fastest backend at hand; of a bilevel case the preset `balanced`."""
    times = list(times)
    if kind == "bilevel":
        return next((name for name in times if name.startswith("balanced")), None)
    return next((name for name in OURS if name in times), None)


def case_ceilings(document: Document, entry: Entry) -> dict[str, float]:
    """The medians of the ceilings measured in the pieces that measured a case."""
    used = [document["pieces"][index]["ceilings"] for index in sorted(set(entry["pieces"]))]
    return {name: statistics.median(ceilings[name] for ceilings in used) for name in used[0]}


def milliseconds(seconds: float) -> str:
    """A time with three digits that count."""
    value = seconds * 1e3
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def times_as_long(value: Ratio) -> str:
    """A ratio with its interval."""
    digits = 2 if value.median < 20 else 1 if value.median < 100 else 0
    return f"{value.median:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def case_lines(entry: Entry) -> list[str]:
    """A case for the terminal: every provider with p50 and p20 to p80, and its ratio to the floor."""
    times = measured(entry)
    floor = times.get(entry["floor"])
    width = max(map(len, entry["providers"]))
    lines = []
    for name, value in entry["providers"].items():
        if value["status"] != "ok":
            lines.append(f"{name:<{width}}  {value['status']}: {value['reason']}")
            continue
        low, middle, high = (milliseconds(t) for t in quantiles(times[name]))
        line = f"{name:<{width}}  {middle:>9} ms  ({low} to {high})  {value['peak_bytes'] / 2**20:8.1f} MiB"
        lines.append(line + (f"  {times_as_long(ratio(times[name], floor))} of the floor" if floor else ""))
    return lines


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table; the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def of_kind(document: Document, kind: str) -> dict[str, Entry]:
    """The cases of a kind that were measured, in the order of the suite."""
    return {name: entry for name, entry in document["cases"].items() if entry["case"]["kind"] == kind and entry["pieces"]}


def _short(name: str) -> str:
    return name.split("/", 1)[1]


def _columns(entries: dict[str, Entry], skip: Sequence[str] = ()) -> list[str]:
    found: dict[str, None] = {}
    for entry in entries.values():
        found.update(dict.fromkeys(name for name in measured(entry) if name != entry["floor"] and name not in skip))
    ours = [name for name in found if name.startswith("bidora")]
    return [name for name in found if name not in ours] + ours


def ratio_table(document: Document, kind: str) -> list[str]:
    """Rows of cases, columns of providers: times as long as the floor, median of per-round ratios with its 95 % interval."""
    entries = of_kind(document, kind)
    if not entries:
        return []
    columns = _columns(entries)
    rows = []
    for name, entry in entries.items():
        times = measured(entry)
        floor = times[entry["floor"]]
        row = [_short(name), milliseconds(quantiles(floor)[1])]
        row += [times_as_long(ratio(times[column], floor)) if column in times else "" for column in columns]
        rows.append(row)
    floor_name = next(iter(entries.values()))["floor"]
    return markdown([kind, f"{floor_name}, ms", *columns], rows)


def gates_table(document: Document, kind: str = "step") -> list[str]:
    """This library against PEFT within each round: the overhead that is left, and the time against PEFT's LoRA and DoRA."""
    rows = []
    for name, entry in of_kind(document, kind).items():
        times = measured(entry)
        ours = our_provider(times)
        if ours is None or "PEFT DoRA" not in times or "PEFT LoRA" not in times:
            continue
        floor, dora, lora = times[entry["floor"]], times["PEFT DoRA"], times["PEFT LoRA"]
        row = [
            _short(name),
            times_as_long(distance(times[ours], dora, floor)),
            times_as_long(ratio(times[ours], lora)),
            times_as_long(ratio(times[ours], dora)),
        ]
        case = entry["case"]
        tokens = case["batch"] * case["sequence"] if "batch" in case else case["tokens"]
        rows.append([*row, f"{tokens / quantiles(times[ours])[1]:,.0f}"])
    header = [kind, "(bidora - floor) / (PEFT DoRA - floor)", "bidora / PEFT LoRA", "bidora / PEFT DoRA", "bidora, tokens/s"]
    return markdown(header, rows) if rows else []


def bilevel_table(document: Document) -> list[str]:
    """Rows of providers: the cost of one iteration against the floor, PEFT's LoRA and DoRA steps and the authors' method."""
    lines: list[str] = []
    for name, entry in of_kind(document, "bilevel").items():
        times = measured(entry)
        others = [other for other in (entry["floor"], "PEFT LoRA", "PEFT DoRA", "Eq. 8 on PEFT DoRA") if other in times]
        rows = []
        for provider, seconds in times.items():
            row = [provider, milliseconds(quantiles(seconds)[1])]
            row += [times_as_long(ratio(seconds, times[other])) if other != provider else "1" for other in others]
            rows.append([*row, f"{entry['providers'][provider]['peak_bytes'] / 2**20:,.0f}"])
        lines += (
            ["", f"{_short(name)}, {len(entry['pieces'])} rounds:", ""]
            if lines
            else [
                f"{_short(name)}, {len(entry['pieces'])} rounds:",
                "",
            ]
        )
        lines += markdown(["one iteration", "ms", *(f"/ {other}" for other in others), "peak MiB"], rows)
    return lines


def operation_table(document: Document) -> list[str]:
    """Achieved bandwidth and arithmetic of the operations, against the copy of the same rounds and the matrix product's rate."""
    rows = []
    rate = f"matmul_{'fp32' if document['machine']['device'] == 'cpu' else 'bf16'}_gflop_s"
    for name, entry in of_kind(document, "operation").items():
        times, counted = measured(entry), predict.operation_counts(entry["case"])
        ceilings = case_ceilings(document, entry)
        copy = times[entry["floor"]]
        for provider, seconds in times.items():
            if provider == entry["floor"]:
                continue
            middle = quantiles(seconds)[1]
            arithmetic = counted.operations / middle / 1e9
            share = ratio(copy, seconds)
            rows.append(
                [
                    _short(name),
                    provider,
                    milliseconds(middle),
                    f"{counted.bytes / middle / 1e9:.1f}",
                    f"{share.median:.0%} ({share.low:.0%} to {share.high:.0%})",
                    f"{arithmetic:,.0f}",
                    f"{arithmetic / ceilings[rate]:.0%}",
                ]
            )
    header = ["operation", "provider", "ms", "GB/s", "of the copy's", "GFLOP/s", "of the matrix product's"]
    return markdown(header, rows) if rows else []


def memory_table(document: Document) -> list[str]:
    """Peak memory of one step above what was there before it, MiB."""
    entries = of_kind(document, "step")
    columns = _columns(entries)
    rows = []
    for name, entry in entries.items():
        providers = entry["providers"]
        cells = [providers[c]["peak_bytes"] / 2**20 if c in measured(entry) else None for c in [entry["floor"], *columns]]
        rows.append([_short(name), *("" if cell is None else f"{cell:,.1f}" for cell in cells)])
    return markdown(["peak MiB of a step", next(iter(entries.values()))["floor"], *columns], rows) if rows else []


def machine_lines(document: Document) -> list[str]:
    """Where the numbers come from, in two sentences and the ceilings."""
    m, pieces = document["machine"], document["pieces"]
    commits = sorted({piece["commit"][:10] + ("+" if piece["modified"] else "") for piece in pieces})
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    ceilings = {name: statistics.median(piece["ceilings"][name] for piece in pieces) for name in pieces[0]["ceilings"]}
    return [
        f"{label(m)} ({m['instructions']}, {m['memory_gib']} GiB, last-level cache {m['cache_mib']} MiB); "
        f"Python {m['python']}, {versions}.",
        f"Measured in {len(pieces)} pieces from {pieces[0]['started']} to {pieces[-1]['started']}, commit {', '.join(commits)} "
        "(+: with changes). Ceilings, medians over the pieces: "
        f"copy {ceilings['copy_gb_s']:.1f} GB/s, matrix product fp32 {ceilings['matmul_fp32_gflop_s']:,.0f} and bf16 "
        f"{ceilings['matmul_bf16_gflop_s']:,.0f} GFLOP/s, a small operator {ceilings['operator_us']:.1f} µs.",
    ]


def refused_table(document: Document) -> list[str]:
    """Providers without a time, and why, one row for each reason."""
    rows: dict[tuple[str, str, str], int] = {}
    for entry in document["cases"].values():
        for provider, value in entry["providers"].items():
            if value["status"] != "ok":
                key = (provider, value["status"], value["reason"])
                rows[key] = rows.get(key, 0) + 1
    return (
        markdown(["provider", "status", "reason", "cases"], [[*key, str(count)] for key, count in rows.items()]) if rows else []
    )


ROUNDS_TO_TELL = 6  # from so many on the least and the largest value enclose the median with 95 %
PEERS = ("PEFT LoRA", "PEFT DoRA", "plain function", "reference, torch.compile", "PEFT DoRA, DoraCaching", "merged linear")


def _against(document: Document, kind: str, peer: str) -> dict[str, Ratio]:
    """By case: how many times as long this library took as a peer. A bilevel case is this library's preset `balanced`."""
    found = {}
    for name, entry in of_kind(document, kind).items():
        times = measured(entry)
        ours = our_provider(times, kind)
        if ours is not None and peer in times:
            found[name] = ratio(times[ours], times[peer])
    return found


def verdict_lines(document: Document) -> list[str]:
    """In how many cases this library is faster or slower than each peer beyond the 95 % interval; the slower ones by name.

    A case of fewer than ROUNDS_TO_TELL rounds is undecided: the interval of its bootstrap is then narrower than 95 %.
    """
    rows, slower = [], []
    for kind in ("step", "bilevel", "layer", "decode"):
        for peer in ("Eq. 8 on PEFT DoRA",) if kind == "bilevel" else PEERS:
            ratios = _against(document, kind, peer)
            if not ratios:
                continue
            rounds = {name: len(document["cases"][name]["pieces"]) for name in ratios}
            told = {name: value for name, value in ratios.items() if rounds[name] >= ROUNDS_TO_TELL}
            lost = {name: value for name, value in told.items() if value.low > 1}
            won = sum(value.high < 1 for value in told.values())
            medians = sorted(value.median for value in ratios.values())
            spread = f"{statistics.median(medians):.2f} ({medians[0]:.2f} to {medians[-1]:.2f})"
            rows.append([kind, peer, f"{len(ratios)}", f"{won}", f"{len(ratios) - won - len(lost)}", f"{len(lost)}", spread])
            if lost:
                worst = sorted(lost.items(), key=lambda item: -item[1].median)
                slower.append(f"- {kind}, {peer}: " + "; ".join(f"{_short(name)} {value.median:.2f}" for name, value in worst))
    if not rows:
        return []
    header = ["bidora against", "peer", "cases", "faster", "undecided", "slower", "times as long: median (least to most)"]
    lines = markdown(header, rows)
    return [*lines, "", "Slower, with how many times as long this library took:", "", *slower] if slower else lines


def _headline_ratios(entry: Entry) -> tuple[str, dict[str, Ratio]] | None:
    """This library's provider of a case and its ratios to the two peers of the headline, None where one was not measured.

    A decoded token's DoRA peer is PEFT's as its documentation has it for inference, with its cache.
    """
    times, kind = measured(entry), entry["case"]["kind"]
    ours = our_provider(times, kind)
    peers = ("PEFT LoRA", {"bilevel": "Eq. 8 on PEFT DoRA", "decode": "PEFT DoRA, DoraCaching"}.get(kind, "PEFT DoRA"))
    if ours is None or any(peer not in times for peer in (*peers, entry["floor"])):
        return None
    return ours, {peer: ratio(times[ours], times[peer]) for peer in peers}


def _headline_cases(document: Document) -> Iterator[tuple[str, str, dict[str, Ratio]]]:
    """Steps and iterations at the largest batch; of layers of rank 16, by kind and tokens, the largest and the worst loser."""
    layers: dict[tuple[str, int], dict[str, tuple[str, dict[str, Ratio]]]] = {}
    for name, entry in document["cases"].items():
        case = entry["case"]
        found = None if case["kind"] == "operation" or not entry["pieces"] else _headline_ratios(entry)
        if found is None:
            continue
        if "batch" in case:
            largest = max(e["case"]["batch"] for e in of_kind(document, case["kind"]).values())
            if case["batch"] == largest and case["r"] <= 16 and case["layers"] in (3, 8):
                yield name, *found
        elif case["r"] == 16:
            layers.setdefault((case["kind"], case["tokens"]), {})[name] = found
    for group in layers.values():
        cases = {name: document["cases"][name]["case"] for name in group}
        largest = max(cases, key=lambda name: cases[name]["out_features"] * cases[name]["in_features"])
        lost = [name for name, (_, against) in group.items() if any(value.low > 1 for value in against.values())]
        worst = max(lost, key=lambda name: max(value.median for value in group[name][1].values()), default=largest)
        yield from ((name, *group[name]) for name in dict.fromkeys((largest, worst)))


def headline_table(document: Document) -> list[str]:
    """What a reader asks about first, with what lost."""
    rows = []
    for name, ours, against in _headline_cases(document):
        entry = document["cases"][name]
        times = measured(entry)
        floor = times[entry["floor"]]
        row = [f"{entry['case']['kind']}: {_short(name)}", milliseconds(quantiles(floor)[1])]
        row += [times_as_long(ratio(times[column], floor)) for column in (*against, ours)]
        rows.append([*row, *map(times_as_long, against.values())])
    dora, own = (
        "PEFT DoRA (bilevel: Eq. 8 on it; decode: its cache)",
        "bidora (bilevel: balanced, an upper step in two iterations)",
    )
    header = ["case", "frozen, ms", "PEFT LoRA", dora, own]
    return markdown([*header, "bidora / LoRA", "bidora / DoRA"], rows) if rows else []


TABLES: dict[str, Callable[[Document], list[str]]] = {  # of one results file
    "machine": machine_lines,
    "headline": headline_table,
    "verdicts": verdict_lines,
    "step": lambda document: ratio_table(document, "step"),
    "gates": gates_table,
    "bilevel": bilevel_table,
    "layer": lambda document: ratio_table(document, "layer"),
    "layer-gates": lambda document: gates_table(document, "layer"),
    "decode": lambda document: ratio_table(document, "decode"),
    "operation": operation_table,
    "memory": memory_table,
    "not-measured": refused_table,
}
