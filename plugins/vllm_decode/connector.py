# pyright: reportMissingImports=false, reportUntypedBaseClass=false
# vLLM is installed in an environment of its own.
"""What vLLM is told of pages that come from elsewhere.

vLLM loads this module by its name (`kv_connector_module_path`), once for its scheduler and once for
its worker. It asks the scheduler's about each new sequence: one whose prompt a gang computes gets
all of its blocks at once, and waits. Its blocks are then known here, transports write them, and
when the worker's is told that all have come, vLLM goes on with the sequence. vLLM never moves a
page itself, and never hears of a hand-off that failed: such a sequence is ended, as one whose
client has left.
"""

from typing import Any

from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)

from .errors import OtherConnectorError

HANDED_OFF = "longreach_handed_off"
"""Of a sequence's `kv_transfer_params`: whether its pages come from elsewhere."""


class HandOffConnector(KVConnectorBase_V1):
    """Both ends, one object each.

    `blocks` are those of sequences that are handed off, by name, from when vLLM allocated them
    until `forget`; `caches` are the worker's, by the names of layers.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.blocks: dict[str, list[Any]] = {}
        self.caches: dict[str, Tensor] = {}
        self._arrived: set[str] = set()

    # The scheduler's.

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """All of the prompt, later: vLLM computes the last token again, and goes on from there."""
        if not _is_handed_off(request):
            return 0, False
        return request.num_prompt_tokens - num_computed_tokens, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Remember where a sequence's pages go; called once more when they have come."""
        if num_external_tokens and _is_handed_off(request):
            self.blocks[request.request_id] = list(blocks.blocks[0])

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Nothing: the worker's end hears of pages from whoever copies them."""
        return KVConnectorMetadata()

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Its blocks are free at once: nobody reads pages that were handed off."""
        return False, None

    def forget(self, name: str) -> None:
        """A sequence has ended, or its pages have come."""
        self.blocks.pop(name, None)

    # The worker's.

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Where all blocks lie."""
        self.caches = dict(kv_caches)

    def arrived(self, name: str) -> None:
        """All pages of a sequence have come, or none come any more."""
        self._arrived.add(name)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Sequences whose pages have come since the last step."""
        arrived, self._arrived = self._arrived, set()
        return None, arrived or None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Pages come by themselves."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No sequence is in a step before all of its pages are there."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing is handed on."""

    def wait_for_save(self) -> None:
        """Nothing is handed on."""


def connector_of(end: str, found: object) -> HandOffConnector:
    """The connector of the scheduler, or of the worker, as `end` says.

    Raises:
        OtherConnectorError: vLLM has another one there.
    """
    if not isinstance(found, HandOffConnector):
        raise OtherConnectorError(end, type(found).__name__, HandOffConnector.__name__)
    return found


def _is_handed_off(request: Any) -> bool:
    return bool((request.kv_transfer_params or {}).get(HANDED_OFF))
