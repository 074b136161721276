"""What the endpoint is told of a cluster: limits of one request, all of them given."""

from dataclasses import dataclass


@dataclass(frozen=True)
class IngressLimits:
    """`progress_seconds` is how long a stream may stay silent before a progress comment."""

    model_name: str
    max_model_len: int
    max_output_tokens: int
    max_body_bytes: int
    max_choices: int
    max_logprobs: int
    progress_seconds: float
