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
class IngressLimits:
    """`progress_seconds` is how long a stream may stay silent before a progress comment.

    `receive_seconds` is how long a client may take to send a request.
    """

    model_name: str
    max_model_len: int
    max_output_tokens: int
    max_body_bytes: int
    max_choices: int
    max_logprobs: int
    progress_seconds: float
    receive_seconds: float
