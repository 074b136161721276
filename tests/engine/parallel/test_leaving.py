"""A rank dies in the middle of a chunk, the others go on as fewer, and a new one comes to them."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing

from longreach.engine.errors import LeftMeshError
from longreach.engine.kv.formats import KVCacheDtype
from longreach.engine.kv.hand_off import Place
from longreach.engine.kv.pages import HeldPages
from longreach.engine.local import LocalPrefill
from longreach.engine.parallel.mesh import Mesh

from ..checkpoints import DUAL_CHUNK, VOCAB, make_checkpoint
from .test_mesh import RecordingSender

PROMPT = np.random.default_rng(1).integers(0, VOCAB, 1400).astype(np.int32)
CHUNK = 256
DIES_AT, COMES_AT = 512, 1024
PUBLISHED = {**DUAL_CHUNK, "sparse_attention_threshold": 800}
SECONDS = 60.0


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


def run_chunks(local: LocalPrefill, start: int, end: int) -> Tensor | None:
    logits = None
    for first in range(start, end, CHUNK):
        until = min(first + CHUNK, end)
        logits = local.prefiller.run_chunk("a", first, until, RecordingSender()).logits
    return logits


def rank_main(
    rank: int, mesh: tuple[int, int], how: signal.Signals, kept: KVCacheDtype, folder: Path
) -> None:
    """The last row of ranks dies. Those that are left go on, and then one row more."""
    torch.set_num_threads(1)
    tensor, sequence = mesh
    joined = Mesh.join(tensor, sequence, rank, f"file://{folder}/whole")
    local = LocalPrefill(folder, 1408, mesh=joined, kv_cache_dtype=kept)
    local.prefiller.admit("a", PROMPT)
    run_chunks(local, 0, DIES_AT)
    if rank >= tensor * (sequence - 1):
        (folder / f"dies-{rank}").write_text(str(os.getpid()))
        local.prefiller.run_chunk("a", DIES_AT, DIES_AT + CHUNK, FatalSender(how))
        os.kill(os.getpid(), how)
    leaving = threading.Thread(target=leave_after_death, args=(joined, mesh, folder))
    leaving.start()
    with pytest.raises((LeftMeshError, RuntimeError)):
        run_chunks(local, DIES_AT, COMES_AT)
    leaving.join()
    with pytest.raises(LeftMeshError):
        joined.sum_over_sequence_ranks(torch.ones(3))
    left = Mesh.join(tensor, sequence - 1, rank, f"file://{folder}/left")
    local.prefiller.move_to(left)
    local.prefiller.rename("a", "b", DIES_AT)
    local.prefiller.rename("b", "a", DIES_AT)
    run_chunks(local, DIES_AT, COMES_AT)
    left.leave()
    finish(local, mesh, rank, folder, takes=False)


def leave_after_death(joined: Mesh, mesh: tuple[int, int], folder: Path) -> None:
    dying = range(mesh[0] * (mesh[1] - 1), mesh[0] * mesh[1])
    wait_for(lambda: all((folder / f"dies-{rank}").exists() for rank in dying))
    time.sleep(1.0)
    joined.leave()


def newcomer_main(rank: int, mesh: tuple[int, int], kept: KVCacheDtype, folder: Path) -> None:
    torch.set_num_threads(1)
    tensor = mesh[0]
    alone = Mesh.join(tensor, 1, rank % tensor, f"file://{folder}/new")
    local = LocalPrefill(folder, 1408, mesh=alone, kv_cache_dtype=kept)
    local.pool.memory.fill_(torch.nan)
    alone.leave()
    local.prefiller.admit("a", PROMPT)
    finish(local, mesh, rank, folder, takes=True)


def finish(
    local: LocalPrefill, mesh: tuple[int, int], rank: int, folder: Path, takes: bool
) -> None:
    whole = Mesh.join(*mesh, rank, f"file://{folder}/again")
    local.prefiller.move_to(whole)
    local.prefiller.share("a", COMES_AT, source=0, takes=takes)
    torch.save(run_chunks(local, COMES_AT, len(PROMPT)), folder / f"{rank}.pt")
    # As a worker of Ray ends: a collective of gloo that was given up waits for good.
    os._exit(0)


@pytest.mark.parametrize(
    ("mesh", "how", "kept"),
    [
        ((1, 2), signal.SIGKILL, "auto"),
        ((1, 4), signal.SIGKILL, "auto"),
        ((1, 3), signal.SIGSTOP, "fp8_e4m3"),
        ((2, 2), signal.SIGKILL, "auto"),
    ],
)
def test_a_prompt_goes_on_without_a_row_of_ranks_and_with_another(
    mesh: tuple[int, int], how: signal.Signals, kept: KVCacheDtype, tmp_path: Path
) -> None:
    """Of four, two ranks wait for others that live; a rank that hangs closes no connection."""
    folder = make_checkpoint(tmp_path / "checkpoint", PUBLISHED, sparse=(60, 128))
    expected = LocalPrefill(folder, 1408, kv_cache_dtype=kept).logits(PROMPT, CHUNK)
    context, size = multiprocessing.get_context("spawn"), mesh[0] * mesh[1]
    dying = range(size - mesh[0], size)
    ranks = [
        context.Process(target=rank_main, args=(rank, mesh, how, kept, folder))
        for rank in range(size)
    ]
    ranks += [
        context.Process(target=newcomer_main, args=(rank, mesh, kept, folder)) for rank in dying
    ]
    for rank in ranks:
        rank.start()
    try:
        for number, rank in enumerate(ranks):
            if number not in dying:
                rank.join(SECONDS)
                assert rank.exitcode == 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    for rank in range(size):
        # Ranks add up in another order, in float32, through all layers.
        found = torch.load(folder / f"{rank}.pt")
        tolerance = 3e-4 if kept == "auto" else 3e-2
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
