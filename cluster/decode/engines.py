"""The engine behind a decode worker, as the settings ask for it."""

import torch

from ...engine.decode.contract import DecodeEngine
from ...engine.decode.decoder import Decoder
from ...engine.decode.detokenizer import TokenBytes
from ...engine.kv.pages import PagePool
from ...engine.model.compute_type import compute_dtype
from ...engine.model.load import load_model
from ...engine.parallel.mesh import Mesh
from ...engine.text.tokenizer import Tokenizer
from ...kernels.page_size import pages_for
from ..memory import own_prompts, room_for_decode
from ..settings import WorkerSettings


def make_engine(settings: WorkerSettings) -> DecodeEngine:
    """Load the model, and allocate all pages.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigurationError: as `room_for_decode`.
    """
    device = torch.device("cuda" if settings.decode.gpus else "cpu")
    with room_for_decode(settings, device):
        return _make_decoder(settings, device)


def _make_decoder(settings: WorkerSettings, device: torch.device) -> Decoder:
    files = settings.model.files
    dtype = compute_dtype(settings.model.dtype, device)
    model = load_model(files, Mesh.single(), dtype, device, weights=settings.model.weights)
    geometry = model.pages_kept_as(settings.model.pages_kept_as)
    pool = PagePool(geometry, pages_for(settings.decode.kv_cache_tokens), device)
    token_bytes = TokenBytes(Tokenizer(files.tokenizer_folder).raw)
    decode = settings.decode
    prompts = own_prompts(decode)
    return Decoder(model, pool, token_bytes, decode.largest_batch, prompts, decode.patience)
