"""A process whose pages others read by NIXL, over TCP."""

import os
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from longreach.cluster.transports.nixl import NixlAgent, NixlPool
from longreach.engine.kv.pages import PageGeometry, PagePool

from ...processes import forking

LAYERS, OWN_HEADS = 3, 2
SECONDS = 120.0


@dataclass(frozen=True)
class Case:
    """How many pages of which type the owner has."""

    dtype: torch.dtype
    pages: int = 12
    head_dim: int = 64

    def make_pool(self, heads: int, extra: int = 0) -> PagePool:
        geometry = PageGeometry(LAYERS, heads, self.head_dim, self.dtype)
        pool = PagePool(geometry, self.pages + extra, torch.device("cpu"))
        pool.clear()
        return pool

    def fill(self, pool: PagePool) -> None:
        if self.pages > 100:  # what is in them does not matter
            pool.memory.fill_(1)
            return
        generator = torch.Generator().manual_seed(0)
        for layer in range(LAYERS):
            shape = pool.memory.shape[1:]
            pool.memory[layer] = torch.randn(shape, generator=generator).to(self.dtype)
            if pool.scales is not None:
                pool.scales[layer] = torch.rand(pool.scales.shape[1:], generator=generator)


def own(case: Case, heads: int, connection: Connection) -> None:
    """A rank that has pages and does nothing about them."""
    torch.set_num_threads(1)
    os.environ["UCX_TLS"] = "tcp"  # as the test's own, which whoever forked this need not have
    pool = case.make_pool(heads)
    case.fill(pool)
    agent = NixlAgent(pool)
    connection.send(agent.pool)
    connection.recv()


class Owner:
    """The other process, and the pool that it lets others read."""

    def __init__(self, case: Case, heads: int = OWN_HEADS) -> None:
        context = forking()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=own, args=(case, heads, theirs), daemon=True)
        self.process.start()
        theirs.close()
        assert self.connection.poll(SECONDS)
        self.pool: NixlPool = self.connection.recv()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> None:
        self.process.kill()
        self.process.join(SECONDS)
