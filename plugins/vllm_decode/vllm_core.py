# pyright: reportMissingImports=false, reportUntypedBaseClass=false
# vLLM is installed in an environment of its own.
"""vLLM's engine core in this process: its scheduler, and the worker of one rank."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from hashlib import sha256
from typing import Any

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.engine import FinishReason
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor
from vllm.v1.request import Request, RequestStatus

from ...engine.decode.leader import Followers
from ...engine.figures import Figures
from ...engine.kv.pages import PageMemory
from ...engine.messages import ChosenToken, TokenLogprob
from ...kernels.page_size import PAGE_TOKENS
from ..vllm.first_runner import take_draws_back_on_cpus
from ..vllm.scheduler import ApartRequest
from . import sums
from .connector import HANDED_OFF, HandOffConnector, connector_of
from .core import Core, Generated, NewSequence
from .executor import LeadingExecutor
from .figures import VllmFigures
from .layers import LayeredMemory, layers_of
from .masks import MasksBackend, SequenceMasks
from .one_stream import OneStream

Hasher = Callable[[Request], list[BlockHash]]
"""Names the pages that a sequence has filled since it was last called."""

_NULL_BLOCKS = 1
"""That vLLM keeps for itself: what a block table has where there is none."""


def engine_arguments(num_pages: int, page_bytes: int, num_ranks: int, **options: Any) -> EngineArgs:
    """vLLM's options, of which some are as pages from elsewhere need them.

    Args:
        num_pages: that sequences may have.
        page_bytes: of a page in all layers, on each rank.
        num_ranks: that the model is cut into.
    """
    return EngineArgs(
        # Tokens come in and go out: text is made elsewhere.
        skip_tokenizer_init=True,
        generation_config="vllm",
        attention_backend="CUSTOM",
        block_size=PAGE_TOKENS,
        kv_cache_memory_bytes=(num_pages + _NULL_BLOCKS) * page_bytes,
        # What is allocated is said above. This share vLLM only wants to see free.
        gpu_memory_utilization=0.01,
        enable_prefix_caching=True,
        # Whoever writes a rank's blocks must be in its process.
        distributed_executor_backend=LeadingExecutor if num_ranks > 1 else "uni",
        tensor_parallel_size=num_ranks,
        **(sums.OPTIONS if num_ranks > 1 else {}),
        disable_hybrid_kv_cache_manager=True,
        disable_log_stats=True,
        kv_transfer_config=KVTransferConfig(
            kv_connector=HandOffConnector.__name__,
            kv_connector_module_path=HandOffConnector.__module__,
            kv_role="kv_consumer",
        ),
        **options,
    )


class VllmCore(Core):
    """Starts vLLM: loads the model, allocates all blocks, captures graphs.

    Args:
        arguments: of `engine_arguments`.
        figures: keeps vLLM's own metrics.
        followers: the other ranks, where there are any.

    Raises:
        OtherPagesError: its blocks are not laid out as pages are.
        OtherConnectorError, UnknownLayerError: its insides are others.
    """

    def __init__(
        self, arguments: EngineArgs, figures: Figures, followers: Followers | None = None
    ) -> None:
        # On CPUs vLLM starts a process for its worker unless this says that it has to do without.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        config = arguments.create_engine_config()
        executor: Any = Executor.get_class(config)
        if followers is not None:
            executor = partial(executor, followers)
        self._core = EngineCore(config, executor, log_stats=True)
        if config.device_config.device_type == "cpu":
            take_draws_back_on_cpus()
        self._scheduler: Any = self._core.scheduler
        self._pool: Any = self._scheduler.kv_cache_manager.block_pool
        self._scheduling = connector_of("scheduler", self._scheduler.get_kv_connector())
        self._working = connector_of("worker", get_kv_transfer_group())
        self._memory = LayeredMemory(list(layers_of(self._working.caches, config)))
        self._stream = OneStream(self._memory.device)
        manager = self._core.structured_output_manager
        manager.backend = MasksBackend(config, None, config.model_config.get_vocab_size())
        self._figures = VllmFigures(config, figures)
        self._sequences: dict[str, Request] = {}
        self._shared: dict[str, list[Any]] = {}
        self._begun: set[str] = set()
        self._preempted = 0
        leading = self._core.model_executor
        if isinstance(leading, LeadingExecutor):
            leading.tell_ready()

    @property
    def memory(self) -> PageMemory:
        return self._memory

    @property
    def num_pages(self) -> int:
        return self._memory.num_pages - _NULL_BLOCKS

    @property
    def num_free(self) -> int:
        return self._pool.get_num_free_blocks()

    @property
    def is_settling(self) -> bool:
        # A queue holds batches of no tokens as well, for as long as a sequence waits for its pages.
        computing = any(each[1].total_num_scheduled_tokens for each in self._core.batch_queue or ())
        return computing or self._scheduler.has_finished_requests()

    @property
    def num_preemptions(self) -> int:
        here = list(self._sequences.values())
        return self._preempted + sum(each.num_preemptions for each in here)

    def add(self, sequence: NewSequence) -> None:
        # Long prompts are told apart by their family: nothing has to look at their tokens for that.
        kind = Request if sequence.family is None else ApartRequest
        request = kind(
            sequence.name,
            sequence.prompt.tolist(),
            _sampling(sequence),
            None,
            block_hasher=self._hasher(sequence),
        )
        if request.structured_output_request is not None:
            assert sequence.held_to is not None
            request.structured_output_request.grammar = SequenceMasks(sequence.held_to)
        self._sequences[sequence.name] = request
        if sequence.shared:
            self._shared[sequence.name] = []
        self._core.add_request(request)
        self._figures.began(request)

    def pages_of(self, name: str) -> list[int]:
        blocks = self._scheduling.blocks.get(name, ())
        if blocks and name in self._shared and not self._shared[name]:
            # They stay, whenever the sequence itself ends: those that others can find, see `Room`.
            findable = (self._sequences[name].num_prompt_tokens - 1) // PAGE_TOKENS
            self._shared[name] = blocks[:findable]
            self._pool.touch(self._shared[name])
        return [block.block_id for block in blocks]

    def num_pages_of(self, names: Sequence[str]) -> int:
        manager = self._scheduler.kv_cache_manager
        held = {block.block_id for name in names for block in self._shared.get(name, ())}
        for name in names:
            if name in self._sequences:
                held.update(manager.get_block_ids(name)[0])
        return len(held)

    def num_computed(self, name: str) -> int:
        request = self._sequences.get(name)
        return 0 if request is None else request.num_computed_tokens

    def begin(self, name: str) -> None:
        self._scheduling.forget(name)
        self._begun.add(name)
        self._working.arrived(name)

    def let_go(self, name: str) -> None:
        blocks = self._shared.pop(name, None)
        if blocks:
            # What lies last is of least use to others, and is given out first.
            self._pool.free_blocks(reversed(blocks))

    def abort(self, names: Sequence[str]) -> None:
        for name in names:
            request = self._sequences.get(name)
            if request is None:
                continue
            waits = request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            if waits and name not in self._begun:
                # vLLM frees blocks that are written from elsewhere when it hears that this has
                # ended: once, wherever the sequence then is.
                self._working.arrived(name)
            self._forget(name)
        self._core.abort_requests(list(names))

    def end(self, name: str) -> None:
        self._figures.ended(name)
        self.abort([name])

    def step(self) -> list[Generated]:
        self._stream.take()
        outputs, executed = self._core.step_fn()
        self._core.post_step(executed)
        if not outputs or 0 not in outputs:
            # Of a step that is under way nothing has come yet, but blocks may have been allocated.
            self._figures.stand(self._scheduler.make_stats())
            return []
        self._figures.stepped(outputs[0])
        return [self._generated(each) for each in outputs[0].outputs]

    def _hasher(self, sequence: NewSequence) -> Hasher | None:
        """What names a sequence's pages in vLLM's prefix cache."""
        if sequence.family is None:
            return self._core.request_block_hasher
        return _hashes_of_a_family(sequence.family, sequence.name, len(sequence.prompt))

    def _generated(self, output: Any) -> Generated:
        name, reason = output.request_id, output.finish_reason
        request = self._sequences.get(name)
        top = 0 if request is None else request.sampling_params.logprobs or 0
        if reason is not None:
            self._forget(name)
        failed = None
        if reason is not None and reason not in (FinishReason.STOP, FinishReason.LENGTH):
            failed = f"vLLM ended it with {reason}"
        return Generated(name, list(_chosen(output, top)), reason is not None, failed)

    def _forget(self, name: str) -> None:
        request = self._sequences.pop(name, None)
        self._figures.left(name)
        self._begun.discard(name)
        self._scheduling.forget(name)
        if request is not None:
            self._preempted += request.num_preemptions


def _hashes_of_a_family(family: str, name: str, prompt_tokens: int) -> Hasher:
    """Names without a look at the tokens, which takes vLLM some tenths of a second for a million.

    A family has one prompt, whose whole pages are those of all its members; what a member says is
    its own.
    """
    shared = prompt_tokens // PAGE_TOKENS

    def hashes(request: Request) -> list[BlockHash]:
        first, last = len(request.block_hashes), request.num_tokens // PAGE_TOKENS
        owners = ((family if page < shared else name, page) for page in range(first, last))
        return [BlockHash(sha256(repr(each).encode()).digest()) for each in owners]

    return hashes


def _chosen(output: Any, most: int) -> Iterable[ChosenToken]:
    """With the best `most` alternatives; there are more where another sequence asked for more."""
    tokens, found = output.new_token_ids, output.new_logprobs
    for row, token in enumerate(tokens):
        if found is None:
            yield ChosenToken(token, float("nan"))
            continue
        ids, values = found.logprob_token_ids[row].tolist(), found.logprobs[row].tolist()
        # The one that was chosen comes first, wherever it is among the best.
        best = zip(ids[1 : 1 + most], values[1 : 1 + most], strict=True)
        top = tuple(TokenLogprob(each, value) for each, value in best)
        yield ChosenToken(token, values[0], top)


def _sampling(sequence: NewSequence) -> SamplingParams:
    """A choice's parameters in vLLM's words. Ranges were checked at the edge."""
    asked = sequence.sampling
    held = sequence.held_to is not None
    return SamplingParams(
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        seed=sequence.seed,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=asked.repetition_penalty,
        logit_bias=dict(asked.logit_bias) or None,
        # The model's own ends are among them.
        stop_token_ids=list(sequence.ends),
        ignore_eos=True,
        min_tokens=asked.min_tokens,
        logprobs=asked.top_logprobs,
        detokenize=False,
        # Its text is never looked at: what masks the tokens is put there by `VllmCore.add`.
        structured_outputs=StructuredOutputsParams(grammar="longreach") if held else None,
        extra_args={"kv_transfer_params": {HANDED_OFF: True}} if sequence.handed_off else None,
    )
