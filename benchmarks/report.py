"""The marked tables of the README files and the charts from the committed results, and a comparison of two runs.

python -m benchmarks.report                      every committed result: tables to the marked pages, charts to PNG
python -m benchmarks.report --check              exit code 1, naming the page and table, where one is stale
python -m benchmarks.report RESULTS.json         print its tables
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from . import predictions, results
from .machine import REPOSITORY, label
from .tables import OURS, TABLES, Document, case_lines, measured, times_as_long
from .timing import ratio

__all__ = ["PAGES", "case_lines", "compare", "filled", "measured", "stale", "table"]
PAGES = tuple(REPOSITORY / page for page in ("README.md", "benchmarks/README.md", "benchmarks/PREDICTIONS.md"))
NOISE = 0.03  # a change below it is never called a regression
NOTHING = "No results yet; `bidora bench --suite cpu` and `--suite gpu` write them to `benchmarks/results`."
_MARKED = re.compile(r"(<!-- bench:([a-z-]+) -->\n)(.*?)(<!-- /bench:\2 -->)", re.DOTALL)
_OPENING = re.compile(r"<!-- /?bench:[a-z-]+ -->")
EVERY = {**TABLES, **predictions.TABLES}  # of one results file


def table(name: str, documents: Sequence[Document]) -> list[str]:
    """The lines of a named table over every results file that has it. Raises ValueError for an unknown name."""
    if name in predictions.MODELLED:
        return predictions.MODELLED[name](documents)
    if name not in EVERY:
        raise ValueError(f"no table {name!r}; there are {', '.join((*EVERY, *predictions.MODELLED))}")
    lines: list[str] = []
    parts = [(document, part) for document in documents if (part := EVERY[name](document))]
    for document, part in parts:
        if len(parts) > 1 and name != "machine":
            part = [f"{label(document['machine'])}, suite {document['suite']}:", "", *part]
        lines += ["", *part] if lines else part
    return lines or [NOTHING]


def filled(text: str, documents: Sequence[Document]) -> str:
    """A page's text with every table between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` made anew.

    Raises ValueError for a table that does not exist and for a marker without its partner.
    """
    if 2 * len(_MARKED.findall(text)) != len(_OPENING.findall(text)):
        raise ValueError("every <!-- bench:NAME --> needs its <!-- /bench:NAME -->")
    return _MARKED.sub(lambda match: match[1] + "\n".join(table(match[2], documents)) + "\n" + match[4], text)


def stale(text: str, documents: Sequence[Document]) -> list[str]:
    """The names of a page's tables that differ from what the results say."""
    new = filled(text, documents)
    return [a[1] for a, b in zip(_MARKED.findall(text), _MARKED.findall(new), strict=True) if a[2] != b[2]]


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
    """Print a file's tables, or bring the marked pages and charts up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", help="print the tables of this file; without it, update pages and charts")
    parser.add_argument("--charts", metavar="FOLDER", help="with RESULTS: also draw its charts there")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a page is stale")
    arguments = parser.parse_args(argv)
    try:
        if arguments.results:
            document = results.load(arguments.results)
            for name, build in EVERY.items():
                if lines := build(document):
                    print(f"\n## {name}\n", *lines, sep="\n")
            if arguments.charts:
                from .charts import draw

                print(*draw(document, Path(arguments.charts)), sep="\n")
            return 0
        documents = [results.load(path) for path in results.committed()]
        pages = list(filter(Path.exists, PAGES))
        if arguments.check:
            wrong = [f"{page}: {name}" for page in pages for name in stale(page.read_text(), documents)]
            print(*wrong or ["every table is up to date"], sep="\n")
            return 1 if wrong else 0
        for page in pages:
            page.write_text(filled(page.read_text(), documents))
            print(page)
        from .charts import draw

        for document, path in zip(documents, results.committed(), strict=True):
            print(*draw(document, path.with_suffix("")), sep="\n")
    except (ValueError, OSError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
