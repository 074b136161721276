"""Prompts: their length, where their facts lie, and how answers to them are scored."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.engine.errors import InvalidRequestError
from longreach.lab.evaluation.ruler import RULER, string_match_all
from longreach.lab.evaluation.tasks import NEEDLES, Prompt, says_it

TASKS = {task.name: task for task in (*NEEDLES, *RULER)}
DEPTHS = st.floats(0, 1)
SEEDS = st.integers(0, 10**6)


def count_bytes(content: str) -> int:
    return 25 + len(content.encode())


def count_words(content: str) -> int:
    """Like byte pairs: words are tokens, and long ones two."""
    return 7 + sum(1 + len(word) // 6 for word in re.findall(r"\w+|[^\w\s]", content))


@given(depth=DEPTHS, seed=SEEDS, tokens=st.integers(2000, 9000))
@settings(max_examples=25)
@pytest.mark.parametrize("name", ["pass-key", "key-value"])
def test_a_fact_lies_once_where_it_was_asked_for(name: str, depth: float, seed, tokens) -> None:
    prompt = TASKS[name].prompt(tokens, seed, depth, count_bytes)
    document, question = prompt.content.rsplit("\n", 1)
    [expected] = prompt.expected
    key = "pass key" if name == "pass-key" else question.removeprefix("What is the ")[:-1]
    fact = re.search(rf"[Tt]he {re.escape(key)} is {re.escape(expected)}\. ", document)
    assert fact is not None
    assert len(re.findall(f"he {re.escape(key)} is ", document)) == 1
    said_twice = f"Remember it. {expected} is the pass key. "
    assert document.replace(said_twice, "").count(expected) == 1
    # Other facts lie around it, and one piece of text may be a few lines long.
    assert fact.start() / len(document) == pytest.approx(depth, abs=800 / len(document))


@given(seed=SEEDS, tokens=st.integers(1500, 9000))
@settings(max_examples=20)
@pytest.mark.parametrize("name", [task.name for task in NEEDLES])
def test_needles_are_exactly_as_long_as_asked(name: str, seed: int, tokens: int) -> None:
    prompt = TASKS[name].prompt(tokens, seed, None, count_bytes)
    assert count_bytes(prompt.content) == tokens
    assert prompt.expected[0] in prompt.content
    assert TASKS[name].prompt(tokens, seed, None, count_bytes) == prompt


@given(seed=SEEDS)
@settings(max_examples=5)
@pytest.mark.parametrize("count", [count_bytes, count_words])
@pytest.mark.parametrize("name", [task.name for task in RULER])
def test_rulers_prompts_fill_their_length(name: str, count, seed: int) -> None:
    tokens = 9000
    prompt = TASKS[name].prompt(tokens, seed, None, count)
    assert tokens - 130 < count(prompt.content) <= tokens
    assert all(each.lower() in prompt.content.lower() for each in prompt.expected)
    assert TASKS[name].prompt(tokens, seed + 1, None, count) != prompt


def ruler(name: str, tokens: int = 12_000, seed: int = 3) -> Prompt:
    return TASKS[name].prompt(tokens, seed, None, count_bytes)


@pytest.mark.parametrize(
    ("name", "asked", "stated", "key", "value"),
    [
        ("niah_single_1", 1, 1, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_multikey_2", 1, None, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_multikey_3", 1, None, r"[0-9a-f-]{36}", r"[0-9a-f-]{36}"),
        ("niah_multivalue", 4, 4, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_multiquery", 4, 4, r"[a-z]+-[a-z]+", r"\d{7}"),
    ],
)
def test_needles_have_rulers_forms_and_counts(name, asked, stated, key, value) -> None:
    prompt = ruler(name)
    *lines, question = prompt.content.splitlines()
    needles = [
        found.groups()
        for line in lines
        if (found := re.fullmatch(rf"The special number for ({key}) is ({value})\.", line))
    ]
    assert len(prompt.expected) == asked
    assert stated is None or len(needles) == stated
    assert stated is not None or len(needles) == len(lines) - 1
    answers = {each for name, each in needles if re.search(rf"\b{name}\b", question)}
    assert answers == set(prompt.expected)
    assert len({each for _, each in needles}) == len(needles)


def test_a_chain_has_four_hops_in_their_order() -> None:
    prompt = ruler("vt")
    task = prompt.content.split("\n\n")[1]
    assignments = re.findall(r"^VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.$", task, re.M)
    names = [name for name, _ in assignments]
    assert tuple(names) == prompt.expected
    assert len(names) == 5
    assert [value for _, value in assignments[1:]] == names[:-1]
    assert f"the value {assignments[0][1]}?" in task.splitlines()[-1]


@pytest.mark.parametrize(("tokens", "often", "seldom"), [(12_000, 30, 3), (2_500, 6, 1)])
def test_common_words_are_ten_times_or_six_times_as_common(tokens, often, seldom) -> None:
    prompt = ruler("cwe", tokens)
    numbered = re.findall(r"\d+\. (\w+)", prompt.content.split("\n\n")[1])
    counts = Counter(numbered)
    assert {word for word, count in counts.items() if count == often} == set(prompt.expected)
    assert set(counts.values()) == {often, seldom}
    assert len(prompt.expected) == 10


def test_frequent_words_follow_a_zeta_distribution() -> None:
    prompt = ruler("fwe", 60_000)
    counts = Counter(prompt.content.splitlines()[1].split())
    noise, *coded = counts.most_common()
    assert noise[0] == "..."
    assert tuple(word for word, _ in coded[:3]) == prompt.expected
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in coded)
    assert [noise[1] / count for _, count in coded[:3]] == pytest.approx([4, 9, 16], rel=0.02)


@pytest.mark.parametrize(
    ("answered", "expected", "score"),
    [
        ("Both ABC and def.", ("abc", "DEF"), 1.0),
        ("1234567", ("1234567", "7654321", "1111111", "2222222"), 0.25),
        ("", ("a",), 0.0),
        ("xabcx", ("abc",), 1.0),
    ],
)
def test_string_match_is_a_recall_of_substrings(answered, expected, score) -> None:
    assert string_match_all(answered, expected) == score


@pytest.mark.parametrize(
    ("answered", "expected", "score"),
    [
        ("12345", ("12345",), 1),
        ("The pass key is 12345.", ("12345",), 1),
        ("leploform", ("leplo",), 0),
        ("123456", ("12345",), 0),
        ("dark pencil", ("dark pencil",), 1),
        ("dark pocket", ("dark pencil",), 0),
        ("東京!", ("東京",), 1),
        ("", ("12345",), 0),
    ],
)
def test_a_needle_is_found_as_whole_words(answered, expected, score) -> None:
    assert says_it(answered, expected) == score


def test_too_few_tokens_are_refused_with_the_least() -> None:
    with pytest.raises(InvalidRequestError, match=r"\d+ tokens.* 50;"):
        TASKS["pass-key"].prompt(50, 0, None, count_bytes)


def test_a_task_without_a_depth_says_so() -> None:
    with pytest.raises(InvalidRequestError, match="--depths any"):
        TASKS["one-of-12-facts"].prompt(2000, 0, 0.5, count_bytes)
