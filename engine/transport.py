"""How finished pages travel from a prefill rank to a decode replica.

Prefill pushes, layer by layer, while it computes; the decode replica has reserved the pages
before. One interface, so that callers do not know whether bytes move by Ray's object store or
by RDMA.
"""

from abc import ABC, abstractmethod

from torch import Tensor


class PageSender(ABC):
    """One prefill rank's way to one decode replica, for one request."""

    @abstractmethod
    def push(
        self,
        layer: int,
        first_page: int,
        first_kv_head: int,
        pages: Tensor,
        scales: Tensor | None = None,
    ) -> None:
        """Start sending consecutive pages of one layer; may block while too much is under way.

        Args:
            layer: of the model.
            first_page: index within the sequence, not within any pool.
            first_kv_head: the model-wide index of the first KV head in `pages`.
            pages: [n, kv_heads, 2, 128, head_dim]. The caller may overwrite it after return.
            scales: of pages of 8 bits, float32 [n, kv_heads, 2]; see `kernels.quantized`.
        """

    @abstractmethod
    def flush(self) -> None:
        """Return when everything pushed lies in the decode replica's pages.

        Raises:
            TransferError: the replica is gone or refused; the request cannot go on there.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Drop what is under way; no more pushes follow."""
