"""Text and chats to token ids, and back.

Control tokens (those the tokenizer marks as special) come from the chat template alone.
The same characters inside anything a user wrote are text, and become the tokens of that text.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import numpy as np
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders

from ..errors import CheckpointError, InvalidRequestError
from ..json_files import read_json
from ..messages import Tokens

# Long text is encoded in pieces, on all cores. Between a line break and an ASCII letter nothing
# joins: not the normalization, not the pattern that splits words, and so no merge.
_PIECE_CHARACTERS = 1 << 16
_SAFE_BORDER = re.compile(r"\n(?=[A-Za-z])")

# Stand for control tokens in what users wrote while the template renders it.
_PRIVATE_USE = range(0xF0000, 0xFFFFE)
_PRIVATE_USE_CHARACTER = re.compile("[\U000f0000-\U000ffffd]")


class Tokenizer:
    """The tokenizer and the chat template of a checkpoint folder. Safe to use from many threads.

    Encoding a million tokens takes a second or two and does not hold Python's lock for most of
    it; call it off an event loop.

    Raises:
        CheckpointError: a file is missing or malformed, or the tokenizer is not byte-level.
    """

    def __init__(self, folder: Path) -> None:
        self.raw = _load(folder / "tokenizer.json")
        """With control tokens recognized in text; for whoever needs the vocabulary."""
        self._plain = tokenizers.Tokenizer.from_str(self.raw.to_str())
        self._plain.encode_special_tokens = True
        self._special = {
            token.content: token_id
            for token_id, token in self.raw.get_added_tokens_decoder().items()
            if token.special
        }
        longest_first = sorted(self._special, key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        config = _read_tokenizer_config(folder)
        self._template = _compile_template(folder, config)
        self._named_tokens = {
            name: _token_text(config[name])
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if config.get(name) is not None
        }

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id; a model may have more rows than that."""
        return _count_ids(self.raw)

    def encode(self, text: str) -> Tokens:
        """Ids of ordinary text, int32 [tokens]; no control token comes out of it.

        Raises:
            InvalidRequestError: the text holds lone surrogates, which are no characters.
        """
        return _join(self._encode_plain(text))

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> Tokens:
        """Ids of a chat as the template writes it, int32 [tokens].

        Args:
            messages: `role` and `content` of each.
            add_generation_prompt: whether to end where the assistant's answer begins.

        Raises:
            InvalidRequestError: the checkpoint has no template, or the template refuses the chat.
        """
        marks = self._marks_for([message["content"] for message in messages])
        marked = [
            {**message, "content": _replace(message["content"], marks)} for message in messages
        ]
        text = self._render(marked, add_generation_prompt)
        original = {mark: token for token, mark in marks.items()}
        parts: list[Tokens] = []
        # Splitting by a pattern with a group gives text, token, text, token, ..., text.
        for index, part in enumerate(self._control.split(text)):
            if index % 2:
                parts.append(np.array([self._special[part]], dtype=np.int32))
            else:
                parts.extend(self._encode_plain(_replace(part, original)))
        return _join(parts)

    def decode(self, ids: Sequence[int] | Tokens) -> str:
        """The text of token ids, control tokens included."""
        return self.raw.decode([int(token) for token in ids], skip_special_tokens=False)

    def _encode_plain(self, text: str) -> list[Tokens]:
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text is not valid Unicode: a lone surrogate at character {error.start}"
            ) from error
        pieces = list(_pieces(text))
        # The batch call is the one that lets other Python threads run meanwhile.
        encodings = self._plain.encode_batch_fast(pieces, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _marks_for(self, contents: Sequence[str]) -> dict[str, str]:
        """A character that occurs nowhere in `contents` for each control token that does."""
        found = {token for content in contents for token in self._control.findall(content)}
        if not found:
            return {}
        taken = {mark for content in contents for mark in _PRIVATE_USE_CHARACTER.findall(content)}
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
        marks = dict(zip(sorted(found, key=len, reverse=True), free, strict=False))
        if len(marks) < len(found):
            raise InvalidRequestError("the messages use up all private-use characters of Unicode")
        return marks

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        if self._template is None:
            raise InvalidRequestError(
                "this model has no chat template; use /v1/completions, or add a "
                "chat_template.jinja to its folder"
            )
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._named_tokens,
            )
        except jinja2.TemplateError as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error.message}"
            ) from error


def count_ids(folder: Path) -> int:
    """`Tokenizer.vocab_size` of a checkpoint folder, without what texts and chats need.

    Raises:
        CheckpointError: as `Tokenizer`.
    """
    return _count_ids(_load(folder / "tokenizer.json"))


def _count_ids(tokenizer: tokenizers.Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _replace(text: str, replacements: Mapping[str, str]) -> str:
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


def _join(parts: Sequence[Tokens]) -> Tokens:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        border = _SAFE_BORDER.search(text, start + _PIECE_CHARACTERS)
        end = border.end() if border else len(text)
        yield text[start:end]
        start = end


def _load(path: Path) -> tokenizers.Tokenizer:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; a served checkpoint needs a tokenizer.json")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises plain Exception
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise CheckpointError(
            f"{path}: decoder {type(tokenizer.decoder).__name__} is not supported; "
            "Longreach serves byte-level BPE (ByteLevel)"
        )
    return tokenizer


def _read_tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def _token_text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _compile_template(folder: Path, config: Mapping[str, Any]) -> jinja2.Template | None:
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.exists() else config.get("chat_template")
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{folder}: several chat templates; put one in chat_template.jinja")
    # Set up as transformers does, which is what templates are written for.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"{folder}: the chat template does not parse: {error}") from error


def _to_json(value: object, indent: int | None = None) -> str:
    """Jinja's own filter escapes HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
