"""Lines of the table, for the terminal and for the CSV file."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ...engine.errors import GB
from .baseline import VLLM_TPOT_MS, VLLM_TTFT_SECONDS, DenseBaseline
from .ceilings import Ceilings
from .environment import Environment
from .running import BatchRun, PromptRun, settled
from .work import Work

_HOW = {"greedy": "", "sampled": ", sampled", "held": ", sampled and held"}


@dataclass(frozen=True)
class Line:
    """One case. Seconds, unless the name says otherwise; None where it was not measured.

    `floor` is linear layers and selected attention at the rate of the model's own products (those
    of linear layers with weights as they are kept), for a batch its bytes at the measured
    bandwidth. Fractions are of what was measured in the same run.
    """

    case: str
    model: str
    weights: str
    tokens: int
    attention: str
    kv_cache: str
    chunk_tokens: int
    ttft: float | None
    tokens_per_second: float | None
    linear: float | None
    attending: float | None
    selection: float | None
    elementwise: float | None
    page_writes: float | None
    other_stages: float | None
    gaps: float | None
    gaps_share: float | None
    density: float | None
    floor: float | None
    floor_fraction: float | None
    linear_fraction: float | None
    tpot_p20_ms: float | None
    tpot_ms: float | None
    tpot_p80_ms: float | None
    tpot_floor_ms: float | None
    tpot_over_floor: float | None
    peak_gb: float | None
    activations_gb: float | None
    matmul_tflops: float
    matmul_square_tflops: float
    read_gbs: float
    cudnn_dense_attention: float | None
    attention_speedup: float | None
    vllm_ttft: float | None
    vllm_tpot_ms: float | None
    environment: Environment

    def text(self) -> str:
        """For the terminal; more lines than one."""
        parts = [f"{self.case}, {self.attention}, KV {self.kv_cache}:"]
        if self.ttft is not None:
            parts.append(self._prefill_text())
        if self.tpot_ms is not None:
            parts.append(self._decode_text())
        if self.peak_gb is not None:
            parts.append(
                f"memory: peak {self.peak_gb:.2f} GB, of which activations "
                f"{self.activations_gb:.2f} GB"
            )
        return "\n  ".join(parts)

    def _prefill_text(self) -> str:
        stages = {
            "linear": self.linear, "attention": self.attending, "selection": self.selection,
            "elementwise": self.elementwise, "page writes": self.page_writes,
            "other": self.other_stages, "gaps and host": self.gaps,
        }  # fmt: skip
        spent = ", ".join(f"{name} {s:.3f}" for name, s in stages.items() if s is not None)
        text = (
            f"TTFT {self.ttft:.3f} s, {self.tokens_per_second:,.0f} tokens/s, "
            f"{self.floor_fraction:.3f} of the floor's speed ({self.floor:.3f} s at density "
            f"{self.density:.4f})\n  seconds: {spent} ({self.gaps_share:.1%})\n  "
            f"linear layers at {self.linear_fraction:.3f} of the matrix products' rate"
        )
        if self.cudnn_dense_attention is not None:
            text += (
                f"\n  cuDNN's dense attention would take {self.cudnn_dense_attention:.2f} s, "
                f"{self.attention_speedup:.2f}x attention and selection"
            )
        if self.vllm_ttft is not None and self.ttft:
            text += f"\n  vLLM's TTFT {self.vllm_ttft:.2f} s, {self.vllm_ttft / self.ttft:.2f}x"
        return text

    def _decode_text(self) -> str:
        assert self.tpot_ms is not None
        assert self.tpot_p20_ms is not None
        assert self.tpot_p80_ms is not None
        text = (
            f"TPOT {self.tpot_ms:.2f} ms (p20 {self.tpot_p20_ms:.2f}, "
            f"p80 {self.tpot_p80_ms:.2f}), {self.tpot_over_floor:.2f}x the bandwidth floor"
        )
        if self.vllm_tpot_ms is not None:
            text += f", vLLM's {self.vllm_tpot_ms:.2f} ms"
        return text


@dataclass(frozen=True)
class Reporter:
    """What all lines of a run have in common."""

    work: Work
    ceilings: Ceilings
    model: str
    weights: str
    kv_cache: str
    kv_bytes_per_token: float
    chunk_tokens: int
    baseline: DenseBaseline | None
    vllm: bool
    environment: Environment

    def of_prompt(self, run: PromptRun) -> Line:
        """A prompt, and what was decoded after it."""
        linear_floor = self.work.linear_flops(run.tokens) / (self.ceilings.linear * 1e12)
        attention = self.work.attention_flops(run.tokens) * run.density
        floor = linear_floor + attention / (self.ceilings.products * 1e12)
        stages = run.stages
        attending = stages.get("attention", 0.0) + stages.get("selection", 0.0)
        dense = None if self.baseline is None else self.baseline.attention_seconds(run.tokens)
        known = ("linear", "attention", "selection", "elementwise", "page writes")
        return self._line(
            case=f"prompt of {run.tokens:,}",
            tokens=run.tokens,
            attention="sparse" if run.sparse else "dense",
            ttft=run.first_token,
            tokens_per_second=run.tokens / run.first_token,
            linear=stages.get("linear"),
            attending=stages.get("attention"),
            selection=stages.get("selection"),
            elementwise=stages.get("elementwise"),
            page_writes=stages.get("page writes"),
            other_stages=sum(s for name, s in stages.items() if name not in known),
            gaps=run.gaps,
            gaps_share=run.gaps / run.prefill,
            density=run.density,
            floor=floor,
            floor_fraction=floor / run.first_token,
            linear_fraction=linear_floor / stages["linear"],
            peak_gb=None if run.peak_bytes is None else run.peak_bytes / GB,
            activations_gb=None if run.activation_bytes is None else run.activation_bytes / GB,
            cudnn_dense_attention=dense,
            attention_speedup=None if dense is None else dense / attending,
            vllm_ttft=VLLM_TTFT_SECONDS.get(run.tokens) if self.vllm else None,
            vllm_tpot_ms=VLLM_TPOT_MS.get(run.tokens) if self.vllm else None,
            **self._decoding([run.tokens], run.steps),
        )

    def of_batch(self, run: BatchRun) -> Line:
        """Decode alone."""
        alone = len(run.lengths) == 1
        return self._line(
            case=f"decode {named(run.lengths)}{_HOW[run.chosen]}",
            tokens=sum(run.lengths),
            attention="dense",
            vllm_tpot_ms=VLLM_TPOT_MS.get(run.lengths[0]) if self.vllm and alone else None,
            **self._decoding(run.lengths, run.steps),
        )

    def _decoding(self, lengths: Sequence[int], steps: list[float]) -> dict[str, float | None]:
        if not steps:
            return {}
        counted = [1e3 * seconds for seconds in settled(steps)]
        cuts = statistics.quantiles(counted, n=10, method="inclusive") if len(counted) > 1 else None
        median = statistics.median(counted)
        # On average half of the new tokens are there besides.
        grown = [length + len(steps) // 2 for length in lengths]
        read = self.work.decode_bytes(grown, self.kv_bytes_per_token)
        floor = read / (self.ceilings.read * 1e6)
        return {
            "tpot_p20_ms": cuts[1] if cuts else median,
            "tpot_ms": median,
            "tpot_p80_ms": cuts[7] if cuts else median,
            "tpot_floor_ms": floor,
            "tpot_over_floor": median / floor,
        }

    def _line(self, **measured: object) -> Line:
        common = {
            "model": self.model,
            "weights": self.weights,
            "kv_cache": self.kv_cache,
            "chunk_tokens": self.chunk_tokens,
            "matmul_tflops": self.ceilings.linear,
            "matmul_square_tflops": self.ceilings.square,
            "read_gbs": self.ceilings.read,
            "environment": self.environment,
        }
        unknown = dict.fromkeys(Line.__dataclass_fields__)
        return Line(**{**unknown, **common, **measured})  # pyright: ignore[reportArgumentType]


def named(lengths: Sequence[int]) -> str:
    """Equal neighbours together: "1 x 1,000,000 + 30 x 1,024"."""
    groups: list[list[int]] = []
    for length in lengths:
        if groups and groups[-1][1] == length:
            groups[-1][0] += 1
        else:
            groups.append([1, length])
    return " + ".join(f"{count} x {length:,}" for count, length in groups)
