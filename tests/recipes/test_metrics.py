from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bidora_kernels.recipes import metrics

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="the extra [train] is not installed")

class_pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)
value_pairs = st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=40)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(class_pairs)
def test_class_metrics_equal_those_of_sklearn(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = map(list, zip(*pairs, strict=True))
    assert metrics.accuracy(predicted, labels) == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted), abs=1e-12)
    assert metrics.macro_f1(predicted, labels) == pytest.approx(
        sklearn_metrics.f1_score(labels, predicted, average="macro", zero_division=0), abs=1e-12
    )
    assert metrics.matthews_correlation(predicted, labels) == pytest.approx(
        sklearn_metrics.matthews_corrcoef(labels, predicted), abs=1e-12
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(value_pairs)
def test_pearson_equals_the_r_of_a_linear_fit(pairs: list[tuple[float, float]]) -> None:
    import numpy

    predicted, labels = map(list, zip(*pairs, strict=True))
    found = metrics.pearson_correlation(predicted, labels)
    if min(numpy.std(predicted), numpy.std(labels)) < 1e-6:  # numpy's own rounding decides there
        assert math.isfinite(found)
    else:
        assert found == pytest.approx(numpy.corrcoef(predicted, labels)[0, 1], abs=1e-6)


def test_a_constant_list_has_no_correlation() -> None:
    assert metrics.matthews_correlation([1, 1, 1], [0, 1, 1]) == 0.0
    assert metrics.pearson_correlation([1.0, 1.0], [0.0, 1.0]) == 0.0


@pytest.mark.parametrize("metric", metrics.METRICS.values())
def test_lists_of_different_length_are_refused(metric) -> None:
    with pytest.raises(ValueError, match="same length > 0, got 1 and 2"):
        metric([1], [1, 2])
    with pytest.raises(ValueError, match="got 0 and 0"):
        metric([], [])
