"""The engine behind a decode worker, as the settings ask for it."""

import torch

from ...engine.decode.contract import DecodeEngine
from ...engine.decode.decoder import Decoder
from ...engine.decode.detokenizer import TokenBytes
from ...engine.kv.pages import PagePool
from ...engine.parallel.mesh import Mesh
from ...engine.text.tokenizer import Tokenizer
from ...kernels.page_size import pages_for
from ..memory import own_prompts, room_for_decode
from ..settings import WorkerSettings
from .meeting import WorkerMeeting
from .spanning import device_of, load_shard, make_leader


def make_engine(settings: WorkerSettings, meeting: WorkerMeeting | None = None) -> DecodeEngine:
    """Load the model, and allocate all pages.

    Args:
        meeting: of a worker's ranks, of which this one leads; None where it is alone.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigurationError: as `room_for_decode`.
    """
    if meeting is not None:
        return make_leader(settings, meeting)
    device = device_of(settings)
    with room_for_decode(settings, device):
        return _make_decoder(settings, device)


def _make_decoder(settings: WorkerSettings, device: torch.device) -> Decoder:
    model, geometry = load_shard(settings, Mesh.single(), device)
    pool = PagePool(geometry, pages_for(settings.decode.kv_cache_tokens), device)
    token_bytes = TokenBytes(Tokenizer(settings.model.files.tokenizer_folder).raw)
    decode = settings.decode
    prompts = own_prompts(decode)
    return Decoder(model, pool, token_bytes, decode.largest_batch, prompts, decode.patience)
