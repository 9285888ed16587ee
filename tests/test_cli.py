from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the extra [train] is not installed")

from bidora_kernels import cli
from tests.recipes.conftest import _no_curves, tiny_data, tiny_model  # noqa: F401

COMMANDS = ("train", "predict", "compare", "analyze", "export", "recipes", "doctor", "bench")


@pytest.fixture
def options(tiny_model: Path, tiny_data: Path) -> list[str]:  # noqa: F811
    return [
        "--task=tsv", f"--data-dir={tiny_data}", f"--model={tiny_model}", "--steps=4", "--retrain-steps=3", "--batch-size=8",
        "--max-length=16", "--lr=0.01", "--device=cpu",
    ]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        cli.main([command, "--help"])
    assert exit_code.value.code == 0
    assert f"example:\n  bidora {command}" in capsys.readouterr().out


def test_help_names_every_command_without_importing_what_training_needs() -> None:
    code = "import sys, bidora_kernels.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
    code += "heavy = {'transformers', 'datasets', 'matplotlib', 'rich', 'peft'} & set(sys.modules)\nassert not heavy, heavy"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert all(command in found.stdout for command in COMMANDS)


def test_train_predict_compare_export(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    run = str(tmp_path / "run")
    assert cli.main(["train", *options, "--output", run]) == 0
    text = capsys.readouterr().out
    for part in (
        "search 4/4  train loss",
        "validation loss",
        "hypergradient",
        "ETA",
        "retrain 3/3",
        "test accuracy:",
        "wall time:",
        run,
    ):
        assert part in text
    assert "\x1b" not in text

    assert cli.main(["train", *options, "--output", run]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert cli.main(["train", *options, "--seed=1", "--output", run, "--overwrite", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["seed"] == 1
    assert cli.main(["train", "--resume", run]) == 0
    assert f"test accuracy: {summary['score']:.4f}" in capsys.readouterr().out

    (tmp_path / "texts").write_text("wheat crop\n\nbank loan\n")
    assert cli.main(["predict", run, "--file", str(tmp_path / "texts"), "--json"]) == 0
    from_file = json.loads(capsys.readouterr().out)
    assert [row["text"] for row in from_file] == ["wheat crop", "bank loan"]
    assert cli.main(["predict", run, "wheat crop", "bank loan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == from_file
    with (tmp_path / "texts").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert cli.main(["predict", run, "-"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [row["label"] for row in from_file]

    assert cli.main(["compare", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["score"] == summary["score"]
    assert cli.main(["compare", run]) == 0
    assert f"{summary['score']:.4f}" in capsys.readouterr().out
    assert cli.main(["export", run, str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


BAD = {
    "no task": (["--steps=1"], "give --preset or --task"),
    "unknown task": (["--task=colaa"], "no task is called 'colaa': cola"),
    "unknown preset": (["--preset=demoo"], "did you mean demo"),
    "preset without a value": (["--preset=paper/roberta-base/sst2"], "gives no retrain_lr and no retrain_steps"),
    "data folder": (["--data-dir=nowhere"], "nowhere is not a folder"),
    "model folder": (["--model=./nowhere"], "--model ./nowhere is not a folder"),
    "no module": (["--target-modules=q_proj"], "query"),
    "rank": (["--r=0"], "r must be a positive integer, got 0"),
    "partition": (["--partition=0.3"], "partition must be in 0.6 … 1.0, got 0.3"),
    "empty validation": (["--train-examples=3"], "the validation split would be empty"),
    "max length": (["--max-length=33"], "max_length must be at most the model's 32 positions, got 33"),
    "number": (["--lr=fast"], "argument --lr: invalid float value: 'fast'"),
    "method": (["--method=adapter"], "argument --method: invalid choice: 'adapter'"),
    "device": (["--device=abacus"], "device"),
    "overwrite and resume": (["--overwrite", "--resume"], "not allowed with argument"),
    "nothing to resume": (["--resume"], "there is no checkpoint to resume from"),
    "penalty": (["--method=full", "--penalty=1"], "penalty needs DoRA layers"),
    "one of two modules": (["--target-modules=query,valeu"], "no layer is called 'valeu'"),
    "no module at all": (["--target-modules=,"], "--target-modules names no layer"),
    "the head": (["--target-modules=query,classifier"], "'classifier' of target_modules is not adapted"),
    "large seed": ([f"--seed={2**63}"], "seed must be below 2**63"),
    "hold out": (["--hold-out=0.0001"], "leaves nothing to score on"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line_and_leaves_nothing(
    name: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given, message = BAD[name]
    base = (
        [] if name == "no task" else [option for option in options if not name.startswith("preset") or option.startswith("--lr")]
    )
    try:
        code = cli.main(["train", *base, *given, "--output", "out/run"])
    except SystemExit as error:
        code = error.code
    printed = capsys.readouterr()
    assert code == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_the_other_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "summary.json").write_text('{"schema_version": 1}')
    (tmp_path / "damaged" / "summary.json").write_text("{")
    for arguments, message in (
        (["predict", str(tmp_path / "no"), "text"], "holds no run"),
        (["predict", str(tmp_path / "no"), "--file", "nothing"], "nothing cannot be read"),
        (["predict", str(tmp_path / "no"), " "], "there is no text to predict"),
        (["compare", str(tmp_path / "damaged")], "summary.json cannot be read"),
        (["export", str(tmp_path / "no"), str(tmp_path / "full")], "is not an empty folder"),
        (["recipes", "nope"], "no preset is called 'nope'"),
        (["train", "--preset=demo", "--output", str(tmp_path / "full")], "is not empty and holds no run"),
        (["train", "--preset=demo", "--overwrite", "--output", str(tmp_path / "full")], "is not empty and holds no run"),
        (["train", "--preset=demo", "--output", str(tmp_path / "full" / "note")], "is not a folder"),
        (["train", "--preset=demo", "--output", str(tmp_path / "full" / "note" / "run")], "is not a folder"),
        (["compare", str(tmp_path / "foreign")], "must be a summary of schema_version 1"),
        (["train", "--preset=demo", "--output", str(tmp_path / "begun")], "already holds a run: --overwrite replaces it"),
        (["train", "--resume", "a", "--output", "b"], "name different folders"),
    ):
        assert cli.main(arguments) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.count("\n") == 1
    assert (tmp_path / "full" / "note").read_text() == "mine"


def test_a_missing_extra_is_one_line_that_names_it(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else find_spec(name, *rest)
    )
    assert cli.main(["train", *options, "--output", str(tmp_path / "run")]) == 2
    assert 'transformers is not installed: pip install "bidora-kernels[train]"' in capsys.readouterr().err


def test_ctrl_c_saves_and_says_how_to_go_on(options: list[str], tmp_path: Path) -> None:
    """A real process with a real signal."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "bidora_kernels.cli", "train", *options, "--steps=4000", "--output", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("search 1/4000")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    finally:
        watchdog.cancel()
        process.kill()
    assert process.returncode == 130
    assert f"stopped by SIGINT; go on with: bidora train --resume {run}" in errors
    assert errors.count("\n") == 1
    assert (run / "checkpoints" / "last.pt").is_file()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_gives_its_exit_code_and_the_run_goes_on(
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    from bidora_kernels.recipes import progress

    class Signalling(progress.Silent):
        def step(self, phase: str, step: int, *numbers: object) -> None:
            if step == 2:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)  # a background shell starts its processes with SIGINT ignored
    with monkeypatch.context() as patched:
        patched.setattr(progress, "display", lambda stream: Signalling())
        assert cli.main(["train", *options, "--output", str(tmp_path / "run")]) == code
    assert f"stopped by {signal.Signals(number).name}; go on with: bidora train --resume" in capsys.readouterr().err
    assert signal.getsignal(number) == before
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("search 4/4") or lines[0].startswith("search 3/4")


def test_doctor_says_which_backend_serves_and_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert cli.main(["doctor"]) == 0
    assert f"torch                {torch.__version__}" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    diagnosis = json.loads(capsys.readouterr().out)
    assert diagnosis["backends"]["cpu"]["backend"] in ("reference", "native")
    assert diagnosis["backends"]["cpu"]["reason"]
    monkeypatch.setenv("BIDORA_BACKEND", "abacus")
    assert cli.main(["doctor"]) == 2
    assert "BIDORA_BACKEND must be one of auto" in capsys.readouterr().err


def test_recipes_lists_tasks_and_presets_with_what_is_not_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    text = capsys.readouterr().out
    assert "reuters-r8" in text
    assert "paper/roberta-base/cola" in text
    assert cli.main(["recipes", "paper/roberta-base/mrpc"]) == 0
    assert "retrain_lr = not given" in capsys.readouterr().out
    assert cli.main(["recipes", "--json"]) == 0
    assert {"tasks", "presets"} == set(json.loads(capsys.readouterr().out))


def test_analyze_draws_the_hypergradient_of_a_run(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert cli.main(["train", *options, "--horizon=2", "--output", str(run)]) == 0
    capsys.readouterr()
    assert cli.main(["analyze", "hypergradient", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    steps = [
        line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["direct_norm"] is not None
    ]
    assert found["upper_steps"] == len(steps) == 2  # balanced: every second of four steps
    assert found["direct_norm"] == pytest.approx(sum(line["direct_norm"] for line in steps) / 2)
    assert found["passes"] == 3
    assert set(found["pass_seconds"]) == {"lower", "validation", "difference"}
    assert Path(found["picture"]).read_bytes().startswith(b"\x89PNG")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "sea')  # a killed run
    other = tmp_path / "other.png"
    assert cli.main(["analyze", "hypergradient", str(run), "--output", str(other)]) == 0
    text = capsys.readouterr().out
    assert "2 upper steps" in text
    assert f"picture: {other}" in text
    assert other.exists()


def test_analyze_says_what_it_cannot_do(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "plain"
    assert cli.main(["train", *options, "--method=dora", "--output", str(run)]) == 0
    for arguments, message in (
        ([str(run)], "no step with a hypergradient"),
        ([str(tmp_path / "nowhere")], "holds no run"),
        ([str(run), "--output", str(tmp_path)], "a picture must be a file ending in .png, .pdf, .svg"),
        ([str(run), "--output", "pic.foo"], "a picture must be a file ending in .png, .pdf, .svg"),
    ):
        capsys.readouterr()
        assert cli.main(["analyze", "hypergradient", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (run / "hypergradient.png").exists()


def test_options_without_effect_are_told(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["--upper-lr=1e-3", "--horizon=2"]
    assert cli.main(["train", *options, "--method=dora", *typed, "--output", str(tmp_path / "dora")]) == 0
    assert "warning: --horizon, --upper-lr: no effect with --method dora" in capsys.readouterr().err
    assert cli.main(["train", *options, "--method=bidora", *typed, "--output", str(tmp_path / "bidora")]) == 0
    assert "no effect" not in capsys.readouterr().err


def test_one_text_per_line_whatever_it_holds(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["train", *options, "--method=dora", "--output", str(tmp_path / "run")]) == 0
    text = "wheat\x0crose\n\nbank\u2028rate\nport\n"
    (tmp_path / "texts").write_text(text, encoding="utf-8-sig")
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    for source in (["--file", str(tmp_path / "texts")], ["-"]):
        capsys.readouterr()
        assert cli.main(["predict", str(tmp_path / "run"), *source, "--json"]) == 0
        assert [row["text"] for row in json.loads(capsys.readouterr().out)] == ["wheat\x0crose", "bank\u2028rate", "port"]
