"""A million tokens over two nodes, by NIXL, of which the one that computes dies half-way.

`make check-million` runs this, which takes two cores four minutes.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from longreach.engine.text.tokenizer import Tokenizer
from longreach.lab.evaluation.tasks import NEEDLES

from .conftest import MODEL, wait_for
from .several_nodes import ACTORS, CONFIGURATION, started

pytestmark = pytest.mark.live

PROMPT_TOKENS, CHUNK_TOKENS = 1_000_000, 32_768
SECONDS = 1800.0
NEEDLE = NEEDLES[0]
ROOM = 2**20 + 8192
MILLION = CONFIGURATION | {
    "model": {"path": "pocket", "name": MODEL},
    "limits": {"max_model_len": ROOM, "max_output_tokens": 1024, "max_choices": 1},
    "prefill": {
        **CONFIGURATION["prefill"], "chunk_tokens": CHUNK_TOKENS, "kv_cache_tokens": ROOM,
    },
    "decode": {**CONFIGURATION["decode"], "kv_cache_tokens": ROOM + 8192},
}  # fmt: skip


def test_a_node_that_dies_in_a_million_tokens_costs_a_pause_and_a_chunk(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Another gang, on a node that had nothing to do, reads back what had come."""

    def count(content: str) -> int:
        return len(tokenizer.encode_chat([{"role": "user", "content": content}]))

    prompt = NEEDLE.prompt(PROMPT_TOKENS, 5, None, count)
    body: dict[str, Any] = {
        "model": MODEL, "max_tokens": 48, "temperature": 0,
        "messages": [{"role": "user", "content": prompt.content}],
    }  # fmt: skip
    computed, again = "longreach_prefill_tokens_total", "longreach_prefill_tokens_again_total"
    with started(MILLION, ("ingress", "decode", "prefill", "prefill"), tmp_path) as nodes:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(nodes.ask, body, "chat/completions", SECONDS)
            wait_for(lambda: nodes.counted(computed) >= PROMPT_TOKENS / 2, SECONDS, "half of it")
            nodes.kill("prefill", nodes.where("prefill", ACTORS["prefill"]))
            answer = asked.result(SECONDS)
        assert answer.status_code == 200, answer.text
        assert NEEDLE.score(answer.json()["choices"][0]["message"]["content"], prompt.expected) == 1
        assert nodes.counted(again) <= CHUNK_TOKENS
        total = answer.json()["usage"]["prompt_tokens"]
        assert total <= nodes.counted(computed) <= total + CHUNK_TOKENS
