"""The end of a whole cluster, from outside."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx

from longreach.cluster.app import LocalCluster
from longreach.engine.text.tokenizer import Tokenizer

from .conftest import LONG, actor_pids, ask_body, computed, make_prompt, scrape, wait_for


def test_stopping_lets_accepted_requests_finish_and_leaves_nothing(
    cluster: LocalCluster, http: httpx.Client, tokenizer: Tokenizer
) -> None:
    """The last test of the cluster that all others share, which ends it: files come by name.

    Of two requests, the second waits for pages that the first holds for its long answers. A third
    comes when the cluster stops already.
    """
    eos = tokenizer.raw.token_to_id("<|im_end|>")

    def ask(tokens: int) -> httpx.Response:
        fields = {"max_tokens": 4096, "n": 8, "logit_bias": {str(eos): 100}}
        body = ask_body(make_prompt(tokenizer, tokens), **fields)
        return http.post("/v1/completions", json=body, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, LONG)
        wait_for(lambda: computed(http) > 0, 30, "the first chunk")
        second = pool.submit(ask, 40_000)
        waiting = ("longreach_num_requests_waiting", "decode")
        wait_for(lambda: scrape(http)[waiting] == 1, 30, "the second waiting for pages")
        stopping = threading.Thread(target=cluster.stop)
        stopping.start()
        wait_for(lambda: http.get("/v1/models").status_code != 200, 30, "the end being announced")
        third = ask(100)
        probes = [http.get(path).status_code for path in ("/-/healthz", "/ready")]
        answers = [first.result(), second.result()]
        stopping.join(60)
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 8
    assert (third.status_code, third.json()["error"]["code"]) == (503, "shutting_down")
    assert int(third.headers["retry-after"]) > 0
    assert probes == [200, 503], "the node is well, and takes nothing new"
    assert not stopping.is_alive()
    wait_for(lambda: not actor_pids(""), 10, "no process of Ray's left")
