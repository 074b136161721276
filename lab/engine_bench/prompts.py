"""Prompts of several lengths, and batches, one after the other in one process."""

from collections.abc import Callable, Iterator, Sequence

import torch

from ...engine.errors import LongreachError
from ...engine.memory.fit import free_bytes
from ...engine.model.config import ModelConfig
from ...engine.prefill.sparsity import SparsityConfig
from ...kernels.page_size import PAGE_TOKENS, pages_for
from ..csv_lines import append
from .baseline import VLLM_MODEL, VLLM_SOURCE, DenseBaseline
from .ceilings import Ceilings
from .environment import Environment
from .fit import fit
from .lines import Line, Reporter
from .options import Options
from .remedies import remedied
from .running import run_batch, run_prompt, warm_up
from .subject import Subject, load, page_geometry
from .work import Work


def measure(options: Options, device: torch.device) -> bool:
    """Print and keep a line for each case; whether all of them could be run.

    Raises:
        DoesNotFitError: the longest prompt does not; nothing was run.
    """
    config = ModelConfig.from_folder(options.files.folder)
    work = Work(config, torch.bfloat16.itemsize, options.kept)
    geometry = page_geometry(config, options.kv_cache)
    budgets = SparsityConfig.from_folder(options.files.folder)
    sparsity = budgets if "sparse" in options.attentions else None
    room = fit(work, geometry, options.chunk_tokens, free_bytes(device), sparsity)
    longest = max(options.tokens, default=0)
    cached = _kv_tokens(longest, options.decode)
    room.check(cached)
    most = room.largest_cache_beside(longest)
    wanted = [sum(_kv_tokens(n, options.decode) for n in batch) for batch in options.batches]
    cached = max(cached, min(most, max(wanted, default=0)))

    environment = Environment.of_this_run(options.commit)
    model = load(options.files, device, options.seed, options.kept)
    rows = min(options.chunk_tokens, longest or options.chunk_tokens)
    ceilings = Ceilings.measure(work, rows, model.dtype, device)
    baseline = DenseBaseline(config, longest, device) if options.baseline and longest else None
    if device.type == "cuda":
        torch.cuda.empty_cache()
    subject = Subject.of(
        options.files, model, options.kv_cache, cached, options.chunk_tokens, options.seed
    )
    bytes_per_token = subject.pool.geometry.bytes_per_page / PAGE_TOKENS
    reporter = Reporter(
        work, ceilings, options.name, options.weights, options.kv_cache, bytes_per_token,
        options.chunk_tokens, baseline, options.name == VLLM_MODEL, environment,
    )  # fmt: skip
    _say_what_is_measured(options, ceilings, subject)
    failed = False
    for case in _cases(options, subject, reporter):
        if isinstance(case, Line):
            print(case.text(), flush=True)
            append(options.csv, [case])
        else:
            failed = True
            print(case, flush=True)
    return not failed


def _cases(options: Options, subject: Subject, reporter: Reporter) -> Iterator[Line | str]:
    """A line of every case, or why there is none; one that fails does not end the others."""
    longest = max(options.tokens, default=0)
    for attention in options.attentions if longest else ():
        sparse = attention == "sparse"
        yield from _tried(lambda s=sparse: warm_up(subject, longest, s, min(options.decode, 4)))
    for tokens, sparse in _prompts(options, subject):
        yield from _tried(
            lambda n=tokens, s=sparse: reporter.of_prompt(run_prompt(subject, n, s, options.decode))
        )
    for batch in options.batches:
        lengths = _shortened(batch, options.decode, subject.pool.num_pages)
        for chosen in options.chosen:
            yield from _tried(
                lambda each=lengths, how=chosen: reporter.of_batch(
                    run_batch(subject, each, options.decode, how)
                )
            )


def _tried(case: Callable[[], Line | None]) -> list[Line | str]:
    """What came out, or what went wrong in words: an error itself would keep tensors alive."""
    try:
        line = case()
    except LongreachError as error:
        return [f"{type(error).__name__}: {remedied(error)}"]
    return [] if line is None else [line]


def _prompts(options: Options, subject: Subject) -> list[tuple[int, bool]]:
    """Lengths and whether sparse; a prompt below the budgets' threshold is dense, and once so."""
    most = options.dense_up_to
    asked = [
        (tokens, attention == "sparse" and subject.is_sparse(tokens))
        for tokens in options.tokens
        for attention in options.attentions
    ]
    return [
        (tokens, sparse)
        for tokens, sparse in dict.fromkeys(asked)
        if sparse or most is None or tokens <= most
    ]


def _shortened(batch: Sequence[int], new_tokens: int, num_pages: int) -> list[int]:
    """The batch's lengths, the longest ones cut by the same so that all fit into the pages."""
    lengths = list(batch)
    excess = sum(pages_for(_kv_tokens(n, new_tokens)) for n in lengths) - num_pages
    if excess <= 0:
        return lengths
    most = max(lengths)
    longest = lengths.count(most)
    cut = -(-excess // longest) * PAGE_TOKENS
    return [max(1, n - cut) if n == most else n for n in lengths]


def _kv_tokens(prompt: int, new_tokens: int) -> int:
    """Tokens of the pages that a prompt and its answer reserve."""
    return pages_for(prompt + new_tokens + 1) * PAGE_TOKENS


def _say_what_is_measured(options: Options, ceilings: Ceilings, subject: Subject) -> None:
    print(
        f"{options.name}, weights {options.weights}; this device: {ceilings.linear:.1f} TFLOP/s "
        f"on the model's own products, {ceilings.square:.1f} on square ones, "
        f"{ceilings.read:.0f} GB/s read\n"
        "TTFT is from the first chunk's start until the first token is sampled; prefill and "
        "decode share one pool of pages, so nothing is handed over."
    )
    if options.files.random and subject.sparsity is not None:
        print(
            "With random weights attention has no structure: selection takes as many columns and "
            "bands as the published budgets say, but which is chance, and no recall is meant. "
            "Density is what that choice attends to."
        )
    if options.name == VLLM_MODEL:
        print(f"vLLM's figures were not measured here: {VLLM_SOURCE}.")
