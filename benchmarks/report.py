"""Results to Markdown tables, a comparison of two runs, and the tables between markers in the README files.

python -m benchmarks.report                      every committed result: tables to the README files, charts to PNG
python -m benchmarks.report RESULTS.json         print its tables
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import predict, results
from .machine import REPOSITORY, label
from .timing import Ratio, distance, quantiles, ratio

Document = dict[str, Any]
Entry = dict[str, Any]
README_FILES = (REPOSITORY / "README.md", REPOSITORY / "benchmarks" / "README.md")
OURS = ("bidora (triton)", "bidora (native)", "bidora (reference)")
NOISE = 0.03  # a change below it is never called a regression
_MARKED = re.compile(r"(<!-- bench:([a-z-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def measured(entry: Entry) -> dict[str, list[float]]:
    """Times by provider, of those that were timed."""
    return {name: value["seconds"] for name, value in entry["providers"].items() if value["status"] == "ok"}


def our_provider(times: Iterable[str]) -> str | None:
    """The provider that `auto` takes: the fastest backend at hand."""
    times = set(times)
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


TABLES: dict[str, Callable[[Document], list[str]]] = {
    "machine": machine_lines,
    "step": lambda document: ratio_table(document, "step"),
    "gates": gates_table,
    "bilevel": bilevel_table,
    "layer": lambda document: ratio_table(document, "layer"),
    "layer-gates": lambda document: gates_table(document, "layer"),
    "decode": lambda document: ratio_table(document, "decode"),
    "operation": operation_table,
    "memory": memory_table,
    "predicted": predict.predicted_table,
    "not-measured": refused_table,
}
STATIC = {"plans": predict.plans_table, "projection": predict.projection_table}


def table(name: str, documents: Sequence[Document]) -> list[str]:
    """The lines of a named table over every results file that has it. Raises ValueError for an unknown name."""
    if name in STATIC:
        return STATIC[name]()
    if name not in TABLES:
        raise ValueError(f"no table {name!r}; there are {', '.join((*TABLES, *STATIC))}")
    lines: list[str] = []
    parts = [(document, part) for document in documents if (part := TABLES[name](document))]
    for document, part in parts:
        if len(parts) > 1 and name != "machine":
            part = [f"{label(document['machine'])}:", "", *part]
        lines += ["", *part] if lines else part
    return lines or ["No results yet; `bidora bench --suite cpu` and `--suite gpu` write them to `benchmarks/results`."]


def filled(text: str, documents: Sequence[Document]) -> str:
    """A README's text with every marked table made anew."""
    return _MARKED.sub(lambda match: match[1] + "\n".join(table(match[2], documents)) + "\n" + match[3], text)


def compare(old: Document, new: Document) -> tuple[list[str], int]:
    """What changed beyond noise, slowest first, and how many regressions.

    Times are compared as ratios to the floor of the same rounds, so that a busier machine is no regression; a change counts where
    the 95 % intervals do not meet and the medians differ by more than 3 %.
    """
    changes = []
    for name in old["cases"].keys() & new["cases"].keys():
        pair = [(document["cases"][name], measured(document["cases"][name])) for document in (old, new)]
        if any(entry["floor"] not in times for entry, times in pair):
            continue
        for provider in pair[0][1].keys() & pair[1][1].keys():
            before, after = (ratio(times[provider], times[entry["floor"]]) for entry, times in pair)
            change = after.median / before.median - 1
            apart = after.low > before.high or after.high < before.low
            if apart and abs(change) > NOISE:
                changes.append((change, name, provider, before, after))
    changes.sort(key=lambda row: (-row[0], row[1], row[2]))
    lines = [
        f"{'slower' if change > 0 else 'faster'} {change:+.1%}  {name}  {provider}: {times_as_long(a)} -> {times_as_long(b)}"
        for change, name, provider, a, b in changes
    ]
    regressions = sum(change > 0 and provider.startswith(OURS) for change, _, provider, _, _ in changes)
    missing = sorted(old["cases"].keys() - new["cases"].keys())
    lines += [f"missing  {name}" for name in missing]
    return lines or ["no change beyond noise"], regressions


def main(argv: Sequence[str] | None = None) -> int:
    """Print a file's tables, or bring the README files and charts up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", help="print the tables of this file; without it, update README files and charts")
    parser.add_argument("--charts", metavar="FOLDER", help="with RESULTS: also draw its charts there")
    arguments = parser.parse_args(argv)
    try:
        if arguments.results:
            document = results.load(arguments.results)
            for name, build in TABLES.items():
                if lines := build(document):
                    print(f"\n## {name}\n", *lines, sep="\n")
            if arguments.charts:
                from .charts import draw

                print(*draw(document, Path(arguments.charts)), sep="\n")
            return 0
        documents = [results.load(path) for path in results.committed()]
        for path in filter(Path.exists, README_FILES):
            path.write_text(filled(path.read_text(), documents))
            print(path)
        from .charts import draw

        for document, path in zip(documents, results.committed(), strict=True):
            print(*draw(document, path.with_suffix("")), sep="\n")
    except (ValueError, OSError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
