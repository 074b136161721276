"""Answers held to a grammar: every token within it, whatever else a request asks for."""

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from longreach.engine.decode.decoder import Decoder
from longreach.engine.decode.detokenizer import TokenBytes
from longreach.engine.decode.grammar import GrammarCompiler, Mask, allowed_tokens
from longreach.engine.decode.sampler import Sampler
from longreach.engine.errors import GrammarError
from longreach.engine.kv.pages import PagePool
from longreach.engine.local import DirectHandOff, LocalPrefill
from longreach.engine.messages import Delta, GenerationRequest, SamplingParameters, Tokens
from longreach.engine.model.pocket import CHECKPOINT
from longreach.lab.pocket.tokenizer import build_tokenizer

VOCAB = 320
END = 256
NO_PROMPT: Tokens = np.empty(0, dtype=np.int32)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TokenBytes(build_tokenizer()), VOCAB, (END,))


def mask_of(tokens: Sequence[int]) -> Mask:
    bits = np.zeros(-(-VOCAB // 32) * 32, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def test_a_mask_is_its_tokens() -> None:
    allowed = allowed_tokens(mask_of([0, 31, 32, 319]), VOCAB)
    assert np.flatnonzero(allowed).tolist() == [0, 31, 32, 319]
    assert allowed.shape == (VOCAB,)


def test_a_constraint_allows_what_its_grammar_does(compiler: GrammarCompiler) -> None:
    constraint = compiler.compile('start: "ab" | "ac" /[0-9]?/')
    seen = []
    for token in b"ac":
        seen.append(np.flatnonzero(allowed_tokens(constraint.allowed(), VOCAB)).tolist())
        constraint.take(token)
    digits = [*range(ord("0"), ord("9") + 1)]
    assert seen == [[ord("a")], [ord("b"), ord("c")]]
    last = np.flatnonzero(allowed_tokens(constraint.allowed(), VOCAB)).tolist()
    assert last == [*digits, END]
    assert not constraint.is_complete
    other = constraint.copy()
    constraint.take(ord("7"))
    assert constraint.is_complete
    assert not other.is_complete
    other.take(END)
    assert other.is_complete


def test_a_mask_may_be_computed_beside_other_work(compiler: GrammarCompiler) -> None:
    constraint = compiler.compile('start: "xy"')
    with ThreadPoolExecutor(1) as executor:
        constraint.compute_ahead(executor)
        constraint.compute_ahead(executor)
        assert np.flatnonzero(allowed_tokens(constraint.allowed(), VOCAB)).tolist() == [ord("x")]
        constraint.take(ord("x"))
        assert np.flatnonzero(allowed_tokens(constraint.allowed(), VOCAB)).tolist() == [ord("y")]


@pytest.mark.parametrize(
    "grammar",
    [
        "start: (",
        "start: /(a/",
        "nothing",
        'start: %json {"type": "strig"}',
        'start: %json {"uniqueItems": true}',
        'start: %json {"$ref": "http://elsewhere/schema"}',
    ],
)
def test_what_does_not_compile_is_an_error(compiler: GrammarCompiler, grammar: str) -> None:
    with pytest.raises(GrammarError) as caught:
        compiler.compile(grammar)
    assert "\n" not in str(caught.value)


def test_a_grammar_that_nothing_matches_is_an_error(compiler: GrammarCompiler) -> None:
    constraint = compiler.compile('start: %json {"$ref": "#"}')
    with pytest.raises(GrammarError):
        constraint.allowed()


def test_forced_text_means_no_control_token(compiler: GrammarCompiler) -> None:
    constraint = compiler.compile('start: "<|im_end|>é"')
    for token in "<|im_end|>é".encode():
        assert np.flatnonzero(allowed_tokens(constraint.allowed(), VOCAB)).tolist() == [token]
        constraint.take(token)
    assert constraint.is_complete


def test_a_model_that_cannot_end_is_held_to_nothing() -> None:
    with pytest.raises(GrammarError):
        GrammarCompiler(TokenBytes(build_tokenizer()), VOCAB, ()).compile('start: "a"')


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "logit_bias": ((7, 100.0),), "presence_penalty": 2.0},
        {"temperature": 1.5},
        {"temperature": 1.0, "top_k": 40},
        {"temperature": 1.0, "top_p": 0.3},
        {"temperature": 1.0, "min_p": 0.9, "repetition_penalty": 2.0},
        {"temperature": 1e-3, "top_k": 1, "frequency_penalty": -2.0},
    ],
)
def test_only_allowed_tokens_are_chosen(sampling: dict) -> None:
    parameters = SamplingParameters(max_tokens=9, **sampling)
    sampler = Sampler(parameters, 0, 0, NO_PROMPT, VOCAB)
    generator = np.random.default_rng(1)
    for _ in range(50):
        logits = generator.normal(size=VOCAB).astype(np.float32) * 5
        before = logits.copy()
        allowed = generator.choice(VOCAB, size=3, replace=False)
        assert sampler.choose(logits, mask_of(allowed.tolist())).token_id in allowed
        assert np.array_equal(logits, before)


def test_log_probabilities_are_the_models_own() -> None:
    logits = np.linspace(-3, 3, VOCAB, dtype=np.float32)
    parameters = SamplingParameters(max_tokens=9, temperature=0.0, top_logprobs=2)
    masked = Sampler(parameters, 0, 0, NO_PROMPT, VOCAB).choose(logits, mask_of([5]))
    free = Sampler(parameters, 0, 0, NO_PROMPT, VOCAB).choose(logits)
    assert masked.token_id == 5
    assert masked.top == free.top
    assert masked.logprob == pytest.approx(free.logprob - float(logits[-1] - logits[5]), abs=1e-4)


def test_tokens_that_cannot_come_at_all_are_damage() -> None:
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[5] = -np.inf
    for temperature in (0.0, 1.0):
        parameters = SamplingParameters(max_tokens=9, temperature=temperature)
        with pytest.raises(FloatingPointError):
            Sampler(parameters, 0, 0, NO_PROMPT, VOCAB).choose(logits, mask_of([5]))


class Engine:
    """The bundled model, whose answers are held to grammars."""

    def __init__(self, max_batch: int = 4) -> None:
        self._prefill = LocalPrefill(CHECKPOINT, 1024)
        pool = PagePool(self._prefill.pool.geometry, 40, torch.device("cpu"))
        token_bytes = TokenBytes(build_tokenizer())
        self.decoder = Decoder(self._prefill.model, pool, token_bytes, max_batch)
        self._requests = 0

    def begin(
        self, prompt: bytes, replayed: tuple[tuple[int, ...], ...] = (), **sampling
    ) -> tuple[str, list]:
        self._requests += 1
        name, values = str(self._requests), {"max_tokens": 40, **sampling}
        ids = np.frombuffer(prompt, dtype=np.uint8).astype(np.int32)
        request = GenerationRequest(name, ids, SamplingParameters(**values), 0.0, replayed)
        self.decoder.reserve(request)
        self._prefill.prefiller.admit(name, ids)
        hand_off = DirectHandOff(self.decoder, name)
        logits = self._prefill.prefiller.run_chunk(name, 0, len(ids), hand_off).logits
        self._prefill.prefiller.release(name)
        assert logits is not None
        return name, self.decoder.start(name, logits.numpy(), self.decoder.prepare(request))

    def finish(self, *begun: tuple[str, list]) -> list[list[tuple[str, str | None]]]:
        """Text and finish reason of each choice of each request."""
        outputs = [output for _, outputs in begun for output in outputs]
        while self.decoder.has_work:
            outputs += self.decoder.step()
        return [self._choices(name, outputs) for name, _ in begun]

    def _choices(self, name: str, outputs: list) -> list[tuple[str, str | None]]:
        texts: dict[int, str] = {}
        reasons: dict[int, str | None] = {}
        for request_id, delta in outputs:
            if request_id == name:
                assert isinstance(delta, Delta), delta
                texts[delta.choice] = texts.get(delta.choice, "") + delta.text
                reasons[delta.choice] = delta.finish_reason
        return [(texts[choice], reasons[choice]) for choice in sorted(texts)]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


def test_answers_match_and_end_by_themselves(engine: Engine) -> None:
    grammar = "start: /[a-c]{3}-[0-9]{2}/"
    held = [
        engine.begin(b"one", grammar=grammar, temperature=0.0),
        engine.begin(b"two", grammar=grammar, temperature=2.0, seed=3, choices=3),
        engine.begin(b"three", grammar=grammar, temperature=1.0, ignore_eos=True),
    ]
    for choices in engine.finish(*held):
        for text, reason in choices:
            assert re.fullmatch("[a-c]{3}-[0-9]{2}", text)
            assert reason == "stop"
    assert engine.decoder.usage == 0


def test_who_is_held_changes_nobody_else(engine: Engine) -> None:
    free = {"temperature": 1.0, "seed": 5, "max_tokens": 12}
    [alone] = engine.finish(engine.begin(b"free", **free))
    both = [engine.begin(b"free", **free), engine.begin(b"held", grammar="start: /[0-9]{9}/")]
    assert engine.finish(*both)[0] == alone


def test_a_seed_gives_the_same_answer(engine: Engine) -> None:
    asked = {"grammar": "start: /[a-z]{12}/", "temperature": 1.5, "seed": 7, "choices": 2}
    first, second = (engine.finish(engine.begin(b"same", **asked))[0] for _ in range(2))
    assert first == second
    assert first[0] != first[1]


def test_an_answer_may_be_cut_off(engine: Engine) -> None:
    [[(text, reason)]] = engine.finish(
        engine.begin(b"long", grammar="start: /[a-b]{50}/", max_tokens=6)
    )
    assert re.fullmatch("[a-b]{6}", text)
    assert reason == "length"


def test_stop_strings_end_it_before_the_grammar_does(engine: Engine) -> None:
    [[(text, reason)]] = engine.finish(
        engine.begin(b"stops", grammar='start: "abcdef"', stop=("cd",))
    )
    assert (text, reason) == ("ab", "stop")


def test_json_is_whole(engine: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["n"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    grammar = f"start: %json {json.dumps(schema)}"
    begun = engine.begin(b"json", grammar=grammar, temperature=1.0, choices=2)
    for text, reason in engine.finish(begun)[0]:
        assert reason == "stop"
        assert 0 <= json.loads(text)["n"] <= 99


def test_a_limit_reached_half_way_ends_one_answer_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = engine.begin(b"free", max_tokens=5, ignore_eos=True)
    # Each step of this expression is a state more, of which there may be none here.
    monkeypatch.setattr("longreach.engine.decode.grammar._MOST_LEXER_STATES", 4)
    held = engine.begin(b"held", grammar="start: /(a|b){30}/", max_tokens=40)
    outputs = [*free[1], *held[1]]
    while engine.decoder.has_work:
        outputs += engine.decoder.step()
    ends = [output for name, output in outputs if name == held[0]]
    assert isinstance(ends[-1], GrammarError)
    assert outputs[-1][0] == free[0]
    assert engine.decoder.usage == 0


def test_a_begun_answer_goes_on_within_its_grammar(engine: Engine) -> None:
    """Tokens that a client has are walked again before anything is chosen."""
    asked = {"grammar": 'start: "x" /[0-9]{6}/ "y"', "temperature": 1.0, "seed": 11}
    [[(whole, _)]] = engine.finish(engine.begin(b"again", **asked))
    had = tuple(whole[:4].encode())
    [[(rest, reason)]] = engine.finish(engine.begin(b"again", replayed=(had,), **asked))
    assert whole[:4] + rest == whole
    assert reason == "stop"
