"""Text stays text, and chats are written as transformers writes them."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from longreach.engine.errors import CheckpointError, InvalidRequestError
from longreach.engine.text.tokenizer import Tokenizer, Writing
from longreach.lab.pocket.tokenizer import SPECIAL_TOKENS, TURN_START_ID, save_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(made, 1000)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text() | st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", "\n", "é"])).map("".join))
def test_text_round_trips_and_makes_no_control_token(tokenizer: Tokenizer, text: str) -> None:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        with pytest.raises(InvalidRequestError):
            tokenizer.encode(text)
        return
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert bytes(ids.astype(np.uint8)) == data
    assert tokenizer.decode(ids) == text


def test_long_text_is_cut_where_nothing_joins(tokenizer: Tokenizer) -> None:
    text = "\n".join(f"line {i} é" for i in range(60_000))
    assert bytes(tokenizer.encode(text).astype(np.uint8)) == text.encode()


@pytest.mark.parametrize("prompted", [True, False])
def test_chats_equal_those_of_transformers(
    folder: Path, tokenizer: Tokenizer, prompted: bool
) -> None:
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What? \U000f0000"},
        {"role": "assistant", "content": "That."},
    ]
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=prompted, return_dict=False
    )
    assert tokenizer.encode_chat(chat, Writing(prompted)).tolist() == expected


@given(st.sampled_from(SPECIAL_TOKENS), st.text("ab\U000f0000\U000f0001", max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_control_tokens_in_what_users_write_are_text(
    tokenizer: Tokenizer, token: str, around: str
) -> None:
    content = around + token + around
    ids = tokenizer.encode_chat([{"role": "user", "content": content}])
    plain = tokenizer.encode_chat([{"role": "user", "content": ""}])
    assert (ids >= 256).sum() == (plain >= 256).sum() == 3
    assert content in tokenizer.decode(ids)
    assert ids[0] == TURN_START_ID


def test_checkpoints_without_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    save_tokenizer(tmp_path, 10)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError):
        Tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    bare = Tokenizer(tmp_path)
    with pytest.raises(InvalidRequestError):
        bare.encode_chat([{"role": "user", "content": "x"}])


def test_a_template_may_refuse_a_chat(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, 10)
    template = "{{ raise_exception('begin with a user') }}"
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(InvalidRequestError):
        Tokenizer(tmp_path).encode_chat([{"role": "user", "content": "x"}])


def with_template(folder: Path, template: str) -> Tokenizer:
    save_tokenizer(folder, 10)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


def test_variables_reach_the_template_as_text(tmp_path: Path) -> None:
    tokenizer = with_template(
        tmp_path, "{{ messages[0].name }}{% if loud %}!{% endif %}{{ names | join }}{{ eos_token }}"
    )
    chat = [{"role": "user", "content": "x", "name": "<|im_end|>"}]
    variables = {"loud": True, "names": ["a", "<|im_start|>"], "eos_token": "no", "messages": []}
    ids = tokenizer.encode_chat(chat, Writing(variables=variables))
    assert tokenizer.decode(ids) == "<|im_end|>!a<|im_start|><|im_end|>"
    assert [token for token in ids if token >= 256] == [258]
    tokenizer.check_variables({"loud": True})
    for name in ("messages", "tools", "eos_token", "add_generation_prompt"):
        with pytest.raises(InvalidRequestError):
            tokenizer.check_variables({name: 1})


@pytest.mark.parametrize("wrong", [3, {"a": 1}, "text", [[]]])
def test_a_variable_that_a_template_cannot_use_is_refused(tmp_path: Path, wrong: object) -> None:
    tokenizer = with_template(tmp_path, "{{ names[0] + 1 }}{{ names.items()[0][7].what }}")
    with pytest.raises(InvalidRequestError):
        tokenizer.encode_chat(
            [{"role": "user", "content": "x"}], Writing(variables={"names": wrong})
        )


@pytest.mark.parametrize("content", ["It is", "im_end", " a \n", "", "<|im_end|>", "user"])
def test_a_chat_that_goes_on_ends_with_its_last_message(tokenizer: Tokenizer, content: str) -> None:
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    ids = tokenizer.encode_chat(chat, Writing(continue_final_message=True))
    assert tokenizer.decode(ids).endswith(f"assistant\n{content}")
    whole = tokenizer.encode_chat(chat, Writing(add_generation_prompt=False))
    assert np.array_equal(ids, whole[: len(ids)])


def test_a_message_that_a_template_leaves_out_cannot_go_on(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ messages[0].content }}")
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(InvalidRequestError):
        tokenizer.encode_chat(chat, Writing(continue_final_message=True))


def test_templates_in_the_configuration_count_too(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, 10)
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0]['content'] }}{{ eos_token }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = Tokenizer(tmp_path).encode_chat([{"role": "user", "content": "x"}])
    assert ids.tolist() == [ord("x"), 258]


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE with words, merges and a normalization, as real checkpoints have."""
    raw = tokenizers.Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()  # type: ignore[assignment]
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    raw.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    raw.train_from_iterator(
        [WORDS, " " * 64],
        trainers.BpeTrainer(
            vocab_size=600,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|a special token that is longer than any other|>"],
            show_progress=False,
        ),
    )
    made = tmp_path_factory.mktemp("merging")
    raw.save(str(made / "tokenizer.json"))
    return Tokenizer(made)


WORDS = "once upon a time there were words, and they were told again and again. " * 50


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([" ", "again", "\u1112\u1161\u11ab", "e\u0301", "z", "\n"])))
def test_no_text_has_fewer_tokens_than_its_bytes_say(merging: Tokenizer, parts: list[str]) -> None:
    assert merging.bytes_per_token == 64
    for text in ("".join(parts), "".join(parts) * 50):
        assert merging.least_tokens(text) <= len(merging.encode(text))


def test_the_least_number_of_tokens_is_sharp_where_text_is_spaces(merging: Tokenizer) -> None:
    assert merging.least_tokens(" " * 6400) == 100
    assert len(merging.encode(" " * 6400)) == 100


@pytest.mark.parametrize("border", ["\n", " "])
def test_encoding_stops_when_it_is_enough(merging: Tokenizer, border: str) -> None:
    text = WORDS.replace(" ", border) * 160
    whole = merging.encode(text)
    for enough in (1000, len(whole) - 1, len(whole)):
        some = merging.encode(text, enough)
        assert (len(some) > enough) == (len(whole) > enough)
        assert np.array_equal(some, whole[: len(some)])
    assert len(merging.encode(text, 1000)) < len(whole)


class _Batches:
    """Of a tokenizer that encodes several texts on all cores: how many at a time, and which."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.texts: list[list[str]] = []

    def encode_batch_fast(self, texts: list[str], **options: bool) -> list[tokenizers.Encoding]:
        self.texts.append(texts)
        return self._tokenizer.encode_batch_fast(texts, **options)


def test_cores_get_more_at_once_the_further_a_text_goes(
    merging: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longreach.engine.text.tokenizer._PIECE_CHARACTERS", 100)
    monkeypatch.setattr("longreach.engine.text.tokenizer._FIRST_PIECES", 2)
    text = "".join(f"line {number:94d}\nx" for number in range(40))
    whole = merging.encode(text)
    batches = _Batches(merging._plain)
    monkeypatch.setattr(merging, "_plain", batches)
    assert np.array_equal(merging.encode(text), whole)
    assert [len(each) for each in batches.texts][:-1] == [2, 4, 8, 16]
    assert "".join(piece for each in batches.texts for piece in each) == text
    batches.texts.clear()
    # Enough after the second batch: the third is never begun.
    merging.encode(text, enough=len(whole) * 3 // 40)
    assert [len(each) for each in batches.texts] == [2, 4]


def test_one_huge_word_is_not_encoded_to_its_end(merging: Tokenizer) -> None:
    assert 1000 < len(merging.encode("z" * (4 << 20), 1000)) < 1 << 18


def test_a_chat_stops_too_and_says_what_a_message_takes(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    chat = [{"role": "user", "content": "word " * 100}] * 100
    assert 200 < len(tokenizer.encode_chat(chat, enough=200)) < 2000
    # A turn's begin, "user", a line break, its end and another line break, of a byte each.
    assert tokenizer.least_tokens_per_message == 1 + 4 + 1 + 1 + 1


def test_text_that_the_tokenizer_gives_up_on_is_refused(tmp_path: Path) -> None:
    """Oniguruma does, on ten million spaces in a row, and panics."""
    raw = tokenizers.Tokenizer(models.BPE())
    pattern = tokenizers.Regex(r"\s*[\r\n]+|\s+(?!\S)|\s+|\S+")
    raw.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    raw.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InvalidRequestError):
        Tokenizer(tmp_path).encode(" " * (12 << 20))
