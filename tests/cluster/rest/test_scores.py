"""What harnesses ask for: log-probabilities of prompts, many prompts, no answer."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path

import numpy as np
import pytest
import torch

from longreach.cluster.rest.generation import Generation
from longreach.cluster.rest.plan import Plan
from longreach.engine.errors import QueueFullError
from longreach.engine.local import LocalPrefill
from longreach.engine.messages import Event, Finished, GenerationRequest, SamplingParameters
from longreach.engine.model.pocket import CHECKPOINT
from longreach.lab.pocket.tokenizer import TURN_END_ID, TURN_START_ID

from .backend import TIMINGS, Endpoint
from .engine_backend import EngineEndpoint

TEXT = "The golden vault holds the sun."


@pytest.fixture(scope="module")
def engine() -> EngineEndpoint:
    return EngineEndpoint()


def expected(text: str) -> np.ndarray:
    """Log-probabilities of a text's bytes from the second on, each computed by itself."""
    prefill, ids = LocalPrefill(CHECKPOINT, 256), np.frombuffer(text.encode(), np.uint8)
    prompt = ids.astype(np.int32)
    rows = [torch.log_softmax(prefill.logits(prompt[:end]), 0) for end in range(1, len(prompt))]
    return np.array([float(row[token]) for row, token in zip(rows, prompt[1:], strict=True)])


def test_a_text_is_scored_without_an_answer(engine: EngineEndpoint) -> None:
    answer = engine.complete(prompt=TEXT, echo=True, logprobs=2, max_tokens=0, temperature=0).json()
    [choice] = answer["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == TEXT
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert logprobs["tokens"] == list(TEXT)
    assert logprobs["text_offset"] == list(range(len(TEXT)))
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(expected(TEXT), abs=1e-3)
    for token, own, top in zip(
        logprobs["tokens"][1:], logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:],
        strict=True,
    ):  # fmt: skip
        assert top[token] == own
        assert max(top.values()) >= own
        assert len(top) in (2, 3)


def test_a_field_of_their_own_has_ranks(engine: EngineEndpoint) -> None:
    whole = engine.complete(prompt=TEXT, prompt_logprobs=1, max_tokens=1, temperature=0).json()
    [choice] = whole["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert len(choice["text"]) == 1
    for letter, scores in zip(TEXT[1:], others, strict=True):
        own = scores[str(ord(letter))]
        assert own["decoded_token"] == letter
        is_best = own["logprob"] == max(each["logprob"] for each in scores.values())
        assert (own["rank"] == 1) == is_best
    chat = engine.chat(prompt_logprobs=0, max_tokens=1).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


def test_the_likelier_of_two_ends_is_told(engine: EngineEndpoint) -> None:
    """As a harness compares them: several prompts of token ids, the sum over the end."""
    begin = "The golden vault holds the"
    ends = [" second singer.", "qzx%%vv#k~QQ@@}"]
    prompts = [list((begin + end).encode()) for end in ends]
    answer = engine.complete(prompt=prompts, echo=True, logprobs=1, max_tokens=0).json()
    sums = [sum(choice["logprobs"]["token_logprobs"][len(begin) :]) for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert sums[0] > sums[1]


def test_a_streamed_echo_comes_first(endpoint: Endpoint) -> None:
    stream = endpoint.complete(prompt=["ab", "cd"], echo=True, logprobs=1, n=2, stream=True).text
    texts: dict[int, str] = {}
    tokens: dict[int, list[str]] = {}
    for line in stream.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                index = choice["index"]
                texts[index] = texts.get(index, "") + choice["text"]
                tokens[index] = tokens.get(index, []) + choice["logprobs"]["tokens"]
    assert texts == {0: "abYes.", 1: "abYes.", 2: "cdYes.", 3: "cdYes."}
    assert all("".join(tokens[index]) == text for index, text in texts.items())


def test_control_tokens_are_in_the_text_where_they_are_asked_for(engine: EngineEndpoint) -> None:
    forced = {"logit_bias": {str(TURN_START_ID): 100}, "temperature": 0, "max_tokens": 3}
    shown, left_out = (
        engine.complete(**forced, logprobs=0, skip_special_tokens=skips).json()["choices"][0]
        for skips in (False, True)
    )
    assert shown["text"] == 3 * "<|im_start|>"
    assert shown["logprobs"]["text_offset"] == [0, 12, 24]
    assert left_out["text"] == ""
    assert left_out["logprobs"]["text_offset"] == [0, 0, 0]
    [chat] = engine.chat(**forced, logprobs=True, skip_special_tokens=False).json()["choices"]
    assert chat["message"]["content"] == shown["text"]
    assert bytes(chat["logprobs"]["content"][0]["bytes"]) == b"<|im_start|>"


@pytest.mark.parametrize(("goes_on", "text"), [(False, ""), (True, 2 * "<|im_end|>")])
def test_the_control_token_that_ends_an_answer_is_no_part_of_it(
    engine: EngineEndpoint, goes_on: bool, text: str
) -> None:
    forced = {"logit_bias": {str(TURN_END_ID): 100}, "temperature": 0, "max_tokens": 2}
    answer = engine.complete(**forced, skip_special_tokens=False, ignore_eos=goes_on).json()
    assert answer["choices"][0]["text"] == text


def test_an_echo_has_the_control_tokens_of_the_prompt(endpoint: Endpoint) -> None:
    prompt = [TURN_START_ID, *b"ab", TURN_END_ID]
    fields = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0}
    [choice] = endpoint.complete(**fields).json()["choices"]
    assert choice["text"] == "<|im_start|>ab<|im_end|>"
    assert choice["logprobs"]["text_offset"] == [0, 12, 13, 14]
    fields = {"prompt": "<|im_start|>ab", "echo": True, "parse_special": True}
    [choice] = endpoint.complete(**fields).json()["choices"]
    assert choice["text"] == "<|im_start|>abYes."


def test_an_echo_without_log_probabilities_costs_none(endpoint: Endpoint) -> None:
    [choice] = endpoint.complete(prompt="ab", echo=True).json()["choices"]
    assert choice["text"] == "abYes."
    assert endpoint.backend.requests[0].sampling.prompt_logprobs is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a"] * 7}, "prompt"),
        ({"prompt": [[65] * 40] * 2, "prompt_logprobs": 0}, "prompt"),
        ({"prompt": [[65] * 65], "echo": True, "logprobs": 0}, "prompt"),
        ({"prompt_logprobs": 6}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
)
def test_what_is_too_much_is_refused(endpoint: Endpoint, fields: dict, param: str) -> None:
    answer = endpoint.complete(**fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_control_tokens_in_prompts_when_asked_for(endpoint: Endpoint) -> None:
    for special, expected_ids in ((True, [257, 97]), (False, list(b"<|im_start|>a"))):
        endpoint.complete(prompt="<|im_start|>a", parse_special=special)
        assert endpoint.backend.requests[-1].prompt.tolist() == expected_ids


def test_what_the_tokenizer_says(endpoint: Endpoint) -> None:
    info = endpoint.request("GET", "/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in info["chat_template"]


class Crowded:
    """Takes two at a time; of more it says that its queue is full."""

    def __init__(self) -> None:
        self.under_way = self.most = self.refused = 0
        self.names: list[str] = []

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.names.append(request.request_id)
        if self.under_way == 2:
            self.refused += 1
            raise QueueFullError(2)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0.001)
        self.under_way -= 1
        yield Finished(1, 0, TIMINGS)

    async def ready(self) -> bool:
        return True


def test_many_prompts_wait_within_their_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a queue that others fill in between end it."""
    monkeypatch.setattr("longreach.cluster.rest.generation._NEXT_TRY_SECONDS", 0.001)
    backend, prompt = Crowded(), np.zeros(1, dtype=np.int32)
    requests = tuple(
        GenerationRequest(str(index), prompt, SamplingParameters(1), 0.0) for index in range(200)
    )
    plan = Plan("a", "b", 0.0, requests, 1, False, False, False, False, None, None)

    async def run() -> int:
        finished = 0
        async with Generation(backend, plan) as generation:
            while not generation.done:
                finished += await generation.next() is not None
        return finished

    backend.under_way = 2  # of others
    with pytest.raises(QueueFullError):  # for the first
        asyncio.run(run())
    backend.under_way = 0
    backend.names.clear()
    # Four come at once, and two are let in.
    assert asyncio.run(run()) == 200
    assert backend.refused > 2
    assert len(set(backend.names)) == len(backend.names)
    assert backend.most == 2


def test_a_queue_that_is_full_from_the_beginning_refuses(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path)
    endpoint.backend.error = QueueFullError(3)
    assert endpoint.complete(prompt=["a", "b"]).status_code == 429
