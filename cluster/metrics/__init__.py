"""Prometheus metrics of all processes of a node, in one scrape that outlives any of them.

Every process keeps its figures in memory-mapped files of one shared folder (prometheus-client's
multiprocess format); `render` adds them up. What a dead process counted stays counted, what it
gauged is gone with it.

prometheus-client picks its multiprocess mode from an environment variable when it is first
imported, which Ray does before any of our code runs. So the files are opened here, explicitly:
nothing depends on the environment, on import order or on a process-wide registry.
"""

from ...engine.figures import Counter, Gauge, Histogram, Metric
from .exposition import CONTENT_TYPE, render
from .process import ProcessFigures
from .vocabulary import (
    BUILD_INFO,
    COMMON_LABELS,
    DECODE_STEP_TIME,
    E2E_REQUEST_LATENCY,
    GENERATION_TOKENS,
    HANDOFF_BYTES,
    HANDOFF_FAILURES,
    INTER_CHUNK_LATENCY,
    INTER_TOKEN_LATENCY,
    KV_CACHE_USAGE,
    LEASES_LAPSED,
    LOST,
    NUM_PROMPTS,
    NUM_REQUESTS_RUNNING,
    NUM_REQUESTS_WAITING,
    NUM_SEQUENCES_WAITING,
    OUTCOMES,
    PREEMPTIONS,
    PREFILL_CHUNKS,
    PREFILL_RANKS,
    PREFILL_STAGE_SECONDS,
    PREFILL_TOKENS,
    PREFILL_TOKENS_AGAIN,
    PREFILL_TOKENS_BACK,
    PREFILL_TOKENS_PER_SECOND,
    PROCESS_CPU_SECONDS,
    PROCESS_OPEN_FILES,
    PROCESS_RESIDENT_BYTES,
    PROCESS_START_TIME,
    PROCESSES,
    PROMPT_TOKENS,
    PROMPT_TOKENS_WAITING,
    RANK_SKEW,
    REQUEST_HANDOFF_TIME,
    REQUEST_PREFILL_TIME,
    REQUEST_QUEUE_TIME,
    REQUEST_RECOVERIES,
    REQUEST_SUCCESS,
    REQUESTS,
    TIME_TO_FIRST_TOKEN,
    VOCABULARY,
    Role,
    prompt_class,
)
from .writer import Metrics
