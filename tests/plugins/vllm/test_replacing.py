"""Functions of vLLM's that get ours around them, whatever vLLM itself has put around them."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest

from longreach.plugins.vllm.replacing import Function, replace_once


def decorated(function: Function) -> Function:
    """As vLLM may do it: with `functools.wraps`."""

    @wraps(function)
    def inner(*args: Any) -> Any:
        return function(*args)

    return inner


@pytest.fixture
def runner() -> type:
    """A class of vLLM's, of which each test has one of its own."""

    class Runner:
        def plain(self, said: str) -> str:
            return said

        @decorated
        def decorated(self, said: str) -> str:
            return said

        @staticmethod
        def of_nothing(said: str) -> str:
            return said

        @classmethod
        def of_the_class(cls, said: str) -> str:
            return f"{cls.__name__} {said}"

    return Runner


def exclaiming(original: Function) -> Function:
    @wraps(original)
    def made(*args: Any) -> str:
        return f"{original(*args)}!"

    return made


@pytest.mark.parametrize("name", ["plain", "decorated"])
def test_it_is_replaced_once(runner: type, name: str) -> None:
    for _ in range(2):
        replace_once(runner, name, exclaiming)
    assert getattr(runner(), name)("said") == "said!"


@pytest.mark.parametrize("of", [lambda runner: runner, lambda runner: runner()])
def test_a_function_of_the_class_gets_its_class_once(
    runner: type, of: Callable[[type], Any]
) -> None:
    for _ in range(2):
        replace_once(runner, "of_the_class", exclaiming)
    assert of(runner).of_the_class("said") == "Runner said!"


@pytest.mark.parametrize("of", [lambda runner: runner, lambda runner: runner()])
def test_a_static_function_stays_one(runner: type, of: Callable[[type], Any]) -> None:
    for _ in range(2):
        replace_once(runner, "of_nothing", exclaiming)
    assert of(runner).of_nothing("said") == "said!"


def test_what_is_decorated_once_more_is_not_replaced_again(runner: type) -> None:
    """Ours is still in there."""
    replace_once(runner, "plain", exclaiming)
    runner.plain = decorated(runner.plain)
    replace_once(runner, "plain", exclaiming)
    assert runner().plain("said") == "said!"


def test_what_is_not_there_is_missed(runner: type) -> None:
    with pytest.raises(AttributeError):
        replace_once(runner, "renamed", exclaiming)
