"""A controller that hangs is started again."""

import threading
import time

from longreach.cluster.controller import ControllerKeeper


def _keeper(answers: list[bool], restarted: list[int], asked: list[float]) -> ControllerKeeper:
    def answer(seconds: float) -> bool:
        asked.append(seconds)
        return answers.pop(0) if answers else True

    return ControllerKeeper(answer, lambda: restarted.append(len(asked)), every=0.05, patience=0.22)


def _wait_for(asked: list[float], count: int) -> None:
    deadline = time.monotonic() + 10
    while len(asked) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_that_is_silent_for_too_long_is_restarted_once() -> None:
    restarted: list[int] = []
    asked: list[float] = []
    keeper = _keeper([True, *[False] * 6], restarted, asked)
    keeper.start()
    _wait_for(asked, 12)
    keeper.close()
    assert len(restarted) == 1
    assert restarted[0] > 4


def test_one_that_answers_now_and_then_is_left_alone() -> None:
    restarted: list[int] = []
    asked: list[float] = []
    keeper = _keeper([False, False, True] * 5, restarted, asked)
    keeper.start()
    _wait_for(asked, 16)
    keeper.close()
    assert restarted == []


def test_nothing_is_restarted_once_it_is_closed() -> None:
    restarted: list[int] = []
    waiting, go_on = threading.Event(), threading.Event()

    def answer(seconds: float) -> bool:
        waiting.set()
        go_on.wait(10)
        return False

    keeper = ControllerKeeper(answer, lambda: restarted.append(1), every=0.01, patience=0.0)
    keeper.start()
    assert waiting.wait(10)
    keeper.close()
    go_on.set()
    time.sleep(0.1)
    assert restarted == []
