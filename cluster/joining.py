"""How a process of ours comes to its Ray, and to no other."""

import logging
from typing import Any, cast

import ray
from ray._private import auto_init_hook

from .handlers import handlers_kept


def join_ray(address: str, **options: Any) -> Any:
    """`ray.init`, without what Ray does unasked; returns what it returns, and raises what it does.

    Handlers of SIGINT and SIGTERM stay: with Ray's own, SIGTERM ends this process after three
    seconds, whatever it does. And who calls a function of `ray` once this process has left it, a
    thread that is a moment late for one, gets a `RayError`: Ray would start itself anew for it,
    open to others, with processes that nobody ends. Serve's functions still have it do so: no
    thread that may be late calls those.

    Args:
        address: as of `ray.init`: "local", "auto", or host:port of the GCS.
    """
    auto_init_hook.enable_auto_connect = False
    with handlers_kept():
        return cast(Any, ray.init)(
            address=address, log_to_driver=False, logging_level=logging.ERROR, **options
        )
