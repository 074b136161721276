"""What a configuration would start, and where, in plain words."""

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...engine.kv.pages import PageGeometry
from ...engine.model.compute_type import compute_dtype
from ...engine.model.config import ModelConfig
from ...engine.prefill.budgets import dense_up_to, has_budgets
from ...kernels.page_size import pages_for
from ..memory import own_prompts
from ..settings import DecodeSettings, GangSettings, Settings, warnings_about


def explain(settings: Settings) -> RenderableType:
    """The model, the lengths it would serve, and every process with what it asks for.

    Raises:
        CheckpointError: the model's folder cannot be read.
    """
    model = ModelConfig.from_folder(settings.model.folder)
    warnings = [
        Text(f"warning: {warning}", style="bold yellow") for warning in warnings_about(settings)
    ]
    return Group(
        _summary(settings, model), _processes(settings, model), _totals(settings, model), *warnings
    )


def kv_bytes(settings: Settings, model: ModelConfig, tokens: int) -> int:
    """Memory of a KV cache for so many tokens, all heads, in whole pages, scales included."""
    # The device does not matter: where it decides the model's type, pages are kept in another.
    dtype = compute_dtype(settings.model.dtype, torch.device("cpu"))
    pages = PageGeometry(model.num_layers, model.num_kv_heads, model.head_dim, dtype)
    return pages_for(tokens) * pages.kept_as(settings.model.pages_kept_as).bytes_per_page


def _summary(settings: Settings, model: ModelConfig) -> Text:
    attention = "plain positions"
    if model.dual_chunk is not None:
        attention = (
            f"dual chunk attention (chunk {model.dual_chunk.chunk_size:,}, "
            f"local {model.dual_chunk.local_size:,})"
        )
    limits = settings.limits
    return Text(
        f"{settings.model.name}, from {settings.model.folder}\n"
        f"{model.num_layers} layers, {model.num_heads} query and {model.num_kv_heads} KV heads of "
        f"{model.head_dim}, {_types(settings)}, {attention}\n"
        f"prompt and answer together up to {limits.max_model_len:,} tokens, "
        f"the answer up to {limits.max_output_tokens:,}; "
        f"up to {limits.max_queued_requests} requests wait for a gang, "
        "the next is told to come back\n"
        f"endpoint http://{settings.ingress.host}:{settings.ingress.port}/v1, "
        + ("API keys wanted\n" if settings.ingress.api_keys_file else "open to all who reach it\n")
    )


def _types(settings: Settings) -> str:
    kept, name = settings.model.pages_kept_as, str(settings.model.dtype)
    if name == "auto":
        name = "float32 on CPUs that do not multiply bfloat16, else bfloat16"
    return name if kept == "auto" else f"{name}, with KV pages in {kept}"


def _processes(settings: Settings, model: ModelConfig) -> Table:
    decode = settings.decode
    table = Table("processes", "what", "KV cache of each", "asks for, each")
    table.add_row(
        f"{settings.ingress.replicas}", "ingress: HTTP, tokenizer, limits", "", "no accelerator"
    )
    for gang in settings.gangs:
        _add_gang(table, settings, model, gang)
    named = "vLLM; " if decode.engine == "vllm" else ""
    table.add_row(f"{decode.replicas}", "decode replica: reserves pages", "", "no accelerator")
    ranks, cached = decode.tensor_parallel, decode.kv_cache_tokens
    spans = f" rank: {decode.replicas} × tensor {ranks}" if ranks > 1 else ""
    table.add_row(
        f"{decode.replicas * ranks}",
        f"decode worker{spans}: {named}batches of up to {decode.largest_batch}; "
        f"{_own_prompts(decode)}",
        f"{cached:,} tokens, {_gib(kv_bytes(settings, model, cached) // ranks)}",
        _asks(decode.gpus, decode.threads),
    )
    return table


def _own_prompts(decode: DecodeSettings) -> str:
    """Which prompts a worker computes itself, in words."""
    if not decode.longest_own_prompt:
        return "no prompts"
    at_once, alone = decode.prompt_tokens_at_once, own_prompts(decode).sizes_alone[-1]
    more = f", {alone:,} of one alone" if alone > at_once else ""
    return f"prompts up to {decode.longest_own_prompt:,} tokens, {at_once:,} in a step{more}"


def _add_gang(table: Table, settings: Settings, model: ModelConfig, gang: GangSettings) -> None:
    prefill = gang.prefill
    rank_bytes = kv_bytes(settings, model, prefill.kv_cache_tokens) // prefill.tensor_parallel
    name = f" {prefill.name}, prompts up to {gang.max_prompt_tokens:,}" if prefill.name else ""
    table.add_row(
        f"{prefill.replicas}",
        f"prefill replica{name}: schedules chunks of {prefill.chunk_tokens:,} tokens over its gang",
        "",
        "no accelerator",
    )
    table.add_row(
        f"{prefill.replicas * prefill.num_ranks}",
        f"prefill rank: {prefill.replicas} × (tensor {prefill.tensor_parallel} × sequence "
        f"{prefill.sequence_parallel}), placed {prefill.placement}; {_attention(gang)}",
        f"{prefill.kv_cache_tokens:,} tokens, {_gib(rank_bytes)}",
        _asks(prefill.gpus_per_rank, prefill.threads_per_rank),
    )


def _attention(gang: GangSettings) -> str:
    """How the gang prefills its prompts: sparsely above a length, or none of them."""
    folder = gang.model.folder
    if not gang.prefill.sparse or not has_budgets(folder):
        return "dense"
    threshold = dense_up_to(folder)
    return "dense" if gang.max_prompt_tokens <= threshold else f"sparse above {threshold:,} tokens"


def _totals(settings: Settings, model: ModelConfig) -> Text:
    decode = settings.decode
    total = decode.replicas * kv_bytes(settings, model, decode.kv_cache_tokens)
    for gang in settings.prefill:
        # Tensor parallel ranks share the heads; sequence parallel ranks each hold all tokens.
        copies = gang.replicas * gang.sequence_parallel
        total += copies * kv_bytes(settings, model, gang.kv_cache_tokens)
    return Text(f"KV caches together: {_gib(total)}")


def _asks(gpus: float, threads: int) -> str:
    threads_said = f"{threads} thread{'s' if threads != 1 else ''}"
    return f"{gpus:g} GPU, {threads_said}" if gpus else threads_said


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
