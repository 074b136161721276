"""A decode worker of two ranks, from outside: what one says, and what a rank's death costs."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from longreach.engine.decode.decoder import Decoder
from longreach.engine.decode.detokenizer import TokenBytes
from longreach.engine.kv.pages import PagePool
from longreach.engine.local import DirectHandOff, LocalPrefill
from longreach.engine.messages import Delta, GenerationRequest, SamplingParameters, Tokens
from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.text.tokenizer import Tokenizer

from ..conftest import make_prompt, wait_for, wait_until_no_page_is_held
from .conftest import CHUNK_TOKENS, DECODE_RANKS, Served


def answer_of_one(prompt: Tokens, **sampling: Any) -> list[str]:
    """The text of each choice, from one process."""
    local = LocalPrefill(CHECKPOINT, max_tokens=8192)
    pool = PagePool(local.pool.geometry, 128, torch.device("cpu"))
    decoder = Decoder(local.model, pool, TokenBytes(Tokenizer(CHECKPOINT).raw), 4)
    parameters = SamplingParameters(ignore_eos=True, **sampling)
    decoder.reserve(GenerationRequest("a", prompt, parameters, 0.0))
    local.prefiller.admit("a", prompt)
    hand_off, logits = DirectHandOff(decoder, "a"), None
    for start in range(0, len(prompt), CHUNK_TOKENS):
        end = min(start + CHUNK_TOKENS, len(prompt))
        logits = local.prefiller.run_chunk("a", start, end, hand_off).logits
    assert logits is not None
    outputs = decoder.start("a", logits.numpy())
    while decoder.has_work:
        outputs += decoder.step()
    texts = [""] * parameters.choices
    for _, delta in outputs:
        assert isinstance(delta, Delta)
        texts[delta.choice] += delta.text
    return texts


@pytest.mark.parametrize("tokens", [1, 201, 3001])
def test_two_ranks_say_what_one_says(served: Served, tokens: int) -> None:
    """A prompt of the worker's own, and one that comes from a gang; greedy, and two choices."""
    prompt = make_prompt(served.tokenizer, tokens)
    said = served.texts(served.body(tokens, max_tokens=24, ignore_eos=True))
    assert said == answer_of_one(prompt, max_tokens=24, temperature=0.0)
    drawn = {"temperature": 0.8, "seed": 3, "max_tokens": 12}
    said = served.texts(served.body(tokens, ignore_eos=True, n=2, **drawn))
    assert said == answer_of_one(prompt, choices=2, **drawn)
    assert [len(served.pids(actor)) for actor in DECODE_RANKS] == [1, 1]
    wait_until_no_page_is_held(served.http)


@pytest.mark.slow
def test_a_gang_that_dies_has_its_pages_back_from_both_ranks(served: Served) -> None:
    body = served.body(14_000, max_tokens=8, ignore_eos=True)
    total, back = "longreach_prefill_tokens_total", "longreach_prefill_tokens_back_total"
    total_before, back_before = served.counted(total), served.counted(back)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.texts, body)
        wait_for(
            lambda: served.counted(total) - total_before >= 4 * CHUNK_TOKENS, 60, "four chunks"
        )
        served.kill_gang("long")
        said = asked.result()
    assert served.counted(back) - back_before >= 2 * CHUNK_TOKENS
    assert served.texts(body) == said
    wait_until_no_page_is_held(served.http)


@pytest.mark.slow
@pytest.mark.parametrize("actor", DECODE_RANKS)
def test_a_rank_that_dies_in_mid_answer_costs_a_pause(served: Served, actor: str) -> None:
    """It takes the other along; both are replaced, and the text is as if nothing had happened."""
    body = served.body(3001, max_tokens=120, ignore_eos=True)
    undisturbed = served.texts(body)
    before = [served.pids(each) for each in DECODE_RANKS]
    said, killed = "", False
    with served.streamed(body) as pieces:
        for piece in pieces:
            said += piece
            if len(said) > 20 and not killed:
                killed = True
                [pid] = served.pids(actor)
                os.kill(pid, signal.SIGKILL)
    assert killed
    assert [said] == undisturbed
    served.wait_until_ready()
    after = [served.pids(each) for each in DECODE_RANKS]
    assert [len(each) for each in after] == [1, 1]
    assert not {*before[0], *before[1]} & {*after[0], *after[1]}
    wait_until_no_page_is_held(served.http)
