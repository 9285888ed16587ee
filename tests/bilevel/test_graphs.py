"""`cuda_graphs=True`: which passes are recorded and replayed, and that nothing else changes. tests/gpu has it on a GPU.

Here a recording repeats PyTorch's operations between the same tensors (`recordings.py`), as a graph repeats kernels.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidora_kernels as bk
from bidora_kernels.bilevel import graphs, optimizer

from . import recordings
from .problems import TRAIN, VALIDATION, assert_same, bert_loss, bert_optimizer, everything, small_bert

Batch = tuple[Tensor, Tensor]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """The passes that were recorded."""
    found: list[Callable[[], None]] = []

    def record(run: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
        found.append(recordings.record(run, device, pool))
        return found[-1]

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "new_pool", object)
    monkeypatch.setattr(optimizer, "check_graphs", lambda owner: None)
    return found


def batches(number: int, rows: int = 3, length: int = 7) -> list[Batch]:
    generator = torch.Generator().manual_seed(number)
    return [
        (torch.randint(2, 40, (rows, length), generator=generator), torch.randint(0, 3, (rows,), generator=generator))
        for _ in range(number)
    ]


def pair(dropout: float = 0.0, **options: Any) -> list[bk.BilevelOptimizer]:
    """Equal models, the second one's passes recorded."""
    model = small_bert(dropout, dropout)
    return [bert_optimizer(copy.deepcopy(model), cuda_graphs=on, **copy.deepcopy(options)) for on in (False, True)]


def train(one: bk.BilevelOptimizer, steps: list[tuple[Any, Any]], loss_fn: Any = bert_loss) -> list[bk.StepStats]:
    torch.manual_seed(3)
    with bk.use_backend("reference"):
        return [one.step(loss_fn, train, validation) for train, validation in steps]


def penalty(model: nn.Module) -> Tensor:
    return sum(parameter.square().sum() for name, parameter in model.named_parameters() if "lora" in name)


@pytest.mark.parametrize(
    "options",
    [
        bk.preset("balanced").optimizer,
        bk.preset("paper-code").optimizer,
        {"estimator": bk.ForwardDifference(), "xi": 1.0, "unroll": "gradient"},
        {"estimator": bk.CentralDifference(), "penalty": penalty},
        {"estimator": bk.FirstOrder(at="before"), "lower_max_norm": 0.1},
        {"estimator": bk.Neumann(terms=2)},
        {"estimator": bk.DoubleBackward()},
    ],
    ids=lambda options: str(options["estimator"]),
)
def test_steps_are_those_without(recorded: list[Any], options: dict[str, Any]) -> None:
    data = batches(10)
    steps = list(zip(data[::2], data[1::2], strict=True))
    plain, graphed = pair(0.2, **options)
    wanted, got = train(plain, steps), train(graphed, steps)
    assert_same(everything(graphed), everything(plain))
    assert recorded
    for one, other in zip(got, wanted, strict=True):
        assert one.passes == other.passes
        assert (one.train_loss, one.validation_loss) == (other.train_loss, other.validation_loss)
        assert (one.radius, one.second_order_norm) == (other.radius, other.second_order_norm)


def test_a_kind_is_recorded_when_it_comes_again(recorded: list[Any]) -> None:
    _, graphed = pair(estimator=bk.FirstOrder())
    short, long = batches(4), batches(4, length=9)
    numbers = []
    for batch in (short[0], long[0], short[1], short[2], long[1], long[2]):
        train(graphed, [(batch, VALIDATION)])
        numbers.append(len(recorded))
    # lower passes of two lengths; validation passes of one
    assert numbers == [0, 1, 2, 2, 3, 3]


def test_weights_of_micro_batches_may_differ_from_step_to_step(recorded: list[Any]) -> None:
    parts = batches(12)
    steps = [
        (bk.MicroBatches(parts[3 * i : 3 * i + 3], [1.0 + i, 2.0, 3.5 - i]), VALIDATION) for i in range(4)
    ]  # fmt: skip
    plain, graphed = pair(estimator=bk.ForwardDifference(), xi=1.0)
    train(plain, steps)
    train(graphed, steps)
    assert_same(everything(graphed), everything(plain))
    assert len(recorded) == 2  # lower and validation passes are of one kind, difference passes of another


def wider(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 1.5 * output


def change_model(model: Any, change: str) -> None:
    layer = model.bert.encoder.layer[0].output
    dora = next(module for module in model.modules() if isinstance(module, bk.FusedDoraLinear))
    if change == "moved":
        layer.dense.weight.data = 2.0 * layer.dense.weight.data
    elif change == "replaced":
        layer.dense.weight = nn.Parameter(2.0 * layer.dense.weight.detach(), requires_grad=False)
    elif change == "module":
        model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.Tanh()
    elif change == "frozen":
        model.classifier.weight.requires_grad_(False)
    elif change == "mode":
        layer.dropout.eval()
    elif change == "dropout":
        layer.dropout.p = 0.5
    elif change == "scaling":
        dora.scaling *= 3.0
    elif change == "norm":
        dora.detach_norm = False
    elif change == "hook":
        layer.register_forward_hook(wider)
    elif change == "directions moved":
        for parameter in bk.split_parameters(model)[0]:
            parameter.data = 1.25 * parameter.data


CHANGES = ["moved", "replaced", "module", "frozen", "mode", "dropout", "scaling", "norm", "hook", "directions moved", "none"]


@pytest.mark.parametrize("change", CHANGES)
def test_graphs_are_dropped_where_the_model_changed(recorded: list[Any], change: str) -> None:
    plain, graphed = pair(0.1, estimator=bk.FirstOrder())
    numbers = []
    for batch in batches(6):
        if len(numbers) == 3:
            change_model(plain.model, change)
            change_model(graphed.model, change)
        for one in (plain, graphed):
            train(one, [(batch, VALIDATION)])
        numbers.append(len(recorded))
    assert_same(everything(graphed), everything(plain))
    assert numbers == ([0, 2, 2, 2, 2, 2] if change == "none" else [0, 2, 2, 2, 4, 4])


class Tempered(nn.Module):
    """A loss with a trained number of its own, which the model does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return bert_loss(model, batch) / self.temperature + self.temperature.square() / 9


@pytest.mark.parametrize(("level", "change"), [("lower", "frozen"), ("lower", "moved"), ("upper", "moved")])
def test_a_parameter_outside_the_model(recorded: list[Any], level: str, change: str) -> None:
    """One of several of the lower level, or all of the upper one."""
    results = []
    for graphs_on in (False, True):
        model, loss = small_bert(), Tempered()
        direction, magnitude = bk.split_parameters(model)
        groups = ([*direction, loss.temperature], magnitude) if level == "lower" else (direction, [loss.temperature])
        lower, upper = (torch.optim.AdamW(group, lr=1e-2) for group in groups)
        one = bk.BilevelOptimizer(model, lower=lower, upper=upper, estimator=bk.Sama(), cuda_graphs=graphs_on)
        for number, batch in enumerate(batches(8)):
            if number == 4 and change == "frozen":
                loss.temperature.requires_grad_(False)
            elif number == 4:
                loss.temperature.data = loss.temperature.data.clone()
            train(one, [(batch, VALIDATION)], loss)
        results.append(everything(one))
    assert recorded
    assert_same(results[1], results[0])


def test_a_pass_belongs_to_its_loss_function(recorded: list[Any]) -> None:
    _, graphed = pair(estimator=bk.FirstOrder())

    def doubled(model: nn.Module, batch: Any) -> Tensor:
        return 2.0 * bert_loss(model, batch)

    losses = {}
    for loss_fn in (bert_loss, doubled) * 3:
        with bk.use_backend("reference"):
            losses[loss_fn] = graphed.hypergradient(loss_fn, TRAIN, VALIDATION)
    for a, b in zip(losses[bert_loss], losses[doubled], strict=True):
        torch.testing.assert_close(2.0 * a, b)
    assert len(recorded) == 4


class Losses:
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return bert_loss(model, batch)


def test_a_method_is_one_function_and_what_it_holds_is_not_kept(recorded: list[Any]) -> None:
    _, graphed = pair(estimator=bk.FirstOrder())
    losses = Losses()
    for batch in batches(3):
        train(graphed, [(batch, VALIDATION)], losses.loss)
    assert len(recorded) == 2
    gone = weakref.ref(losses)
    del losses
    gc.collect()
    assert gone() is None


def test_passes_that_never_come_again_are_told_once(recorded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LIMIT", 4)
    plain, graphed = pair(estimator=bk.FirstOrder())
    steps = [(batch, VALIDATION) for batch in batches(6)]

    def with_new_functions() -> None:
        for step in steps:
            train(graphed, [step], lambda model, batch: bert_loss(model, batch))

    with pytest.warns(UserWarning, match="others keep coming") as told:
        with_new_functions()
    train(plain, steps)
    assert len(told) == 1
    assert_same(everything(graphed)[:-1], everything(plain)[:-1])
    assert not recorded


def test_where_many_are_recorded_others_run_without(recorded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LIMIT", 2)
    plain, graphed = pair(estimator=bk.FirstOrder())
    steps = [(batch, VALIDATION) for length in (5, 7, 9) for batch in batches(3, length=length)]
    train(plain, steps)
    with pytest.warns(UserWarning, match="2 kinds of passes are recorded, and others keep coming"):
        train(graphed, steps)
    assert_same(everything(graphed), everything(plain))
    assert len(recorded) == 2


def test_a_model_that_changes_in_each_step_is_told(recorded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LIMIT", 3)
    _, graphed = pair(estimator=bk.FirstOrder())

    def counted(model: Any, batch: Any) -> Tensor:
        model.calls = getattr(model, "calls", 0) + 1
        return bert_loss(model, batch)

    with pytest.warns(UserWarning, match="the model has changed in many steps"):
        train(graphed, [(TRAIN, VALIDATION)] * 5, counted)


class Named(dict[str, Any]):
    """A batch that prints as its name."""

    def __repr__(self) -> str:
        return "batch"


@pytest.mark.parametrize("kind", [dict, Named])
def test_plain_values_and_scalars_of_a_batch(recorded: list[Any], kind: type) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return bert_loss(model, (batch["ids"], batch["labels"])) * batch["scale"] * batch["tensor"]

    plain, graphed = pair(estimator=bk.FirstOrder())
    for one in (plain, graphed):
        for number, (ids, labels) in enumerate(batches(8)):
            batch = kind(ids=ids, labels=labels, scale=number % 2 + 1, tensor=torch.tensor(0.5 + number))
            train(one, [(batch, batch)], loss)
    assert_same(everything(graphed), everything(plain))
    assert len(recorded) == 4


def test_a_batch_elsewhere_or_of_something_else_is_refused(recorded: list[Any]) -> None:
    _, graphed = pair(estimator=bk.FirstOrder())
    before = everything(graphed)
    with pytest.raises(ValueError, match="needs batches on cpu, got tensors on meta"):
        graphed.step(bert_loss, (TRAIN[0].to("meta"), TRAIN[1]), VALIDATION)
    with pytest.raises(TypeError, match="must hold tensors and plain values, got object"):
        graphed.step(bert_loss, (TRAIN[0], object()), VALIDATION)
    with pytest.raises(ValueError, match="must not require gradients"):
        graphed.step(bert_loss, (TRAIN[0], TRAIN[1].double().requires_grad_()), VALIDATION)
    odd = Named(ids=TRAIN[0])
    odd.extra = TRAIN[1]  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="items of a Named, not its attributes"):
        graphed.step(bert_loss, odd, VALIDATION)
    assert_same(everything(graphed), before)


def test_a_loss_that_cannot_be_told_from_another_is_refused(recorded: list[Any]) -> None:
    @dataclasses.dataclass
    class Loss:
        factor: float = 1.0

        def __call__(self, model: nn.Module, batch: Any) -> Tensor:
            return bert_loss(model, batch) * self.factor

    _, graphed = pair(estimator=bk.FirstOrder())
    with pytest.raises(TypeError, match=r"tells passes apart by loss_fn.*unhashable"):
        train(graphed, [(TRAIN, VALIDATION)], Loss())


@pytest.mark.parametrize("error", [RuntimeError("not permitted when capturing"), torch.OutOfMemoryError("full")], ids=repr)
def test_a_pass_that_cannot_be_recorded_changes_nothing(
    recorded: list[Any], monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def refuse(run: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
        run()
        raise error

    _, graphed = pair(0.2, estimator=bk.Sama())
    train(graphed, [(TRAIN, VALIDATION)])
    torch.manual_seed(3)
    before = everything(graphed)
    monkeypatch.setattr(graphs, "record", refuse)
    out_of_memory = isinstance(error, torch.OutOfMemoryError)
    with pytest.raises(type(error), match="full" if out_of_memory else r"cannot be recorded as a CUDA graph.*not permitted"):
        train(graphed, [(TRAIN, VALIDATION)])
    assert_same(everything(graphed), before)


def test_what_graphs_do_not_allow_is_said() -> None:
    with pytest.raises(ValueError, match="on one CUDA device"):
        bert_optimizer(small_bert(), cuda_graphs=True)
    model = small_bert()
    lower, upper = (torch.optim.SGD(group, lr=0.1) for group in bk.split_parameters(model))
    with pytest.raises(TypeError, match=r"nn\.Module, got function"):
        bk.BilevelOptimizer(lambda: None, lower=lower, upper=upper, cuda_graphs=True)
