"""Text and chats to token ids, and back.

Control tokens (those the tokenizer marks as special) come from the chat template alone.
The same characters inside anything a user wrote are text, and become the tokens of that text.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import numpy as np
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders, normalizers, pre_tokenizers

from ..errors import CheckpointError, InvalidRequestError
from ..json_files import read_json
from ..messages import Tokens

# Long text is encoded in pieces, on all cores. Between a line break and an ASCII letter nothing
# joins: not the normalization, not the pattern that splits words, and so no merge. A piece takes a
# core some 13 ms.
_PIECE_CHARACTERS = 1 << 14
_SAFE_BORDER = re.compile(r"\n(?=[A-Za-z])")
# Pieces that are encoded before anybody looks whether that is enough: half a megabyte of text. Then
# twice as many, and so on: there is work for many cores, and what is in vain is these, or about as
# much as was not.
_FIRST_PIECES = 32
# A text without borders is looked at from its beginning before all of it is encoded.
_MOST_WITHOUT_LOOKING = 1 << 19
# Where a text is cut without a border, its last two words may not be words of the whole text.
_UNSURE_WORDS = 2

# The most bytes of text that become one byte by NFC: three Hangul letters become one syllable.
_NFC_SHRINKS = 3
_SAMPLE_MESSAGES = 8
_SAMPLE_TOOL = "sample_tool"

# Stand for control tokens in what users wrote while the template renders it.
_PRIVATE_USE = range(0xF0000, 0xFFFFE)
_PRIVATE_USE_CHARACTER = re.compile("[\U000f0000-\U000ffffd]")


@dataclass(frozen=True)
class Writing:
    """How the chat template writes a chat.

    It ends where the assistant's answer begins, or with `continue_final_message` within the last
    message, which the answer goes on with. `variables` are for the template alone; what they mean
    is up to it. `tools` are those that the model may call, in OpenAI's form.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()


_PLAIN = Writing()
# What templates fail with where a variable is not what they take it for.
_WRONG_VARIABLE = (
    TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError,
)  # fmt: skip
# What a template is told by us, and no client may say otherwise.
_OURS = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
)


class Tokenizer:
    """The tokenizer and the chat template of a checkpoint folder. Safe to use from many threads.

    Encoding a million tokens takes seconds of one core, shares them among all that there are, and
    does not hold Python's lock for most of it; call it off an event loop.

    Raises:
        CheckpointError: a file is missing or malformed, or the tokenizer is not byte-level.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
        source = _template_source(folder, config)
        self._template = None if source is None else _compile_template(folder, source)
        self.info = {**config, "chat_template": source}
        """What the folder's tokenizer_config.json says, and the chat template."""
        self._named_tokens = {
            name: _token_text(config[name])
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if config.get(name) is not None
        }

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id; a model may have more rows than that."""
        return _count_ids(self.raw)

    @cached_property
    def bytes_per_token(self) -> int | None:
        """The most bytes of ASCII text that one token can stand for; None where nothing is known.

        Known of a byte-level vocabulary that has all bytes and drops none: there a token stands for
        as many bytes as it has letters.
        """
        vocabulary = self.raw.get_vocab(with_added_tokens=False)
        added = self.raw.get_added_tokens_decoder().values()
        letters = pre_tokenizers.ByteLevel.alphabet()
        if not _keeps_every_byte(self.raw) or not all(letter in vocabulary for letter in letters):
            return None
        if any(token.lstrip or token.rstrip for token in added):
            return None  # such a token stands for any number of spaces as well
        return max(
            map(len, [*vocabulary, *(token.content for token in added if not token.special)])
        )

    def least_tokens(self, text: str) -> int:
        """Fewer tokens than this cannot hold the text; known without encoding it."""
        if text.isascii():
            return self.least_tokens_of_bytes(len(text), is_ascii=True)
        return self.least_tokens_of_bytes(len(text.encode("utf-8", "surrogatepass")))

    def least_tokens_of_bytes(self, size: int, is_ascii: bool = False) -> int:
        """As `least_tokens`, for any text of so many bytes of UTF-8."""
        if self.bytes_per_token is None:
            return 0
        shrinks = self.raw.normalizer is not None and not is_ascii
        return -(-size // (self.bytes_per_token * (_NFC_SHRINKS if shrinks else 1)))

    @cached_property
    def least_tokens_per_message(self) -> int:
        """Tokens that the chat template writes around every message, at least 1."""
        around = map(self._tokens_around, (("user",), ("assistant",), ("user", "assistant")))
        return max(min((tokens for tokens in around if tokens is not None), default=1), 1)

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the chat template tells the model of tools."""
        chat = [{"role": "user", "content": "a"}]
        tool = {"type": "function", "function": {"name": _SAMPLE_TOOL, "parameters": {}}}
        try:
            return _SAMPLE_TOOL in self._render(chat, Writing(tools=[tool]))
        except InvalidRequestError:
            return False

    def _tokens_around(self, roles: Sequence[str]) -> int | None:
        """Around each message of a chat in which these take turns; None where it may not be."""
        sample = [
            {"role": roles[i % len(roles)], "content": "a"} for i in range(2 * _SAMPLE_MESSAGES)
        ]
        try:
            half, whole = self.encode_chat(sample[:_SAMPLE_MESSAGES]), self.encode_chat(sample)
        except InvalidRequestError:
            return None
        return (len(whole) - len(half)) // _SAMPLE_MESSAGES - 1

    def encode(self, text: str, enough: int | None = None) -> Tokens:
        """Ids of ordinary text, int32 [tokens]; no control token comes out of it.

        Args:
            enough: encode no further once there are more tokens than this. The answer may then be
                of the text's beginning alone, and is longer than `enough` in any case.

        Raises:
            InvalidRequestError: the text holds lone surrogates, which are no characters.
        """
        return _join(self._encode_plain(text, enough))

    def encode_with_control(self, text: str, enough: int | None = None) -> Tokens:
        """As `encode`, but what is written as a control token becomes one."""
        return self._encode_parts(text, {}, enough)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        writing: Writing = _PLAIN,
        enough: int | None = None,
    ) -> Tokens:
        """Ids of a chat as the template writes it, int32 [tokens].

        Args:
            messages: `role`, `content` and what else the template knows of each.
            writing: where the chat ends, and what else the template is told.
            enough: as in `encode`.

        Raises:
            InvalidRequestError: the checkpoint has no template, or the template refuses the chat.
        """
        given = (messages, writing.variables, writing.tools)
        texts = list(texts_in(given))
        free = _unused_characters(texts)
        marks = self._marks_for(texts, free)
        marked, variables, tools = with_texts(given, lambda text: _replace(text, marks))
        end = _one_of(free) if writing.continue_final_message else ""
        marked[-1]["content"] += end
        text = self._render(marked, replace(writing, variables=variables, tools=tools))
        if end:
            text = _up_to(text, end)
        return self._encode_parts(text, {mark: token for token, mark in marks.items()}, enough)

    def _encode_parts(
        self, text: str, original: Mapping[str, str], enough: int | None = None
    ) -> Tokens:
        """Ids of text with control tokens, and with marks for others that are text."""
        parts: list[Tokens] = []
        room = enough
        # Splitting by a pattern with a group gives text, token, text, token, ..., text.
        for index, part in enumerate(self._control.split(text)):
            if index % 2:
                more = [np.array([self._special[part]], dtype=np.int32)]
            else:
                more = self._encode_plain(_replace(part, original), room)
            parts.extend(more)
            if room is not None:
                room -= sum(map(len, more))
                if room < 0:
                    break
        return _join(parts)

    def decode(self, ids: Sequence[int] | Tokens) -> str:
        """The text of token ids, control tokens included."""
        return self.raw.decode([int(token) for token in ids], skip_special_tokens=False)

    def _encode_plain(self, text: str, enough: int | None = None) -> list[Tokens]:
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text is not valid Unicode: a lone surrogate at character {error.start}"
            ) from error
        encoded: list[Tokens] = []
        room = enough
        pieces, at_once = _pieces(text), _FIRST_PIECES
        while batch := list(islice(pieces, at_once)):
            for piece in batch:
                if room is not None and len(piece) > _MOST_WITHOUT_LOOKING:
                    beginning = self._more_than(piece, room)
                    if beginning is not None:
                        return [*encoded, beginning]
            # The batch call is the one that lets other Python threads run meanwhile.
            encodings = _or_refused(self._plain.encode_batch_fast, batch)
            more = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
            encoded.extend(more)
            if room is not None:
                room -= sum(map(len, more))
                if room < 0:
                    break
            at_once *= 2
        return encoded

    def _more_than(self, text: str, enough: int) -> Tokens | None:
        """Ids of the beginning of a text where that alone has more than `enough`, else None.

        Words are found from left to right, so all words of a beginning but the last ones are words
        of the whole, and a word is encoded by itself. Inside of one huge word nothing is certain;
        but merges are local, so twice as many tokens as are enough do not become half as many.
        """
        length = _MOST_WITHOUT_LOOKING // 8
        while length < len(text):
            [encoding] = _or_refused(self._plain.encode_batch, [text[:length]])
            ids = np.array(encoding.ids, dtype=np.int32)
            words = np.array(encoding.word_ids, dtype=np.int64)
            sure = int(np.searchsorted(words, words[-1] + 1 - _UNSURE_WORDS)) if len(words) else 0
            if sure > enough:
                return ids[:sure]
            if len(ids) > 2 * enough:
                return ids
            length *= 2
        return None

    def _marks_for(self, texts: Iterable[str], free: Iterator[str]) -> dict[str, str]:
        """A character that occurs in no text for each control token that does."""
        found = {token for text in texts for token in self._control.findall(text)}
        return {token: _one_of(free) for token in sorted(found, key=len, reverse=True)}

    def check_variables(self, variables: Mapping[str, Any]) -> None:
        """Refuse what the template is told by us.

        Raises:
            InvalidRequestError: with the variable's name.
        """
        taken = [name for name in variables if name in _OURS or name in self._named_tokens]
        if taken:
            raise InvalidRequestError(
                f"the chat template's variable '{taken[0]}' is not for clients to set; leave it out"
            )

    def _render(self, messages: Sequence[Mapping[str, Any]], writing: Writing) -> str:
        if self._template is None:
            raise InvalidRequestError(
                "this model has no chat template; use /v1/completions, or add a "
                "chat_template.jinja to its folder"
            )
        ends_open = writing.continue_final_message
        try:
            ours = {
                "messages": messages,
                "add_generation_prompt": writing.add_generation_prompt and not ends_open,
                "tools": writing.tools or None,
                "documents": None,
                **self._named_tokens,
            }
            return self._template.render({**writing.variables, **ours})
        except jinja2.TemplateError as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error.message}"
            ) from error
        except _WRONG_VARIABLE as error:
            raise InvalidRequestError(
                f"the model's chat template fails on these messages and variables: {error}"
            ) from error


def count_ids(folder: Path) -> int:
    """`Tokenizer.vocab_size` of a checkpoint folder, without what texts and chats need.

    Raises:
        CheckpointError: as `Tokenizer`.
    """
    return _count_ids(_load(folder / "tokenizer.json"))


def _count_ids(tokenizer: tokenizers.Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a value of JSON, names of objects' members included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, member in value.items():
            yield name
            yield from texts_in(member)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from texts_in(member)


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same value of JSON, with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(name): with_texts(member, change) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [with_texts(member, change) for member in value]
    return value


def _unused_characters(texts: Iterable[str]) -> Iterator[str]:
    """Of private use, and in none of the texts."""
    taken = {found for text in texts for found in _PRIVATE_USE_CHARACTER.findall(text)}
    return (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)


def _one_of(free: Iterator[str]) -> str:
    character = next(free, None)
    if character is None:
        raise InvalidRequestError("the messages use up all private-use characters of Unicode")
    return character


def _up_to(chat: str, end: str) -> str:
    """A chat as far as a character that stands where its last message's content ends."""
    found = chat.rfind(end)
    if found < 0:
        raise InvalidRequestError(
            "the last message cannot be continued: the chat template leaves it out"
        )
    return chat[:found]


def _replace(text: str, replacements: Mapping[str, str]) -> str:
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


def _join(parts: Sequence[Tokens]) -> Tokens:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)


def _or_refused(
    encode: Callable[..., list[tokenizers.Encoding]], texts: list[str]
) -> list[tokenizers.Encoding]:
    """What `encode` says of the texts.

    Raises:
        InvalidRequestError: it gave up, as it does on some ten million spaces in a row.
    """
    try:
        return encode(texts, add_special_tokens=False)
    except BaseException as error:
        # A panic in Rust is no Exception, and its type is not exported.
        if type(error).__name__ != "PanicException":
            raise
        raise InvalidRequestError(
            f"the tokenizer cannot split this text into words: {error}"
        ) from None


def _keeps_every_byte(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether nothing of a text is lost before its words are encoded."""
    if not isinstance(tokenizer.normalizer, normalizers.NFC | None):
        return False
    state = json.loads(tokenizer.to_str())
    steps = state["pre_tokenizer"] or {}
    return all(
        step["type"] in ("ByteLevel", "Digits") or step.get("behavior", "Removed") != "Removed"
        for step in steps.get("pretokenizers", [steps])
        if step
    )


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


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.exists() else config.get("chat_template")
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{folder}: several chat templates; put one in chat_template.jinja")
    return source


def _compile_template(folder: Path, source: str) -> jinja2.Template:
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
