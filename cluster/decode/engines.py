"""The engine behind a decode worker, as the settings ask for it.

Longreach's own is made here. Any other is declared, as an entry point of the group
`longreach.decode_engines` with its name in the settings: a function like
`plugins.vllm_decode.start.start`. So nothing of it is loaded where it is not asked for.
"""

from importlib.metadata import entry_points

import torch

from ...engine.decode.contract import DecodeEngine
from ...engine.decode.decoder import Decoder
from ...engine.decode.detokenizer import TokenBytes
from ...engine.errors import NoVllmError
from ...engine.figures import Figures
from ...engine.kv.pages import PageGeometry, PagePool
from ...engine.model.compute_type import compute_dtype
from ...engine.model.config import ModelConfig
from ...engine.parallel.mesh import Mesh
from ...engine.text.tokenizer import Tokenizer
from ...kernels.page_size import pages_for
from ..memory import own_prompts, room_for_decode
from ..settings import WorkerSettings
from .meeting import WorkerMeeting
from .spanning import device_of, load_shard, make_leader

GROUP = "longreach.decode_engines"


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
    if meeting is not None:
        return make_leader(settings, meeting)
    device = device_of(settings)
    with room_for_decode(settings, device):
        if settings.decode.engine == "native":
            return _make_decoder(settings, device)
        return _start_another(settings, figures, device)


def _start_another(
    settings: WorkerSettings, figures: Figures, device: torch.device
) -> DecodeEngine:
    declared = list(entry_points(group=GROUP, name=settings.decode.engine))
    if not declared:
        raise NoVllmError("nothing that is installed declares it as an engine")
    start = declared[0].load()
    model, decode = settings.model, settings.decode
    config = ModelConfig.from_folder(model.folder)
    computed = compute_dtype(model.dtype, device)
    pages = PageGeometry(config.num_layers, config.num_kv_heads, config.head_dim, computed)
    return start(
        model.files,
        pages.kept_as(model.pages_kept_as),
        pages_for(decode.kv_cache_tokens),
        decode.largest_batch,
        own_prompts(decode),
        figures,
        on_gpu=device.type == "cuda",
    )


def _make_decoder(settings: WorkerSettings, device: torch.device) -> Decoder:
    model, geometry = load_shard(settings, Mesh.single(), device)
    pool = PagePool(geometry, pages_for(settings.decode.kv_cache_tokens), device)
    token_bytes = TokenBytes(Tokenizer(settings.model.files.tokenizer_folder).raw)
    decode = settings.decode
    prompts = own_prompts(decode)
    return Decoder(model, pool, token_bytes, decode.largest_batch, prompts, decode.patience)
