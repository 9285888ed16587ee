"""The suites are what they say, and every case can be named, filtered and shrunk."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.cases import ISSUE_MODELS, MODELS, RANKS, SUITES, TOKENS, BilevelCase, DecodeCase, LayerCase, StepCase, suite
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


def test_cpu_stays_small() -> None:
    layers = [case for case in suite("cpu") if isinstance(case, LayerCase)]
    assert max(case.tokens for case in layers) <= 4096
    for case in layers:
        assert case.model in ("roberta-base", "roberta-large", "gpt2-medium") or (case.out_features, case.in_features) == (
            4096,
            4096,
        )
    for kind in (StepCase, BilevelCase):
        assert {case.targets for case in suite("cpu") if type(case) is kind} == {"all-linear", "q+v"}
    three = [case for case in suite("cpu") if isinstance(case, StepCase) and case.layers == 3 and case.batch == 8 and case.r == 4]
    assert len(three) >= 4
    assert all(case.min_rounds >= 20 for case in three)


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
