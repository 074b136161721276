"""One rank of a decoder that spans several GPUs, in a process of its own."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path

import numpy as np
import torch

from ...engine.decode.contract import Output
from ...engine.decode.decoder import Decoder
from ...engine.decode.detokenizer import TokenBytes
from ...engine.decode.follower import Follower
from ...engine.decode.leader import Followers, LeadingStep
from ...engine.decode.make_step import make_step
from ...engine.decode.orders import Channel
from ...engine.kv.pages import PagePool
from ...engine.messages import Delta
from ...engine.model.config import WeightFormat
from ...engine.model.files import ModelFiles
from ...engine.model.load import load_model
from ...engine.model.qwen2 import Qwen2
from ...engine.parallel.mesh import Mesh
from ...engine.text.tokenizer import Tokenizer
from ...kernels.page_size import pages_for
from .running import make_request
from .subject import page_geometry, synchronize

MOST_FIRST = 4
"""The first tokens of a batch that are kept, to compare."""


@dataclass(frozen=True)
class SpanCase:
    """Batches, one after the other, on so many tensor ranks."""

    ranks: int
    files: ModelFiles
    kv_cache: str
    kept: WeightFormat
    batches: tuple[tuple[int, ...], ...]
    new_tokens: int
    seed: int


@dataclass(frozen=True)
class SpanRun:
    """Seconds of each step of a batch; its first tokens with their log-probabilities, row by row.

    `free_bytes` are what the leader's device had left.
    """

    steps: list[float]
    first: list[list[tuple[int, float]]]
    free_bytes: int


def run_rank(rank: int, case: SpanCase, folder: Path) -> None:
    """Meet in the folder, and run every batch; rank 0 leaves `runs.pt` there."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    # As in a cluster, where the host has as much to do for each rank.
    torch.set_num_threads(1)
    if on_gpu:
        torch.cuda.set_device(device)
    listener = Listener(str(folder / f"orders-{rank}"), "AF_UNIX") if rank else None
    meeting = f"file://{folder}/meeting"
    mesh = Mesh.join(case.ranks, 1, rank, meeting, "nccl" if on_gpu else "gloo")
    model = load_model(case.files, mesh, torch.bfloat16, device, case.seed, case.kept)
    if on_gpu:
        torch.cuda.empty_cache()
    tokens = max(sum(pages_for(n + case.new_tokens + 2) for n in b) for b in case.batches)
    pool = PagePool(page_geometry(model.config, case.kv_cache, case.ranks), tokens, device)
    _fill(pool, model, case.seed)
    runs = []
    _meet(mesh, device)
    for batch in case.batches:
        channels = _orders(case, folder, listener)
        step = make_step(model, pool, len(batch))
        if rank:
            Follower(pool, step).follow(channels[0])
        else:
            leading = LeadingStep(step, Followers(channels))
            runs.append(_lead(case, batch, model, pool, leading))
            del leading
        # NCCL does not let go of a communicator while a graph that uses it is there.
        del step
        for channel in channels:
            channel.close()
    if not rank:
        torch.save([vars(run) for run in runs], folder / "runs.pt")
    mesh.close()


def read_runs(folder: Path) -> list[SpanRun]:
    """What rank 0 left, one for each batch."""
    return [SpanRun(**run) for run in torch.load(folder / "runs.pt", weights_only=False)]


def _meet(mesh: Mesh, device: torch.device) -> None:
    """Return when all ranks are here, with what they listen at."""
    mesh.sum_over_tensor_ranks(torch.zeros(1, device=device))
    synchronize(device)


def _orders(case: SpanCase, folder: Path, listener: Listener | None) -> list[Channel]:
    """A channel for the orders of one batch: at its end the leader closes it."""
    if listener is not None:
        return [listener.accept()]
    return [Client(str(folder / f"orders-{rank}"), "AF_UNIX") for rank in range(1, case.ranks)]


def _fill(pool: PagePool, model: Qwen2, seed: int) -> None:
    """With the same numbers for each head, however many ranks there are."""
    heads, memory = model.heads, pool.memory
    generator = torch.Generator(memory.device)
    one = torch.empty(memory[0, :, 0].shape, dtype=model.dtype, device=memory.device)
    for layer in range(len(memory)):
        for head in range(heads.num_kv_heads):
            generator.manual_seed(seed + layer * 1024 + heads.first_kv_head + head)
            memory[layer, :, head] = one.normal_(generator=generator).to(memory.dtype)
    if pool.scales is not None:
        pool.scales.fill_(1.0)


def _lead(
    case: SpanCase, batch: Sequence[int], model: Qwen2, pool: PagePool, step: LeadingStep
) -> SpanRun:
    token_bytes = TokenBytes(Tokenizer(case.files.tokenizer_folder).raw)
    decoder = Decoder(model, pool, token_bytes, len(batch), step=step)
    generator = np.random.default_rng(case.seed)
    for number, length in enumerate(batch):
        prompt = np.zeros(length, dtype=np.int32)
        decoder.reserve(make_request(str(number), prompt, case.new_tokens + 1))
    for number in range(len(batch)):
        logits = generator.standard_normal(model.config.vocab_size, dtype=np.float32)
        decoder.start(str(number), logits)
    device, outputs = pool.memory.device, []
    steps, started = [], time.perf_counter()
    while decoder.has_work:
        said = decoder.step()
        # Nothing is said where the next step is launched before this one is looked at.
        if said:
            outputs += said
            steps.append(time.perf_counter() - started)
            started = time.perf_counter()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return SpanRun(steps, [_first(outputs, str(n)) for n in range(len(batch))], free)


def _first(outputs: Sequence[Output], name: str) -> list[tuple[int, float]]:
    deltas = [said for request_id, said in outputs if request_id == name]
    tokens = [token for delta in deltas if isinstance(delta, Delta) for token in delta.tokens]
    return [(token.token_id, token.logprob) for token in tokens[:MOST_FIRST]]
