"""What the endpoint needs to know of the settings."""

from dataclasses import dataclass


@dataclass(frozen=True)
class IngressLimits:
    """`progress_seconds` is how long a stream may stay silent before a progress comment."""

    model_name: str
    max_model_len: int
    max_output_tokens: int = 4096
    max_body_bytes: int = 64 << 20
    max_choices: int = 8
    max_logprobs: int = 20
    progress_seconds: float = 1.0
