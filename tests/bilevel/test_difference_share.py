"""A second-order term on a share of the train batch: the same term as on that part, and one pass fewer than a callable."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import bidora_kernels as bk
from bidora_kernels.bilevel.batches import first_share
from bidora_kernels.ops._context import current_mode

from ..tiny_models import gpt2, randomize
from .problems import TRAIN, VALIDATION, Curved, bert_loss, bert_optimizer, error, flat, second_order, small_bert, toy_optimizer

ESTIMATORS = [
    bk.ForwardDifference(), bk.Sama(), bk.CentralDifference(), bk.DoubleBackward(), bk.ForwardMode(),
    bk.Neumann(terms=2, step=1e-3),
]  # fmt: skip
FIRST_ROW = (TRAIN[0][:1], TRAIN[1][:1])
PARTS = bk.MicroBatches([(TRAIN[0][i : i + 1], TRAIN[1][i : i + 1]) for i in range(3)], weights=[1, 2, 1])
Named = collections.namedtuple("Named", "ids labels")


def first_row(batch: Any) -> Any:
    return FIRST_ROW


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_share_gives_the_term_of_those_rows(estimator: Any) -> None:
    share, part = (
        bert_optimizer(small_bert(), estimator=estimator, difference_batch=which).hypergradient(
            bert_loss, TRAIN, VALIDATION, terms=True
        )
        for which in (0.4, first_row)  # one row of three
    )
    whole = bert_optimizer(small_bert(), estimator=estimator).hypergradient(bert_loss, TRAIN, VALIDATION, terms=True)
    assert error(flat(share[1]), flat(part[1])) < 1e-6
    assert error(flat(share[1]), flat(whole[1])) > 0.1
    for got in (share, part):
        assert error(flat(got[0]), flat(whole[0])) < 1e-9  # the lower step is the whole batch's


@pytest.mark.parametrize("estimator", [bk.ForwardDifference(), bk.Sama()], ids=repr)
def test_its_base_costs_no_pass(estimator: Any) -> None:
    seen: list[tuple[int, set[str]]] = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        seen.append((len(batch[1]), set(current_mode().needs)))
        return bert_loss(model, batch)

    both, magnitude = {"direction", "magnitude"}, {"magnitude"}
    stats = bert_optimizer(small_bert(), estimator=estimator, difference_batch=0.4).step(watched, TRAIN, VALIDATION)
    assert seen == [(1, both), (2, {"direction"}), (3, both), (1, magnitude)]
    assert stats.passes == 3
    with torch.no_grad():
        assert stats.train_loss == pytest.approx(float(bert_loss(small_bert(), TRAIN)))
    seen.clear()
    stats = bert_optimizer(small_bert(), estimator=estimator, difference_batch=first_row).step(watched, TRAIN, VALIDATION)
    assert [rows for rows, _ in seen] == [3, 3, 1, 1]
    assert stats.passes == 4


def test_a_step_without_an_upper_part_and_first_order_are_left_whole() -> None:
    rows: list[int] = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        rows.append(len(batch[1]))
        return bert_loss(model, batch)

    optimizer = bert_optimizer(small_bert(), upper_every=2, difference_batch=0.4)
    for _ in range(2):
        optimizer.step(watched, TRAIN, VALIDATION)
    assert rows == [1, 2, 3, 1, 3]
    rows.clear()
    bert_optimizer(small_bert(), estimator=bk.FirstOrder(), difference_batch=0.4).step(watched, TRAIN, VALIDATION)
    assert rows == [3, 3]


@pytest.mark.parametrize("options", [{}, {"penalty": bk.OrthogonalPenalty(0.1)}, {"lower_max_norm": 0.01}], ids=repr)
def test_the_directions_step_is_the_whole_batchs(options: dict[str, Any]) -> None:
    """Loss, penalty and clipping weigh in the two parts as they do in one."""
    moved = []
    for share in (None, 0.4):
        model = small_bert()
        optimizer = bert_optimizer(model, torch.optim.SGD, lr=0.1, difference_batch=share, **options)
        start = flat(list(bk.split_parameters(model)[0]))
        optimizer.step(bert_loss, TRAIN, VALIDATION)
        moved.append(flat(list(bk.split_parameters(model)[0])) - start)
    assert error(moved[1], moved[0]) < 1e-9


@pytest.mark.parametrize("estimator", [bk.ForwardDifference(), bk.CentralDifference(), bk.DoubleBackward()], ids=repr)
@pytest.mark.parametrize(("share", "parts"), [(0.2, 1), (0.25, 1), (0.3, 2), (0.75, 2), (0.8, 3)])
def test_of_micro_batches_whole_ones_are_taken(estimator: Any, share: float, parts: int) -> None:
    """As few as weigh the share, each with its weight."""
    taken = bk.MicroBatches(PARTS.batches[:parts], PARTS.weights[:parts])
    got, wanted = (
        second_order(bert_optimizer(small_bert(), estimator=estimator, difference_batch=which), bert_loss, PARTS, VALIDATION)
        for which in (share, lambda batch: taken)
    )
    assert error(got, wanted) < 1e-6


@pytest.mark.parametrize(
    ("estimator", "exact"),
    [(bk.ForwardDifference(), bk.DoubleBackward()), (bk.Sama(), bk.Sama(bk.DoubleBackward()))],
    ids=["ForwardDifference", "Sama"],
)
def test_dropout_is_the_same_in_both_passes(estimator: Any, exact: Any) -> None:
    """Masks of its own in either pass would put their difference, over a small radius, into the term."""
    terms, masks = [], []
    for which in (estimator, exact):
        torch.manual_seed(3)
        model = small_bert(dropout=0.3)
        model.bert.embeddings.register_forward_hook(lambda module, given, out: masks.append(out.detach() == 0))
        optimizer = bert_optimizer(model, estimator=which, difference_batch=0.4)
        terms.append(second_order(optimizer, bert_loss, TRAIN, VALIDATION))
    lower, _, _, difference = masks[:4]
    assert bool(lower.any())
    assert torch.equal(lower, difference)
    assert error(terms[0], terms[1]) < 1e-3


@pytest.mark.parametrize("share", [None, 0.4, first_row])
@pytest.mark.parametrize("estimator", [bk.ForwardDifference(), bk.CentralDifference()], ids=repr)
def test_passes_that_draw_otherwise_are_refused(estimator: Any, share: Any) -> None:
    """As a compiled and an eager pass do: each has masks of its own, and nothing in the numbers would tell."""
    calls: list[int] = []

    def drawing(model: nn.Module, batch: Any) -> Tensor:
        calls.append(len(calls))
        if len(calls) == wrong:
            torch.rand(1)
        return bert_loss(model, batch)

    optimizer = bert_optimizer(small_bert(), estimator=estimator, xi=1.0, difference_batch=share)
    wrong = 0
    passes = optimizer.step(drawing, TRAIN, VALIDATION).passes + (share == 0.4)  # its lower pass has two parts
    before = [p.detach().clone() for group in bk.split_parameters(optimizer.model) for p in group]
    wrong = len(calls) + passes
    with pytest.raises(RuntimeError, match="drew different random numbers"):
        optimizer.step(drawing, TRAIN, VALIDATION)
    assert all(map(torch.equal, before, [p for group in bk.split_parameters(optimizer.model) for p in group]))


def test_under_a_grad_scaler_the_numbers_stay() -> None:
    plain, scaled = (
        bert_optimizer(small_bert(), difference_batch=0.4, grad_scaler=scaler)
        for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10))
    )
    for optimizer in (plain, scaled):
        for _ in range(2):
            optimizer.step(bert_loss, TRAIN, VALIDATION)
    for group, other in zip(bk.split_parameters(plain.model), bk.split_parameters(scaled.model), strict=True):
        assert error(flat(list(other)), flat(list(group))) < 1e-12


def test_a_base_of_the_whole_batch_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from bidora_kernels.bilevel.passes import Passes

    real = Passes.run

    def mixed(self: Any, *arguments: Any, magnitude_parts: int | None = None, **keywords: Any) -> Any:
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(Passes, "run", mixed)
    with pytest.raises(AssertionError):
        test_a_share_gives_the_term_of_those_rows(bk.ForwardDifference())


# cutting batches -------------------------------------------------------------------------------------------------------------


def ids(*rows: int) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("batch", "first", "rest"),
    [
        (ids(1, 2, 3), ids(1), ids(2, 3)),
        ((ids(1, 2, 3), ["a", "b", "c"]), (ids(1), ["a"]), (ids(2, 3), ["b", "c"])),
        ([ids(1, 2, 3), None, 0.5], [ids(1), None, 0.5], [ids(2, 3), None, 0.5]),
        ({"x": ids(1, 2, 3), "scale": torch.tensor(2.0), "name": "n"}, {"x": ids(1), "scale": torch.tensor(2.0), "name": "n"},
         {"x": ids(2, 3), "scale": torch.tensor(2.0), "name": "n"}),
        (Named(ids(1, 2, 3), {"deep": ids(4, 5, 6)}), Named(ids(1), {"deep": ids(4)}), Named(ids(2, 3), {"deep": ids(5, 6)})),
        ((ids(1, 2, 3), [["a", "b"], ["c"], []]), (ids(1), [["a", "b"]]), (ids(2, 3), [["c"], []])),
        ({"x": ids(1, 2, 3), "meta": Named("n", 2.0), "size": torch.Size([7])},
         {"x": ids(1), "meta": Named("n", 2.0), "size": torch.Size([7])},
         {"x": ids(2, 3), "meta": Named("n", 2.0), "size": torch.Size([7])}),
        (transformers.modeling_outputs.BaseModelOutput(last_hidden_state=ids(1, 2, 3)),
         transformers.modeling_outputs.BaseModelOutput(last_hidden_state=ids(1)),
         transformers.modeling_outputs.BaseModelOutput(last_hidden_state=ids(2, 3))),
        (transformers.BatchEncoding({"input_ids": ids(1, 2, 3)}), transformers.BatchEncoding({"input_ids": ids(1)}),
         transformers.BatchEncoding({"input_ids": ids(2, 3)})),
    ],
)  # fmt: skip
def test_batches_are_cut_by_rows(batch: Any, first: Any, rest: Any) -> None:
    whole, share = first_share(batch, 0.4)
    assert whole.weights == pytest.approx([1 / 3, 2 / 3])
    assert share.weights == [1.0]
    assert share.batches[0] is whole.batches[0]
    for got, wanted in zip(whole.batches, (first, rest), strict=True):
        assert type(got) is type(batch)
        assert repr(got) == repr(wanted)


def test_rounding_and_the_ends() -> None:
    assert len(first_share(ids(1, 2, 3, 4), 0.5)[1].batches[0]) == 2
    assert len(first_share(ids(1, 2, 3, 4), 0.01)[1].batches[0]) == 1  # never none
    for batch, share in ((ids(1, 2, 3), 1.0), (ids(1), 0.5), (ids(1, 2, 3), 0.9)):
        whole, part = first_share(batch, share)
        assert whole.batches == part.batches == [batch]


def token_batch(*labels: list[int], **more: Tensor) -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(len(labels), len(labels[0])), "labels": torch.tensor(labels), **more}


@pytest.mark.parametrize(
    "batch",
    [
        token_batch([1, 2, 3], [4, -100, -100], [-100, -100, -100]),
        token_batch([1, 2, 3], [-100, 4, 5], [-100, 6, 7]),  # two each for a causal model, which has no use for the first
        token_batch([1, 2, -100], [-100, 4, 5]),  # two each, but not for a causal model
        token_batch([1, 2, 3], [4, 5, 6], attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]])),
        token_batch([1, 2, 3], [4, 5, 6], mask=torch.ones(1, 3)),
        token_batch([1, 2, 3], [4, 5, 6], mask=torch.ones(2, 3, device="meta")),
    ],
)
def test_a_mean_over_tokens_is_left_whole(batch: dict[str, Tensor]) -> None:
    """Rows with unequal numbers of labelled tokens do not share such a loss by their number."""
    whole, part = first_share(batch, 0.5)
    assert whole.batches == part.batches == [batch]


@pytest.mark.parametrize(
    "batch",
    [
        token_batch([1, 2, 3], [4, 5, 6]),
        token_batch([-100, 2, 3], [-100, 5, 6], attention_mask=torch.ones(2, 3)),
        token_batch([1, -100, 3], [4, 5, -100], causal_mask=torch.ones(2, 1, 3, 3), mask=torch.ones(7)[:2]),
        {"input_ids": torch.zeros(4, 3), "labels": torch.zeros(4, 5)},  # many labels of one row each: a mean over rows
        token_batch([[1, 2], [3, 4]], [[5, 6], [7, 8]]),  # type: ignore[list-item]
    ],
)
def test_rows_that_weigh_alike_are_cut(batch: dict[str, Tensor]) -> None:
    whole, part = first_share(batch, 0.5)
    assert whole.weights == [0.5, 0.5]
    assert torch.equal(part.batches[0]["labels"], batch["labels"][: len(batch["labels"]) // 2])
    floating = batch["labels"].is_floating_point()
    assert len(first_share(batch, 0.5, alike=True)[0]) == 1 + floating  # where each process must cut as the others do


def test_a_language_model_is_cut_by_rows() -> None:
    """Its mean over tokens is the mean over rows of one length: the same lower step, and the term of the first rows."""
    generator = torch.Generator().manual_seed(5)
    train, validation = ({"input_ids": x, "labels": x} for x in torch.randint(2, 40, (2, 4, 7), generator=generator))
    moved, terms, passes = [], [], []
    for which in (None, 0.5, lambda batch: {name: value[:2] for name, value in batch.items()}):
        model = gpt2()
        bk.apply_dora(model, bk.DoraConfig(r=2, target_modules="all-linear"))
        randomize(model)
        direction, magnitude = bk.split_parameters(model.double())
        optimizer = bk.BilevelOptimizer(
            model, lower=torch.optim.SGD(direction, lr=0.1), upper=torch.optim.SGD(magnitude, lr=0.1), difference_batch=which
        )
        terms.append(second_order(optimizer, lambda model, batch: model(**batch).loss, train, validation))
        start = flat(direction)
        passes.append(optimizer.step(lambda model, batch: model(**batch).loss, train, validation).passes)
        moved.append(flat(direction) - start)
    assert error(moved[1], moved[0]) < 1e-9
    assert error(terms[1], terms[2]) < 1e-6
    assert error(terms[1], terms[0]) > 0.1
    assert passes == [3, 3, 4]


@pytest.mark.parametrize(
    ("batch", "problem", "text"),
    [
        (object(), TypeError, "plain values, got object: give MicroBatches, or a callable"),
        ({"x": ids(1, 2), "rows": [object(), object()]}, TypeError, "got object"),
        ([{"x": ids(1, 2)}, {"x": ids(3, 4)}], TypeError, "got list"),
        (torch.nn.utils.rnn.pack_sequence([ids(1, 2)]), TypeError, "got PackedSequence"),
        (torch.eye(3).to_sparse(), TypeError, "got Tensor"),
        ((ids(1, 2), [["a"], ["b"], ["c"]]), ValueError, r"got \[2, 3\]"),
        ("train", TypeError, "must hold tensors, got str"),
        ((["a", "b"], 1), TypeError, "must hold tensors, got tuple"),
        (torch.tensor(1.0), TypeError, "must hold tensors, got Tensor"),
        ({"x": ids(1, 2), "positions": ids(1)}, ValueError, r"rows of one number, got \[1, 2\]"),
        ((ids(1, 2), ["a", "b", "c"]), ValueError, r"got \[2, 3\]"),
        (torch.empty(0, 3), ValueError, "must have rows, got none"),
    ],
)
def test_batches_without_clear_rows_are_refused(batch: Any, problem: type[Exception], text: str) -> None:
    with pytest.raises(problem, match=text):
        first_share(batch, 0.5)


def test_a_refused_batch_changes_nothing() -> None:
    model = small_bert()
    optimizer = bert_optimizer(model, difference_batch=0.5)
    before = [p.detach().clone() for group in bk.split_parameters(model) for p in group]
    with pytest.raises(TypeError, match="got object"):
        optimizer.step(bert_loss, (*TRAIN, object()), VALIDATION)
    assert all(map(torch.equal, before, [p for group in bk.split_parameters(model) for p in group]))


@pytest.mark.parametrize("wrong", [0, 0.0, -0.5, 1.5, float("nan"), True, "half", [0.5]])
def test_what_is_no_share(wrong: Any) -> None:
    with pytest.raises(ValueError, match="difference_batch must be a share over 0 and up to 1, a callable or None"):
        toy_optimizer(Curved(), difference_batch=wrong)
