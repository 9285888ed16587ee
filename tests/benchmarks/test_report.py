"""Tables derive from the JSON, the README's are up to date, and a regression is told from noise."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest

from benchmarks import report, results

from .test_results import CASE_ID, document


@pytest.mark.parametrize("path", report.README_FILES, ids=lambda path: str(path.relative_to(report.REPOSITORY)))
def test_readme_tables_are_up_to_date(path: Path) -> None:
    if not path.exists():
        pytest.skip("not there yet")
    documents = [results.load(committed) for committed in results.committed()]
    text = path.read_text()
    assert text.count("<!-- bench:") == text.count("<!-- /bench -->")
    assert report.filled(text, documents) == text, "stale: python -m benchmarks.report"


def test_only_the_marked_part_changes() -> None:
    text = "before\n<!-- bench:not-measured -->\nold\n<!-- /bench -->\nafter\n"
    new = report.filled(text, [document()])
    assert new.startswith("before\n<!-- bench:not-measured -->\n| provider |")
    assert new.endswith("\n<!-- /bench -->\nafter\n")
    assert "| none | unavailable | no GPU | 1 |" in new
    assert "old" not in new
    assert report.filled(new, [document()]) == new
    with pytest.raises(ValueError, match="no table 'nonsense'"):
        report.filled("<!-- bench:nonsense -->\n<!-- /bench -->", [])


def test_a_table_without_results_says_so() -> None:
    assert report.table("step", []) == [
        "No results yet; `bidora bench --suite cpu` and `--suite gpu` write them to `benchmarks/results`."
    ]


def _noisy(slowdown: float, seed: int) -> dict:
    made, generator = document(), random.Random(seed)
    entry = made["cases"][CASE_ID]
    disturbance = [generator.uniform(1.0, 3.0) for _ in range(20)]
    entry["pieces"] = [0] * 20
    providers = entry["providers"]
    providers["bidora (native)"] = copy.deepcopy(providers.pop("ours"))
    for name, factor in (("floor", 1.0), ("bidora (native)", 1.2 * slowdown)):
        providers[name]["seconds"] = [factor * d * generator.uniform(0.98, 1.02) for d in disturbance]
    return made


def test_compare_names_a_regression_and_not_noise() -> None:
    lines, regressions = report.compare(_noisy(1.0, 0), _noisy(1.0, 1))
    assert (lines, regressions) == (["no change beyond noise"], 0)
    lines, regressions = report.compare(_noisy(1.0, 0), _noisy(1.1, 1))
    assert regressions == 1
    assert len(lines) == 1
    assert lines[0].startswith("slower +")
    assert "bidora (native)" in lines[0]
    lines, regressions = report.compare(_noisy(1.1, 0), _noisy(1.0, 1))
    assert regressions == 0
    assert lines[0].startswith("faster -")


def test_compare_names_missing_cases() -> None:
    shorter = document()
    shorter["cases"] = {}
    assert report.compare(document(), shorter) == ([f"missing  {CASE_ID}"], 0)
