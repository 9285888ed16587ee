"""Tables derive from the JSON, the README's are up to date, and a regression is told from noise."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest

from benchmarks import report, results

from .test_results import CASE_ID, document


@pytest.mark.parametrize("path", report.PAGES, ids=lambda path: str(path.relative_to(report.REPOSITORY)))
def test_marked_tables_are_up_to_date(path: Path) -> None:
    documents = [results.load(committed) for committed in results.committed()]
    text = path.read_text()
    assert "<!-- bench:" in text
    assert report.stale(text, documents) == [], "stale: python -m benchmarks.report"


def test_a_stale_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way of the command: a page made from the committed results, then the results change, then one digit by hand."""
    page, folder = tmp_path / "README.md", tmp_path / "results"
    page.write_text("# x\n<!-- bench:layer -->\n<!-- /bench:layer -->\n\n<!-- bench:plans -->\n<!-- /bench:plans -->\n")
    monkeypatch.setattr(report, "PAGES", (page, tmp_path / "absent.md"))
    monkeypatch.setattr(results, "FOLDER", folder)
    results.save(document(), folder / "machine.json")
    assert report.main(["--check"]) == 1
    assert capsys.readouterr().out == f"{page}: layer\n{page}: plans\n"
    assert report.main([]) == 0
    assert (folder / "machine").is_dir()
    assert report.main(["--check"]) == 0
    made = page.read_text()
    assert "| x | 1,250 |" in made
    changed = document()
    changed["cases"][CASE_ID]["providers"]["floor"]["seconds"] = [1.0, 1.6]
    results.save(changed, folder / "machine.json")
    capsys.readouterr()
    assert report.main(["--check"]) == 1
    assert capsys.readouterr().out == f"{page}: layer\n"
    assert report.main([]) == 0
    assert page.read_text() != made
    page.write_text(page.read_text().replace("| x | 1,300 |", "| x | 1,200 |"))
    assert report.stale(page.read_text(), [changed]) == ["layer"]


def test_only_the_marked_part_changes() -> None:
    text = "before\n<!-- bench:not-measured -->\nold\n<!-- /bench:not-measured -->\nafter\n"
    new = report.filled(text, [document()])
    assert new.startswith("before\n<!-- bench:not-measured -->\n| provider |")
    assert new.endswith("\n<!-- /bench:not-measured -->\nafter\n")
    assert "| none | unavailable | no GPU | 1 |" in new
    assert "old" not in new
    assert report.filled(new, [document()]) == new
    with pytest.raises(ValueError, match="no table 'nonsense'"):
        report.filled("<!-- bench:nonsense -->\n<!-- /bench:nonsense -->", [])
    for broken in ("<!-- bench:step -->\n", "<!-- bench:step -->\n<!-- /bench:layer -->\n"):
        with pytest.raises(ValueError, match="needs its"):
            report.filled(broken, [])


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


def test_verdicts_name_the_losing_cases_and_count_the_rest() -> None:
    made = _noisy(1.0, 0)
    entry = made["cases"][CASE_ID]
    entry["case"]["kind"] = "layer"
    mine = entry["providers"]["bidora (native)"]["seconds"]
    for peer, factor in (("PEFT LoRA", 0.8), ("PEFT DoRA", 2.0)):
        entry["providers"][peer] = {**entry["providers"]["floor"], "seconds": [factor * second for second in mine]}
    lines = report.table("verdicts", [made])
    assert "| layer | PEFT LoRA | 1 | 0 | 0 | 1 | 1.25 (1.25 to 1.25) |" in lines
    assert "| layer | PEFT DoRA | 1 | 1 | 0 | 0 | 0.50 (0.50 to 0.50) |" in lines
    assert lines[-1] == "- layer, PEFT LoRA: x 1.25"
