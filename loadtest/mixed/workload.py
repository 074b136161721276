"""What is asked, whatever the load."""

from dataclasses import dataclass, replace

from .mix import Mix
from .plan import Bounds, ClosedLoad, Load, Plan, TraceLoad, plan_mix, plan_trace
from .prepare import Style
from .record import Ask
from .slo import Slo
from .trace import TraceLine

_ROOM = 0.99
"""Of an endpoint's longest prompt: lengths are estimates."""


@dataclass(frozen=True)
class Workload:
    """Prompts, how they are asked, and what answers shall be like.

    Attributes:
        source: a mix, already scaled, or a trace.
        answer_tokens: of a mix; a trace has its own.
        scale: of a trace's prompts.
        seed: the same one makes the same prompts at the same moments.
    """

    source: Mix | tuple[TraceLine, ...]
    slo: Slo
    style: Style
    bounds: Bounds
    answer_tokens: int
    scale: float
    seed: int

    def cut_to(self, max_model_len: int | None) -> "Workload":
        """The same with no prompt longer than the endpoint has room for, where it says so.

        Raises:
            ValueError: a class has none as short as that, or a trace has a longer one.
        """
        if max_model_len is None:
            return self
        if isinstance(self.source, Mix):
            room = int((max_model_len - self.answer_tokens) * _ROOM)
            return replace(self, source=self.source.cut_at(room))
        for line in self.source[: self.bounds.requests]:
            if line.input_length * self.scale > (max_model_len - line.output_length) * _ROOM:
                raise ValueError(
                    f"the trace has a prompt of {line.input_length:,} tokens and an answer of "
                    f"{line.output_length:,}; the endpoint has room for {max_model_len:,} "
                    "together; take such lines out, or --scale laptop"
                )
        return self

    def plan(self, load: Load, number: int = 0) -> Plan:
        """What is sent; each number gives other prompts.

        Raises:
            ValueError: nothing would be sent, or the SLO has no limit for one of the lengths.
        """
        if isinstance(load, TraceLoad):
            assert not isinstance(self.source, Mix), "only a trace has its own moments"
            return plan_trace(self.source, load, self.scale, self.bounds, self.slo)
        assert isinstance(self.source, Mix), "a trace has its own moments"
        seed = self.seed + number
        plan = plan_mix(self.source, load, self.bounds, self.answer_tokens, seed)
        self.slo.wait(self.source.classes[-1].highest)
        return plan

    def plan_warm_up(self, count: int) -> Plan:
        """So many of the shortest prompts, one after the other."""
        if isinstance(self.source, Mix):
            tokens, answer_tokens = self.source.classes[0].lowest, self.answer_tokens
        else:
            line = min(self.source, key=lambda line: line.input_length)
            tokens, answer_tokens = round(line.input_length * self.scale), line.output_length
        asks = (Ask(each, None, "warm-up", tokens, answer_tokens) for each in range(count))
        return Plan(tuple(asks), ("warm-up",), ClosedLoad(1), self.bounds)
