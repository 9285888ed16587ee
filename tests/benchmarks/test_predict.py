"""The counted bytes and operations of a plan, against counts by hand; the times at given ceilings."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import predictions, results
from benchmarks.predict import (
    MODELLED_H200,
    PLANS,
    Ceilings,
    Shape,
    case_shape,
    counts,
    frozen,
    native,
    native_activation_plan,
    native_weight_plan,
    operation_counts,
    peft_dora,
    peft_lora,
    seconds,
    triton_activation_plan,
)  # fmt: skip

from .test_results import CASE_ID, document

SHAPE = Shape(tokens=4, out=3, inner=5, r=2, size=4)


def test_frozen_by_hand() -> None:
    bytes_of_one_product = 4 * (4 * 5 + 4 * 3 + 3 * 5)
    assert counts(frozen(SHAPE)) == (2 * bytes_of_one_product, 2 * 2 * 4 * 3 * 5)


def test_lora_by_hand() -> None:
    t, n, k, r, size = 4, 3, 5, 2, 4
    products = 2 * (t * k + t * n + n * k)
    forward = (t * k + t * r) + (t * n + t * r) + 2 * t * n + 3 * t * n
    backward = 2 * t * n + 2 * (t * n + t * r) + 2 * (t * k + t * r) + 3 * t * k
    assert counts(peft_lora(SHAPE)).bytes == size * (products + forward + backward)
    assert counts(peft_lora(SHAPE)).operations == 2 * 2 * t * n * k + 3 * 2 * t * k * r + 3 * 2 * t * n * r


def test_time_takes_the_slower_of_bytes_and_operations() -> None:
    plan = frozen(SHAPE)
    assert seconds(plan, Ceilings(1.0, 1e9, 0.0)) == pytest.approx(counts(plan).bytes)
    assert seconds(plan, Ceilings(1e9, 1.0, 0.0)) == pytest.approx(counts(plan).operations)
    assert seconds(plan, Ceilings(1e18, 1e18, 2.0)) == pytest.approx(4.0)


def test_every_plan_costs_at_least_the_floor() -> None:
    for train in (True, False):
        shape = Shape(4096, 4096, 4096, 16, 2, train)
        floor = seconds(frozen(shape), MODELLED_H200)
        assert all(seconds(plan(shape), MODELLED_H200) >= floor for plan in PLANS.values())


def test_the_native_plan_follows_the_tokens() -> None:
    few, many = Shape(1, 4096, 4096, 16, 4), Shape(16384, 1024, 1024, 16, 4)
    assert native(few) == native_activation_plan(few)
    assert native(many) == native_weight_plan(many)


def test_the_model_agrees_with_an_independent_one() -> None:
    """A finer model of the kernels said 1.82 times faster than PEFT DoRA and 1.12 than PEFT LoRA."""
    shape = Shape(4096, 4096, 4096, 16, 2)
    ours = seconds(triton_activation_plan(shape), MODELLED_H200)
    assert seconds(peft_dora(shape), MODELLED_H200) / ours == pytest.approx(1.82, rel=0.1)
    assert seconds(peft_lora(shape), MODELLED_H200) / ours == pytest.approx(1.12, rel=0.05)


def test_operation_counts_of_a_stored_case() -> None:
    case = {
        "kind": "operation",
        "operation": "weight_norm",
        "out_features": 3,
        "in_features": 5,
        "r": 2,
        "dtype": "bf16",
        "tokens": 0,
    }
    assert operation_counts(case).bytes == 3 * 5 * 2 + 4 * 2 * 8 + 4 * 3


def _gpu_document(slower: float) -> dict:
    """One layer case on a GPU at ceilings of its own, every provider `slower` than its plan."""
    made = document()
    ceilings = Ceilings(2e12, 400e12, 2e-6)
    made["machine"].update(device="cuda", gpu="some GPU")
    made["pieces"][0]["ceilings"] = {
        "copy_gb_s": 2e3, "matmul_fp32_gflop_s": 1e4, "matmul_bf16_gflop_s": 4e5, "operator_us": 2.0,
    }  # fmt: skip
    entry = made["cases"].pop(CASE_ID)
    entry["case"] = {"kind": "layer", "dtype": "bf16", "tokens": 4096, "out_features": 4096, "in_features": 4096, "r": 16}
    shape, ok = case_shape(entry["case"]), entry["providers"]["floor"]
    entry["floor"] = "frozen linear"
    entry["providers"] = {
        name: {**ok, "seconds": [slower * seconds(PLANS[name](shape), ceilings)] * 2}
        for name in ("frozen linear", "PEFT LoRA", "PEFT DoRA, fp32 adapters", "bidora (triton)")
    }
    made["selected"] = [predictions.GAP_CASE]
    made["cases"][predictions.GAP_CASE] = entry
    return made


def test_the_gap_is_named_and_adds_up() -> None:
    (header, _, row) = predictions.gap_table(_gpu_document(1.5))
    cells = dict(zip((h.strip() for h in header.split("|")), (c.strip() for c in row.split("|")), strict=True))
    assert cells["ratio"] == "1.50"
    value = {name: float(cells[name]) for name in cells if name not in ("", "ratio", "bidora, ms")}
    assert value["products"] + value["everything else"] + value["launches"] == pytest.approx(value["predicted"], abs=2e-3)
    assert value["measured"] - value["predicted"] == pytest.approx(value["gap"], abs=2e-3)
    assert value["of it the products'"] + value["of it the rest"] == pytest.approx(value["gap"], abs=2e-3)
    assert value["of it the products'"] == pytest.approx(0.5 * value["products"], rel=0.02)
    assert any("| bidora (triton) | 1 | 1.50 | 1.50 | 1.50 |" in line for line in predictions.summary_table(_gpu_document(1.5)))


def test_the_projection_takes_a_measured_gpu_where_there_is_one_and_says_so() -> None:
    words, ceilings, gaps = predictions.basis([])
    assert words.startswith("No layer was measured by the suite on a GPU")
    assert ceilings == MODELLED_H200
    assert set(gaps.values()) == {1.0}
    tiny, cpu = _gpu_document(1.5), document()
    tiny["tiny"] = True
    assert predictions.basis([cpu, tiny])[0] == words
    words, ceilings, gaps = predictions.basis([cpu, _gpu_document(1.5)])
    assert "some GPU" in words
    assert ceilings.arithmetic == 400e12
    assert list(gaps.values()) == pytest.approx([1.5] * 3)
    assert predictions.projection_table([])[2:] != predictions.projection_table([_gpu_document(1.5)])[2:]


def test_the_projection_by_hand() -> None:
    """64 GPUs sharded over all: 13 GB gathered twice at 40 GB/s, which hides every method's compute."""
    row = next(line for line in predictions.projection_table([]) if line.startswith("| 64 | all GPUs"))
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert float(row.split("|")[4]) == pytest.approx(2 * 2 * parameters * 63 / 64 / 40e9 * 1e3, abs=0.1)


def test_the_page_is_printed_from_any_results(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results.save(_gpu_document(1.5), tmp_path / "r.json")
    assert predictions.main([str(tmp_path / "r.json")]) == 0
    printed = capsys.readouterr().out
    assert "# Predicted, then measured" in printed
    assert "some GPU" in printed
    assert predictions.main([str(tmp_path / "absent.json")]) == 2
