"""A node of a Ray cluster that is about to go: it gets no more work, and finishes what it has.

Its proxy has clients whose requests other nodes may be working on, and these are waited for too.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import ray
from ray import _raylet
from ray.core.generated import autoscaler_pb2
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.serve._private.constants import SERVE_NAMESPACE, SERVE_PROXY_NAME
from ray.serve._private.utils import format_actor_name

from ..engine.errors import UnavailableError
from .front import depart
from .joining import join_ray
from .metrics import (
    KV_CACHE_USAGE,
    NUM_PROMPTS,
    NUM_REQUESTS_RUNNING,
    NUM_REQUESTS_WAITING,
    NUM_SEQUENCES_WAITING,
)
from .metrics.exposition import FolderCollector
from .nodes import metrics_of_node

logger = logging.getLogger(__name__)

_GAUGES = (
    NUM_REQUESTS_RUNNING,
    NUM_REQUESTS_WAITING,
    NUM_SEQUENCES_WAITING,
    NUM_PROMPTS,
    # Of a prompt that another node computes, a decode replica has nothing yet but its pages.
    KV_CACHE_USAGE,
)
_QUIET_LOOKS = 5
"""So often nothing must be under way, one after the other: a request comes from role to role."""
_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 5.0


def drain_this_node(directory: Path, seconds: float) -> bool:
    """Have Ray and Serve put nothing new on this node; whether it was idle before time was up.

    Args:
        directory: where the cluster's processes leave their figures.

    Raises:
        UnavailableError: Ray does not answer, or does not let the node go.
    """
    deadline = time.time() + seconds
    try:
        join_ray("auto")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UnavailableError(f"no Ray runs on this node ({error})") from error
    try:
        return leave(directory, deadline)
    finally:
        ray.shutdown()


def leave(directory: Path, deadline: float) -> bool:
    """As `drain_this_node`, from a process of Ray's, until a time in seconds since 1970."""
    node_id = ray.get_runtime_context().get_node_id()
    announce(deadline, node_id)
    folder = metrics_of_node(directory)
    return wait_until_idle(lambda: has_clients(node_id) or has_work(folder), deadline)


def announce(deadline: float, node_id: str) -> None:
    """Tell Ray that a node goes, at a time in seconds since 1970; raises as above."""
    context = ray.get_runtime_context()
    accepted, why = (
        cast(Any, _raylet)
        .GcsClient(address=context.gcs_address)
        .drain_node(
            node_id,
            cast(Any, autoscaler_pb2).DRAIN_NODE_REASON_PREEMPTION,
            "longreach drain",
            round(deadline * 1000),
        )
    )
    if not accepted:
        raise UnavailableError(f"Ray does not let the node go: {why}")


def wait_until_idle(
    is_busy: Callable[[], bool], deadline: float, look_seconds: float = _LOOK_SECONDS
) -> bool:
    """Return True once nothing has been under way on this node for some looks; False at the end.

    Args:
        is_busy: whether something is, in one look.
        deadline: in seconds since 1970.
    """
    quiet = 0
    while quiet < _QUIET_LOOKS:
        if time.time() >= deadline:
            return False
        quiet = 0 if is_busy() else quiet + 1
        time.sleep(look_seconds)
    return True


def has_work(folder: Path) -> bool:
    """Whether a role works on a request, lets one wait, or holds pages for one.

    Args:
        folder: with the figures of a node.
    """
    names = {gauge.name for gauge in _GAUGES}
    families = [each for each in FolderCollector(folder).collect() if each.name in names]
    return any(sample.value for family in families for sample in family.samples)


def has_clients(node_id: str) -> bool:
    """Whether requests are under way at a node's proxy, which sees its clients off from now on."""
    try:
        # Named by Serve, which ends it when it has had nothing to do for a while.
        name = format_actor_name(SERVE_PROXY_NAME, node_id)
        proxy = ray.get_actor(name, namespace=SERVE_NAMESPACE)
        asked = proxy.__ray_call__.remote(depart)
        return cast(int, ray.get(asked, timeout=_ANSWER_SECONDS)) > 0
    except (GetTimeoutError, ActorUnavailableError):
        return True  # It hangs or is out of reach, which Serve looks after, or has much to do.
    except (ValueError, RayActorError):
        return False  # There is none, or none any more.
    except RayError as error:
        # Of another version, say: nothing is known of its clients, and the rest goes on.
        logger.warning("the node's proxy cannot be asked for its clients: %s", error)
        return False
