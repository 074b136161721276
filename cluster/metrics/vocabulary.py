"""Every metric by name: what it counts or measures, its labels and its buckets.

docs/metrics.md is this list; a test holds the two together.
"""

from typing import Literal

from ...engine.figures import Counter, Gauge, Histogram, Metric

Role = Literal["ingress", "prefill", "decode"]
COMMON_LABELS = ("model_name", "role")

_PROMPT_CLASSES = ((8192, "8k"), (32768, "32k"), (131072, "128k"), (524288, "512k"))


def prompt_class(prompt_tokens: int) -> str:
    """The label of the smallest class that holds a prompt: 8k, 32k, 128k, 512k or 1m."""
    return next((name for limit, name in _PROMPT_CLASSES if prompt_tokens <= limit), "1m")


# From an ingress's overhead to a million tokens on a small machine: twice as wide at each step, and
# finer from one to ten minutes, where the limits on long prompts lie.
_REQUEST_SECONDS = (
    0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0,
    80.0, 100.0, 120.0, 150.0, 180.0, 210.0, 240.0, 300.0, 360.0, 420.0, 480.0, 540.0, 600.0,
    900.0, 1280.0, 2560.0,
)  # fmt: skip
_SHORT_SECONDS = (
    0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
    0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0,
)  # fmt: skip
_TOKENS_PER_SECOND = tuple(float(100 * 2**step) for step in range(16))

OUTCOMES = ("success", "invalid", "rejected", "cancelled", "failed")
REQUESTS = Counter(
    "longreach_requests_total",
    "Requests by how they ended: success, invalid (4xx), rejected (429), cancelled by the client, "
    "or failed.",
    ("outcome",),
)
REQUEST_SUCCESS = Counter(
    "longreach_request_success_total",
    "Choices of successful requests by why they ended: stop or length.",
    ("finished_reason",),
)
REQUEST_RECOVERIES = Counter(
    "longreach_request_recoveries_total",
    "Requests that were begun again, in place of an error: what served them died, or was asked to "
    "go. Waiting for what is not up yet does not count.",
)
PROMPT_TOKENS = Counter(
    "longreach_prompt_tokens_total", "Prompt tokens of requests whose prefill ended well."
)
GENERATION_TOKENS = Counter("longreach_generation_tokens_total", "Tokens generated.")
TIME_TO_FIRST_TOKEN = Histogram(
    "longreach_time_to_first_token_seconds",
    "From a request's arrival to its first token.",
    _REQUEST_SECONDS,
    ("prompt_class",),
)
INTER_TOKEN_LATENCY = Histogram(
    "longreach_inter_token_latency_seconds",
    "Between one token of a choice and its next; tokens that came together count as equal steps "
    "since those before them.",
    _SHORT_SECONDS,
    ("prompt_class",),
)
INTER_CHUNK_LATENCY = Histogram(
    "longreach_inter_chunk_latency_seconds",
    "Between the arrival of one or more tokens of a choice and of the next ones: the pauses that a "
    "reader sees.",
    _SHORT_SECONDS,
    ("prompt_class",),
)
E2E_REQUEST_LATENCY = Histogram(
    "longreach_e2e_request_latency_seconds",
    "From a successful request's arrival to the end of its answer.",
    _REQUEST_SECONDS,
    ("prompt_class",),
)
REQUEST_QUEUE_TIME = Histogram(
    "longreach_request_queue_time_seconds",
    "From a request's arrival to the start of its first chunk.",
    _REQUEST_SECONDS,
    ("prompt_class",),
)
REQUEST_PREFILL_TIME = Histogram(
    "longreach_request_prefill_time_seconds",
    "From the start of a request's first chunk to the end of its last.",
    _REQUEST_SECONDS,
    ("prompt_class",),
)
REQUEST_HANDOFF_TIME = Histogram(
    "longreach_request_handoff_time_seconds",
    "From the end of a request's last chunk until all its pages lay in the decode replica: the "
    "part of the hand-off that computing did not hide.",
    _REQUEST_SECONDS,
    ("prompt_class",),
)
PREFILL_TOKENS_PER_SECOND = Histogram(
    "longreach_prefill_tokens_per_second",
    "Prompt tokens of one request over its prefill time.",
    _TOKENS_PER_SECOND,
    ("prompt_class",),
)
HANDOFF_BYTES = Counter(
    "longreach_handoff_bytes_total", "Bytes of KV pages that reached a decode replica."
)
PREFILL_CHUNKS = Counter("longreach_prefill_chunks_total", "Chunks computed by prefill gangs.")
PREFILL_TOKENS = Counter(
    "longreach_prefill_tokens_total",
    "Prompt tokens computed, by prefill gangs or by decode workers themselves, those of requests "
    "that were cancelled later too.",
)
PREFILL_TOKENS_AGAIN = Counter(
    "longreach_prefill_tokens_again_total",
    "Prompt tokens computed once more, because what had computed them, or held their pages, died.",
)
PREFILL_TOKENS_BACK = Counter(
    "longreach_prefill_tokens_back_total",
    "Prompt tokens that requests which were begun again did not have computed once more: their "
    "pages lay at a decode worker, or at the gang.",
)
PREFILL_STAGE_SECONDS = Counter(
    "longreach_prefill_stage_seconds_total",
    "Where the time of prefill chunks went, on the slowest rank of each chunk.",
    ("stage",),
)
RANK_SKEW = Histogram(
    "longreach_rank_skew_seconds",
    "How much longer the slowest rank of a gang computed one chunk than the fastest.",
    _SHORT_SECONDS,
)
DECODE_STEP_TIME = Histogram(
    "longreach_decode_step_time_seconds",
    "One step of the decode engine: one token for every sequence in the batch.",
    _SHORT_SECONDS,
)
NUM_REQUESTS_RUNNING = Gauge(
    "longreach_num_requests_running", "Requests that this role is working on."
)
NUM_REQUESTS_WAITING = Gauge(
    "longreach_num_requests_waiting", "Requests that wait for this role to begin on them."
)
NUM_SEQUENCES_WAITING = Gauge(
    "longreach_num_sequences_waiting",
    "Sequences whose prompt is prefilled and that wait for a place in the batch, or for pages.",
)
NUM_PROMPTS = Gauge(
    "longreach_num_prompts_computing",
    "Requests whose prompts a decode worker computes itself, and has not computed yet.",
)
PREEMPTIONS = Counter(
    "longreach_num_preemptions_total",
    "How often a request had to make room for others and to go on later.",
)
KV_CACHE_USAGE = Gauge(
    "longreach_kv_cache_usage_perc",
    "Share of KV pages in use, 0 to 1, in the fullest pool of this role.",
    merge="max",
)
PROMPT_TOKENS_WAITING = Gauge(
    "longreach_prompt_tokens_waiting",
    "Prompt tokens that a gang has taken and has not computed yet.",
)
LOST = Counter(
    "longreach_lost_total",
    "Prefill gangs, single ranks of them, and decode workers that died or hung and were replaced.",
)
PREFILL_RANKS = Gauge(
    "longreach_prefill_ranks",
    "Ranks that compute in prefill gangs; fewer than were configured until a lost one is replaced.",
)
LEASES_LAPSED = Counter(
    "longreach_leases_lapsed_total",
    "Requests that a decode worker released because no ingress wanted them any more.",
)
HANDOFF_FAILURES = Counter(
    "longreach_handoff_failures_total",
    "Prompts that ended because their pages did not reach the decode replica.",
)
BUILD_INFO = Gauge(
    "longreach_build_info",
    "Always 1; its labels are versions.",
    ("longreach", "ray", "torch"),
    merge="max",
)
PROCESSES = Gauge("longreach_processes", "Processes that live.")
PROCESS_START_TIME = Gauge(
    "longreach_process_start_time_seconds",
    "When the youngest process started, in seconds since 1970.",
    merge="max",
)
PROCESS_CPU_SECONDS = Counter(
    "longreach_process_cpu_seconds_total", "Processor time that processes took."
)
PROCESS_RESIDENT_BYTES = Gauge(
    "longreach_process_resident_memory_bytes",
    "Memory of the host that processes hold; what they share is counted for each.",
)
PROCESS_OPEN_FILES = Gauge("longreach_process_open_fds", "Open files and sockets.")

VOCABULARY: tuple[Metric, ...] = (
    REQUESTS,
    REQUEST_SUCCESS,
    REQUEST_RECOVERIES,
    NUM_REQUESTS_RUNNING,
    NUM_REQUESTS_WAITING,
    NUM_SEQUENCES_WAITING,
    NUM_PROMPTS,
    PREEMPTIONS,
    PROMPT_TOKENS,
    GENERATION_TOKENS,
    TIME_TO_FIRST_TOKEN,
    INTER_TOKEN_LATENCY,
    INTER_CHUNK_LATENCY,
    E2E_REQUEST_LATENCY,
    REQUEST_QUEUE_TIME,
    REQUEST_PREFILL_TIME,
    REQUEST_HANDOFF_TIME,
    HANDOFF_BYTES,
    PREFILL_TOKENS_PER_SECOND,
    PREFILL_TOKENS,
    PREFILL_TOKENS_AGAIN,
    PREFILL_TOKENS_BACK,
    PREFILL_CHUNKS,
    PREFILL_STAGE_SECONDS,
    RANK_SKEW,
    DECODE_STEP_TIME,
    KV_CACHE_USAGE,
    PROMPT_TOKENS_WAITING,
    HANDOFF_FAILURES,
    LEASES_LAPSED,
    LOST,
    PREFILL_RANKS,
    BUILD_INFO,
    PROCESSES,
    PROCESS_START_TIME,
    PROCESS_CPU_SECONDS,
    PROCESS_RESIDENT_BYTES,
    PROCESS_OPEN_FILES,
)
