"""Gangs, decode workers and the ingress on nodes of their own, of which one dies in mid-prompt.

`make check-nodes` runs this.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from longreach.engine.text.tokenizer import Tokenizer

from .conftest import ask_body, make_prompt, wait_for
from .several_nodes import ACTORS, CHUNK_TOKENS, CONFIGURATION, SECONDS, Nodes, started

pytestmark = pytest.mark.live

PROMPT_TOKENS = 20_000


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    labels = ("ingress", "decode", "decode", "prefill", "prefill")
    with started(CONFIGURATION, labels, tmp_path_factory.mktemp("several")) as nodes:
        yield nodes


@pytest.mark.parametrize("label", ACTORS)
def test_a_node_that_dies_in_mid_prompt_costs_a_pause_and_a_chunk(
    nodes: Nodes, tokenizer: Tokenizer, label: str
) -> None:
    computed, again = "longreach_prefill_tokens_total", "longreach_prefill_tokens_again_total"
    body = ask_body(make_prompt(tokenizer, PROMPT_TOKENS), temperature=0.8, seed=5, max_tokens=8)
    undisturbed = nodes.ask(body)
    assert undisturbed.status_code == 200, undisturbed.text
    tokens_before, again_before = nodes.counted(computed), nodes.counted(again)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(nodes.ask, body)
        wait_for(
            lambda: nodes.counted(computed) - tokens_before >= 8 * CHUNK_TOKENS,
            SECONDS, "eight chunks",
        )  # fmt: skip
        nodes.kill(label, nodes.where(label, ACTORS[label]))
        answer = asked.result(SECONDS)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == undisturbed.json()["choices"]
    assert nodes.counted(again) - again_before <= CHUNK_TOKENS
    assert nodes.counted(computed) - tokens_before <= PROMPT_TOKENS + CHUNK_TOKENS
