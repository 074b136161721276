"""Why a configuration cannot run, each with what to change: what sections must agree in."""

from collections.abc import Iterator

from ...kernels.page_size import PAGE_TOKENS, pages_for
from .parts import GangSettings
from .sections import DecodeSettings, PrefillSettings
from .whole import Whole


def problems(whole: Whole) -> Iterator[str]:
    """All of them, those first that others may follow from."""
    yield from _problems_with_lengths(whole)
    for gang in whole.gangs:
        yield from _problems_with_gang(gang)
    yield from _problems_with_pages(whole)
    yield from _problems_with_ranks(whole.decode)
    yield from _problems_with_steps(whole)
    yield from _problems_with_replicas(whole)
    if whole.decode.engine == "vllm":
        yield from _problems_with_vllm(whole)
    yield from _problems_with_types(whole)
    if whole.transport.kind == "cuda_ipc":
        for gang in whole.prefill:
            yield from _problems_with_cuda_ipc(gang, whole.decode)
    yield from _problems_with_limits(whole)


def _problems_with_pages(whole: Whole) -> Iterator[str]:
    """What keeps a decode worker from holding the longest request."""
    limits, decode = whole.limits, whole.decode
    # Choices share the pages that the prompt fills. Each has the page that it fills in part to
    # itself, which holds PAGE_TOKENS - 1 tokens of the prompt at most; with vLLM, one more.
    beside = PAGE_TOKENS - (decode.engine == "native")
    answer = pages_for(limits.max_output_tokens + beside)
    needed = (pages_for(limits.max_model_len) + limits.max_choices * answer) * PAGE_TOKENS
    if decode.kv_cache_tokens < needed:
        yield (
            f"decode.kv_cache_tokens ({decode.kv_cache_tokens}) cannot hold the longest request: "
            f"{limits.max_model_len} tokens and {limits.max_choices} answers of "
            f"{limits.max_output_tokens}; make it {needed} or more"
        )


def _problems_with_steps(whole: Whole) -> Iterator[str]:
    """What a decode step cannot be."""
    decode = whole.decode
    if decode.prompt_tokens_at_once % PAGE_TOKENS:
        yield (
            f"decode.prefill_at_once is {decode.prefill_at_once}; make it a multiple of "
            f"{PAGE_TOKENS}"
        )
    at_once, alone = decode.prompt_tokens_at_once, decode.prefill_alone
    if alone is not None and alone < at_once:
        yield (
            f"decode.prefill_alone ({alone}) is below prefill_at_once ({at_once}), which a "
            "step may compute in any case; raise it, or leave it out"
        )
    if whole.limits.max_choices > decode.largest_batch:
        yield (
            f"limits.max_choices ({whole.limits.max_choices}) is more than decode.max_batch "
            f"({decode.largest_batch}), so one request would not fit into a step; raise "
            "decode.max_batch"
        )


def _problems_with_replicas(whole: Whole) -> Iterator[str]:
    """What cannot grow."""
    several = [("decode.max_replicas", whole.decode)]
    for key, each in several + [(gang.key("max_replicas"), gang) for gang in whole.prefill]:
        if each.max_replicas is not None and each.max_replicas < each.replicas:
            yield (
                f"{key} ({each.max_replicas}) is below replicas ({each.replicas}), with which "
                "it begins; raise it, or leave it out for a fixed number"
            )


def _problems_with_types(whole: Whole) -> Iterator[str]:
    """What GPUs do not compute."""
    model = whole.model
    on_gpus = whole.decode.gpus or any(gang.gpus_per_rank for gang in whole.prefill)
    if not on_gpus or model.dtype not in ("float32", "float16"):
        return
    if model.kv_cache_dtype == "bfloat16":
        yield (
            f"model.kv_cache_dtype bfloat16 beside model.dtype {model.dtype} is for CPUs; "
            "set model.dtype to bfloat16 where there are GPUs, or leave kv_cache_dtype out"
        )
    if model.weights == "fp8":
        yield (
            f"model.weights fp8 beside model.dtype {model.dtype} is for CPUs; set "
            "model.dtype to bfloat16 where there are GPUs, or leave weights out"
        )


def _problems_with_limits(whole: Whole) -> Iterator[str]:
    """What limits leave no room or no use for."""
    limits, shutdown = whole.limits, whole.shutdown
    asked = "hand_over_seconds" in shutdown.model_fields_set and shutdown.hand_over_seconds
    if asked and not limits.retries:
        yield (
            f"shutdown.hand_over_seconds ({shutdown.hand_over_seconds:g}) waits for requests "
            "to go on elsewhere, and with limits.retries 0 none does; raise limits.retries, or "
            "leave hand_over_seconds out"
        )
    if limits.max_output_tokens >= limits.max_model_len:
        yield (
            f"limits.max_output_tokens ({limits.max_output_tokens}) leaves no room for a "
            f"prompt in limits.max_model_len ({limits.max_model_len}); lower it"
        )


def _problems_with_lengths(whole: Whole) -> Iterator[str]:
    """What keeps every prompt from having one gang."""
    names = [gang.name for gang in whole.prefill]
    if len(names) > 1 and None in names:
        yield "prefill lists several gangs, and one has no `name`; give each its own"
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        yield f"prefill lists two gangs of the name {repeated!r}; give each its own"
    own, first = whole.decode.longest_own_prompt, whole.gangs[0]
    if first.prefill.max_prompt_tokens and first.max_prompt_tokens <= own:
        yield (
            f"{first.prefill.key('max_prompt_tokens')} ({first.max_prompt_tokens}) leaves it "
            f"no prompt, because decode workers compute those of up to {own} tokens "
            "themselves; lower decode.prefill_up_to, or leave the gang out"
        )
    covered = 0
    for gang in whole.gangs:
        if gang.max_prompt_tokens <= covered:
            yield (
                f"{gang.prefill.key('max_prompt_tokens')} ({gang.max_prompt_tokens}) leaves it "
                f"no prompt, because those up to {covered} tokens go to the gangs before it; "
                "list gangs by rising max_prompt_tokens, and leave it out for the last one only"
            )
        covered = gang.max_prompt_tokens
    longest = whole.limits.max_model_len
    if covered != longest:
        yield (
            f"{whole.prefill[-1].key('max_prompt_tokens')} is {covered} and "
            f"limits.max_model_len is {longest}; leave it out, so that the last gang takes "
            "every prompt that the others do not"
        )


def _problems_with_vllm(whole: Whole) -> Iterator[str]:
    """What only Longreach's own engine does."""
    instead = "or set decode.engine: native"
    if whole.model.weights == "fp8":
        yield (
            "model.weights fp8 is not for decode.engine vllm, which rounds weights in another "
            f"way; leave weights out, {instead}"
        )
    if whole.model.kv_cache_dtype == "fp8_e4m3":
        yield (
            "model.kv_cache_dtype fp8_e4m3 is not for decode.engine vllm, which reads pages of "
            f"the type that it computes in; leave kv_cache_dtype out, {instead}"
        )
    if whole.model.kv_cache_dtype == "bfloat16" and whole.model.dtype not in ("auto", "bfloat16"):
        yield (
            f"model.kv_cache_dtype bfloat16 beside model.dtype {whole.model.dtype} is not for "
            "decode.engine vllm, which computes in the type that pages are kept in; leave "
            f"kv_cache_dtype out, {instead}"
        )
    if whole.decode.prefill_alone is not None:
        yield (
            "decode.prefill_alone is not for decode.engine vllm, whose steps of prompts are "
            f"prefill_at_once long, whoever is beside; leave it out, {instead}"
        )
    limits = whole.limits
    own = min(whole.decode.longest_own_prompt, limits.max_model_len)
    # Each choice may have to compute a short prompt for itself.
    apart = limits.max_choices * pages_for(own + limits.max_output_tokens) * PAGE_TOKENS
    if own and whole.decode.kv_cache_tokens < apart:
        yield (
            f"decode.kv_cache_tokens ({whole.decode.kv_cache_tokens}) cannot hold "
            f"{limits.max_choices} answers of {limits.max_output_tokens} to a prompt of {own} "
            f"tokens each by itself, as vLLM may have to; make it {apart} or more, or lower "
            "decode.prefill_up_to"
        )


def _problems_with_cuda_ipc(gang: PrefillSettings, decode: DecodeSettings) -> Iterator[str]:
    """What keeps pages from going from GPU to GPU."""
    if not gang.gpus_per_rank or not decode.gpus:
        yield (
            f"transport.kind cuda_ipc copies between GPUs, and {gang.key('gpus_per_rank')} or "
            "decode.gpus is 0; give both a GPU, or set transport.kind: object_store"
        )
    if gang.placement != "STRICT_PACK" and gang.num_ranks > 1:
        yield (
            f"transport.kind cuda_ipc copies between GPUs of one host, and "
            f"{gang.key('placement')}, {gang.placement}, may put the ranks of a gang on "
            "several; use STRICT_PACK, or set transport.kind: object_store"
        )


def _problems_with_ranks(decode: DecodeSettings) -> Iterator[str]:
    """What several ranks of a decode worker need."""
    if decode.tensor_parallel == 1:
        return
    if 0 < decode.gpus < 1:
        yield (
            f"decode.gpus ({decode.gpus:g}) is of each of decode.tensor_parallel "
            f"({decode.tensor_parallel}) ranks, and NCCL refuses two of them on one GPU; make it 1"
        )
    if not decode.gpus and not decode.cpus:
        yield (
            "decode.cpus and decode.gpus are both 0, and Ray places the ranks of "
            "decode.tensor_parallel by what is asked for; ask for a part of a CPU"
        )


def _problems_with_gang(gang: GangSettings) -> Iterator[str]:
    """What its ranks cannot hold, or be placed by."""
    prefill, longest = gang.prefill, gang.max_prompt_tokens
    if prefill.chunk_tokens % PAGE_TOKENS:
        yield (
            f"{prefill.key('chunk_tokens')} is {prefill.chunk_tokens}; make it a multiple of "
            f"{PAGE_TOKENS}"
        )
    if prefill.kv_cache_tokens < longest:
        limit = "max_prompt_tokens" if prefill.max_prompt_tokens else "limits.max_model_len"
        yield (
            f"{prefill.key('kv_cache_tokens')} ({prefill.kv_cache_tokens}) cannot hold one prompt "
            f"of {limit} ({longest}); raise the one or lower the other"
        )
    if not prefill.cpus_per_rank and not prefill.gpus_per_rank:
        yield (
            f"{prefill.key('cpus_per_rank')} and gpus_per_rank are both 0, and Ray places by "
            "what is asked for; ask for a part of a CPU"
        )
