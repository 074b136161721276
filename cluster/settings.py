"""A cluster's configuration: YAML in, checked and frozen settings out.

Every key has a default but `model.path`, `model.name`, `limits.max_model_len` and the two
`kv_cache_tokens`. What cannot run is refused before anything starts, with a sentence that names the
remedy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from ..engine.errors import CheckpointError, ConfigurationError
from ..engine.kv.formats import KVCacheDtype
from ..engine.model.config import Dtype, ModelConfig, WeightFormat
from ..engine.model.files import ModelFiles
from ..engine.prefill.budgets import BUDGETS_FILE, dense_up_to, has_budgets
from ..kernels.page_size import PAGE_TOKENS, pages_for
from .recovery import RECOVERY_SECONDS

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NodeLabels = dict[str, str]
"""Of Ray's nodes: something is placed only on those that have all of them."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ModelSettings(_Section):
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


class LimitSettings(_Section):
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


class PrefillSettings(_Section):
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


class DecodeSettings(_Section):
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


class IngressSettings(_Section):
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


class TransportSettings(_Section):
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


class MetricsSettings(_Section):
    """Where processes leave their figures; a fresh temporary folder when not given."""

    directory: Path | None = Field(default=None, strict=False)


class AutoscalingSettings(_Section):
    """Between `replicas` and `max_replicas`: see `autoscaling`.

    `queue_seconds`: so long the prompts that wait may take to compute before there are more gangs.
    `kv_usage`: of a decode replica's pages, before there are more replicas. More come when that has
    been so for `up_seconds`, and fewer when fewer would have done for `down_seconds`.
    """

    queue_seconds: Positive = 60.0
    kv_usage: Annotated[float, Field(gt=0, le=1)] = 0.8
    up_seconds: NotNegative = 15.0
    down_seconds: NotNegative = 600.0


class ShutdownSettings(_Section):
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


@dataclass(frozen=True)
class HandOffTerms:
    """What both sides of a hand-off must agree in: whose pages they are, and how they travel.

    While a configuration takes the place of another one, sides of both are up.
    """

    model: ModelSettings
    transport: str


@dataclass(frozen=True)
class GangSettings:
    """What the processes of one gang need to know.

    `max_prompt_tokens` is the longest prompt that they get. `others_seconds` is how long what they
    replace may keep the room that they are to have.
    """

    model: ModelSettings
    prefill: PrefillSettings
    transport: TransportSettings
    max_prompt_tokens: int
    others_seconds: float

    @property
    def terms(self) -> HandOffTerms:
        """Which decode workers' prompts they may compute."""
        return HandOffTerms(self.model, self.transport.kind)


@dataclass(frozen=True)
class WorkerSettings:
    """What a decode worker needs to know.

    `longest_chunk` is the most tokens that it may get pages of at a time, from any gang.
    """

    model: ModelSettings
    decode: DecodeSettings
    transport: TransportSettings
    longest_chunk: int

    @property
    def terms(self) -> HandOffTerms:
        """Which gangs may compute prompts for it."""
        return HandOffTerms(self.model, self.transport.kind)


def _as_gangs(raw: Any) -> Any:
    """One gang may stand for a list of one."""
    if isinstance(raw, list):
        return tuple(raw)
    return (raw,) if isinstance(raw, (dict, PrefillSettings)) else raw


Gangs = Annotated[tuple[PrefillSettings, ...], BeforeValidator(_as_gangs), Field(min_length=1)]


class Settings(_Section):
    """A whole cluster. The gangs of `prefill` are in the order of the prompt lengths they take."""

    model: ModelSettings
    limits: LimitSettings
    prefill: Gangs
    decode: DecodeSettings
    ingress: IngressSettings = IngressSettings()
    transport: TransportSettings = TransportSettings()
    metrics: MetricsSettings = MetricsSettings()
    autoscaling: AutoscalingSettings = AutoscalingSettings()
    shutdown: ShutdownSettings = ShutdownSettings()

    @property
    def gangs(self) -> tuple[GangSettings, ...]:
        """For the processes of each gang, in the order of `prefill`."""
        return tuple(
            GangSettings(
                model=self.model,
                prefill=prefill,
                transport=self.transport,
                max_prompt_tokens=prefill.max_prompt_tokens or self.limits.max_model_len,
                others_seconds=self.shutdown.decode_seconds,
            )
            for prefill in self.prefill
        )

    @property
    def worker(self) -> WorkerSettings:
        """For the worker of each decode replica."""
        return WorkerSettings(
            model=self.model,
            decode=self.decode,
            transport=self.transport,
            longest_chunk=max(gang.chunk_tokens for gang in self.prefill),
        )

    @model_validator(mode="after")
    def _can_run(self) -> "Settings":
        problem = next(self._problems(), None)
        if problem is not None:
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        yield from self._problems_with_lengths()
        for gang in self.gangs:
            yield from _problems_with_gang(gang)
        longest = self.limits.max_model_len
        # Choices share the pages that the prompt fills. Each has the page that it fills in part to
        # itself, which holds PAGE_TOKENS - 1 tokens of the prompt at most; with vLLM, one more.
        beside = PAGE_TOKENS - (self.decode.engine == "native")
        answer = pages_for(self.limits.max_output_tokens + beside)
        needed = (pages_for(longest) + self.limits.max_choices * answer) * PAGE_TOKENS
        if self.decode.kv_cache_tokens < needed:
            yield (
                f"decode.kv_cache_tokens ({self.decode.kv_cache_tokens}) cannot hold the longest "
                f"request: {longest} tokens and {self.limits.max_choices} answers of "
                f"{self.limits.max_output_tokens}; make it {needed} or more"
            )
        yield from _problems_with_ranks(self.decode)
        if self.decode.prompt_tokens_at_once % PAGE_TOKENS:
            yield (
                f"decode.prefill_at_once is {self.decode.prefill_at_once}; make it a multiple of "
                f"{PAGE_TOKENS}"
            )
        at_once, alone = self.decode.prompt_tokens_at_once, self.decode.prefill_alone
        if alone is not None and alone < at_once:
            yield (
                f"decode.prefill_alone ({alone}) is below prefill_at_once ({at_once}), which a "
                "step may compute in any case; raise it, or leave it out"
            )
        for key, each in [("decode.max_replicas", self.decode)] + [
            (gang.key("max_replicas"), gang) for gang in self.prefill
        ]:
            if each.max_replicas is not None and each.max_replicas < each.replicas:
                yield (
                    f"{key} ({each.max_replicas}) is below replicas ({each.replicas}), with which "
                    "it begins; raise it, or leave it out for a fixed number"
                )
        if self.limits.max_choices > self.decode.largest_batch:
            yield (
                f"limits.max_choices ({self.limits.max_choices}) is more than decode.max_batch "
                f"({self.decode.largest_batch}), so one request would not fit into a step; raise "
                "decode.max_batch"
            )
        if self.decode.engine == "vllm":
            yield from self._problems_with_vllm()
        on_gpus = self.decode.gpus or any(gang.gpus_per_rank for gang in self.prefill)
        mixed = self.model.dtype in ("float32", "float16")
        if on_gpus and mixed and self.model.kv_cache_dtype == "bfloat16":
            yield (
                f"model.kv_cache_dtype bfloat16 beside model.dtype {self.model.dtype} is for CPUs; "
                "set model.dtype to bfloat16 where there are GPUs, or leave kv_cache_dtype out"
            )
        if on_gpus and mixed and self.model.weights == "fp8":
            yield (
                f"model.weights fp8 beside model.dtype {self.model.dtype} is for CPUs; set "
                "model.dtype to bfloat16 where there are GPUs, or leave weights out"
            )
        if self.transport.kind == "cuda_ipc":
            for gang in self.prefill:
                yield from self._problems_with_cuda_ipc(gang)
        shutdown = self.shutdown
        asked = "hand_over_seconds" in shutdown.model_fields_set and shutdown.hand_over_seconds
        if asked and not self.limits.retries:
            yield (
                f"shutdown.hand_over_seconds ({shutdown.hand_over_seconds:g}) waits for requests "
                "to go on elsewhere, and with limits.retries 0 none does; raise limits.retries, or "
                "leave hand_over_seconds out"
            )
        if self.limits.max_output_tokens >= longest:
            yield (
                f"limits.max_output_tokens ({self.limits.max_output_tokens}) leaves no room for a "
                f"prompt in limits.max_model_len ({longest}); lower it"
            )

    def _problems_with_lengths(self) -> Iterator[str]:
        """What keeps every prompt from having one gang."""
        names = [gang.name for gang in self.prefill]
        if len(names) > 1 and None in names:
            yield "prefill lists several gangs, and one has no `name`; give each its own"
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            yield f"prefill lists two gangs of the name {repeated!r}; give each its own"
        own, first = self.decode.longest_own_prompt, self.gangs[0]
        if first.prefill.max_prompt_tokens and first.max_prompt_tokens <= own:
            yield (
                f"{first.prefill.key('max_prompt_tokens')} ({first.max_prompt_tokens}) leaves it "
                f"no prompt, because decode workers compute those of up to {own} tokens "
                "themselves; lower decode.prefill_up_to, or leave the gang out"
            )
        covered = 0
        for gang in self.gangs:
            if gang.max_prompt_tokens <= covered:
                yield (
                    f"{gang.prefill.key('max_prompt_tokens')} ({gang.max_prompt_tokens}) leaves it "
                    f"no prompt, because those up to {covered} tokens go to the gangs before it; "
                    "list gangs by rising max_prompt_tokens, and leave it out for the last one only"
                )
            covered = gang.max_prompt_tokens
        longest = self.limits.max_model_len
        if covered != longest:
            yield (
                f"{self.prefill[-1].key('max_prompt_tokens')} is {covered} and "
                f"limits.max_model_len is {longest}; leave it out, so that the last gang takes "
                "every prompt that the others do not"
            )

    def _problems_with_vllm(self) -> Iterator[str]:
        """What only Longreach's own engine does."""
        instead = "or set decode.engine: native"
        if self.model.weights == "fp8":
            yield (
                "model.weights fp8 is not for decode.engine vllm, which rounds weights in another "
                f"way; leave weights out, {instead}"
            )
        if self.model.kv_cache_dtype == "fp8_e4m3":
            yield (
                "model.kv_cache_dtype fp8_e4m3 is not for decode.engine vllm, which reads pages of "
                f"the type that it computes in; leave kv_cache_dtype out, {instead}"
            )
        if self.model.kv_cache_dtype == "bfloat16" and self.model.dtype not in ("auto", "bfloat16"):
            yield (
                f"model.kv_cache_dtype bfloat16 beside model.dtype {self.model.dtype} is not for "
                "decode.engine vllm, which computes in the type that pages are kept in; leave "
                f"kv_cache_dtype out, {instead}"
            )
        if self.decode.prefill_alone is not None:
            yield (
                "decode.prefill_alone is not for decode.engine vllm, whose steps of prompts are "
                f"prefill_at_once long, whoever is beside; leave it out, {instead}"
            )
        limits = self.limits
        own = min(self.decode.longest_own_prompt, limits.max_model_len)
        # Each choice may have to compute a short prompt for itself.
        apart = limits.max_choices * pages_for(own + limits.max_output_tokens) * PAGE_TOKENS
        if own and self.decode.kv_cache_tokens < apart:
            yield (
                f"decode.kv_cache_tokens ({self.decode.kv_cache_tokens}) cannot hold "
                f"{limits.max_choices} answers of {limits.max_output_tokens} to a prompt of {own} "
                f"tokens each by itself, as vLLM may have to; make it {apart} or more, or lower "
                "decode.prefill_up_to"
            )

    def _problems_with_cuda_ipc(self, gang: PrefillSettings) -> Iterator[str]:
        if not gang.gpus_per_rank or not self.decode.gpus:
            yield (
                f"transport.kind cuda_ipc copies between GPUs, and {gang.key('gpus_per_rank')} or "
                "decode.gpus is 0; give both a GPU, or set transport.kind: object_store"
            )
        if gang.placement != "STRICT_PACK" and gang.num_ranks > 1:
            yield (
                f"transport.kind cuda_ipc copies between GPUs of one host, and "
                f"{gang.key('placement')}, {gang.placement}, may put the ranks of a gang on "
                "several; use STRICT_PACK, or set transport.kind: object_store"
            )


def _problems_with_ranks(decode: DecodeSettings) -> Iterator[str]:
    """What several ranks of a decode worker need."""
    if decode.tensor_parallel == 1:
        return
    if 0 < decode.gpus < 1:
        yield (
            f"decode.gpus ({decode.gpus:g}) is of each of decode.tensor_parallel "
            f"({decode.tensor_parallel}) ranks, and NCCL refuses two of them on one GPU; make it 1"
        )
    if not decode.gpus and not decode.cpus:
        yield (
            "decode.cpus and decode.gpus are both 0, and Ray places the ranks of "
            "decode.tensor_parallel by what is asked for; ask for a part of a CPU"
        )


def _problems_with_gang(gang: GangSettings) -> Iterator[str]:
    prefill, longest = gang.prefill, gang.max_prompt_tokens
    if prefill.chunk_tokens % PAGE_TOKENS:
        yield (
            f"{prefill.key('chunk_tokens')} is {prefill.chunk_tokens}; make it a multiple of "
            f"{PAGE_TOKENS}"
        )
    if prefill.kv_cache_tokens < longest:
        limit = "max_prompt_tokens" if prefill.max_prompt_tokens else "limits.max_model_len"
        yield (
            f"{prefill.key('kv_cache_tokens')} ({prefill.kv_cache_tokens}) cannot hold one prompt "
            f"of {limit} ({longest}); raise the one or lower the other"
        )
    if not prefill.cpus_per_rank and not prefill.gpus_per_rank:
        yield (
            f"{prefill.key('cpus_per_rank')} and gpus_per_rank are both 0, and Ray places by "
            "what is asked for; ask for a part of a CPU"
        )


def load_settings(path: Path) -> Settings:
    """Read and check a configuration, the checkpoint's own limits included.

    Raises:
        ConfigurationError: the file is missing, is not YAML, or describes what cannot run.
        CheckpointError: the model's folder cannot be served.
    """
    settings = read_settings(path)
    check_model(settings)
    return settings


def read_settings(path: Path) -> Settings:
    """Read and check a configuration; the checkpoint may lie elsewhere, and is not looked at.

    Raises:
        ConfigurationError: the file is missing, is not YAML, or describes what cannot run.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error.strerror}); name a cluster's YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text: {error}") from error
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ConfigurationError(f"{path} is not valid YAML: {said}") from error
    return parse_settings(raw, str(path))


def parse_settings(raw: Any, source: str = "configuration") -> Settings:
    """Check what a YAML file said.

    Raises:
        ConfigurationError: with the first thing that is wrong.
    """
    if not isinstance(raw, dict):
        raise ConfigurationError(f"{source} is empty or not a mapping; begin with `model:`")
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        # The one form has no list, and so no place in it.
        one_gang = not isinstance(raw.get("prefill"), list)
        raise ConfigurationError(f"{source}: {_first_problem(error, one_gang)}") from error


def check_model(settings: Settings) -> None:
    """Refuse settings that this checkpoint cannot be served with.

    Raises:
        ConfigurationError: a length beyond the model's, a mesh that does not divide it, or sparse
            prefill that is asked for by name where the checkpoint has no budgets for it.
        CheckpointError: the folder cannot be read, or has tokens that the model has no row for.
    """
    # With what it needs, it takes longer to import than the rest of reading a configuration.
    from ..engine.text.tokenizer import Tokenizer

    model = ModelConfig.from_folder(settings.model.folder)
    if settings.limits.max_model_len > model.max_position_embeddings:
        raise ConfigurationError(
            f"limits.max_model_len ({settings.limits.max_model_len}) is beyond the "
            f"{model.max_position_embeddings} positions of {settings.model.folder}; lower it"
        )
    check_decode_ranks(settings.decode, model)
    if settings.decode.engine == "vllm" and model.dual_chunk is None:
        raise ConfigurationError(
            f"decode.engine vllm is for models with a dual_chunk_attention_config, and "
            f"{settings.model.folder} has none; set decode.engine: native"
        )
    for gang in settings.gangs:
        model.check_tensor_parallel(gang.prefill.tensor_parallel)
        missing = _missing_budgets(gang)
        if missing is not None and "sparse" in gang.prefill.model_fields_set:
            raise ConfigurationError(missing)
    # One such token in a prompt would end a whole gang.
    tokens = Tokenizer(settings.model.files.tokenizer_folder).vocab_size
    if tokens > model.vocab_size:
        raise CheckpointError(
            f"{settings.model.folder}: its tokenizer has ids up to {tokens - 1} and its embedding "
            f"only {model.vocab_size} rows; resize the embedding, or remove the added tokens"
        )


def check_decode_ranks(decode: DecodeSettings, model: ModelConfig) -> None:
    """Refuse a number of ranks of a decode worker that a model cannot be cut into.

    Raises:
        ConfigurationError: it does not divide the KV heads, which are not held twice, or the MLP.
    """
    heads, middle = model.num_kv_heads, model.intermediate_size
    if heads % decode.tensor_parallel or middle % decode.tensor_parallel:
        possible = [n for n in range(1, heads + 1) if heads % n == 0 and middle % n == 0]
        raise ConfigurationError(
            f"decode.tensor_parallel ({decode.tensor_parallel}) does not divide this model's "
            f"{heads} KV heads and MLP of {middle}; make it one of {', '.join(map(str, possible))}"
        )


def warnings_about(settings: Settings) -> list[str]:
    """What would run otherwise than its defaults say; for settings that `check_model` let through.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    missing = (_missing_budgets(gang) for gang in settings.gangs)
    return [each for each in missing if each is not None]


def _missing_budgets(gang: GangSettings) -> str | None:
    """What to say where long prompts would be prefilled densely and are meant not to be."""
    folder = gang.model.folder
    if not gang.prefill.sparse or has_budgets(folder):
        return None
    threshold = dense_up_to(folder)
    if gang.max_prompt_tokens <= threshold:
        return None
    return (
        f"{gang.prefill.key('sparse')} is true and {folder} has no {BUDGETS_FILE}, so prompts of "
        f"more than {threshold:,} tokens would be prefilled densely, which takes about ten times "
        "as long at a million; make the file with `longreach eval calibrate`, or set "
        "prefill.sparse: false if dense is what you want"
    )


def _first_problem(error: ValidationError, one_gang: bool) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    if one_gang:
        where = where.replace("prefill.0", "prefill", 1)
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key '{where}'; remove it or correct its spelling"
        case "missing":
            return f"'{where}' is missing; add it"
        case "value_error":
            return problem["msg"].removeprefix("Value error, ")
    return f"{where}: {problem['msg']}, not {problem['input']!r}"
