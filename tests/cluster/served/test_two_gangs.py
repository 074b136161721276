"""A gang for short prompts and one for long ones: who computes what, and who dies."""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from ..conftest import wait_for
from .conftest import OWN_LIMIT, SHORT_LIMIT, Served

LONG = 24_000
"""Tokens that take long enough for something to happen meanwhile."""


def ask(served: Served, tokens: int) -> httpx.Response:
    return served.ask(served.body(tokens, max_tokens=1))


def begin_long(served: Served, pool: ThreadPoolExecutor) -> "Future[httpx.Response]":
    """Ask for a long prompt, and return when some of it has been computed."""
    before = served.computed().get("long", 0)
    answer = pool.submit(ask, served, LONG)
    wait_for(lambda: served.computed().get("long", 0) > before, 60, "a chunk of the long prompt")
    assert not answer.done()
    return answer


def test_each_prompt_is_computed_by_who_takes_its_length(served: Served) -> None:
    before = served.computed()
    for tokens in (10, OWN_LIMIT, OWN_LIMIT + 1, SHORT_LIMIT, SHORT_LIMIT + 1):
        assert ask(served, tokens).status_code == 200
    after = served.computed()
    grown = {gang: value - before.get(gang, 0) for gang, value in after.items()}
    assert grown == {
        "decode": 10 + OWN_LIMIT, "short": OWN_LIMIT + 1 + SHORT_LIMIT, "long": SHORT_LIMIT + 1,
    }  # fmt: skip


def test_the_end_of_the_long_prompts_gang_does_short_ones_no_harm(served: Served) -> None:
    with ThreadPoolExecutor(1) as pool:
        long = begin_long(served, pool)
        served.kill_gang("long")
        while not long.done():
            assert ask(served, 1000).status_code == 200
        # It waited for the gang that takes the other's place.
        assert long.result().status_code == 200
    served.wait_until_ready()


@pytest.mark.slow
def test_the_end_of_the_short_prompts_gang_does_a_long_one_no_harm(served: Served) -> None:
    with ThreadPoolExecutor(1) as pool:
        long = begin_long(served, pool)
        served.kill_gang("short")
        assert long.result().status_code == 200
    served.wait_until_ready()
    assert ask(served, 1000).status_code == 200


def test_a_full_queue_of_long_prompts_is_none_of_short_ones(served: Served) -> None:
    with ThreadPoolExecutor(1) as pool, ExitStack() as leaving:
        long = begin_long(served, pool)
        for waiting in (1, 2):
            leaving.enter_context(served.streamed(served.body(LONG)))
            wait_for(lambda n=waiting: served.waiting_for("long") == n, 10, "one more waits")
        assert ask(served, LONG).status_code == 429
        assert ask(served, 1000).status_code == 200
        leaving.close()
        assert long.result().status_code == 200
