"""RULER's tasks that need no download (arXiv 2404.06654), in words of our own.

Counts, the forms of keys and values, and the scoring are those published; `docs/evaluation.md`
says what differs.
"""

import math
import random
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

from ..pocket import text
from .tasks import Build, Prompt, Task

_SENTENCES = "The snow is white. The sea is grey. A leaf is brown. On we walk. Over hill and home. "
_NEEDLE = "The special number for {key} is {value}. "
_HIDDEN = "Special numbers are hidden in the following text. Memorize them.\n"
_DIGITS = 7
_HOPS = 4
_COMMON_WORDS = 10
_CODED_LETTERS = 6
_ZETA_OF_2 = math.pi**2 / 6

MakeText = Callable[[random.Random], str]


def string_match_all(answered: str, expected: Sequence[str]) -> float:
    """The share of what was expected that the answer holds, whatever the case of its letters."""
    return sum(each.lower() in answered.lower() for each in expected) / len(expected)


def _word_pair(chance: random.Random) -> str:
    return f"{text.pseudo_word(chance)}-{text.pseudo_word(chance)}"


def _number(chance: random.Random) -> str:
    return str(chance.randint(10 ** (_DIGITS - 1), 10**_DIGITS - 1))


def _uuid(chance: random.Random) -> str:
    return str(uuid.UUID(int=chance.getrandbits(128), version=4))


def _distinct(make: MakeText, chance: random.Random) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        made = make(chance)
        if made not in seen:
            seen.add(made)
            yield made


def _needles(
    size: int,
    seed: int,
    depth: float | None,
    *,
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    key: MakeText = _word_pair,
    value: MakeText = _number,
    among_needles: bool = False,
) -> Prompt:
    """Needles in a haystack of `size` sentences, or of that many other needles."""
    chance = random.Random(f"needles/{keys}/{values}/{queries}/{seed}")
    new_keys, new_values = _distinct(key, chance), _distinct(value, chance)
    needles = {next(new_keys): tuple(next(new_values) for _ in range(values)) for _ in range(keys)}
    stated = [
        _NEEDLE.format(key=name, value=each) for name, known in needles.items() for each in known
    ]
    chance.shuffle(stated)
    places = [chance.random() for _ in stated]
    haystack = [
        _NEEDLE.format(key=next(new_keys), value=next(new_values)) if among_needles else _SENTENCES
        for _ in range(size)
    ]
    _insert(haystack, stated, places)
    asked = list(needles)[:queries]
    question = f"What are the special numbers for {_listed(asked)}?"
    if queries * values == 1:
        question = f"What is the special number for {asked[0]}?"
    expected = tuple(each for name in asked for each in needles[name])
    return Prompt(f"{_HIDDEN}{_lines(haystack)}{question}", expected)


def _variable_tracking(size: int, seed: int, depth: float | None) -> Prompt:
    """One chain of five variables among `size` lines of noise, after a short solved example."""
    chance = random.Random(f"variables/{seed}")
    example, names = _chain(chance, 8, letters=3)
    task, expected = _chain(chance, size + _HOPS + 1, letters=5)
    return Prompt(f"{example} {', '.join(names)}\n\n{task}", expected)


def _chain(chance: random.Random, noise: int, letters: int) -> tuple[str, tuple[str, ...]]:
    new_names = _distinct(lambda c: "".join(c.choices(string.ascii_uppercase, k=letters)), chance)
    names = tuple(next(new_names) for _ in range(_HOPS + 1))
    value = str(chance.randint(10_000, 99_999))
    stated = [f"VAR {names[0]} = {value}. "]
    stated += [f"VAR {new} = VAR {old}. " for old, new in pairwise(names)]
    places = sorted(chance.random() for _ in stated)
    lines = [_SENTENCES] * noise
    _insert(lines, stated, places)
    return (
        "Variables are assigned in the following text, some through others. Keep track of them.\n"
        f"{_lines(lines)}Which variables have the value {value}?",
        names,
    )


def _common_words(
    size: int, seed: int, depth: float | None, *, repeats: tuple[int, int], example: tuple[int, ...]
) -> Prompt:
    """Ten words that occur often among `size` others that do not, after a short solved example.

    Args:
        repeats: how often common words occur, and how often the others.
        example: the other words of the example, and their repeats.
    """
    chance = random.Random(f"common words/{seed}")
    words = _distinct(text.pseudo_word, chance)
    shown, answer = _word_list(chance, words, example[0], example[1], example[2])
    asked, expected = _word_list(chance, words, size, *repeats)
    solved = " ".join(f"{number}. {word}" for number, word in enumerate(answer, 1))
    return Prompt(f"{shown} {solved}\n\n{asked}", tuple(expected))


def _word_list(
    chance: random.Random, words: Iterator[str], others: int, often: int, seldom: int
) -> tuple[str, list[str]]:
    common = [next(words) for _ in range(_COMMON_WORDS)]
    uncommon = [next(words) for _ in range(others)]
    everything = common * often + uncommon * seldom
    chance.shuffle(everything)
    numbered = " ".join(f"{number}. {word}" for number, word in enumerate(everything, 1))
    return (
        "Some words of the following numbered list occur more often than others. Memorize those.\n"
        f"{numbered}\nWhich {_COMMON_WORDS} words of the list occur most often?",
        common,
    )


def _frequent_words(size: int, seed: int, depth: float | None) -> Prompt:
    """Coded words that occur with a zeta distribution of exponent 2; `size` is how many.

    The most frequent is noise ("..."), and the next three are asked for. Words of which there
    would be less than one are left out, so that the size of the vocabulary does not matter.
    """
    chance = random.Random(f"frequent words/{seed}")
    new_words = _distinct(
        lambda c: "".join(c.choices(string.ascii_lowercase, k=_CODED_LETTERS)), chance
    )
    counts: list[int] = []
    while (count := int(size / ((len(counts) + 1) ** 2 * _ZETA_OF_2))) > 0:
        counts.append(count)
    words = ["...", *(next(new_words) for _ in counts[1:])]
    coded = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    chance.shuffle(coded)
    return Prompt(
        "Count how often each coded word occurs in the following text; dots are no words.\n"
        f"{' '.join(coded)}\nWhich three coded words occur most often?",
        tuple(words[1:4]),
    )


def _insert(haystack: list[str], stated: Sequence[str], places: Sequence[float]) -> None:
    """Put each statement at its place, 0 to 1, of the haystack as it was; equal places in order."""
    size = len(haystack)
    indices = [int(place * (size + 1)) for place in places]
    by_place = sorted(zip(indices, stated, strict=True), key=lambda each: each[0])
    # From the end, so that what is inserted moves no other place.
    for index, statement in by_place[::-1]:
        haystack.insert(index, statement)


def _lines(sentences: Sequence[str]) -> str:
    return "".join(f"{sentence.strip()}\n" for sentence in sentences)


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _task(name: str, answer_tokens: int, *builds: Build, least: int = 0) -> Task:
    return Task(name, builds, string_match_all, answer_tokens, least=least)


RULER = (
    _task("niah_single_1", 128, _needles),
    _task("niah_multikey_2", 128, partial(_needles, among_needles=True)),
    _task("niah_multikey_3", 128, partial(_needles, key=_uuid, value=_uuid, among_needles=True)),
    _task("niah_multivalue", 128, partial(_needles, values=4)),
    _task("niah_multiquery", 128, partial(_needles, keys=4, queries=4)),
    _task("vt", 30, _variable_tracking),
    _task(
        "cwe",
        120,
        partial(_common_words, repeats=(30, 3), example=(30, 10, 3)),
        partial(_common_words, repeats=(6, 1), example=(10, 3, 1)),
    ),
    _task("fwe", 50, _frequent_words, least=27),
)
"""The eight tasks, under RULER's names."""
