"""Something that answers prompts: a model in this process, or one behind an endpoint."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...engine.messages import Progress

TokenCount = Callable[[str], int]
"""Tokens of the whole prompt in which a user says this, chat template included."""

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Answer:
    """What a model said, and how long the prompt turned out to be, in its own tokens."""

    text: str
    prompt_tokens: int


class Answerer(ABC):
    """Answers chats of one turn, greedily: the same prompt gets the same answer.

    One model may answer in several ways (`variants`), so that its weights are loaded once.
    """

    @property
    @abstractmethod
    def model(self) -> str:
        """What the model is called."""

    @property
    @abstractmethod
    def variants(self) -> Sequence[str]:
        """The ways in which it answers, by the names that results carry."""

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, str]:
        """Whatever else decides a prompt or its answer; results of others are not mixed in."""

    @abstractmethod
    def counter(self, sample: str) -> TokenCount:
        """Counts tokens of prompts whose text is like `sample`.

        Exact where the tokenizer can be asked, else an estimate from the sample.
        """

    @abstractmethod
    def answer(
        self, variant: str, content: str, max_tokens: int, on_progress: OnProgress
    ) -> Answer:
        """The answer to what a user says, of at most `max_tokens` tokens.

        Args:
            on_progress: called now and then while a long prompt is read, if that is known.

        Raises:
            LongreachError: there is no answer; the same prompt may be asked again.
        """
