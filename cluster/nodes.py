"""What differs from node to node of a Ray cluster: where a process is, and what lies there."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from ..engine.errors import CheckpointError


@contextmanager
def reading_here() -> Iterator[None]:
    """Where a process reads its model: what is missing is missing on one node, which is named.

    Raises:
        CheckpointError: as was raised within, with the node.
    """
    try:
        yield
    except CheckpointError as error:
        if not ray.is_initialized():
            raise
        raise CheckpointError(
            f"{error}; this is on node {ray.util.get_node_ip_address()}, and every node with a "
            "rank, a decode worker or an ingress reads the checkpoint from its own disk"
        ) from error


def default_metrics_directory() -> Path:
    """A folder of the same name on every node, and of another one for each start of Ray."""
    session = ray.get_runtime_context().get_session_name()
    return Path(tempfile.gettempdir()) / f"longreach-metrics-{session}"


def metrics_of_node(directory: Path) -> Path:
    """Where the processes of this node leave their figures.

    Each node has a folder of its own, so that nodes which share a disk do not count each other's
    twice. A process that is no part of a Ray cluster has no node, and writes into `directory`.
    """
    if not ray.is_initialized():
        return directory
    return directory / ray.get_runtime_context().get_node_id()
