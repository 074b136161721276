"""Text from tokens: characters over several tokens, and stop strings wherever they fall."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from longreach.engine.decode.detokenizer import Detokenizer, TokenBytes
from longreach.engine.errors import CheckpointError, InvalidRequestError
from longreach.lab.pocket.tokenizer import TURN_END_ID, TURN_START_ID, build_tokenizer

TOKEN_BYTES = TokenBytes(build_tokenizer())
"""A token a byte, so that every character above ASCII is split."""


def run(data: bytes, stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    """All text of a run of tokens, and whether a stop string ended it."""
    detokenizer = Detokenizer(TOKEN_BYTES, stop)
    text = ""
    for byte in data:
        text += detokenizer.push(byte)
        if detokenizer.stopped:
            return text, True
    return text + detokenizer.finish(), False


@given(st.text())
def test_the_parts_make_the_whole(text: str) -> None:
    assert run(text.encode(errors="replace"))[0] == text.encode(errors="replace").decode()


@given(st.binary())
def test_broken_bytes_become_replacement_characters(data: bytes) -> None:
    assert run(data)[0] == data.decode(errors="replace")


@given(st.text(alphabet="abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4)))
def test_text_ends_before_the_stop_string_that_is_complete_first(
    text: str, stop: list[str]
) -> None:
    ends = [(text.find(s) + len(s), -len(s)) for s in stop if s in text]
    said, stopped = run(text.encode(), tuple(stop))
    if not ends:
        assert (said, stopped) == (text, False)
        return
    end, length = min(ends)
    assert (said, stopped) == (text[: end + length], True)


def test_nothing_is_said_that_could_begin_a_stop_string() -> None:
    detokenizer = Detokenizer(TOKEN_BYTES, ("END",))
    assert [detokenizer.push(byte) for byte in b"aENx"] == ["a", "", "", "ENx"]
    detokenizer = Detokenizer(TOKEN_BYTES, ("END",))
    assert [detokenizer.push(byte) for byte in b"EN"] == ["", ""]
    assert detokenizer.finish() == "EN"


def test_stop_strings_are_not_looked_for_in_the_first_tokens() -> None:
    detokenizer = Detokenizer(TOKEN_BYTES, ("END",), min_tokens=4)
    assert [detokenizer.push(byte) for byte in b"aEND"] == ["a", "E", "N", "D"]
    assert not detokenizer.stopped
    assert [detokenizer.push(byte) for byte in b"END"] == ["", "", ""]
    assert detokenizer.stopped


def test_a_character_appears_with_its_last_byte() -> None:
    detokenizer = Detokenizer(TOKEN_BYTES)
    assert [detokenizer.push(byte) for byte in "é€".encode()] == ["", "é", "", "", "€"]


def test_control_and_unused_tokens_say_nothing() -> None:
    detokenizer = Detokenizer(TOKEN_BYTES)
    assert [detokenizer.push(token) for token in (TURN_END_ID, 319, 65)] == ["", "", "A"]


def test_control_tokens_may_be_shown_and_stopped_at() -> None:
    detokenizer = Detokenizer(TOKEN_BYTES, ("m_start|>",), shows_control=True)
    tokens = (TURN_END_ID, 319, 65, TURN_START_ID)
    assert "".join(map(detokenizer.push, tokens)) == "<|im_end|>A<|i"
    assert detokenizer.stopped


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(InvalidRequestError):
        Detokenizer(TOKEN_BYTES, ("",))
    other = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    other.decoder = decoders.Metaspace()
    with pytest.raises(CheckpointError):
        TokenBytes(other)
