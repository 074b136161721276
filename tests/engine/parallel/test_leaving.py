"""A rank dies in the middle of a chunk, the others go on as fewer, and a new one comes to them."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from longreach.engine.errors import LeftMeshError
from longreach.engine.kv.formats import KVCacheDtype
from longreach.engine.kv.hand_off import Place
from longreach.engine.kv.pages import HeldPages
from longreach.engine.local import LocalPrefill
from longreach.engine.parallel.mesh import Mesh

from ...processes import forking
from ..checkpoints import DUAL_CHUNK, make_checkpoint
from .test_mesh import RecordingSender

PUBLISHED = {**DUAL_CHUNK, "sparse_attention_threshold": 800}
SECONDS = 60.0


@dataclass(frozen=True)
class Case:
    """The last row of ranks of a mesh ends in a prompt's third chunk, and one comes with its fifth.

    `chunk` tokens are in each of six chunks, but in the last.
    """

    mesh: tuple[int, int]
    how: signal.Signals
    kept: KVCacheDtype
    folder: Path
    chunk: int = 256
    on_gpus: bool = False

    @property
    def prompt(self) -> np.ndarray:
        length = 6 * self.chunk - 120
        return np.random.default_rng(1).integers(32, 90, length).astype(np.int32)

    @property
    def dies_at(self) -> int:
        return 2 * self.chunk

    @property
    def comes_at(self) -> int:
        return 4 * self.chunk

    @property
    def dying(self) -> range:
        tensor, sequence = self.mesh
        return range(tensor * (sequence - 1), tensor * sequence)

    def device(self, rank: int) -> torch.device:
        return torch.device("cuda", rank) if self.on_gpus else torch.device("cpu")

    def join(self, sequence: int, rank: int, place: str) -> Mesh:
        meeting = f"file://{self.folder}/{place}"
        backend = "nccl" if self.on_gpus else "gloo"
        return Mesh.join(self.mesh[0], sequence, rank, meeting, backend)

    def local(self, mesh: Mesh, rank: int) -> LocalPrefill:
        """With nothing but NaN in its pages, unless these are of 8 bits."""
        torch.set_num_threads(1)
        device = self.device(rank)
        if self.on_gpus:
            torch.cuda.set_device(device)
        dtype = torch.bfloat16 if self.on_gpus else torch.float32
        local = LocalPrefill(
            self.folder, 6 * self.chunk, dtype, device, mesh=mesh, kv_cache_dtype=self.kept
        )
        local.pool.memory.fill_(torch.nan)
        return local

    def compute(self, local: LocalPrefill, start: int, end: int) -> Tensor | None:
        """Some chunks; the logits behind the last."""
        logits = None
        for first in range(start, end, self.chunk):
            until = min(first + self.chunk, end)
            result = local.prefiller.run_chunk("a", first, until, RecordingSender())
            assert result.stages
            logits = result.logits
        return None if logits is None else logits.cpu()


class FatalSender(RecordingSender):
    """Ends its process as soon as it is given pages of the second layer."""

    def __init__(self, how: signal.Signals) -> None:
        super().__init__()
        self._how = how

    def push(self, place: Place, pages: HeldPages) -> None:
        if place.layer == 1:
            os.kill(os.getpid(), self._how)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def rank_main(rank: int, case: Case) -> None:
    """One of those that are there from the beginning."""
    joined = case.join(case.mesh[1], rank, "whole")
    local = case.local(joined, rank)
    local.prefiller.admit("a", case.prompt)
    case.compute(local, 0, case.dies_at)
    if rank in case.dying:
        (case.folder / f"dies-{rank}").touch()
        end = case.dies_at + case.chunk
        local.prefiller.run_chunk("a", case.dies_at, end, FatalSender(case.how))
        os.kill(os.getpid(), case.how)
    leaving = threading.Thread(target=leave_after_death, args=(joined, case))
    leaving.start()
    try:
        case.compute(local, case.dies_at, case.comes_at)
    except (LeftMeshError, RuntimeError):
        pass
    else:
        # What waited on a GPU has ended, and nobody was told.
        assert case.on_gpus
    leaving.join()
    assert joined.is_left
    with pytest.raises(LeftMeshError):
        joined.sum_over_sequence_ranks(torch.ones(3, device=case.device(rank)))
    if case.on_gpus:
        torch.cuda.synchronize()
    left = case.join(case.mesh[1] - 1, rank, "left")
    local.prefiller.move_to(left)
    local.prefiller.rename("a", "b", case.dies_at)
    local.prefiller.rename("b", "a", case.dies_at)
    case.compute(local, case.dies_at, case.comes_at)
    left.leave()
    finish(local, rank, case, takes=False)


def leave_after_death(joined: Mesh, case: Case) -> None:
    wait_for(lambda: all((case.folder / f"dies-{rank}").exists() for rank in case.dying))
    time.sleep(1.0)
    joined.leave()
    # Whoever failed has left before it is told to.
    joined.leave()


def newcomer_main(rank: int, case: Case) -> None:
    """One that comes later, and has met its own row alone."""
    wait_for(lambda: all((case.folder / f"dies-{rank}").exists() for rank in case.dying))
    alone = case.join(1, rank % case.mesh[0], "new")
    local = case.local(alone, rank)
    alone.leave()
    local.prefiller.admit("a", case.prompt)
    finish(local, rank, case, takes=True)


def finish(local: LocalPrefill, rank: int, case: Case, takes: bool) -> None:
    whole = case.join(case.mesh[1], rank, "again")
    local.prefiller.move_to(whole)
    local.prefiller.share("a", case.comes_at, takes=takes)
    logits = case.compute(local, case.comes_at, len(case.prompt))
    torch.save(logits, case.folder / f"{rank}.pt")
    # As a worker of Ray ends: a collective of gloo that was given up waits for good.
    os._exit(0)


def run(case: Case) -> list[Tensor]:
    """The logits of all ranks that are there in the end."""
    context, size = forking(), case.mesh[0] * case.mesh[1]
    ranks = [context.Process(target=rank_main, args=(rank, case)) for rank in range(size)]
    ranks += [context.Process(target=newcomer_main, args=(rank, case)) for rank in case.dying]
    for rank in ranks:
        rank.start()
    try:
        for number, rank in enumerate(ranks):
            if number not in case.dying:
                rank.join(SECONDS)
                assert rank.exitcode == 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return [torch.load(case.folder / f"{rank}.pt") for rank in range(size)]


@pytest.mark.parametrize(
    ("mesh", "how", "kept"),
    [
        ((1, 2), signal.SIGKILL, "auto"),
        pytest.param((1, 4), signal.SIGKILL, "auto", marks=pytest.mark.slow),
        ((1, 3), signal.SIGSTOP, "fp8_e4m3"),
        ((2, 2), signal.SIGKILL, "auto"),
    ],
)
def test_a_prompt_goes_on_without_a_row_of_ranks_and_with_another(
    mesh: tuple[int, int], how: signal.Signals, kept: KVCacheDtype, tmp_path: Path
) -> None:
    """Of four, two ranks wait for others that live; a rank that hangs closes no connection."""
    folder = make_checkpoint(tmp_path / "checkpoint", PUBLISHED, sparse=(60, 128))
    case = Case(mesh, how, kept, folder)
    alone = LocalPrefill(folder, 6 * case.chunk, kv_cache_dtype=kept)
    expected = alone.logits(case.prompt, case.chunk)
    tolerance = 3e-4 if kept == "auto" else 3e-2
    for found in run(case):
        # Ranks add up in another order, in float32, through all layers.
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
