"""The split: uniform, keyed, the same for the same unit, and blind to everything else."""

import datetime

import numpy as np
import pyarrow as pa

from cloister_data.datasets import SplitRef
from cloister_guard.datasets.split import SPLIT_COLUMN, in_part, population_key, select_part, split_values

KEY = population_key(b"secret", "hospital/people")


def test_values_are_uniform_keyed_and_stable() -> None:
    values = split_values(KEY, range(20_000))
    assert values.min() >= 0
    assert values.max() < 1
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    # 19 degrees of freedom: 52 is beyond p = 5e-5, and the key is fixed.
    assert ((counts - 1000) ** 2 / 1000).sum() < 52
    assert np.array_equal(values[5:10], split_values(KEY, range(5, 10)))
    assert not np.array_equal(values[:10], split_values(population_key(b"secret", "hospital/others"), range(10)))
    assert not np.array_equal(values[:10], split_values(population_key(b"other", "hospital/people"), range(10)))


def test_a_unit_is_named_by_one_text_whatever_its_type() -> None:
    assert np.array_equal(split_values(KEY, [7]), split_values(KEY, ["7"]))
    day = datetime.date(2024, 1, 31)
    assert np.array_equal(split_values(KEY, [day]), split_values(KEY, ["2024-01-31"]))


def test_train_and_test_are_a_partition() -> None:
    values = split_values(KEY, range(1000))
    table = pa.table({"x": range(1000), SPLIT_COLUMN: values})
    parts = {
        part: select_part(table, SplitRef(dataset="a/b", part=part, test=0.3)) for part in ("all", "train", "test")
    }
    rows = {part: set(found.column("x").to_pylist()) for part, found in parts.items()}
    assert rows["train"] | rows["test"] == rows["all"] == set(range(1000))
    assert not rows["train"] & rows["test"]
    assert all(SPLIT_COLUMN not in found.column_names for found in parts.values())
    assert 240 < len(rows["test"]) < 360
    # A larger test part holds the smaller one: no unit changes sides the wrong way.
    assert rows["test"] <= set(
        select_part(table, SplitRef(dataset="a/b", part="test", test=0.4)).column("x").to_pylist()
    )
    assert in_part(np.array([0.0, 0.3, 0.5]), SplitRef(dataset="a/b", part="test", test=0.3)).tolist() == [
        True,
        False,
        False,
    ]
