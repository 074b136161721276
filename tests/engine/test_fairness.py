"""Whose turn it is: the order, and the bound on how often one is passed."""

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.engine.errors import InvalidRequestError
from longreach.engine.fairness import Turns

PIECE = 8
PATIENCES = st.sampled_from([0.25, 1.0, 2.0, 5.0])
# Before each turn: the lengths of those that join, and which of those that are here leaves.
JOINING = st.lists(st.integers(1, 12 * PIECE), max_size=3)
LEAVING = st.none() | st.integers(0, 20)
TURNS = st.lists(st.tuples(JOINING, LEAVING), max_size=60)


@dataclass
class Joined:
    """What a test knows of a prompt by its own counting."""

    tokens: int
    most_passed: float
    served: int = 0
    passed: int = 0


class Service:
    """Serves whoever is first in pieces, and counts who passes whom."""

    def __init__(self, patience: float) -> None:
        self.turns = Turns(patience)
        self._patience = patience
        self.here: dict[str, Joined] = {}
        self.served: list[str] = []
        self._names = iter(range(1_000_000))

    def join(self, tokens: int) -> str:
        name = f"prompt {next(self._names)}"
        self.turns.join(name, tokens)
        earlier = sum(joined.tokens for joined in self.here.values())
        pieces = (len(self.here) + 2) * PIECE
        most_passed = self._patience * (2 * tokens + earlier) + pieces
        self.here[name] = Joined(tokens, most_passed)
        return name

    def leave(self, name: str) -> None:
        self.turns.leave(name)
        del self.here[name]

    def serve(self) -> str | None:
        order = self.turns.order()
        assert sorted(order) == sorted(self.here)
        if not order:
            return None
        name, joined = order[0], self.here[order[0]]
        tokens = min(PIECE, joined.tokens - joined.served)
        self.turns.serve(name, tokens)
        joined.served += tokens
        self.served.append(name)
        for other in self._earlier_than(name):
            other.passed += tokens
            assert other.passed <= other.most_passed
        if joined.served == joined.tokens:
            self.leave(name)
        return name

    def _earlier_than(self, name: str) -> Iterable[Joined]:
        names = list(self.here)
        return [self.here[each] for each in names[: names.index(name)]]

    def kind(self, name: str) -> int:
        remaining = self.here[name].tokens - self.here[name].served
        return next(power for power in range(64) if remaining < 2**power)


@given(st.lists(st.integers(1, 12 * PIECE), max_size=10), TURNS)
def test_without_starvation_the_shortest_kind_is_first_and_within_it_the_earliest(
    at_first: list[int], turns: list[tuple[list[int], int | None]]
) -> None:
    service = Service(patience=1e9)
    for tokens in at_first:
        service.join(tokens)
    for joining, _ in turns:
        for tokens in joining:
            service.join(tokens)
        # dict keeps the order of joining, and sorting is stable.
        assert service.turns.order() == sorted(service.here, key=service.kind)
        service.serve()


@given(PATIENCES, TURNS)
def test_nobody_is_passed_by_more_than_the_bound_and_all_are_served(
    patience: float, turns: list[tuple[list[int], int | None]]
) -> None:
    service = Service(patience)
    for joining, leaving in turns:
        for tokens in joining:
            service.join(tokens)
        if leaving is not None and leaving < len(service.here):
            service.leave(list(service.here)[leaving])
        service.serve()  # asserts the bound
    while service.serve() is not None:
        pass
    assert not service.here


@pytest.mark.parametrize("patience", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("long_ones", [1, 3])
def test_a_stream_of_short_prompts_without_an_end_does_not_starve_long_ones(
    patience: float, long_ones: int
) -> None:
    service = Service(patience)
    names = [service.join(20 * PIECE) for _ in range(long_ones)]
    turns = 0
    while names[-1] in service.here:
        service.join(PIECE)
        service.serve()
        turns += 1
    own = 20 * long_ones
    assert turns <= own + patience * (20 + own) + long_ones + 1
    # One after the other, although all of them starved.
    served = [name for name in service.served if name in names]
    assert served == sorted(served, key=names.index)


def test_short_prompts_keep_their_part_while_a_long_one_starves() -> None:
    service = Service(patience=2.0)
    long = service.join(1000 * PIECE)
    while long not in service.served:
        service.join(PIECE)
        service.serve()
    since = len(service.served)
    for _ in range(300):
        service.join(PIECE)
        service.serve()
    # One piece of the long one for two of theirs.
    assert service.served[since:].count(long) == 100


EQUAL = st.integers(2, 5).flatmap(lambda n: st.integers(1, 96).map(lambda tokens: [tokens] * n))
OF_A_KIND = st.lists(st.integers(64, 127), min_size=2, max_size=5)


@given(st.tuples(PATIENCES, EQUAL) | st.tuples(st.just(1e9), OF_A_KIND), TURNS)
def test_equal_prompts_never_alternate_nor_any_of_a_kind_where_none_starves(
    service_of: tuple[float, list[int]], turns: list[tuple[list[int], int | None]]
) -> None:
    patience, tokens = service_of
    service = Service(patience)
    equal = [service.join(each) for each in tokens]
    for joining, _ in turns:
        for joining_tokens in joining:
            service.join(joining_tokens)
        service.serve()
    while service.serve() is not None:
        pass
    served = [name for name in service.served if name in equal]
    assert served == sorted(served, key=equal.index)


def test_prompts_that_came_earlier_do_not_use_up_patience() -> None:
    turns = Turns(patience=1.0)
    turns.join("earlier", 500)
    turns.join("later", 600)
    turns.serve("earlier", 1)
    for _ in range(498):
        turns.serve("earlier", 1)
    turns.join("short", 10)
    assert turns.order() == ["earlier", "short", "later"]


def test_one_that_starved_and_is_served_but_has_not_left_is_in_nobodys_way() -> None:
    turns = Turns(patience=1.0)
    turns.join("served", 10)
    turns.join("starving", 12)
    turns.join("short", 9)
    turns.serve("short", 9)
    turns.join("shorter", 8)
    turns.serve("shorter", 8)
    turns.serve("served", 10)
    turns.join("another", 5)
    assert turns.order() == ["starving", "another"]


def test_a_name_is_in_the_order_once_and_may_come_again_when_it_has_left() -> None:
    turns = Turns(patience=1.0)
    turns.join("a", 3)
    with pytest.raises(InvalidRequestError):
        turns.join("a", 4)
    turns.leave("a")
    turns.leave("a")
    turns.join("a", 4)
    assert turns.order() == ["a"]
    turns.serve("a", 4)
    assert turns.order() == []
