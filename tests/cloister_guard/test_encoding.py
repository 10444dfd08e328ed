"""Encodings follow from the declared schema alone, and no row can make them fail."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_data.errors import InvalidRequestError
from cloister_data.schema import (
    BooleanColumn,
    CategoryColumn,
    DateColumn,
    IntegerColumn,
    RealColumn,
    Schema,
    TensorColumn,
    TextColumn,
)
from cloister_guard.encoding import encode_features, encode_target, feature_width, target_kind

SCHEMA = Schema(
    privacy_unit="patient",
    columns=(
        IntegerColumn(name="patient", low=0, high=100_000),
        RealColumn(name="weight", low=0, high=200, nullable=True),
        IntegerColumn(name="stage", low=1, high=4, nullable=True),
        DateColumn(name="seen", low="2020-01-01", high="2020-12-31", nullable=True),
        BooleanColumn(name="smoker", nullable=True),
        CategoryColumn(name="group", categories=("a", "b", "c"), nullable=True),
        TextColumn(name="notes", max_bytes=100),
        TensorColumn(name="scan", shape=(2, 2), dtype="uint8", low=0, high=255),
        IntegerColumn(name="wide", low=0, high=10**9),
    ),
)
FEATURES = ("weight", "stage", "seen", "smoker", "group")


def _table(**columns: Any) -> pa.Table:
    day = datetime.date(2020, 1, 1)
    values: dict[str, Any] = {
        "weight": [0.0, 50.0, 200.0, None],
        "stage": [1, 2, 4, None],
        "seen": pa.array([day, datetime.date(2020, 12, 31), day, None], pa.date32()),
        "smoker": [True, False, True, None],
        "group": ["a", "c", "b", None],
        "wide": [0, 5, 10**9, 7],
    }
    return pa.table(values | columns)


def test_features_by_their_declared_bounds() -> None:
    encoded = encode_features(_table(), SCHEMA, FEATURES)
    assert encoded.dtype == np.float32
    third = np.float32(-1 + 2 / 3)
    expected = [
        [-1, -1, -1, 1, 1, 0, 0],
        [-0.5, third, 1, -1, 0, 0, 1],
        [1, 1, -1, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_allclose(encoded, np.asarray(expected, dtype=np.float32), atol=1e-6)
    assert feature_width(SCHEMA, FEATURES) == 7


def test_the_order_is_the_one_that_was_asked() -> None:
    forwards = encode_features(_table(), SCHEMA, ("weight", "group"))
    backwards = encode_features(_table(), SCHEMA, ("group", "weight"))
    assert np.array_equal(forwards, backwards[:, [3, 0, 1, 2]])


def test_values_outside_the_declaration_are_harmless() -> None:
    table = _table(
        weight=[-1e300, float("inf"), float("nan"), 1e300],
        stage=[-(2**62), 2**62, 3, 0],
        group=["a", "z", "", None],
    )
    encoded = encode_features(table, SCHEMA, ("weight", "stage", "group"))
    np.testing.assert_allclose(encoded[:, 0], [-1, 0, 0, 1])
    np.testing.assert_allclose(encoded[:, 1], [-1, 1, 1 / 3, -1], atol=1e-6)
    assert encoded[1:, 2:].sum() == 0


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.one_of(st.none(), st.floats()), min_size=1, max_size=20))
def test_every_real_becomes_a_number_in_range(values: list[float | None]) -> None:
    encoded = encode_features(pa.table({"weight": pa.array(values, pa.float64())}), SCHEMA, ("weight",))
    assert np.isfinite(encoded).all()
    assert (np.abs(encoded) <= 1).all()


def test_mock_like_tables_are_read_too() -> None:
    """Days as text or timestamps, categories as dictionaries, several chunks, columns of nulls."""
    table = _table(
        seen=["2020-01-01", "2020-12-31", "2020-01-01", None],
        group=pa.array(["a", "c", "b", None]).dictionary_encode(),
        weight=pa.chunked_array([[0.0, 50.0], [], [200.0, None]], type=pa.float64()),
    )
    assert np.array_equal(encode_features(table, SCHEMA, FEATURES), encode_features(_table(), SCHEMA, FEATURES))
    nulls = pa.table({name: pa.nulls(3) for name in FEATURES})
    assert not encode_features(nulls, SCHEMA, FEATURES).any()
    empty = _table().slice(0, 0)
    assert encode_features(empty, SCHEMA, FEATURES).shape == (0, 7)


@pytest.mark.parametrize(
    ("features", "says"),
    [
        (("weight", "height"), "no column 'height'"),
        (("notes",), "without a declared encoding"),
        (("scan",), "without a declared encoding"),
        (("patient",), "privacy unit"),
        ((), "No features"),
    ],
)
def test_features_that_can_not_be_encoded_are_refused_without_data(features: tuple[str, ...], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        feature_width(SCHEMA, features)


@pytest.mark.parametrize(
    ("target", "loss", "values", "present"),
    [
        ("group", "cross_entropy", [0, 2, 1, 0], [True, True, True, False]),
        ("smoker", "cross_entropy", [1, 0, 1, 0], [True, True, True, False]),
        ("smoker", "binary_cross_entropy", [1.0, 0.0, 1.0, 0.0], [True, True, True, False]),
        ("stage", "cross_entropy", [0, 1, 3, 0], [True, True, True, False]),
        ("stage", "accuracy", [0, 1, 3, 0], [True, True, True, False]),
        ("weight", "mse", [-1.0, -0.5, 1.0, 0.0], [True, True, True, False]),
        ("seen", "huber", [-1.0, 1.0, -1.0, 0.0], [True, True, True, False]),
    ],
)
def test_targets_in_the_form_of_their_loss(target: str, loss: Any, values: list[float], present: list[bool]) -> None:
    encoded = encode_target(_table(), SCHEMA, target, loss)
    assert encoded.values.tolist() == values
    assert encoded.present.tolist() == present
    kind = np.int64 if loss in ("cross_entropy", "accuracy") else np.float32
    assert encoded.values.dtype == kind


@pytest.mark.parametrize(
    ("target", "loss", "says"),
    [
        ("height", "mse", "no column 'height'"),
        ("patient", "mse", "privacy unit"),
        ("group", "binary_cross_entropy", "3 classes"),
        ("group", "mse", "predicts numbers"),
        ("smoker", "l1", "predicts numbers"),
        ("weight", "cross_entropy", "predicts classes"),
        ("wide", "cross_entropy", "predicts classes"),
        ("notes", "accuracy", "predicts classes"),
        ("scan", "huber", "predicts numbers"),
    ],
)
def test_targets_that_do_not_fit_their_loss_are_refused(target: str, loss: Any, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        target_kind(SCHEMA, target, loss)


def test_bounds_that_are_too_narrow_are_refused() -> None:
    narrow = Schema(columns=(RealColumn(name="x", low=0.0, high=1e-200),))
    with pytest.raises(InvalidRequestError, match="too narrow"):
        target_kind(narrow, "x", "mse")
    assert encode_features(pa.table({"x": [0.0, 1e-200]}), narrow, ("x",)).tolist() == [[-1.0], [1.0]]
