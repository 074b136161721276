"""Text stays text, and chats are written as transformers writes them."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from longreach.engine.errors import CheckpointError, InvalidRequestError
from longreach.engine.text.tokenizer import Tokenizer
from longreach.lab.pocket.tokenizer import SPECIAL_TOKENS, TURN_START_ID, save_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(made, 1000)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
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
    assert tokenizer.encode_chat(chat, prompted).tolist() == expected


@given(st.sampled_from(SPECIAL_TOKENS), st.text("ab\U000f0000\U000f0001", max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
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
    with pytest.raises(InvalidRequestError, match="begin with a user"):
        Tokenizer(tmp_path).encode_chat([{"role": "user", "content": "x"}])


def test_templates_in_the_configuration_count_too(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, 10)
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0]['content'] }}{{ eos_token }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = Tokenizer(tmp_path).encode_chat([{"role": "user", "content": "x"}])
    assert ids.tolist() == [ord("x"), 258]
