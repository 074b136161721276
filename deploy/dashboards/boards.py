"""The six dashboards: what is on them, and what a person does when a panel is red."""

from .panels import Board, Panel, Query, of_model, per_second, quantile, share, total

_REQUESTS = "longreach_requests_total"
_TTFT = "longreach_time_to_first_token_seconds"

SERVICE = Board(
    "service",
    "Longreach: service",
    (
        Panel(
            "Requests by outcome",
            "reqps",
            "Red is a rate of failures: see the alert LongreachErrors.",
            (Query(per_second(_REQUESTS, "outcome"), "{{outcome}}"),),
        ),
        Panel(
            "Share that failed by the cluster's fault",
            "percentunit",
            "Look at the board Reliability for what died, then at its log.",
            (
                Query(
                    share(per_second(_REQUESTS, outcome="failed"), per_second(_REQUESTS)), "failed"
                ),
            ),
            red=0.01,
        ),
        Panel(
            "Time to the first token, 95th percentile by prompt class",
            "s",
            "If the queue grows too, there is more work than gangs: add one, or refuse earlier. "
            "If not, look at the board Prefill.",
            (Query(quantile(0.95, _TTFT, "prompt_class"), "{{prompt_class}}"),),
            red=300,
        ),
        Panel(
            "Between two tokens, 99th percentile",
            "s",
            "Look at the board Decode: batches may be larger than the GPU is fast.",
            (Query(quantile(0.99, "longreach_inter_token_latency_seconds"), "p99"),),
            red=0.5,
        ),
        Panel(
            "Requests under way and waiting",
            "short",
            "Waiting at prefill: more gangs. Waiting at decode: more KV pages. See Capacity.",
            (
                Query(total("longreach_num_requests_running", "role"), "{{role}} works"),
                Query(total("longreach_num_requests_waiting", "role"), "{{role}} waits"),
            ),
        ),
        Panel(
            "Refused because the queue was full",
            "reqps",
            "Clients are told to come back. Where that lasts, add gangs or decode replicas.",
            (Query(f"{per_second(_REQUESTS, outcome='rejected')} or vector(0)", "429"),),
            red=1,
        ),
    ),
)

PREFILL = Board(
    "prefill",
    "Longreach: prefill",
    (
        Panel(
            "Prompt tokens computed a second",
            "short",
            "Far below what measuring.md says while the queue is not empty: look at the stages.",
            (Query(per_second("longreach_prefill_tokens_total", "gang"), "gang {{gang}}"),),
        ),
        Panel(
            "Tokens that wait to be computed",
            "short",
            "Over the speed above this is the wait in seconds. Add a gang where it only grows.",
            (Query(total("longreach_prompt_tokens_waiting", "gang"), "gang {{gang}}"),),
            red=20e6,
        ),
        Panel(
            "Where the time goes, seconds a second",
            "s",
            "Much communication: the network between ranks. Much hand-off: the transport.",
            (Query(per_second("longreach_prefill_stage_seconds_total", "stage"), "{{stage}}"),),
        ),
        Panel(
            "How much longer the slowest rank takes, 95th percentile",
            "s",
            "One GPU is slower than the others: look at its clocks and at what else runs there.",
            (Query(quantile(0.95, "longreach_rank_skew_seconds"), "p95"),),
            red=1,
        ),
        Panel(
            "Chunks a second",
            "short",
            "None while prompts wait: the gang hangs, and is replaced after a minute.",
            (Query(per_second("longreach_prefill_chunks_total", "gang"), "gang {{gang}}"),),
        ),
        Panel(
            "Tokens a second of one prompt, by class",
            "short",
            "The median of what a single request saw.",
            (
                Query(
                    quantile(0.5, "longreach_prefill_tokens_per_second", "prompt_class"),
                    "{{prompt_class}}",
                ),
            ),
        ),
    ),
)

KV = Board(
    "kv",
    "Longreach: KV cache and hand-off",
    (
        Panel(
            "KV pages in use, fullest pool of each role",
            "percentunit",
            "Decode full: prompts wait for pages. Add decode replicas, or shorter answers.",
            (Query(f"max by (role) ({of_model('longreach_kv_cache_usage_perc')})", "{{role}}"),),
            red=0.95,
        ),
        Panel(
            "Requests that wait for pages at decode",
            "short",
            "The pool is full: see above.",
            (Query(total("longreach_num_requests_waiting", role="decode"), "waiting"),),
            red=10,
        ),
        Panel(
            "Bytes handed off a second",
            "Bps",
            "None while prompts are computed: the transport fails.",
            (Query(per_second("longreach_handoff_bytes_total"), "bytes"),),
        ),
        Panel(
            "Hand-off that prefill did not hide, 95th percentile",
            "s",
            "The network or host memory between prefill and decode is the narrow place.",
            (Query(quantile(0.95, "longreach_request_handoff_time_seconds"), "p95"),),
            red=5,
        ),
        Panel(
            "Prompts whose hand-off failed",
            "short",
            "Restart what hangs: the runbook of LongreachHandoffFailing.",
            (Query(f"{per_second('longreach_handoff_failures_total')} or vector(0)", "failed"),),
            red=0.01,
        ),
    ),
)

DECODE = Board(
    "decode",
    "Longreach: decode",
    (
        Panel(
            "Tokens generated a second",
            "short",
            "Compare with the batch: each sequence gets one token a step.",
            (Query(per_second("longreach_generation_tokens_total"), "tokens"),),
        ),
        Panel(
            "One step, 50th and 99th percentile",
            "s",
            "Slow steps at small batches: the GPU is shared, or throttled.",
            (
                Query(quantile(0.5, "longreach_decode_step_time_seconds"), "p50"),
                Query(quantile(0.99, "longreach_decode_step_time_seconds"), "p99"),
            ),
            red=0.2,
        ),
        Panel(
            "Requests that generate",
            "short",
            "At decode.max_batch, further ones wait.",
            (Query(total("longreach_num_requests_running", role="decode"), "generating"),),
        ),
        Panel(
            "Sequences that wait for a place in the batch",
            "short",
            "Raise decode.max_batch, or add decode replicas.",
            (Query(total("longreach_num_sequences_waiting"), "waiting"),),
            red=8,
        ),
        Panel(
            "Pauses that a reader sees, 99th percentile",
            "s",
            "A step or a copy of pages holds all answers up.",
            (Query(quantile(0.99, "longreach_inter_chunk_latency_seconds"), "p99"),),
            red=2,
        ),
    ),
)

RELIABILITY = Board(
    "reliability",
    "Longreach: reliability",
    (
        Panel(
            "Gangs and decode workers lost, an hour",
            "short",
            "One is repaired by itself. Several in an hour: the runbook of LongreachLosing.",
            (
                Query(
                    f"sum by (role) (increase({of_model('longreach_lost_total')}[1h]))",
                    "{{role}}",
                ),
            ),
            red=2,
        ),
        Panel(
            "Requests begun again",
            "reqps",
            "Something died under them, and clients saw a pause. Look at what was lost.",
            (Query(f"{per_second('longreach_request_recoveries_total')} or vector(0)", "again"),),
            red=0.1,
        ),
        Panel(
            "Prompt tokens after a death, a second",
            "short",
            "Computed again is what a death cost; what came back is what it did not cost.",
            (
                Query(
                    f"{per_second('longreach_prefill_tokens_again_total')} or vector(0)",
                    "computed again",
                ),
                Query(
                    f"{per_second('longreach_prefill_tokens_back_total')} or vector(0)",
                    "came back",
                ),
            ),
        ),
        Panel(
            "Requests that clients cancelled",
            "reqps",
            "Many: clients or a proxy on the way give up; compare with the time to first tokens.",
            (Query(f"{per_second(_REQUESTS, outcome='cancelled')} or vector(0)", "cancelled"),),
        ),
        Panel(
            "Requests that nobody wanted any more",
            "reqps",
            "An ingress or a proxy died with its clients' requests.",
            (Query(f"{per_second('longreach_leases_lapsed_total')} or vector(0)", "lapsed"),),
            red=0.1,
        ),
        Panel(
            "Processes that live",
            "short",
            "Fewer than before: something is being replaced, or nothing has room for it.",
            (Query(total("longreach_processes", "role"), "{{role}}"),),
        ),
        Panel(
            "Versions",
            "short",
            "Two at once only while an upgrade is under way.",
            (
                Query(
                    f"count by (longreach, ray, torch) ({of_model('longreach_build_info')})",
                    "{{longreach}}, Ray {{ray}}, torch {{torch}}",
                ),
            ),
        ),
        Panel(
            "Nodes that are scraped",
            "short",
            "One is missing: its pod is down, or the network policy keeps Prometheus out.",
            (Query('sum(up{job="longreach"})', "up"),),
            red=1,
            below=True,
        ),
    ),
)

_TOKENS = per_second("longreach_prompt_tokens_total")
CAPACITY = Board(
    "capacity",
    "Longreach: capacity and cost",
    (
        Panel(
            "Prompt tokens served a second",
            "short",
            "What the cluster is paid for.",
            (Query(_TOKENS, "tokens"),),
        ),
        Panel(
            "Cost of a million prompt tokens",
            "currencyUSD",
            "From the variables above: GPUs, and what one costs an hour. High when idle.",
            (Query(f"$gpus * $cost / 3600 * 1e6 / ({_TOKENS} > 0)", "cost"),),
        ),
        Panel(
            "How long the queue is, in seconds of work",
            "s",
            "More than your promise: add gangs. 0 for days: take one away.",
            (
                Query(
                    f"{total('longreach_prompt_tokens_waiting')} / "
                    f"({per_second('longreach_prefill_tokens_total')} > 0)",
                    "queue",
                ),
            ),
            red=300,
        ),
        Panel(
            "Processors' time, cores by role",
            "short",
            "An ingress at one core for long tokenizes more than it can: add ingress replicas.",
            (Query(per_second("longreach_process_cpu_seconds_total", "role"), "{{role}}"),),
        ),
        Panel(
            "Memory of the host by role",
            "bytes",
            "Close to the pods' limit: a process will be killed.",
            (Query(total("longreach_process_resident_memory_bytes", "role"), "{{role}}"),),
        ),
        Panel(
            "Memory of nodes, as Ray sees it",
            "bytes",
            "As above, with Ray's own processes and its object store.",
            (Query("sum by (instance) (ray_node_mem_used)", "{{instance}}"),),
            source="ray",
        ),
        Panel(
            "Memory of GPUs in use",
            "percentunit",
            "Pools take theirs at the start, so this is flat; growth is a leak.",
            (
                Query(
                    "max by (Hostname, gpu) (DCGM_FI_DEV_FB_USED / "
                    "(DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE))",
                    "{{Hostname}} {{gpu}}",
                ),
            ),
            red=0.98,
            source="dcgm",
        ),
        Panel(
            "GPUs at work",
            "percent",
            "Low while the queue is not empty: look at the board Prefill.",
            (Query("max by (Hostname, gpu) (DCGM_FI_DEV_GPU_UTIL)", "{{Hostname}} {{gpu}}"),),
            source="dcgm",
        ),
    ),
)

BOARDS = (SERVICE, PREFILL, KV, DECODE, RELIABILITY, CAPACITY)
