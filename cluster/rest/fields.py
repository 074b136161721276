"""Fields of OpenAI's and vLLM's that this server does not act on: what is accepted and what is not.

A field that is advice, or describes the caller, is accepted whatever it says. One that would change
the answer is refused, unless its value asks for nothing. docs/endpoint.md has a table of all
fields, and a test sends what stands there.
"""

from collections.abc import Mapping

Neutral = Mapping[str, tuple[object, ...]]
"""Names of fields, and the values of each that ask for nothing. Null always does."""

ADVICE = frozenset(
    {
        # Of OpenAI's.
        "metadata",
        "moderation",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
        # Of vLLM's.
        "add_special_tokens",  # no tokenizer that is served adds any
        "cache_salt",
        "guided_decoding_backend",
        "include_reasoning",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "priority",
        "return_mm_kwargs",
        "return_token_offsets",
        "session_id",
        "spaces_between_special_tokens",
        "stream_interval",
        "truncation_side",
    }
)
"""Of both generating endpoints."""

ADVICE_RESPONSES = frozenset(
    {
        "max_tool_calls",
        "moderation",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning",
        "safety_identifier",
        "service_tier",
        "stream_options",
        "user",
    }
)
ADVICE_RESPONSES_FORMAT = frozenset({"description"})
ADVICE_RESPONSES_PART = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"})
ADVICE_RESPONSES_TEXT = frozenset({"verbosity"})
ADVICE_OUTPUT_ITEM = frozenset({"id", "phase", "status"})
ADVICE_MESSAGE = frozenset({"annotations", "cache_control", "weight"})
ADVICE_PART = frozenset({"cache_control"})
ADVICE_STREAM = frozenset({"include_obfuscation"})
ADVICE_TOKENIZE = frozenset({"add_special_tokens", "media_io_kwargs", "mm_processor_kwargs"})

UNSUPPORTED: Neutral = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),
    "ec_transfer_params": ({},),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
"""Of both generating endpoints."""

UNSUPPORTED_CHAT: Neutral = {
    **UNSUPPORTED,
    "audio": (),
    "chat_template": (),
    "echo": (False,),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "web_search_options": (),
}
UNSUPPORTED_COMPLETION: Neutral = {**UNSUPPORTED, "prompt_embeds": (), "suffix": ("",)}
UNSUPPORTED_MESSAGE: Neutral = {
    "audio": (),
    "function_call": (),
    "refusal": (),
}
UNSUPPORTED_RESPONSES: Neutral = {
    "access_programs": ([],),
    "background": (False,),
    "background_options": ({},),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "previous_response_id": (),
    "prompt": (),
    "store": (False,),
    "truncation": ("disabled",),
}
UNSUPPORTED_TOKENIZE: Neutral = {"chat_template": (), "tools": ([],)}


def asks_for_nothing(value: object, neutral: tuple[object, ...]) -> bool:
    """Whether a field's value is null or one of those that ask for nothing; 1.0 is 1."""
    return value is None or any(_is_same(value, known) for known in neutral)


def _is_same(value: object, known: object) -> bool:
    # True is no 1: JSON keeps them apart.
    return value == known and isinstance(value, bool) == isinstance(known, bool)
