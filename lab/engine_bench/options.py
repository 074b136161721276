"""The command line, checked."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...engine.errors import ConfigurationError
from ...engine.model.config import WeightFormat
from ...engine.model.files import RANDOM, ModelFiles
from ...kernels.page_size import PAGE_TOKENS
from .command_line import read
from .running import Chosen
from .sizes import batch, count, mesh

ATTENTIONS = ("sparse", "dense")
_MESHES = {
    "prompts": "1x1",
    "scaling": "1x1,1x2,1x4,1x8,2x4",
    "mesh": "1x1,1x2,2x1",
    "span": "1x1,2x1",
}
_CSV = {
    "prompts": Path("docs/bench/engine.csv"),
    "scaling": Path("docs/bench/scaling.csv"),
    "mesh": Path("docs/bench/mesh.csv"),
    "span": Path("docs/bench/span.csv"),
}


@dataclass(frozen=True)
class Options:
    """What to measure; `tokens` rise, and are one length but for prompts.

    `chunks` are sizes of chunks, one but for a mesh; `rank_tokens` those that each sequence rank of
    a mesh computes at once, in a chunk more. What `what` does not use is as it is by default.
    """

    what: str
    name: str
    files: ModelFiles
    tokens: tuple[int, ...]
    attentions: tuple[str, ...]
    kv_cache: str
    kept: WeightFormat
    chunks: tuple[int, ...]
    rank_tokens: int | None
    dense_up_to: int | None
    decode: int
    batches: tuple[tuple[int, ...], ...]
    chosen: tuple[Chosen, ...]
    baseline: bool
    csv: Path
    commit: str | None
    seed: int
    meshes: tuple[tuple[int, int], ...]
    link_gbs: float
    latency_us: float

    @property
    def chunk_tokens(self) -> int:
        """Of every chunk but a prompt's last."""
        return self.chunks[0]

    @property
    def weights(self) -> str:
        """Where they come from, and how they are kept."""
        source = f"random, seed {self.seed}" if self.files.random else "checkpoint"
        return source if self.kept == "auto" else f"{source}, {self.kept}"


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read and check a command line.

    Raises:
        CheckpointError: no such shape.
        ConfigurationError: a value that is none of its option's, or an option that the command
            does not use.
    """
    given = read(arguments)
    name = given.checkpoint or RANDOM + given.shape
    _check_numbers(given)
    tokens, batches = _tokens(given.what, given.tokens), _batches(given.what, given.batches)
    if not tokens and not batches:
        raise ConfigurationError("nothing to measure; name --tokens, or --batches, or both")
    return Options(
        what=given.what,
        name=name.removeprefix(RANDOM),
        files=_files(name, given.tokenizer),
        tokens=tokens,
        attentions=_attentions(given.what, given.attention),
        kv_cache=given.kv_cache,
        kept=given.weights,
        chunks=_chunks(given.what, given.chunk_tokens),
        rank_tokens=_rank_tokens(given.rank_tokens),
        dense_up_to=given.dense_up_to,
        decode=given.decode,
        batches=batches,
        chosen=_chosen(given.sampled, given.held),
        baseline=given.baseline,
        csv=given.csv or _CSV[given.what],
        commit=given.commit,
        seed=given.seed,
        meshes=_meshes(given.what, given.meshes),
        link_gbs=given.link_gbs,
        latency_us=given.latency_us,
    )


def _check_numbers(given: argparse.Namespace) -> None:
    # Of one step nothing can be said of how steps differ.
    least = 2 if given.what == "span" else 0
    if given.decode < least:
        raise ConfigurationError(f"--decode {given.decode}: take {least} or more")
    if not given.link_gbs > 0:
        raise ConfigurationError(f"--link-gbs {given.link_gbs}: take more than 0")
    if not given.latency_us >= 0:
        raise ConfigurationError(f"--latency-us {given.latency_us}: take 0 or more")


def _files(name: str, tokenizer: str | None) -> ModelFiles:
    files = ModelFiles.of(name)
    return files if tokenizer is None else replace(files, tokenizer_folder=Path(tokenizer))


def _tokens(what: str, text: str) -> tuple[int, ...]:
    """Rising; only prompts may be of several lengths, or none."""
    lengths = tuple(sorted({count(each) for each in text.split(",") if each}))
    if what != "prompts" and not lengths:
        raise ConfigurationError(f"{what} needs a prompt; name its length with --tokens")
    _check_one(what, f"--tokens {text}", lengths)
    return lengths


def _attentions(what: str, text: str) -> tuple[str, ...]:
    attentions = tuple(dict.fromkeys(text.split(",")))
    if not set(attentions) <= set(ATTENTIONS):
        raise ConfigurationError(f"--attention {text}: name {' or '.join(ATTENTIONS)}")
    _check_one(what, f"--attention {text}", attentions)
    return attentions


def _check_one(what: str, given: str, values: Sequence[object]) -> None:
    if what != "prompts" and len(values) > 1:
        raise ConfigurationError(
            f"{given}: {what} measures one; name one, and call it again for others"
        )


def _chunks(what: str, text: str) -> tuple[int, ...]:
    chunks = tuple(dict.fromkeys(_whole_pages("--chunk-tokens", each) for each in text.split(",")))
    if what != "mesh" and len(chunks) > 1:
        raise ConfigurationError(
            f"--chunk-tokens {text}: several sizes of chunks are for `mesh`; name one"
        )
    return chunks


def _rank_tokens(text: str | None) -> int | None:
    return None if text is None else _whole_pages("--rank-tokens", text)


def _whole_pages(option: str, text: str) -> int:
    tokens = count(text)
    if tokens % PAGE_TOKENS:
        raise ConfigurationError(f"{option} is {tokens}; make it a multiple of {PAGE_TOKENS}")
    return tokens


def _batches(what: str, text: str) -> tuple[tuple[int, ...], ...]:
    batches = tuple(batch(each) for each in text.split(",") if each)
    if what == "span" and not batches:
        raise ConfigurationError("span needs a batch; name one with --batches")
    return batches


def _meshes(what: str, text: str | None) -> tuple[tuple[int, int], ...]:
    return tuple(mesh(each) for each in (_MESHES[what] if text is None else text).split(","))


def _chosen(sampled: bool, held: bool) -> tuple[Chosen, ...]:
    more: tuple[Chosen, ...] = ("sampled", "held") if held else ("sampled",) if sampled else ()
    return ("greedy", *more)
