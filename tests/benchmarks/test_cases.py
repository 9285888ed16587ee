"""The suites are what they say, and every case can be named, filtered and shrunk."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest

from benchmarks.cases import (
    COSTLY,
    ISSUE_MODELS,
    MODELS,
    NARROW,
    RANKS,
    REFERENCE,
    SUITES,
    TOKENS,
    BilevelCase,
    DecodeCase,
    LayerCase,
    StepCase,
    suite,
)
from benchmarks.run import providers
from bidora_kernels.cli import add_bench_arguments


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("tiny", [False, True])
def test_ids_are_unique(name: str, tiny: bool) -> None:
    ids = [case.id for case in suite(name, tiny=tiny)]
    assert ids
    assert len(set(ids)) == len(ids)


def test_full_is_the_cross_product() -> None:
    found = {(c.model, c.layer, c.tokens, c.r, c.dtype) for c in suite("full") if type(c) is LayerCase}
    wanted = {
        (model, layer, tokens, r, dtype)
        for model in ISSUE_MODELS
        for layer in MODELS[model]
        for tokens in TOKENS
        for r in RANKS
        for dtype in ("fp32", "bf16")
    }
    assert wanted <= found


def test_cpu_holds_the_narrow_models_in_full_and_one_wide_column() -> None:
    layers = [case for case in suite("cpu") if isinstance(case, LayerCase)]
    assert max(case.tokens for case in layers) <= 4096
    for model in NARROW:
        for layer in MODELS[model]:
            found = {(c.kind, c.tokens) for c in layers if (c.model, c.layer, c.r) == (model, layer, 16)}
            long = set() if layer in ("c_fc", "mlp.c_proj") else {("layer", 4096)}  # RoBERTa-large's shapes again
            assert found == {("layer", 128), ("decode", 1)} | long
            assert {c.r for c in layers if (c.model, c.layer, c.tokens) == (model, layer, 128)} >= {4, 16, 64}
    wide = [case for case in layers if case.model not in NARROW]
    assert {(case.out_features, case.in_features) for case in wide} == {(4096, 4096)}
    assert {case.tokens for case in wide if case.kind == "layer"} == {128, 4096}


def test_cpu_steps() -> None:
    for kind in (StepCase, BilevelCase):
        assert {case.targets for case in suite("cpu") if type(case) is kind} == {"all-linear", "q+v"}
    steps = [case for case in suite("cpu") if type(case) is StepCase and (case.layers, case.batch, case.r) == (3, 8, 4)]
    assert len(steps) >= 2
    assert all(case.min_rounds >= 20 for case in steps)
    assert {c.layers for c in suite("cpu") if type(c) is StepCase and c.batch == 2 and c.r == 4} == {1, 2, 3, 6, 12}


def test_what_a_case_leaves_out_is_never_a_peer() -> None:
    """Time may be saved on this library's own variants and on exact estimators, not on what it is compared with."""
    for case in suite("cpu"):
        everything, kept = providers(dataclasses.replace(case, without=())), providers(case)
        assert set(kept) <= set(everything)
        gone = {name for name in everything if name not in kept}
        assert all(name.startswith((*REFERENCE, *COSTLY, "plain function")) for name in gone), gone
        assert case.floor in kept
        assert json.loads(json.dumps(case.describe())) == case.describe()
    assert any(type(c) is BilevelCase and not c.without for c in suite("cpu"))
    for targets in ("all-linear", "q+v"):
        assert any(type(c) is StepCase and c.targets == targets and c.without == REFERENCE for c in suite("cpu"))


def test_gpu_has_the_predicted_columns_decode_step_and_bilevel() -> None:
    cases = suite("gpu")
    columns = {(c.tokens, c.out_features, c.in_features, c.r) for c in cases if type(c) is LayerCase}
    assert columns == {
        (4096, 4096, 4096, 16), (8192, 4096, 14336, 16), (4096, 768, 768, 4), (16384, 8192, 8192, 64), (4096, 4096, 4096, 384),
    }  # fmt: skip
    assert {type(case) for case in cases} >= {DecodeCase, StepCase, BilevelCase}


def test_filter() -> None:
    assert {case.kind for case in suite("cpu", "decode/")} == {"decode"}
    assert {case.r for case in suite("cpu", "operation/weight_norm/*r8*")} == {8}
    with pytest.raises(ValueError, match="no case of suite cpu matches 'nothing'"):
        suite("cpu", "nothing")
    with pytest.raises(ValueError, match="suite must be one of smoke, cpu, gpu, full, got 'all'"):
        suite("all")


def test_the_command_offers_every_suite() -> None:
    parser = argparse.ArgumentParser()
    add_bench_arguments(parser)
    action = next(action for action in parser._actions if action.dest == "suite")
    assert tuple(action.choices or ()) == tuple(SUITES)
