"""vLLM with asynchronous scheduling: the next step is launched before it hears of the last.

So it is on GPUs, and never on CPUs unless it is made to, though all of it works there.
"""

from typing import Any

import pytest


def schedule_asynchronously(patch: pytest.MonkeyPatch) -> None:
    """Whatever is started from now on."""
    from longreach.plugins.vllm_decode import vllm_core

    make: Any = vllm_core.EngineCore

    def make_asynchronous(config: Any, *args: Any, **named: Any) -> Any:
        config.scheduler_config.async_scheduling = True
        core = make(config, *args, **named)
        assert core.batch_queue_size == 2
        return core

    patch.setattr(vllm_core, "EngineCore", make_asynchronous)
