# pyright: reportMissingImports=false
# vLLM is installed in an environment of its own.
"""By which hashes the pages of long prompts are found, without a server: `make test-vllm`."""

from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from vllm.v1.request import Request

pytestmark = pytest.mark.live

PAGE = 16
TOKENS = list(range(5 * PAGE + 3))


def request(tokens: list[int], salt: str | None = None) -> "Request":
    """As vLLM makes one, its prompt hashed page by page."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(PAGE, sha256)
    return Request("a", tokens, SamplingParams(), None, cache_salt=salt, block_hasher=hasher)


def apart(tokens: list[int], salt: str | None = None) -> list[bytes]:
    """The hashes of a long prompt and of two pages that follow it."""
    from longreach.plugins.vllm.scheduler import keep_apart

    made = request(tokens, salt)
    keep_apart(made)
    made.append_output_token_ids(list(range(2 * PAGE)))
    return list(made.block_hashes)


def test_the_same_prompt_finds_its_pages_and_no_other_does() -> None:
    own = apart(TOKENS)
    assert len(own) == len(set(own)) == 7
    assert apart(TOKENS) == own
    # One token more, or another last one, which no whole page has in it.
    for other in ([*TOKENS, 1], [*TOKENS[:-1], 1], TOKENS[: 2 * PAGE]):
        assert not set(apart(other)) & set(own)
    assert not set(apart(TOKENS, salt="theirs")) & set(own)
    assert not set(request(TOKENS).block_hashes) & set(own)


def test_a_prompt_of_less_than_a_page_is_kept_apart_by_its_salt() -> None:
    """Its first page has generated tokens in it, and another prompt may have those."""
    answered = apart([1, 2, 3])
    assert len(answered) == 2
    assert not set(apart([1, 2, 3, 0])) & set(answered)


def test_no_token_is_hashed_by_pages_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a million that takes some tenths of a second, on the thread that steps."""
    from vllm.v1.core import kv_cache_utils

    from longreach.plugins.vllm.scheduler import keep_apart

    made = request(TOKENS)
    hashed: list[int] = []
    whole = kv_cache_utils.hash_block_tokens
    monkeypatch.setattr(
        kv_cache_utils,
        "hash_block_tokens",
        lambda *given: hashed.append(len(given[2])) or whole(*given),
    )
    keep_apart(made)
    assert hashed == []
    made.append_output_token_ids(np.arange(PAGE).tolist())
    assert hashed == [PAGE]
