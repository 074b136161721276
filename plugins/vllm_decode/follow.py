"""Another rank of a vLLM that spans several devices: see `orders`."""

from ...engine.decode.follower import FollowerPages, FollowingRank
from ...engine.decode.orders import Channel
from ...engine.errors import NoVllmError, in_one_line


def follow(rank: int, channel: Channel) -> tuple[FollowingRank, FollowerPages]:
    """Carry the leader's orders out until all blocks are allocated.

    Args:
        rank: this one's, 1 or more.
        channel: that its orders come by.

    Returns:
        the rank, which goes on with orders, and where pages of its heads come.

    Raises:
        NoVllmError: vLLM cannot be imported.
        LostError: the leader is gone before.
    """
    try:
        from ..vllm.registration import register
        from .vllm_follower import VllmFollower
    except ImportError as error:
        raise NoVllmError(in_one_line(error)) from error
    # What the leader sends refers to what it registers.
    register()
    follower = VllmFollower(rank)
    memory = follower.until_ready(channel)
    return follower, FollowerPages(memory, rank * memory.geometry.num_kv_heads)
