"""How many event loops Ray Serve has in each of our replicas: one.

By itself it runs what we deploy on a loop and a thread of its own, and its routers on others, so
that every message between replicas is handed from thread to thread several times, which takes a
millisecond each on a busy machine. What is deployed here never holds a loop up for long.

Serve reads this from the environment of a process alone.
"""

from typing import Any


def one_loop() -> dict[str, Any]:
    """For `ray_actor_options` of a deployment."""
    variables = {
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    }
    return {"runtime_env": {"env_vars": variables}}
