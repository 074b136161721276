"""A cluster's configuration: YAML in, checked and frozen settings out.

Every key has a default but `model.path`. What cannot run is refused before anything starts, with
a sentence that names the remedy.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..engine.errors import CheckpointError, ConfigurationError
from ..engine.kv.formats import KVCacheDtype
from ..engine.model.config import Dtype, ModelConfig
from ..engine.model.files import ModelFiles
from ..engine.prefill.budgets import BUDGETS_FILE, dense_up_to, has_budgets
from ..kernels.page_size import PAGE_TOKENS, pages_for

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ModelSettings(_Section):
    """Which checkpoint, under which name, in which type.

    `path` is a Hugging Face checkpoint folder, "pocket" for the bundled model, or "random/" and a
    shape of engine/model/shapes for random weights of a real model's sizes. `dtype` "auto" is up to
    each process: see `engine.model.precision`. `kv_cache_dtype` is how KV pages are kept.
    """

    path: str
    name: Annotated[str, Field(min_length=1)]
    dtype: Dtype = "auto"
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
    """What one request may ask for, and how many may wait."""

    max_model_len: Count
    max_output_tokens: Count = 4096
    max_body_bytes: Count = 64 << 20
    max_choices: Count = 8
    max_logprobs: Annotated[int, Field(ge=0)] = 20
    max_queued_requests: Annotated[int, Field(ge=0, le=1000)] = 32


class PrefillSettings(_Section):
    """The gangs: `tensor_parallel` × `sequence_parallel` ranks each, a KV pool on every rank.

    `patience`: how far shorter prompts may pass one that came before them; see `fairness.Turns`.
    """

    replicas: Count = 1
    tensor_parallel: Count = 1
    sequence_parallel: Count = 1
    chunk_tokens: Count = 32768
    kv_cache_tokens: Count
    threads_per_rank: Count = 1
    cpus_per_rank: NotNegative = 1.0
    gpus_per_rank: NotNegative = 0.0
    placement: Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"] = "STRICT_PACK"
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


class DecodeSettings(_Section):
    """The decode replicas: one worker process each, with a KV pool.

    `patience`: as a gang's, for prompts that wait for pages here.
    """

    replicas: Count = 1
    kv_cache_tokens: Count
    max_batch: Count = 8
    threads: Count = 1
    cpus: NotNegative = 1.0
    gpus: NotNegative = 0.0
    patience: Positive = 2.0


class IngressSettings(_Section):
    """The HTTP endpoint. `api_keys_file` has one key a line; without it everybody is welcome."""

    replicas: Count = 1
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    api_keys_file: Path | None = Field(default=None, strict=False)
    progress_seconds: Annotated[float, Field(gt=0, le=2)] = 1.0


class TransportSettings(_Section):
    """How pages travel to decode replicas, and how many bytes a rank may have under way.

    By "object_store", Ray's, they go anywhere over the host's memory. By "cuda_ipc" a decode worker
    copies them from GPU to GPU, of one host; nothing is under way then but messages.
    """

    kind: Literal["object_store", "cuda_ipc"] = "object_store"
    max_in_flight_bytes: Count = 256 << 20


class MetricsSettings(_Section):
    """Where processes leave their figures; a fresh temporary folder when not given."""

    directory: Path | None = Field(default=None, strict=False)


class ShutdownSettings(_Section):
    """How long accepted requests may take to finish when the cluster stops or is redeployed."""

    drain_seconds: NotNegative = 600.0


class Settings(_Section):
    """A whole cluster."""

    model: ModelSettings
    limits: LimitSettings
    prefill: PrefillSettings
    decode: DecodeSettings
    ingress: IngressSettings = IngressSettings()
    transport: TransportSettings = TransportSettings()
    metrics: MetricsSettings = MetricsSettings()
    shutdown: ShutdownSettings = ShutdownSettings()

    @model_validator(mode="after")
    def _can_run(self) -> "Settings":
        problem = next(self._problems(), None)
        if problem is not None:
            raise ValueError(problem)
        return self

    def _problems(self):
        longest, chunk = self.limits.max_model_len, self.prefill.chunk_tokens
        if chunk % PAGE_TOKENS:
            yield f"prefill.chunk_tokens is {chunk}; make it a multiple of {PAGE_TOKENS}"
        if self.prefill.kv_cache_tokens < longest:
            yield (
                f"prefill.kv_cache_tokens ({self.prefill.kv_cache_tokens}) cannot hold one prompt "
                f"of limits.max_model_len ({longest}); raise the one or lower the other"
            )
        if not self.prefill.cpus_per_rank and not self.prefill.gpus_per_rank:
            yield (
                "prefill.cpus_per_rank and prefill.gpus_per_rank are both 0, and Ray places by "
                "what is asked for; ask for a part of a CPU"
            )
        # Choices share the pages that the prompt fills. Each has the page that it fills in part to
        # itself, which holds PAGE_TOKENS - 1 tokens of the prompt at most.
        answer = pages_for(self.limits.max_output_tokens + PAGE_TOKENS - 1)
        needed = (pages_for(longest) + self.limits.max_choices * answer) * PAGE_TOKENS
        if self.decode.kv_cache_tokens < needed:
            yield (
                f"decode.kv_cache_tokens ({self.decode.kv_cache_tokens}) cannot hold the longest "
                f"request: {longest} tokens and {self.limits.max_choices} answers of "
                f"{self.limits.max_output_tokens}; make it {needed} or more"
            )
        if self.limits.max_choices > self.decode.max_batch:
            yield (
                f"limits.max_choices ({self.limits.max_choices}) is more than decode.max_batch "
                f"({self.decode.max_batch}), so one request would not fit into a step; raise "
                "decode.max_batch"
            )
        on_gpus = self.prefill.gpus_per_rank or self.decode.gpus
        mixed = self.model.dtype in ("float32", "float16")
        if on_gpus and mixed and self.model.kv_cache_dtype == "bfloat16":
            yield (
                f"model.kv_cache_dtype bfloat16 beside model.dtype {self.model.dtype} is for CPUs; "
                "set model.dtype to bfloat16 where there are GPUs, or leave kv_cache_dtype out"
            )
        if self.transport.kind == "cuda_ipc":
            yield from self._problems_with_cuda_ipc()
        if self.limits.max_output_tokens >= longest:
            yield (
                f"limits.max_output_tokens ({self.limits.max_output_tokens}) leaves no room for a "
                f"prompt in limits.max_model_len ({longest}); lower it"
            )

    def _problems_with_cuda_ipc(self):
        if not self.prefill.gpus_per_rank or not self.decode.gpus:
            yield (
                "transport.kind cuda_ipc copies between GPUs, and prefill.gpus_per_rank or "
                "decode.gpus is 0; give both a GPU, or set transport.kind: object_store"
            )
        if self.prefill.placement != "STRICT_PACK" and self.prefill.num_ranks > 1:
            yield (
                "transport.kind cuda_ipc copies between GPUs of one host, and prefill.placement "
                f"{self.prefill.placement} may put the ranks of a gang on several; use "
                "STRICT_PACK, or set transport.kind: object_store"
            )


def load_settings(path: Path) -> Settings:
    """Read and check a configuration, the checkpoint's own limits included.

    Raises:
        ConfigurationError: the file is missing, is not YAML, or describes what cannot run.
        CheckpointError: the model's folder cannot be served.
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
    settings = parse_settings(raw, str(path))
    check_model(settings)
    return settings


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
        raise ConfigurationError(f"{source}: {_first_problem(error)}") from error


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
    model.check_tensor_parallel(settings.prefill.tensor_parallel)
    missing = _missing_budgets(settings)
    if missing is not None and "sparse" in settings.prefill.model_fields_set:
        raise ConfigurationError(missing)
    # One such token in a prompt would end a whole gang.
    tokens = Tokenizer(settings.model.files.tokenizer_folder).vocab_size
    if tokens > model.vocab_size:
        raise CheckpointError(
            f"{settings.model.folder}: its tokenizer has ids up to {tokens - 1} and its embedding "
            f"only {model.vocab_size} rows; resize the embedding, or remove the added tokens"
        )


def warnings_about(settings: Settings) -> list[str]:
    """What would run otherwise than its defaults say; for settings that `check_model` let through.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    missing = _missing_budgets(settings)
    return [] if missing is None else [missing]


def _missing_budgets(settings: Settings) -> str | None:
    """What to say where long prompts would be prefilled densely and are meant not to be."""
    folder, longest = settings.model.folder, settings.limits.max_model_len
    if not settings.prefill.sparse or has_budgets(folder):
        return None
    threshold = dense_up_to(folder)
    if longest <= threshold:
        return None
    return (
        f"prefill.sparse is true and {folder} has no {BUDGETS_FILE}, so prompts of more than "
        f"{threshold:,} tokens would be prefilled densely, which takes about ten times as long at "
        "a million; make the file with `longreach eval calibrate`, or set prefill.sparse: false "
        "if dense is what you want"
    )


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key '{where}'; remove it or correct its spelling"
        case "missing":
            return f"'{where}' is missing; add it"
        case "value_error":
            return problem["msg"].removeprefix("Value error, ")
    return f"{where}: {problem['msg']}, not {problem['input']!r}"
