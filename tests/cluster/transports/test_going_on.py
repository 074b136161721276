"""A prompt that goes on after a death, by every transport: behind what has been computed.

What is taken over must be what was computed, so logits and tokens are compared bit for bit.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from longreach.engine.errors import TransferError, UnavailableError
from longreach.engine.kv.hand_off import Place

from .pair import CHUNK_TOKENS, Pair, chunks_of, make_prompt, replace_ray, settings_of

PROMPT = make_prompt(2301)
TRANSPORTS = ("object_store", "cuda_ipc", "nixl")


@pytest.fixture(params=[(t, k) for t in TRANSPORTS for k in ("auto", "fp8_e4m3")], ids="-".join)
def pair(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Pair]:
    replace_ray(monkeypatch)
    made = Pair(settings_of(*request.param), tmp_path)
    yield made
    made.end()


def undisturbed(pair: Pair) -> tuple[np.ndarray, list[int]]:
    """What the prompt's logits are, and what is answered, where nobody dies."""
    pair.reserve("undisturbed", PROMPT)
    logits, failure = pair.prefill("undisturbed", PROMPT)
    assert failure is None
    assert logits is not None
    return logits, pair.answer("undisturbed", logits)


def test_another_gang_goes_on_behind_what_the_worker_has(pair: Pair) -> None:
    expected, tokens = undisturbed(pair)
    pair.reserve("a", PROMPT)
    _, failure = pair.compute("a", PROMPT, range(2))
    assert failure is None
    assert pair.rank.flush("a") is None
    pair.rank._prefiller._pool.clear()  # whoever died has nothing any more
    assert pair.go_on("a") == 2 * CHUNK_TOKENS
    another = pair.another_rank()
    logits, failure = pair.compute("a", PROMPT, chunks_of(PROMPT), another, back=2)
    assert failure is None
    assert another.flush("a") is None
    np.testing.assert_array_equal(logits, expected)
    assert logits is not None
    assert pair.answer("a", logits) == tokens


def test_only_whole_pages_count_and_those_that_came_twice_count_once(pair: Pair) -> None:
    pair.reserve("a", PROMPT)
    assert pair.go_on("a") == 0
    engine = pair.worker._engine
    geometry = engine.pool.geometry
    for layer in range(geometry.num_layers):
        for head in range(geometry.num_kv_heads):
            page = engine.pool.layer(layer).heads(head, 1).at(slice(0, 1))
            assert engine.complete_tokens("a") == 0
            engine.receive("a", Place(layer, 0, head), page)
            engine.receive("a", Place(layer, 0, head), page)
    assert engine.complete_tokens("a") == 128


def test_nothing_of_a_gang_that_was_given_up_comes_any_more(pair: Pair) -> None:
    """It may live, and use its pages for others by then."""
    pair.reserve("a", PROMPT)
    pair.compute("a", PROMPT, range(1))
    assert pair.rank.flush("a") is None
    assert pair.go_on("a") == CHUNK_TOKENS
    pair.compute("a", PROMPT, range(1, 2), is_there=True)
    failure = pair.rank.flush("a")
    assert failure is not None
    assert "goes on with another gang" in failure
    assert pair.go_on("a") == CHUNK_TOKENS


def test_another_worker_gets_pages_that_the_gang_has(pair: Pair, tmp_path: Path) -> None:
    expected, tokens = undisturbed(pair)
    pair.reserve("a", PROMPT)
    pair.compute("a", PROMPT, range(3))
    another = pair.another_worker(tmp_path / "another")
    pair.reserve("b", PROMPT, another)
    pair.rank.come_back("a", "b", pair.destinations["b"], 2 * CHUNK_TOKENS)
    # The third chunk is computed again.
    logits, failure = pair.compute("b", PROMPT, range(2, 4), is_there=True)
    assert failure is None
    assert pair.rank.flush("b") is None
    np.testing.assert_array_equal(logits, expected)
    assert logits is not None
    assert pair.answer("b", logits, another) == tokens
    pair.rank.release("b")
    assert pair.rank._prefiller._pool.num_free == pair.rank._prefiller._pool.num_pages


def test_pages_of_a_request_that_is_over_do_not_come_back(pair: Pair) -> None:
    pair.reserve("a", PROMPT)
    pair.compute("a", PROMPT, range(1))
    assert pair.rank.flush("a") is None
    pair.go_on("a")
    pair.loop.run(pair.worker.release("a"))
    _, failure = pair.compute("a", PROMPT, range(2), pair.another_rank(), back=1)
    assert failure is not None
    with pytest.raises(UnavailableError):
        pair.go_on("a")
    with pytest.raises(TransferError):
        pair.worker._engine.complete_tokens("a")
