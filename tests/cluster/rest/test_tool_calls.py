"""Calls of tools, out of text that comes in whatever parts."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.cluster.rest.tool_calls import Arguments, CallBegun, Content, Piece, ToolCallReader

ASKED = {"city": "Köln", "n": [1, {"a": "}"}]}
WRITTEN = json.dumps(ASKED, ensure_ascii=False)
ONE = f'<tool_call>\n{{"name": "get", "arguments": {WRITTEN}}}\n</tool_call>'
TWO = '<tool_call>{"name":"put","arguments":{}}</tool_call>'


def read(parts: list[str], one_call: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """Text, and name and arguments of each call."""
    reader = ToolCallReader(one_call)
    pieces: list[Piece] = [piece for part in parts for piece in reader.push(part)]
    pieces += reader.finish()
    text, names, arguments = "", [], []
    for piece in pieces:
        match piece:
            case Content(text=said):
                text += said
            case CallBegun(index=index, name=name):
                assert index == len(names)
                names.append(name)
                arguments.append("")
            case Arguments(index=index, text=more):
                arguments[index] += more
    assert reader.num_calls == len(names)
    return text, list(zip(names, arguments, strict=True))


ANSWERS: dict[str, tuple[str, str, list[tuple[str, Any]]]] = {
    "text alone": ("Hello <b>you</b> \n", "Hello <b>you</b> \n", []),
    "a call": (ONE, "", [("get", ASKED)]),
    "text and a call": (f"Let me see.\n\n{TWO}", "Let me see.", [("put", {})]),
    "calls": (f"{ONE}\n{TWO}\n", "", [("get", ASKED), ("put", {})]),
    "text after": (f"{TWO} Done.", " Done.", [("put", {})]),
    "quotes": (
        '<tool_call>{"name": "f", "arguments": {"a": "\\"}</tool_call>\\\\"}}</tool_call>',
        "",
        [("f", {"a": '"}</tool_call>\\'})],
    ),
    "another order": (
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", {"a": 1})]
    ),
    "arguments as text": (
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", {"a": 1})]
    ),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', "", [("f", {})]),
    "no end": ('<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [("f", {"a": 1})]),
    "no JSON": ("<tool_call>get it</tool_call>!", "<tool_call>get it</tool_call>!", []),
    "no name": ('<tool_call>{"n": 1}</tool_call>', '<tool_call>{"n": 1}</tool_call>', []),
    "nothing more": ("a <tool_call>", "a<tool_call>", []),
    "half a tag": ("a <tool_ca", "a <tool_ca", []),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_read(name: str) -> None:
    answer, text, calls = ANSWERS[name]
    for parts in ([answer], list(answer)):
        said, made = read(parts)
        assert said == text
        assert [(name, json.loads(arguments)) for name, arguments in made] == calls


@settings(max_examples=200)
@given(name=st.sampled_from(sorted(ANSWERS)), data=st.data())
def test_parts_do_not_matter(name: str, data: st.DataObject) -> None:
    answer = ANSWERS[name][0]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=6)))
    parts = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert read(parts) == read([answer])


def test_arguments_come_as_they_are_written() -> None:
    reader = ToolCallReader()
    assert reader.push('<tool_call>{"name": "f", "arg') == []
    [begun, first] = reader.push('uments": {"a": ')
    assert isinstance(begun, CallBegun)
    assert first == Arguments(0, '{"a": ')
    assert reader.push("12") == [Arguments(0, "12")]
    assert reader.push("}}</tool") == [Arguments(0, "}")]
    assert reader.push("_call>") == []


def test_of_one_call_the_rest_is_left_out() -> None:
    assert read([f"{TWO}\n{ONE} more"], one_call=True) == ("", [("put", "{}")])
    other = '<tool_call>{"arguments": {}, "name": "f"}</tool_call>'
    assert read([f"{other} more {ONE}"], one_call=True) == ("", [("f", "{}")])


def test_ids_differ() -> None:
    reader = ToolCallReader()
    ids = [piece.id for piece in reader.push(TWO + TWO) if isinstance(piece, CallBegun)]
    assert len(set(ids)) == 2
