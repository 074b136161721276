"""The engine behind a decode worker, as the settings ask for it.

Longreach's own is made here. Any other is declared, as an entry point of the group
`longreach.decode_engines` with its name in the settings: a function like
`plugins.vllm_decode.start.start`; and of the group `longreach.decode_followers`, for the further
ranks of a worker: `plugins.vllm_decode.follow.follow`. So nothing of it is loaded where it is not
asked for.
"""

from contextlib import closing
from importlib.metadata import entry_points
from multiprocessing.connection import Listener
from typing import Any

import torch
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from ...engine.decode.contract import DecodeEngine
from ...engine.decode.decoder import Decoder
from ...engine.decode.detokenizer import TokenBytes
from ...engine.decode.follower import FollowerPages, FollowingRank
from ...engine.decode.orders import Channel
from ...engine.errors import NoVllmError
from ...engine.figures import Figures
from ...engine.kv.pages import PageGeometry, PagePool
from ...engine.model.compute_type import compute_dtype
from ...engine.model.config import ModelConfig
from ...engine.parallel.mesh import Mesh
from ...engine.text.tokenizer import Tokenizer
from ...kernels.page_size import pages_for
from ..memory import own_prompts, room_for_decode
from ..settings import WorkerSettings, check_decode_ranks
from .meeting import WorkerMeeting
from .spanning import device_of, followers_at, load_shard, make_follower, make_leader

GROUP = "longreach.decode_engines"
FOLLOWERS = "longreach.decode_followers"


def make_engine(
    settings: WorkerSettings, figures: Figures, meeting: WorkerMeeting | None = None
) -> DecodeEngine:
    """Load the model, and allocate all pages.

    Args:
        figures: keeps what an engine that is not Longreach's own counts by names of its own.
        meeting: of a worker's ranks, of which this one leads; None where it is alone.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigurationError: as `room_for_decode`.
        NoVllmError: it is asked for, and cannot be had.
    """
    is_native = settings.decode.engine == "native"
    if is_native and meeting is not None:
        return make_leader(settings, meeting)
    device = device_of(settings)
    with room_for_decode(settings, device):
        if is_native:
            return _make_decoder(settings, device)
        return _start_another(settings, figures, device, meeting)


def make_following_rank(
    settings: WorkerSettings, rank: int, store: Store, channel: Listener
) -> tuple[FollowingRank, FollowerPages, Channel]:
    """Another rank of a worker, its pages, and what its orders come by; as `make_engine`.

    Args:
        store: that ranks of Longreach's own engine meet in; others meet by what their leader says.
        channel: where the leader connects.
    """
    decode = settings.decode
    if decode.engine == "native":
        return make_follower(settings, rank, store, channel)
    follow = _declared(FOLLOWERS, decode.engine)
    check_decode_ranks(decode, ModelConfig.from_folder(settings.model.folder))
    with room_for_decode(settings, device_of(settings)), closing(channel):
        orders = channel.accept()
        return *follow(rank, orders), orders


def _declared(group: str, name: str) -> Any:
    declared = list(entry_points(group=group, name=name))
    if not declared:
        raise NoVllmError("nothing that is installed declares it as an engine")
    return declared[0].load()


def _start_another(
    settings: WorkerSettings,
    figures: Figures,
    device: torch.device,
    meeting: WorkerMeeting | None,
) -> DecodeEngine:
    start = _declared(GROUP, settings.decode.engine)
    model, decode = settings.model, settings.decode
    config = ModelConfig.from_folder(model.folder)
    check_decode_ranks(decode, config)
    computed = compute_dtype(model.dtype, device)
    heads = config.num_kv_heads // decode.tensor_parallel
    pages = PageGeometry(config.num_layers, heads, config.head_dim, computed)
    return start(
        model.files,
        pages.kept_as(model.pages_kept_as),
        pages_for(decode.kv_cache_tokens),
        decode.largest_batch,
        own_prompts(decode),
        figures,
        None if meeting is None else followers_at(meeting),
        on_gpu=device.type == "cuda",
    )


def _make_decoder(settings: WorkerSettings, device: torch.device) -> Decoder:
    model, geometry = load_shard(settings, Mesh.single(), device)
    pool = PagePool(geometry, pages_for(settings.decode.kv_cache_tokens), device)
    token_bytes = TokenBytes(Tokenizer(settings.model.files.tokenizer_folder).raw)
    decode = settings.decode
    prompts = own_prompts(decode)
    return Decoder(model, pool, token_bytes, decode.largest_batch, prompts, decode.patience)
