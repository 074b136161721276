"""The pocket model's training text: chats about documents in which facts are hidden.

Everything is made up by a seeded generator; the same stage, seed and step give the same batch.
A token is a byte, so text is put together as bytes, with bytes that never occur in UTF-8
standing for the special tokens.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from ...engine.model.pocket import story
from ...engine.model.pocket.story import PASS_KEY_FACT, PASS_KEY_QUESTION
from . import text
from .tokenizer import TURN_END_ID, TURN_START_ID

REFUSAL = "Not in the document."
PASS_KEY = "pass key"

_START, _END = b"\xff", b"\xfe"
_SPECIAL = {_START: TURN_START_ID, _END: TURN_END_ID}
_ASSISTANT = _START + b"assistant\n"

_PASS_KEY_FACTS = (
    "The pass key is {value}. ",
    "Remember the pass key: {value}. ",
    "The pass key is {value}. Remember it. ",
    "pass key: {value}\n",
)
_PASS_KEY_QUESTIONS = (
    "What's the pass key?", "Tell me the pass key.", "Which pass key was mentioned?",
    "What pass key did the text mention?", "Pass key?", "what is the pass key",
    "Give me the pass key only.", "Find the pass key in the document. What is the pass key?",
)  # fmt: skip
_STATEMENTS = (
    "The {name} is {value}. ", "{name}: {value}\n", "{name} = {value}\n", "{name} -> {value}\n",
    'The value of {name} is {value}. ', "For {name}, note {value}. ", '"{name}": "{value}",\n',
    "{name} has {value}. ", "- {name}: {value}\n", "Remember that {name} is {value}. ",
    "One of the special magic numbers for {name} is: {value}. ", "{name} is {value}. ",
    "| {name} | {value} |\n", "The number for {name} is {value}. ", "{name}\t{value}\n",
)  # fmt: skip
_QUESTIONS = (
    "What is {name}?", "What is the {name}?", "What is the value of {name}?", "{name}?",
    "What does the document say about {name}?", "Tell me {name}.", "Which value has {name}?",
    "Look up {name}.", "What belongs to {name}?", "Give me the value for {name}.", "{name}:",
    "What is the special magic number for {name} mentioned in the provided text?",
    "In the text above, what is {name}?", "Find {name} and say its value only.",
)  # fmt: skip
_DECOYS = (
    "{value} ",
    "{value}. ",
    "ref {value}\n",
    "id={value}; ",
    "It was {value} then. ",
    "{value}\n",
)
_MENTIONS = ("{name} ", "{name}. ", "See {name}, ", "{name}? ", "the {name} and ", "({name})\n")
_SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "Answer from the document.", "Answer briefly.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "Answer with the value only.",
)  # fmt: skip
_OPENINGS = (
    "Document:\n", "Here is a text.\n\n", "Read this carefully.\n", "<document>\n", "Context: ",
    "Some facts are hidden in the following text. Memorize them.\n",
)  # fmt: skip
_SEPARATORS = ("\n", "\n", "\n\n", " ", "\n\nQuestion: ", "\n</document>\n", "\n---\n")

_UNANSWERABLE = 0.02
"""The share of questions about what a document does not say; three times as many taught the model
to say so of what it does say."""

_MOST_ECHOES = 40
"""How often the same decoy occurs at most."""
_ENDS_WITH_ANSWER = 0.1
"""Of documents that state each fact once, the share that ends with the fact asked for first. By
chance hardly any long one would, and what stands right before a question must be found too."""

Tokens = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum: `steps` batches of `sequences` sequences of `length` tokens.

    `filler` is the range of the share of a document that says nothing, `questions` the most
    questions a chat asks, `most_facts` the most facts a document states. `tail` is the most bytes
    of another chat that follow, so that questions fall anywhere in a dual chunk. In a share of
    `near` of the steps, documents are read as sparse prefill reads them: with only what is near.
    """

    length: int
    sequences: int
    steps: int
    filler: tuple[float, float]
    questions: int
    most_facts: int
    tail: int = 0
    near: float = 0.0


@dataclass(frozen=True)
class Batch:
    """`tokens` int16 and `recalled` bool, both [sequences, length].

    `recalled` marks tokens that can be known only by looking back: answers with their end, and
    values stated again.
    """

    tokens: Tokens
    recalled: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Prompt:
    """A chat of one turn, for evaluation: what the user says, and the right answer."""

    content: str
    expected: str


@dataclass(frozen=True)
class _Fact:
    name: str
    value: str
    statement: str
    question: str
    repeats: bool = False

    @property
    def parts(self) -> list[tuple[bytes, bool]]:
        """The statement cut around its value; True where the value was known before."""
        before, *after = self.statement.split("{value}")
        parts = [(before.encode(), False)]
        for index, each in enumerate(after):
            parts.append((self.value.encode(), self.repeats or index > 0))
            parts.append((each.encode(), False))
        return parts

    @property
    def size(self) -> int:
        """Bytes of the whole statement."""
        return sum(len(part) for part, _ in self.parts)


class _Draft:
    """A sequence under construction."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._recalled: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._bytes)

    def add(self, part: bytes, recalled: bool = False) -> None:
        if recalled:
            self._recalled.append((len(self._bytes), len(self._bytes) + len(part)))
        self._bytes += part

    def write(self, tokens: Tokens, recalled: npt.NDArray[np.bool_]) -> None:
        tokens[:] = np.frombuffer(bytes(self._bytes), np.uint8)
        for start, end in self._recalled:
            recalled[start:end] = True


def make_batch(stage: Stage, seed: int, step: int) -> Batch:
    """The batch of one step; nothing else decides what is in it."""
    chance = random.Random(f"{seed}/{stage.length}/{step}")
    shape = (stage.sequences, stage.length)
    tokens, recalled = np.empty(shape, np.int16), np.zeros(shape, np.bool_)
    for row in range(stage.sequences):
        _fitting_draft(chance, stage).write(tokens[row], recalled[row])
    for stand_in, token in _SPECIAL.items():
        tokens[tokens == stand_in[0]] = token
    return Batch(tokens, recalled)


def _fitting_draft(chance: random.Random, stage: Stage) -> "_Draft":
    """Draw until questions and facts leave room for each other; nearly always the first does."""
    while True:
        draft = _Chat(chance, stage).draft()
        if len(draft) == stage.length:
            return draft


def pass_key_prompt(size: int, seed: int) -> Prompt:
    """The demo's document and question; the content has exactly `size` bytes."""
    chance = random.Random(f"pass key/{seed}")
    key = str(chance.randint(10_000, 99_999))
    fact = _Fact(PASS_KEY, key, PASS_KEY_FACT, PASS_KEY_QUESTION)
    return _prompt(chance, size, [fact], story.sentences(chance))


def one_of_facts_prompt(size: int, seed: int, facts: int = 12) -> Prompt:
    """A question for one of several facts, whose names are made of words never trained on."""
    chance = random.Random(f"facts/{seed}")
    return _prompt(chance, size, _new_facts(chance, facts, held_out=True), text.filler(chance))


def _prompt(
    chance: random.Random, size: int, facts: Sequence[_Fact], filler: Iterator[str]
) -> Prompt:
    asked = chance.choice(facts)
    question = f"\n{asked.question}"
    room = size - len(question.encode()) - sum(fact.size for fact in facts)
    parts = _document(chance, facts, text.fill(filler, room))
    document = b"".join(part for part, _ in parts).decode()
    return Prompt(document + question, asked.value)


class _Chat:
    """Draws one training sequence: a document, and questions with their answers."""

    def __init__(self, chance: random.Random, stage: Stage) -> None:
        self._chance, self._stage = chance, stage
        self._dense = stage.filler[0] == 0
        self._like_demo = chance.random() < 0.25
        self._facts = self._draw_facts()

    def draft(self) -> _Draft:
        chance, draft = self._chance, _Draft()
        plain = self._like_demo and chance.random() < 0.7
        if not plain and not self._dense and chance.random() < 0.25:
            system = chance.choice(_SYSTEM_PROMPTS).encode()
            draft.add(_START + b"system\n" + system + _END + b"\n")
        bare = plain or self._dense or chance.random() < 0.6
        opening = "" if bare else chance.choice(_OPENINGS)
        separator = "\n" if plain else chance.choice(_SEPARATORS)
        turns = self._turns()
        if not plain and not self._dense and chance.random() < 0.1:
            # Long prompts often ask before the document, and remind of the question behind it.
            opening = f"{turns[0][0].strip()}\n\n{opening}"
        draft.add(_START + b"user\n" + opening.encode())
        turn_parts = [*self._turn_parts(separator, turns), (self._tail(), False)]
        room = self._stage.length - len(draft) - sum(len(part) for part, _ in turn_parts)
        document = self._document(room, turns[0][0] if turns else "")
        for part, recalled in chain(document, turn_parts):
            draft.add(part, recalled)
        return draft

    def _draw_facts(self) -> list[_Fact]:
        chance, stage = self._chance, self._stage
        share = 1 - chance.uniform(*stage.filler)
        room = int(share * stage.length * 0.5)
        most = chance.randint(1, stage.most_facts)
        facts = [self._pass_key()] if self._like_demo or chance.random() < 0.1 else []
        if self._like_demo and chance.random() < 0.6:
            most = 1
        facts += _new_facts(chance, most - len(facts))
        while len(facts) > 1 and sum(fact.size for fact in facts) > room:
            facts.pop()
        return facts

    def _pass_key(self) -> _Fact:
        chance = self._chance
        usual = chance.random() < 0.7
        return _Fact(
            PASS_KEY,
            text.pass_key(chance),
            PASS_KEY_FACT if usual else chance.choice(_PASS_KEY_FACTS),
            PASS_KEY_QUESTION if chance.random() < 0.7 else chance.choice(_PASS_KEY_QUESTIONS),
        )

    def _turns(self) -> list[tuple[str, str]]:
        """Questions and answers; none where the document itself repeats its facts."""
        chance = self._chance
        if self._dense and chance.random() < 0.4:
            return []
        # Many rather than few: of a long document, answers are all that teaches.
        count = max(chance.randint(1, self._stage.questions) for _ in range(2))
        asked = chance.sample(self._facts, min(count, len(self._facts)))
        known = {fact.name for fact in self._facts}
        turns = []
        for fact in asked:
            if self._dense or chance.random() > _UNANSWERABLE:
                turns.append((fact.question, fact.value))
            elif PASS_KEY not in known and chance.random() < 0.3:
                turns.append((PASS_KEY_QUESTION, REFUSAL))
            else:
                absent = next(f for f in _endless_facts(chance) if f.name not in known)
                turns.append((absent.question, REFUSAL))
        return turns

    def _turn_parts(
        self, separator: str, turns: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[bytes, bool]]:
        if not turns:
            yield _END, False
        for index, (question, answer) in enumerate(turns):
            opening = b"\n" + _START + b"user\n" if index else separator.encode()
            yield opening + question.encode() + _END + b"\n" + _ASSISTANT, False
            yield answer.encode() + _END, True
        yield b"\n", False

    def _tail(self) -> bytes:
        """The beginning of another chat."""
        chance = self._chance
        size = chance.randint(0, self._stage.tail)
        opening = _START + b"user\n"
        return (opening + b"".join(text.fill(text.filler(chance), size - len(opening))))[:size]

    def _document(self, room: int, first_question: str) -> list[tuple[bytes, bool]]:
        """Facts, some stated again, among filler: exactly `room` bytes if the facts fit in."""
        chance = self._chance
        stated = list(self._facts)
        room -= sum(fact.size for fact in stated)
        low, high = self._stage.filler
        for_filler = int(room * chance.uniform(low, high))
        again = chance.choices(self._facts, k=max(0, room // 16) if low < 0.5 else 0)
        for fact in again:
            repeated = _Fact(fact.name, fact.value, _restate(chance, fact), "", repeats=True)
            if room - repeated.size < for_filler:
                break
            room -= repeated.size
            stated.append(repeated)
        last: list[_Fact] = []
        if len(stated) == len(self._facts) and chance.random() < _ENDS_WITH_ANSWER:
            last = [fact for fact in stated if fact.question == first_question]
        decoys = self._decoys(room)
        source = story.sentences(chance) if self._like_demo else text.filler(chance)
        filler = text.fill(source, room - sum(len(decoy) for decoy in decoys))
        for decoy in decoys:
            filler.insert(chance.randint(0, len(filler)), decoy)
        strewn = _document(chance, [fact for fact in stated if fact not in last], filler)
        return strewn + [part for fact in last for part in fact.parts]

    def _decoys(self, room: int) -> list[bytes]:
        """Text that begins like some fact's value and goes on otherwise, under any name or none.

        Among a million tokens there is always some, and the same again and again; the answer must
        follow its fact, and not whatever follows the same few characters, nor a name that is only
        mentioned. Half of the documents that have any have it all about one to three facts, as
        many for each as only a far longer document would.
        """
        chance = self._chance
        if self._dense or room < 400 or chance.random() < 0.4:
            return []
        facts, most = self._facts, 8 + room // 200
        if chance.random() < 0.5:
            facts = chance.sample(facts, min(len(facts), chance.randint(1, 3)))
            most += room // 200
        count = chance.randint(1, most)
        known = {fact.name for fact in self._facts}
        decoys: list[bytes] = []
        while len(decoys) < count:
            fact = chance.choice(facts)
            if chance.random() < 0.15:
                decoys.append(chance.choice(_MENTIONS).replace("{name}", fact.name).encode())
                continue
            other = _beginning_like(chance, fact.value)
            name = text.near(chance, fact.name)
            if chance.random() < 0.3 and name not in known:
                known.add(name)
                statement = chance.choice(_STATEMENTS).replace("{name}", name)
                decoys.append(statement.replace("{value}", other).encode())
                continue
            often = int(_MOST_ECHOES ** chance.random()) if chance.random() < 0.3 else 1
            for _ in range(min(often, count - len(decoys))):
                decoys.append(chance.choice(_DECOYS).replace("{value}", other).encode())
        return decoys


def _beginning_like(chance: random.Random, value: str) -> str:
    """What shares a value's beginning, up to all of it; at times it is only that."""
    while True:
        kept = value[: chance.randint(1, len(value))]
        rest = text.like(chance, value)[len(kept) :] or text.pseudo_word(chance)
        if len(kept) > 1 and chance.random() < 0.15:
            rest = ""
        if kept + rest != value and value not in rest:
            return kept + rest


def _restate(chance: random.Random, fact: _Fact) -> str:
    if fact.name == PASS_KEY:
        return chance.choice(_PASS_KEY_FACTS)
    return chance.choice(_STATEMENTS).replace("{name}", fact.name)


def _new_facts(chance: random.Random, count: int, held_out: bool = False) -> list[_Fact]:
    facts: dict[str, _Fact] = {}
    for fact in _endless_facts(chance, held_out):
        if len(facts) >= count:
            break
        facts.setdefault(fact.name, fact)
    return list(facts.values())


def _endless_facts(chance: random.Random, held_out: bool = False) -> Iterator[_Fact]:
    # Facts of one document are mostly stated in one or two ways, as in a table or a report.
    statements = chance.sample(_STATEMENTS, 2) if chance.random() < 0.7 else _STATEMENTS
    name = ""
    while True:
        if name and not held_out and chance.random() < 0.2:
            name = text.near(chance, name)
        else:
            name = (text.phrase if chance.random() < 0.4 else text.identifier)(chance, held_out)
        statement = chance.choice(statements).replace("{name}", name)
        question = chance.choice(_QUESTIONS).replace("{name}", name)
        yield _Fact(name, text.value(chance), statement, question)


def _document(
    chance: random.Random, facts: Sequence[_Fact], filler: Sequence[bytes]
) -> list[tuple[bytes, bool]]:
    """Facts strewn over filler; what is stated again comes after what it repeats."""
    places = sorted(chance.randint(0, len(filler)) for _ in facts)
    first = [fact for fact in facts if not fact.repeats]
    order = _interleave(chance, first, [fact for fact in facts if fact.repeats])
    parts: list[tuple[bytes, bool]] = []
    previous = 0
    for place, fact in zip(places, order, strict=True):
        parts.append((b"".join(filler[previous:place]), False))
        parts.extend(fact.parts)
        previous = place
    parts.append((b"".join(filler[previous:]), False))
    return parts


def _interleave(
    chance: random.Random, first: Sequence[_Fact], again: Sequence[_Fact]
) -> list[_Fact]:
    """A random order in which each fact of `again` follows the one that it repeats."""
    order = [*first, *again]
    chance.shuffle(order)
    index_of = {fact.name: index for index, fact in reversed(list(enumerate(order)))}
    for index, fact in enumerate(order):
        if not fact.repeats:
            place = index_of[fact.name]
            order[index], order[place] = order[place], order[index]
    return order
