"""Where the ranks of a decode worker that spans devices find each other."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerMeeting:
    """Made of what the ranks behind the leader say, and told to all.

    `store` is host and port of the store that rank 1 serves. `channels` are addresses of sockets
    that take orders, one for each rank from 1 on, which whoever knows `key` may connect to.
    """

    store: tuple[str, int]
    channels: tuple[str, ...]
    key: bytes
