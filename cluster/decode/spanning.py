"""A decode worker over several devices: how its ranks meet, and what each of them is made of.

The worker's own process is rank 0 and leads; see `engine.decode.orders`. Orders travel by Unix
sockets, since all ranks of a worker are on one node.
"""

from contextlib import closing
from multiprocessing.connection import Client, Listener

import torch
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ...engine.decode.decoder import Decoder
from ...engine.decode.detokenizer import TokenBytes
from ...engine.decode.follower import Follower, FollowerPages
from ...engine.decode.leader import Followers, LeadingPool, LeadingStep
from ...engine.decode.make_step import make_step
from ...engine.decode.orders import Channel
from ...engine.kv.pages import PageGeometry, PagePool
from ...engine.model.compute_type import compute_dtype
from ...engine.model.config import ModelConfig
from ...engine.model.load import load_model
from ...engine.model.qwen2 import Qwen2
from ...engine.parallel.mesh import Mesh
from ...engine.text.tokenizer import Tokenizer
from ...kernels.page_size import pages_for
from ..memory import own_prompts, room_for_decode
from ..settings import WorkerSettings, check_decode_ranks
from .meeting import WorkerMeeting


def device_of(settings: WorkerSettings) -> torch.device:
    """That a rank of a worker, or the only one, computes on."""
    return torch.device("cuda" if settings.decode.gpus else "cpu")


def load_shard(
    settings: WorkerSettings, mesh: Mesh, device: torch.device
) -> tuple[Qwen2, PageGeometry]:
    """One rank's shard of the model, and the pages of its KV heads.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigurationError: it cannot be served so.
    """
    model = settings.model
    dtype = compute_dtype(model.dtype, device)
    shard = load_model(model.files, mesh, dtype, device, weights=model.weights)
    return shard, shard.pages_kept_as(model.pages_kept_as)


def followers_at(meeting: WorkerMeeting) -> Followers:
    """The other ranks, as the leader gives them orders."""
    return Followers([Client(each, authkey=meeting.key) for each in meeting.channels])


def make_leader(settings: WorkerSettings, meeting: WorkerMeeting) -> Decoder:
    """Rank 0: meet the others, load, and allocate all pages; collective.

    Raises: as `load_shard`, and as `room_for_decode`.
    """
    decode, device = settings.decode, device_of(settings)
    check_decode_ranks(decode, ModelConfig.from_folder(settings.model.folder))
    with room_for_decode(settings, device):
        mesh = _join(settings, 0, TCPStore(*meeting.store))
        followers = followers_at(meeting)
        model, geometry = load_shard(settings, mesh, device)
        pool = LeadingPool(geometry, pages_for(decode.kv_cache_tokens), device, followers)
        prompts = own_prompts(decode)
        step = LeadingStep(make_step(model, pool, decode.largest_batch, prompts), followers)
        token_bytes = TokenBytes(Tokenizer(settings.model.files.tokenizer_folder).raw)
        return Decoder(
            model, pool, token_bytes, decode.largest_batch, prompts, decode.patience, step
        )


def make_follower(
    settings: WorkerSettings, rank: int, store: Store, channel: Listener
) -> tuple[Follower, FollowerPages, Channel]:
    """Another rank, and what its orders come by; as `make_leader`.

    Args:
        store: that all ranks meet in.
        channel: where the leader connects.
    """
    decode, device = settings.decode, device_of(settings)
    check_decode_ranks(decode, ModelConfig.from_folder(settings.model.folder))
    with room_for_decode(settings, device):
        mesh = _join(settings, rank, store)
        with closing(channel):
            orders = channel.accept()
        model, geometry = load_shard(settings, mesh, device)
        pool = PagePool(geometry, pages_for(decode.kv_cache_tokens), device)
        step = make_step(model, pool, decode.largest_batch, own_prompts(decode))
        return Follower(pool, step), FollowerPages(pool, model.heads.first_kv_head), orders


def _join(settings: WorkerSettings, rank: int, store: Store) -> Mesh:
    decode = settings.decode
    return Mesh.join(decode.tensor_parallel, 1, rank, store, "nccl" if decode.gpus else "gloo")
