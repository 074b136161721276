"""What each kind of process is told of a configuration."""

from dataclasses import dataclass

from .sections import DecodeSettings, ModelSettings, PrefillSettings, TransportSettings


@dataclass(frozen=True)
class HandOffTerms:
    """What both sides of a hand-off must agree in: whose pages they are, and how they travel.

    While a configuration takes the place of another one, sides of both are up.
    """

    model: ModelSettings
    transport: str


@dataclass(frozen=True)
class GangSettings:
    """What the processes of one gang need to know.

    `max_prompt_tokens` is the longest prompt that they get. `others_seconds` is how long what they
    replace may keep the room that they are to have.
    """

    model: ModelSettings
    prefill: PrefillSettings
    transport: TransportSettings
    max_prompt_tokens: int
    others_seconds: float

    @property
    def terms(self) -> HandOffTerms:
        """Which decode workers' prompts they may compute."""
        return HandOffTerms(self.model, self.transport.kind)


@dataclass(frozen=True)
class WorkerSettings:
    """What a decode worker needs to know.

    `longest_chunk` is the most tokens that it may get pages of at a time, from any gang.
    """

    model: ModelSettings
    decode: DecodeSettings
    transport: TransportSettings
    longest_chunk: int

    @property
    def terms(self) -> HandOffTerms:
        """Which gangs may compute prompts for it."""
        return HandOffTerms(self.model, self.transport.kind)
