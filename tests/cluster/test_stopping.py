"""The end of a whole cluster, from outside."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx

from longreach.cluster.app import LocalCluster
from longreach.engine.text.tokenizer import Tokenizer

from .conftest import actor_pids, ask_body, make_prompt, scrape, wait_for

ANSWER_TOKENS = 120
"""Which take long enough for something to happen meanwhile."""
PROMPTS, CHOICES = 4, 8
"""Of the first request; as many answers as are generated at once."""


def test_stopping_lets_accepted_requests_finish_and_leaves_nothing(
    cluster: LocalCluster, http: httpx.Client, tokenizer: Tokenizer
) -> None:
    """The last test of the cluster that all others share, which ends it: files come by name.

    Of two requests, the second waits for pages that the first, of several prompts, holds for
    answers that may be long. A third comes when the cluster stops already.
    """
    eos = tokenizer.raw.token_to_id("<|im_end|>")
    fields = {"max_tokens": 4096, "min_tokens": ANSWER_TOKENS - 1, "n": CHOICES}

    def ask(prompts: int) -> httpx.Response:
        body = ask_body(make_prompt(tokenizer, 600), logit_bias={str(eos): 100}, **fields)
        body["prompt"] = [body["prompt"]] * prompts
        return http.post("/v1/completions", json=body, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, PROMPTS)
        running, waiting = (
            (f"longreach_num_requests_{each}", "decode") for each in ("running", "waiting")
        )
        wait_for(lambda: scrape(http)[running] == PROMPTS, 60, "the first's answers")
        second = pool.submit(ask, 1)
        wait_for(lambda: scrape(http)[waiting] == 1, 30, "the second waiting for pages")
        stopping = threading.Thread(target=cluster.stop)
        stopping.start()
        wait_for(lambda: http.get("/v1/models").status_code != 200, 30, "the end being announced")
        third = ask(1)
        probes = [http.get(path).status_code for path in ("/-/healthz", "/ready")]
        answers = [first.result(), second.result()]
        stopping.join(60)
    for answer, choices in zip(answers, (PROMPTS * CHOICES, CHOICES), strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == choices * ANSWER_TOKENS
    assert (third.status_code, third.json()["error"]["code"]) == (503, "shutting_down")
    assert int(third.headers["retry-after"]) > 0
    assert probes == [200, 503], "the node is well, and takes nothing new"
    assert not stopping.is_alive()
    wait_for(lambda: not actor_pids(""), 10, "no process of Ray's left")
