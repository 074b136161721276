# pyright: reportMissingImports=false
# vLLM is installed in an environment of its own.
"""vLLM's schedulers, with a prefix cache that keeps long prompts apart.

Above the first layer, K and V of a prefix depend on the whole prompt: by temperature on its length,
by sparse attention on what its later tokens chose. vLLM's cache knows the prefix alone. So pages of
a prompt that is long enough for that are found again by the very same prompt only: for another of
its answers, when it is asked again, or after a preemption.
"""

import hashlib
from typing import Any

import numpy as np
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from .checks import raw_config
from .model_attention import alike_up_to


class ApartRequest(Request):
    """One whose block hasher names its pages so that no other prompt finds them, however long."""


class KeepsApart(Scheduler):
    """Marks a long prompt before anything of it is cached."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._alike_up_to = alike_up_to(raw_config(vllm_config))

    def add_request(self, request: Request) -> None:
        is_long = request.num_prompt_tokens > self._alike_up_to
        if is_long and not isinstance(request, ApartRequest):
            keep_apart(request)
        super().add_request(request)


class AsyncKeepsApart(KeepsApart, AsyncScheduler):
    """As vLLM takes one unless it is told otherwise."""


def keep_apart(request: Request) -> None:
    """Have a request's pages found by the same prompt alone: all of it is in their hashes then.

    Those that vLLM has made already are hashed once more, and not its tokens, of which a million
    take it some tenths of a second, in which nobody gets a token. Each later hash has the one
    before it in it, and the first one of all the salt.
    """
    tokens = np.asarray(request.prompt_token_ids, dtype=np.int32)
    whole = hashlib.sha256(tokens.tobytes())
    request.cache_salt = f"{request.cache_salt or ''}/longreach/{whole.hexdigest()}"
    prefix = whole.digest()
    request.block_hashes[:] = [
        BlockHash(hashlib.sha256(prefix + each).digest()) for each in request.block_hashes
    ]


def make_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Scheduler:
    """The scheduler that vLLM would have taken, with that."""
    asynchronous = vllm_config.scheduler_config.async_scheduling
    kind = AsyncKeepsApart if asynchronous else KeepsApart
    return kind(vllm_config, *args, **kwargs)
