"""The search for the highest load that holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.loadtest.mixed.plan import ClosedLoad, OpenLoad
from longreach.loadtest.mixed.sweep import PRECISION, search, value_of, with_load


@given(st.floats(0.001, 1_000), st.floats(0.001, 1_000))
def test_a_rate_is_found_to_a_tenth(limit: float, first: float) -> None:
    found = search(lambda load: load <= limit, first, steps=100, whole=False)
    assert found is not None
    assert found <= limit < found * (1 + PRECISION)


@given(st.integers(1, 1_000), st.integers(1, 1_000))
def test_a_number_of_clients_is_found_exactly(limit: int, first: int) -> None:
    tried: list[float] = []

    def holds(load: float) -> bool:
        tried.append(load)
        return load <= limit

    assert search(holds, first, steps=100, whole=True) == limit
    assert all(load == int(load) >= 1 for load in tried)
    assert len(set(tried)) == len(tried)


@given(st.floats(0.001, 1_000), st.integers(1, 12))
def test_it_never_tries_more_often_than_it_may(limit: float, steps: int) -> None:
    tried: list[float] = []

    def holds(load: float) -> bool:
        tried.append(load)
        return load <= limit

    found = search(holds, 1.0, steps, whole=False)
    assert len(tried) <= steps
    assert found == max((load for load in tried if load <= limit), default=None)


def test_where_nothing_holds_there_is_none() -> None:
    assert search(lambda load: False, 8, steps=6, whole=False) is None
    assert search(lambda load: False, 8, steps=20, whole=True) is None


def test_a_load_keeps_its_kind() -> None:
    load = OpenLoad(1.0, burst=3)
    assert with_load(load, 2.5) == OpenLoad(2.5, load.pattern, 3)
    assert value_of(with_load(load, 2.5)) == 2.5
    assert with_load(ClosedLoad(1), 4.0) == ClosedLoad(4)
    assert value_of(ClosedLoad(4)) == pytest.approx(4.0)
