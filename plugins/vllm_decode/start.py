"""Starts vLLM for a decode worker."""

from ...engine.decode.detokenizer import TokenBytes
from ...engine.decode.leader import Followers
from ...engine.decode.step import PromptLimits
from ...engine.errors import NoVllmError, in_one_line
from ...engine.figures import Figures
from ...engine.kv.formats import dtype_name
from ...engine.kv.pages import PageGeometry
from ...engine.model.config import ModelConfig
from ...engine.model.files import ModelFiles
from ...engine.text.tokenizer import Tokenizer
from ...kernels.page_size import PAGE_TOKENS
from .decoder import VllmDecoder


def start(
    files: ModelFiles,
    pages: PageGeometry,
    num_pages: int,
    max_batch: int,
    prompts: PromptLimits,
    figures: Figures,
    followers: Followers | None,
    on_gpu: bool,
) -> VllmDecoder:
    """Load a model into vLLM, in this process, and allocate all pages.

    Args:
        pages: of this rank's heads, kept in the type that vLLM then computes in as well.
        figures: keeps vLLM's own metrics.
        followers: the other ranks, where there are any.

    Raises:
        NoVllmError: vLLM cannot be imported.
        ConfigurationError: as the plugin in `plugins.vllm` says of what it cannot serve.
    """
    try:
        from ..vllm.registration import register
        from .vllm_core import VllmCore, engine_arguments
    except ImportError as error:
        raise NoVllmError(in_one_line(error)) from error
    # vLLM finds it by itself only where Longreach is installed, and not where it is just on a path.
    register()
    config = ModelConfig.from_folder(files.folder)
    arguments = engine_arguments(
        num_pages,
        pages.bytes_per_page,
        config.num_kv_heads // pages.num_kv_heads,
        model=str(files.folder),
        load_format="dummy" if files.random else "auto",
        dtype=dtype_name(pages.dtype),
        max_model_len=min(num_pages * PAGE_TOKENS, config.max_position_embeddings),
        # One more, for a sequence that waits for its pages: it never has to wait for a place.
        max_num_seqs=max_batch + 1,
        max_num_batched_tokens=prompts.at_once + max_batch + 1,
        enforce_eager=not on_gpu,
    )
    token_bytes = TokenBytes(Tokenizer(files.tokenizer_folder).raw)
    return VllmDecoder(
        VllmCore(arguments, figures, followers), config, token_bytes, max_batch, prompts.longest
    )
