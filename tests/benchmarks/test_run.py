"""The command runs every kind of case, goes on where it stopped, and refuses a provider that computes something else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import charts, peers, report, results, run, timing
from benchmarks.cases import suite
from bidora_kernels import cli

pytest.importorskip("peft")
LAYER = "layer/roberta-base.attention/*"


def test_smoke_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "smoke.json"
    assert cli.main(["bench", "--suite", "smoke", "--device", "cpu", "--json", str(path)]) == 0, capsys.readouterr().err
    document = results.load(path)
    assert results.problems(document, complete=True) == []
    ok = {name: set(report.measured(entry)) for name, entry in document["cases"].items()}
    for name, providers in ok.items():
        assert any("bidora" in provider for provider in providers), name
        if name.split("/")[0] in ("layer", "decode", "step", "bilevel"):
            assert {"PEFT LoRA", "PEFT DoRA"} <= providers, name
    for name in report.TABLES:
        assert report.table(name, [document])
    assert {path.stem for path in charts.draw(document, tmp_path)} >= {"time", "step", "iteration", "memory", "roofline"}
    capsys.readouterr()
    assert cli.main(["bench", "--json", str(path), "--device", "cpu"]) == 0
    assert "all 9 cases are measured" in capsys.readouterr().out


def test_a_budget_stops_and_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pattern = tmp_path / "r.json", "layer/*fp32"
    nothing = run.run("smoke", pattern, 0.0, path, tiny=True, log=lambda text: None)
    assert not nothing["cases"]
    assert len(nothing["selected"]) == 2
    with monkeypatch.context() as late:  # the budget is used up within the first round of a case
        late.setattr(run, "measure", lambda *arguments: timing.measure(*arguments[:-1], float("-inf")))
        first = run.run("smoke", pattern, None, path, tiny=True, log=lambda text: None)
    assert [entry["pieces"] for entry in first["cases"].values()] == [[0], [0]]
    done = run.run("smoke", pattern, None, path, tiny=True, log=lambda text: None)
    assert [entry["pieces"] for entry in done["cases"].values()] == [[0, 1], [0, 1]]
    assert results.problems(done, complete=True) == []
    assert done == results.load(path)
    for name, entry in done["cases"].items():
        for provider, seconds in report.measured(entry).items():
            assert seconds[:1] == first["cases"][name]["providers"][provider]["seconds"], "earlier rounds are kept"


def test_results_of_another_machine_or_suite_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    document = run.run("smoke", LAYER, 0.0, path, tiny=True, log=lambda text: None)
    document["machine"]["cpu"] = "another"
    results.save(document, path)
    with pytest.raises(ValueError, match="results of another machine"):
        run.run("smoke", LAYER, None, path, tiny=True, log=lambda text: None)
    with pytest.raises(ValueError, match="results of another suite"):
        run.run("cpu", "T128-r4", None, path, tiny=True, log=lambda text: None)


def test_a_provider_that_computes_something_else_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = peers.plain_function
    monkeypatch.setattr(peers, "plain_function", lambda x, *rest: 1.001 * right(x, *rest))
    document = run.run("smoke", "layer/*fp32", None, None, tiny=True, log=lambda text: None)
    for entry in document["cases"].values():
        assert entry["providers"]["plain function"]["status"] == "refused"
        assert "relative error above" in entry["providers"]["plain function"]["reason"]
        assert "seconds" not in entry["providers"]["plain function"]


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["bench", "--filter", "nothing"]) == 2
    assert capsys.readouterr().err == "bidora bench: no case of suite smoke matches 'nothing'; --list shows them\n"
    assert cli.main(["bench", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    if not torch.cuda.is_available():
        assert cli.main(["bench", "--suite", "gpu"]) == 2
        assert "needs a GPU" in capsys.readouterr().err
    assert cli.main(["bench", "--suite", "cpu", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 50


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["bench", "--help"])
    assert exit_code.value.code == 0
    assert "example:\n  bidora bench" in capsys.readouterr().out


def test_without_the_checkout_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "bidora_kernels" / "cli.py"))
    assert cli.main(["bench"]) == 2
    assert "the benchmarks are not part of the package" in capsys.readouterr().err


def test_every_plan_is_taken_by_name() -> None:
    """A plan that is asked for is the one that runs: the native choice is called, and answered, for each provider."""
    (case,) = [case for case in suite("cpu", "layer/roberta-base.attention/768x768-T128-r16*", tiny=True) if case.plans]
    document = run.run("cpu", "layer/roberta-base.attention/768x768-T128-r16*", None, None, tiny=True, log=lambda text: None)
    (entry,) = document["cases"].values()
    for backend, plans in peers.LAYER_PLANS.items():
        for plan in plans:
            assert entry["providers"][f"bidora ({backend}), {plan}"]["status"] in ("ok", "unavailable")
    native = pytest.importorskip("bidora_kernels.native")
    if native.why_unavailable() is not None:
        return
    from bidora_kernels.ops import _native_plan

    shared = peers.Material(case, "cpu")
    for plan in peers.LAYER_PLANS["native"]:
        with peers.native_plan(plan):
            answer = _native_plan.weight_plan_pays(1, shared.sets[0].weight, torch.float32, False)
        assert answer == plan.startswith("weight")
        assert entry["providers"][f"bidora (native), {plan}"]["status"] == "ok"


def test_cuda_graphs_need_a_gpu() -> None:
    (case,) = suite("gpu", "decode/", tiny=True)
    document = run.run("gpu", "decode/", None, None, tiny=True, log=lambda text: None)
    (entry,) = document["cases"].values()
    graphs = {name: value for name, value in entry["providers"].items() if name.endswith(", CUDA graph")}
    assert len(graphs) == 4
    assert {value["reason"] for name, value in graphs.items() if "triton" not in name} == {"CUDA graphs need a GPU"}
    assert case.floor in report.measured(entry)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_decode_in_a_cuda_graph() -> None:
    document = run.run("gpu", "decode/", None, None, "cuda", tiny=True, log=lambda text: None)
    (entry,) = document["cases"].values()
    assert {"frozen linear, CUDA graph", "bidora (triton), CUDA graph"} <= set(report.measured(entry))


def _interpreted(pattern: str | None, path: Path) -> dict:
    command = [sys.executable, "-m", "benchmarks.run", "--suite", "gpu", "--tiny", "--device", "cpu", "--json", str(path)]
    command += ["--filter", pattern] if pattern else []
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run(command, cwd=report.REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(path.read_text())


def test_gpu_operations_run_on_the_interpreter(tmp_path: Path) -> None:
    document = _interpreted("operation/*compose*", tmp_path / "gpu.json")
    assert results.problems(document, complete=True) == []
    for entry in document["cases"].values():
        assert entry["providers"]["bidora (triton)"]["status"] == "ok"


@pytest.mark.slow
def test_gpu_suite_runs_on_the_interpreter(tmp_path: Path) -> None:
    document = _interpreted(None, tmp_path / "gpu.json")
    assert results.problems(document, complete=True) == []
    assert all("bidora (triton)" in entry["providers"] or "bilevel" in name for name, entry in document["cases"].items())
