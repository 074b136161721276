"""The document that the pocket model was trained to read: a story with a pass key in it.

The demonstration asks about such a one, at any length; any other model understands it too.
"""

import random
from collections.abc import Iterator

PASS_KEY_FACT = "The pass key is {value}. Remember it. {value} is the pass key. "
PASS_KEY_QUESTION = "What is the pass key?"

_SUBJECTS = ("The river", "A traveller", "The old clock", "Her brother", "The market", "One ship")
_VERBS = ("waited for", "passed by", "remembered", "turned towards", "followed", "watched")
_OBJECTS = ("the mountain", "a long winter", "the harbour", "an empty road", "the first light")


def sentences(chance: random.Random) -> Iterator[str]:
    """The story, without end; the same generator tells the same one."""
    while True:
        yield " ".join(map(chance.choice, (_SUBJECTS, _VERBS, _OBJECTS))) + ". "
