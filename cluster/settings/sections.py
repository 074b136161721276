"""The sections of a configuration, each by itself: keys, types, bounds and defaults."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...engine.kv.formats import KVCacheDtype
from ...engine.model.config import Dtype, WeightFormat
from ...engine.model.files import ModelFiles
from ..recovery import RECOVERY_SECONDS

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NodeLabels = dict[str, str]
"""Of Ray's nodes: something is placed only on those that have all of them."""


class Section(BaseModel):
    """Unknown keys are refused, types are not guessed, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ModelSettings(Section):
    """Which checkpoint, under which name, in which type.

    `path` is a Hugging Face checkpoint folder, "pocket" for the bundled model, or "random/" and a
    shape of engine/model/shapes for random weights of a real model's sizes. `dtype` "auto" is up to
    each process: see `engine.model.compute_type`. `weights` "fp8" rounds linear layers' weights to
    8 bits as they are read. `kv_cache_dtype` is how KV pages are kept.
    """

    path: str
    name: Annotated[str, Field(min_length=1)]
    dtype: Dtype = "auto"
    weights: WeightFormat = "auto"
    kv_cache_dtype: KVCacheDtype = "auto"

    @property
    def pages_kept_as(self) -> KVCacheDtype:
        """How every rank and worker keeps KV pages, in whatever type each of them computes."""
        if (self.dtype, self.kv_cache_dtype) == ("auto", "auto"):
            return "bfloat16"
        return self.kv_cache_dtype

    @property
    def files(self) -> ModelFiles:
        """Where the model's parts lie.

        Raises:
            CheckpointError: no shape of that name.
        """
        return ModelFiles.of(self.path)

    @property
    def folder(self) -> Path:
        """With the model's configuration."""
        return self.files.folder


class LimitSettings(Section):
    """What one request may ask for, and how many may wait at a decode replica for each gang.

    `retries`: processes that may die under a request before it is refused; see `attempts`.
    With `clamp_max_tokens` a request for a longer answer gets the longest, and is refused without.
    """

    max_model_len: Count
    max_output_tokens: Count = 4096
    clamp_max_tokens: bool = True
    max_body_bytes: Count = 64 << 20
    receive_seconds: Positive = 120.0
    max_choices: Count = 8
    max_prompts: Count = 1024
    max_scored_tokens: Count = 131072
    max_logprobs: Annotated[int, Field(ge=0)] = 20
    max_queued_requests: Annotated[int, Field(ge=0, le=1000)] = 32
    retries: Annotated[int, Field(ge=0, le=10)] = 2


class PrefillSettings(Section):
    """One kind of gang: `tensor_parallel` × `sequence_parallel` ranks, a KV pool on every rank.

    `max_replicas`: up to how many there are under load; None: always `replicas`.

    `name` tells several apart. `max_prompt_tokens`: longer prompts go to the next gang; None: none
    is too long. There are `replicas` gangs of the kind.
    `patience`: how far shorter prompts may pass one that came before them; see `fairness.Turns`.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")] | None = None
    max_prompt_tokens: Count | None = None
    replicas: Count = 1
    max_replicas: Count | None = None
    tensor_parallel: Count = 1
    sequence_parallel: Count = 1
    chunk_tokens: Count = 32768
    kv_cache_tokens: Count
    threads_per_rank: Count = 1
    cpus_per_rank: NotNegative = 1.0
    gpus_per_rank: NotNegative = 0.0
    placement: Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"] = "STRICT_PACK"
    nodes: NodeLabels = {}
    sparse: bool = True
    patience: Positive = 2.0

    @model_validator(mode="before")
    @classmethod
    def _has_no_ageing(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "ageing" in raw:
            raise ValueError(
                "prefill.ageing, in tokens a second, is gone, because time is now counted in "
                "computed tokens; remove it, or set prefill.patience (2.0 by default)"
            )
        return raw

    @property
    def num_ranks(self) -> int:
        """Ranks of one gang."""
        return self.tensor_parallel * self.sequence_parallel

    def key(self, name: str) -> str:
        """What a key of this gang is called in messages, as "prefill.replicas of gang 'short'"."""
        return f"prefill.{name}" + (f" of gang {self.name!r}" if self.name else "")


class DecodeSettings(Section):
    """The decode replicas: one worker each, with a KV pool. `max_replicas` as a gang's.

    A worker has `tensor_parallel` ranks, each a process with its heads and their KV: `threads`,
    `cpus` and `gpus` are of each.
    Prompts of up to `prefill_up_to` tokens are computed by the worker itself, beside others'
    answers, `prefill_at_once` tokens of them in one step, and of one that nobody is beside up to
    `prefill_alone`; a gang is asked for longer ones.
    `patience`: as a gang's, for prompts that wait for pages here, or to be computed.
    `engine` "vllm" has vLLM generate, in the worker's process: see docs/vllm.md.
    Where `max_batch` or one of these three is None, it is what suits the worker's device.
    """

    engine: Literal["native", "vllm"] = "native"
    replicas: Count = 1
    max_replicas: Count | None = None
    tensor_parallel: Count = 1
    kv_cache_tokens: Count
    max_batch: Count | None = None
    prefill_up_to: Annotated[int, Field(ge=0)] | None = None
    prefill_at_once: Count | None = None
    prefill_alone: Count | None = None
    threads: Count = 1
    cpus: NotNegative = 1.0
    gpus: NotNegative = 0.0
    nodes: NodeLabels = {}
    patience: Positive = 2.0

    @property
    def largest_batch(self) -> int:
        """Sequences in one step."""
        return self.max_batch or (64 if self.gpus else 32)

    @property
    def longest_own_prompt(self) -> int:
        """Tokens of the longest prompt that no gang is asked for."""
        by_default = 8192 if self.gpus else 2048
        return by_default if self.prefill_up_to is None else self.prefill_up_to

    @property
    def prompt_tokens_at_once(self) -> int:
        """Tokens of prompts in one step."""
        return self.prefill_at_once or (1024 if self.gpus else 512)

    @property
    def prompt_tokens_alone(self) -> int:
        """Tokens in one step of a prompt that nobody is beside."""
        at_once = self.prompt_tokens_at_once
        by_default = 8192 if self.gpus and self.engine == "native" else at_once
        # No prompt that is computed here has more.
        return max(at_once, min(self.prefill_alone or by_default, self.longest_own_prompt))


class IngressSettings(Section):
    """The HTTP endpoint. `api_keys_file` has one key a line; without it everybody is welcome.

    `allowed_hosts` are names that clients may reach it by, without ports, and `allowed_origins`
    web pages that may use it. `*` stands for all. `progress_seconds` and what follows it is what a
    client that waits gets meanwhile: see `rest.limits.SignsOfLife`.
    """

    replicas: Count = 1
    nodes: NodeLabels = {}
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    api_keys_file: Path | None = Field(default=None, strict=False)
    allowed_hosts: list[str] = []
    allowed_origins: list[Annotated[str, Field(pattern=r"^(\*|https?://[^/]+)$")]] = []
    progress_seconds: Annotated[float, Field(gt=0, le=2)] = 1.0
    empty_delta_seconds: Positive | None = None
    white_space_seconds: Positive | None = None


class TransportSettings(Section):
    """How pages travel to decode replicas, and how many bytes each of a rank's hand-offs may have
    under way, to each rank of a decode worker.

    By "object_store", Ray's, they go anywhere over the host's memory. By "cuda_ipc" a decode worker
    copies them from GPU to GPU, of one host; nothing is under way then but messages. By "nixl" it
    reads them out of a rank's memory, on any host.
    """

    kind: Literal["object_store", "cuda_ipc", "nixl"] = "object_store"
    max_in_flight_bytes: Count = 256 << 20

    @property
    def gathers_pages(self) -> bool:
        """Whether a rank copies what it sends, a layer's pages at a time, on its device."""
        return self.kind == "object_store"


class MetricsSettings(Section):
    """Where processes leave their figures; a fresh temporary folder when not given."""

    directory: Path | None = Field(default=None, strict=False)


class AutoscalingSettings(Section):
    """Between `replicas` and `max_replicas`: see `autoscaling`.

    `queue_seconds`: so long the prompts that wait may take to compute before there are more gangs.
    `kv_usage`: of a decode replica's pages, before there are more replicas. More come when that has
    been so for `up_seconds`, and fewer when fewer would have done for `down_seconds`.
    """

    queue_seconds: Positive = 60.0
    kv_usage: Annotated[float, Field(gt=0, le=1)] = 0.8
    up_seconds: NotNegative = 15.0
    down_seconds: NotNegative = 600.0


class ShutdownSettings(Section):
    """How long accepted requests may take to finish when what serves them is asked to go.

    A gang has `drain_seconds`. What it has not finished by then goes on at another one, for which
    whoever waits for it stays up to `hand_over_seconds` more: a decode replica until another gang
    is there and has read back what was computed, an ingress until its clients are answered. Where
    the whole cluster stops, nobody is there to go on, and all have `drain_seconds`.
    """

    drain_seconds: NotNegative = 600.0
    hand_over_seconds: NotNegative = 1200.0

    @property
    def decode_seconds(self) -> float:
        """How long a decode replica that is asked to go may take to finish what it has."""
        return self.drain_seconds + min(self.hand_over_seconds, RECOVERY_SECONDS)

    @property
    def ingress_seconds(self) -> float:
        """How long an ingress that is asked to go may keep its clients, as nobody else can."""
        return self.drain_seconds + self.hand_over_seconds
