"""What a user may say, checked, as what the rest of this package works with."""

from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .arrivals import Pattern
from .mix import Mix
from .plan import Bounds, ClosedLoad, Load, OpenLoad, TraceLoad
from .prepare import Style
from .slo import Slo
from .trace import TraceLine, read_trace
from .workload import Workload


class Scale(StrEnum):
    """How long prompts are."""

    FULL = "full"
    LAPTOP = "laptop"

    @property
    def factor(self) -> float:
        """By which every length is multiplied: of prompts, and those that limits are for."""
        return 1 / 8 if self is Scale.LAPTOP else 1.0


class Options(BaseModel):
    """The command's options; their meaning is said there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    concurrency: int | None = Field(default=None, ge=1)
    trace: Path | None = None
    speed: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    arrivals: Pattern
    burst: int = Field(ge=1)
    mix: str
    scale: Scale
    answer_tokens: int = Field(ge=1)
    requests: int = Field(ge=1)
    seconds: float = Field(gt=0, allow_inf_nan=False)
    timeout: float = Field(gt=0, allow_inf_nan=False)
    slo: str
    slo_per_token: float
    sweep: bool
    steps: int = Field(ge=1)
    hold: float = Field(gt=0, le=1)
    check: bool
    ignore_eos: bool
    seed: int
    warm_up: int = Field(ge=0)
    note: str

    @model_validator(mode="after")
    def _one_load(self) -> "Options":
        given = [self.rate, self.concurrency, self.trace]
        if sum(each is not None for each in given) != 1:
            raise ValueError("name one load: --rate, --concurrency or --trace")
        if self.sweep and self.trace is not None:
            raise ValueError("--sweep changes --rate or --concurrency; a trace has its own moments")
        if self.trace is None and self.speed != 1.0:
            raise ValueError("--speed is a trace's; leave it out, or name --trace")
        return self

    @property
    def load(self) -> Load:
        """The one that is measured, or the first one of a sweep."""
        if self.concurrency is not None:
            return ClosedLoad(self.concurrency)
        if self.rate is not None:
            return OpenLoad(self.rate, self.arrivals, self.burst)
        return TraceLoad(self.speed)

    def workload(self) -> Workload:
        """All that does not depend on the load.

        Raises:
            ValueError: one of the options does not say what it should.
            OSError: a trace's file cannot be read.
        """
        factor = self.scale.factor
        source: Mix | tuple[TraceLine, ...]
        if self.trace is not None:
            source = tuple(read_trace(self.trace))
        else:
            source = Mix.parse(self.mix).scaled(factor)
        return Workload(
            source=source,
            slo=Slo.parse(self.slo, self.slo_per_token).scaled(factor),
            style=Style(self.check, self.ignore_eos),
            bounds=Bounds(self.requests, self.seconds, self.timeout),
            answer_tokens=self.answer_tokens,
            scale=factor,
            seed=self.seed,
        )
