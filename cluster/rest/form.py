"""What sends an answer needs of the form that it comes in."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pydantic import BaseModel

from ...engine.messages import Delta, Finished, PromptScores
from .errors import RestError


class Form(ABC):
    """The form of the answer to one HTTP request, which is streamed or whole, not both.

    Methods for streams return the events that a client gets then, often none.
    """

    names_events = False
    """Whether the line `event:` of each event has its `type`."""

    end_of_stream = b""
    """What a stream ends with, behind its events."""

    @abstractmethod
    def collect(self, choice: int, delta: Delta) -> None:
        """Keep a part of an answer that will be sent whole."""

    @abstractmethod
    def answer(self, finished: Sequence[Finished]) -> BaseModel:
        """The whole answer, from what was collected."""

    def keep_scores(self, index: int, scores: PromptScores) -> None:
        """Keep how likely the tokens of a prompt are, for forms that say so."""
        return

    def beginning(self) -> Sequence[BaseModel]:
        """Before anything else."""
        return ()

    @abstractmethod
    def events(self, choice: int, delta: Delta) -> Sequence[BaseModel]:
        """Of a part of the answer."""

    @abstractmethod
    def empty_events(self) -> Sequence[BaseModel]:
        """That add nothing to the answer, and say only that it goes on."""

    @abstractmethod
    def progress_events(self, processed: int, seconds: float) -> Sequence[BaseModel]:
        """With the progress of prefill.

        Args:
            processed: tokens of all prompts.
            seconds: since the request came.
        """

    @abstractmethod
    def ending(self, finished: Sequence[Finished]) -> Sequence[BaseModel]:
        """Of an answer that is whole."""

    @abstractmethod
    def failure(self, error: RestError) -> Sequence[BaseModel]:
        """Of an answer that is not and will not be."""
