"""What the endpoint is told of a cluster: limits of one request, all of them given."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Access:
    """Who may send requests: keys, if any; names of this server; origins of web pages.

    Without keys everybody may; without hosts, under any name; `*` stands for all.
    """

    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


OPEN = Access()


@dataclass(frozen=True)
class SignsOfLife:
    """What a client that waits gets meanwhile, and with it whatever stands in between; in seconds.

    A stream gets a comment with the progress after so much silence, which clients skip, and after
    `empty_delta_seconds` without an event an event that says nothing, for gateways that swallow
    comments. Before an answer that is not streamed comes white space, every `white_space_seconds`;
    its status is sent with the first. None for neither.
    """

    progress_seconds: float
    empty_delta_seconds: float | None = None
    white_space_seconds: float | None = None

    @property
    def silence(self) -> float:
        """The longest of a stream."""
        return min(self.progress_seconds, self.empty_delta_seconds or self.progress_seconds)


@dataclass(frozen=True)
class IngressLimits:
    """`clamp_max_tokens`: who asks for more tokens than there may be gets as many as may be.

    `receive_seconds` is how long a client may take to send a request. `max_choices` are answers of
    one prompt, and `max_scored_tokens` those of all prompts together whose tokens are scored.
    """

    model_name: str
    max_model_len: int
    max_output_tokens: int
    clamp_max_tokens: bool
    max_body_bytes: int
    max_choices: int
    max_prompts: int
    max_scored_tokens: int
    max_logprobs: int
    receive_seconds: float
    signs_of_life: SignsOfLife
