"""Ordinary text, names and values without end, drawn from a seeded generator.

Nothing here is taken from anyone's writing: sentences, code, logs and records are put together
from short lists. `HELD_OUT_NOUNS` never occur in training, so that names made of them are new.
"""

import random
from collections.abc import Callable, Iterator

from ...engine.model.pocket import story


def _words_of(line: str) -> tuple[str, ...]:
    return tuple(line.split())


_NOUNS = _words_of(
    "harbour gate kite river tower lamp bridge garden letter engine mirror window forest station "
    "market castle island valley meadow library kitchen cabin wagon candle basket ladder anchor "
    "barrel blanket bottle button camera carpet circle coffee copper corner cotton desert dinner "
    "doctor dragon driver eagle falcon farmer feather finger flower glacier guitar hammer helmet "
    "honey hunter jacket jungle kettle ladle lemon locker magnet marble monkey needle orange "
    "oyster palace pencil pepper pillow pirate planet pocket potato rabbit rocket saddle sailor "
    "school shadow signal silver singer spider spring square statue summer teacher temple ticket "
    "timber tunnel turtle valve vessel violin walnut winter wizard account badge customer door "
    "vault server invoice order parcel room cargo user project device vehicle flight platform"
)
HELD_OUT_NOUNS = _words_of(
    "acorn beacon cactus dolphin emerald fountain goblet hamster igloo jasmine kayak lantern "
    "mango nectar otter papaya quartz raven sapphire trumpet umbrella vulture whistle yogurt zebra "
    "biscuit compass drawer elbow furnace"
)
_ADJECTIVES = _words_of(
    "red blue green old new small large quiet northern southern eastern western wooden golden "
    "silver broken hidden secret second third upper lower main spare early late round narrow "
    "bright dark cold warm empty heavy light rapid gentle"
)
_TRAITS = _words_of(
    "code number colour price owner weight height password name address size status version key "
    "level score count rate date label serial pin combination value"
)
_VERBS = _words_of(
    "sees finds carries follows leaves opens closes watches paints counts repairs forgets answers "
    "crosses holds reaches visits describes moves keeps brings sends"
)
_FIRST_NAMES = _words_of("Anna Bela Carlos Dina Emil Fatima Goran Hana Ivan Julia Kofi Lena Mira")
_LAST_NAMES = _words_of("Keller Novak Silva Okoye Tanaka Berg Rossi Haddad Larsen Mehta Weiss")
_SYLLABLES = _words_of(
    "ba be bi bo ca ce co cu da de di do fa fe fi fo ga ge go ha he ho ja jo ka ke ki ko la le li "
    "lo ma me mi mo na ne ni no pa pe pi po ra re ri ro sa se si so ta te ti to va ve vi vo wa we "
    "za zo zu bra cre dro fle gri plo ster tran vor win xan yel"
)
_FOREIGN_WORDS = _words_of(
    "город вечер дорога письмо молоко зима ветер окно книга море "
    "θάλασσα δρόμος βιβλίο ουρανός ψωμί σπίτι "
    "東京 山 川 春 電車 図書館 手紙 時間 学校 今日は 天気 北京 语言 城市 消息 "
    "서울 바다 하늘 도서관 مدينة كتاب بحر طريق नगर पुस्तक जल "
    "Straße Mädchen Küche façade naïve señor año ópera żółty łódź český ångström"
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CAPITALS = _LETTERS.upper()
_DIGITS = "0123456789"
_HEX = "0123456789abcdef"

Pieces = Iterator[str]


def pseudo_word(chance: random.Random) -> str:
    """A pronounceable word that means nothing."""
    return "".join(chance.choices(_SYLLABLES, k=chance.randint(2, 4)))


def phrase(chance: random.Random, held_out: bool = False) -> str:
    """What a thing is called in prose, such as "spare key" or "colour of the old gate"."""
    noun = chance.choice(HELD_OUT_NOUNS if held_out else _NOUNS)
    kind = chance.random()
    if kind < 0.35:
        return f"{noun} {chance.choice(_TRAITS)}"
    if kind < 0.6:
        return f"{chance.choice(_TRAITS)} of the {chance.choice(_ADJECTIVES)} {noun}"
    if kind < 0.8:
        return f"{chance.choice(_TRAITS)} of {pseudo_word(chance).capitalize()} {noun}"
    return f"{chance.choice(_ADJECTIVES)} {noun}"


def identifier(chance: random.Random, held_out: bool = False) -> str:
    """What a thing is called in records, such as "door-17", "vault_code" or "Anna Berg"."""
    noun = chance.choice(HELD_OUT_NOUNS if held_out else _NOUNS)
    kind = chance.randrange(9)
    if kind == 0:
        return f"{chance.choice(_ADJECTIVES)}-{noun}"
    if kind == 1:
        return f"{noun}_{chance.choice(_TRAITS)}"
    if kind == 2:
        return f"{noun}-{chance.randrange(1000)}"
    if kind == 3:
        return f"{noun.capitalize()}{pseudo_word(chance).capitalize()}"
    if kind == 4:
        return pseudo_word(chance).capitalize()
    if kind == 5:
        return f"{chance.choice(_FIRST_NAMES)} {pseudo_word(chance).capitalize()}"
    if kind == 6:
        return _code(chance)
    if kind == 7:
        return f"{noun} {pseudo_word(chance)}"
    return " ".join(chance.sample(_FOREIGN_WORDS, 2))


def value(chance: random.Random) -> str:
    """A number, a word, a code or a date: 3 to 16 bytes mostly."""
    kind = chance.random()
    if kind < 0.2:
        return str(chance.randint(10_000, 99_999))
    if kind < 0.4:
        return "".join(chance.choices(_DIGITS, k=chance.randint(3, 9)))
    if kind < 0.55:
        return pseudo_word(chance)
    if kind < 0.75:
        return _code(chance)
    if kind < 0.83:
        return f"{chance.choice(_ADJECTIVES)} {chance.choice(_NOUNS)}"
    if kind < 0.88:
        return f"{chance.randint(1, 999)}.{chance.randint(0, 99):02}"
    if kind < 0.92:
        return f"20{chance.randint(10, 39)}-{chance.randint(1, 12):02}-{chance.randint(1, 28):02}"
    if kind < 0.96:
        return chance.choice(_FOREIGN_WORDS)
    return f"{chance.choice(_FIRST_NAMES)} {chance.choice(_LAST_NAMES)}"


def pass_key(chance: random.Random) -> str:
    """Five digits mostly; else four to eight, or letters and digits."""
    kind = chance.random()
    if kind < 0.6:
        return str(chance.randint(10_000, 99_999))
    if kind < 0.85:
        return "".join(chance.choices(_DIGITS, k=chance.randint(4, 8)))
    return "".join(chance.choices(_LETTERS + _DIGITS, k=chance.randint(4, 8)))


def like(chance: random.Random, original: str) -> str:
    """Another value of about the same kind: often with letters for letters, digits for digits."""
    other = "".join(_like_character(chance, each) for each in original)
    if other == original or (not original.isdecimal() and chance.random() < 0.5):
        return value(chance)
    return other


def _like_character(chance: random.Random, original: str) -> str:
    for kind in (_DIGITS, _LETTERS, _CAPITALS):
        if original in kind:
            return chance.choice(kind)
    return original


def near(chance: random.Random, name: str) -> str:
    """Another name, one word or the last character apart."""
    words = name.split(" ")
    if len(words) > 1:
        words[chance.randrange(len(words))] = chance.choice(_NOUNS)
        return " ".join(words)
    return name[:-1] + chance.choice(_LETTERS + _DIGITS)


def filler(chance: random.Random) -> Pieces:
    """Text of any kind without end; the kind changes now and then."""
    while True:
        kind = chance.choices(_KINDS, _KIND_WEIGHTS)[0]
        for _ in range(chance.randint(4, 60)):
            yield kind(chance)


def fill(pieces: Iterator[str], size: int) -> list[bytes]:
    """Pieces of exactly `size` bytes together, and whole characters; none if `size` is negative."""
    filled: list[bytes] = []
    while size > 0:
        piece = next(pieces).encode()
        if len(piece) > size:
            piece = piece[:size].decode(errors="ignore").encode().ljust(size)
        filled.append(piece)
        size -= len(piece)
    return filled


def _code(chance: random.Random) -> str:
    kind = chance.randrange(4)
    if kind == 0:
        return f"{''.join(chance.choices(_CAPITALS, k=2))}-{chance.randrange(10_000):04}"
    if kind == 1:
        return "".join(chance.choices(_HEX, k=chance.randint(6, 10)))
    if kind == 2:
        return "".join(chance.choices(_CAPITALS + _DIGITS, k=chance.randint(4, 8)))
    return "".join(chance.choices(_LETTERS + _DIGITS, k=chance.randint(5, 10)))


def _sentence(chance: random.Random) -> str:
    choice = chance.choice
    return (
        f"The {choice(_ADJECTIVES)} {choice(_NOUNS)} {choice(_VERBS)} the "
        f"{choice(_ADJECTIVES)} {choice(_NOUNS)}. "
    )


def _story_sentence(chance: random.Random) -> str:
    return next(story.sentences(chance))


def _repeated_sentences(_: random.Random) -> str:
    return (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    )


def _words(chance: random.Random) -> str:
    return " ".join(chance.choices(_NOUNS + _VERBS + _ADJECTIVES + _TRAITS, k=12)) + " "


def _pseudo_words(chance: random.Random) -> str:
    words = [pseudo_word(chance) for _ in range(chance.randint(4, 9))]
    return " ".join(words).capitalize() + ". "


def _foreign_words(chance: random.Random) -> str:
    return " ".join(chance.choices(_FOREIGN_WORDS, k=chance.randint(3, 8))) + ". "


def _log_line(chance: random.Random) -> str:
    return (
        f"2024-{chance.randint(1, 12):02}-{chance.randint(1, 28):02} {chance.randint(0, 23):02}:"
        f"{chance.randint(0, 59):02}:{chance.randint(0, 59):02} "
        f"{chance.choice(('INFO', 'WARN', 'DEBUG', 'ERROR'))} {chance.choice(_NOUNS)}: "
        f"{chance.choice(_VERBS)} {chance.choice(_NOUNS)} in {chance.randrange(5000)} ms\n"
    )


def _code_line(chance: random.Random) -> str:
    name, other, count = chance.choice(_NOUNS), chance.choice(_TRAITS), chance.randrange(100)
    return chance.choice((
        f"def {name}_{other}(self, {other}):\n",
        f"    return {name}.{other} + {count}\n",
        f"    for {other} in range({count}):\n",
        f"        self.{name} = {other}[{count}]\n",
        f"if ({name} > {count}) {{ {other}++; }}\n",
        f"import {name}.{other}\n",
        f"// {_sentence(chance)}\n",
    ))  # fmt: skip


def _record(chance: random.Random) -> str:
    return (
        f'{{"id": {chance.randrange(100_000)}, "{chance.choice(_TRAITS)}": '
        f'"{chance.choice(_NOUNS)}", "{chance.choice(_TRAITS)}": {chance.randrange(1000)}}}\n'
    )


def _noise(chance: random.Random) -> str:
    return "".join(chance.choices(_LETTERS + _DIGITS + " -_/.,:", k=40)) + "\n"


_KINDS: tuple[Callable[[random.Random], str], ...] = (
    _story_sentence, _sentence, _repeated_sentences, _words, _pseudo_words, _foreign_words,
    _log_line, _code_line, _record, _noise,
)  # fmt: skip
_KIND_WEIGHTS = (5, 6, 1, 3, 3, 2, 3, 3, 2, 1)
