"""The kernels' step over two ranks says what it says on one.

On two GPUs over NCCL, captured; elsewhere in Triton's interpreter over gloo.
"""

import gc
from multiprocessing.connection import Client, Listener
from pathlib import Path

import pytest
import torch

from longreach.engine.decode.decoder import Decoder
from longreach.engine.decode.detokenizer import TokenBytes
from longreach.engine.decode.follower import Follower
from longreach.engine.decode.graph_step import GraphStep, captured, eager
from longreach.engine.decode.leader import Followers, LeadingPool, LeadingStep
from longreach.engine.decode.step import PromptLimits
from longreach.engine.kv.pages import PagePool
from longreach.engine.messages import Delta
from longreach.engine.model.qwen2 import Qwen2
from longreach.engine.parallel.mesh import Mesh
from longreach.kernels import elementwise, greedy, matvec
from longreach.kernels.elementwise import triton_elementwise
from longreach.kernels.greedy import triton_greedy
from longreach.kernels.matvec import triton_matvec
from longreach.lab.pocket.tokenizer import build_tokenizer

from ...kernels import conftest  # noqa: F401  # mends Triton's interpreter
from ...processes import run_ranks
from ..checkpoints import DUAL_CHUNK, make_checkpoint
from .test_decode import make_prompt, make_request

ON_GPUS = torch.cuda.device_count() > 1
PROMPTS = PromptLimits(longest=512, at_once=128, pieces=2)
PROGRAMS, PAGES = 3, 12
ROWS = [1, 2]
Said = dict[tuple[str, int], list[tuple[int, float]]]
"""Tokens and their log-probabilities of each choice of each request."""


def make_step(model: Qwen2, pool: PagePool) -> GraphStep:
    capture = captured(model.device) if ON_GPUS else eager
    return GraphStep(model, pool, ROWS, PROGRAMS, capture, PROMPTS)


def decode(mesh: Mesh, folder: Path, followers: Followers, device: torch.device) -> Said:
    model = Qwen2.load(folder, mesh, torch.float32, device)
    pool = LeadingPool(model.page_geometry, PAGES, device, followers)
    pool.memory.fill_(torch.nan)
    step = LeadingStep(make_step(model, pool), followers)
    decoder = Decoder(model, pool, TokenBytes(build_tokenizer()), ROWS[-1], PROMPTS, step=step)
    outputs = []
    for name, length, sampling in (
        ("best", 129, {}),
        ("drawn", 20, {"temperature": 0.9, "seed": 3, "top_p": 0.9}),
        ("from logits", 127, {"top_logprobs": 3, "choices": 2}),
    ):
        prompt = make_prompt(length, seed=length)
        decoder.admit(make_request(name, prompt, max_tokens=4, **sampling))
        outputs += decoder.step()
    while decoder.has_work:
        outputs += decoder.step()
    said: Said = {}
    for name, delta in outputs:
        if isinstance(delta, Delta):
            own = said.setdefault((name, delta.choice), [])
            own += [(token.token_id, token.logprob) for token in delta.tokens]
    return said


def use_kernels() -> None:
    """In the interpreter, all of the step's kernels instead of their definitions."""
    elementwise._version = lambda tensor: triton_elementwise
    greedy.best_tokens = triton_greedy.best_tokens
    matvec.linear = triton_matvec.linear


def rank_main(rank: int, ranks: int, folder: Path, output: Path) -> None:
    torch.set_num_threads(1)
    use_kernels()
    device = torch.device("cuda", rank) if ON_GPUS else torch.device("cpu")
    if ON_GPUS:
        torch.cuda.set_device(device)
    address = str(output / "orders")
    listener = Listener(address, family="AF_UNIX") if rank else None
    meeting = f"file://{output}/meeting-{ranks}"
    mesh = Mesh.join(ranks, 1, rank, meeting, "nccl" if ON_GPUS else "gloo")
    # NCCL's ranks do not wait for each other before they first have something to exchange.
    mesh.sum_over_tensor_ranks(torch.zeros(1, device=device)).cpu()
    if listener is None:
        channels = [Client(address, family="AF_UNIX")] if ranks > 1 else []
        followers = Followers(channels)
        torch.save(decode(mesh, folder, followers, device), output / f"said-{ranks}.pt")
        followers.close()
    else:
        follow(mesh, folder, listener, device)
    # Graphs hold their communicator.
    gc.collect()
    mesh.close()


def follow(mesh: Mesh, folder: Path, listener: Listener, device: torch.device) -> None:
    model = Qwen2.load(folder, mesh, torch.float32, device)
    pool = PagePool(model.page_geometry, PAGES, device)
    pool.memory.fill_(torch.nan)
    Follower(pool, make_step(model, pool)).follow(listener.accept())


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none")
def test_two_ranks_say_what_one_says(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", DUAL_CHUNK, layers=1)
    for ranks in (1, 2):
        run_ranks(rank_main, (ranks, folder, tmp_path), ranks)
    alone, both = (
        torch.load(tmp_path / f"said-{ranks}.pt", weights_only=False) for ranks in (1, 2)
    )
    assert {key: [token for token, _ in said] for key, said in both.items()} == {
        key: [token for token, _ in said] for key, said in alone.items()
    }
    assert sorted(alone) == [("best", 0), ("drawn", 0), ("from logits", 0), ("from logits", 1)]
    for key, said in alone.items():
        assert len(said) == 4
        # Ranks add up in another order, in float32.
        expected = [pytest.approx(logprob, rel=3e-4, abs=3e-4) for _, logprob in said]
        assert [logprob for _, logprob in both[key]] == expected
