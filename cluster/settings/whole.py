"""All sections of a configuration together."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from .parts import GangSettings, WorkerSettings
from .sections import (
    AutoscalingSettings,
    DecodeSettings,
    IngressSettings,
    LimitSettings,
    MetricsSettings,
    ModelSettings,
    PrefillSettings,
    Section,
    ShutdownSettings,
    TransportSettings,
)


def _as_gangs(raw: Any) -> Any:
    """One gang may stand for a list of one."""
    if isinstance(raw, list):
        return tuple(raw)
    return (raw,) if isinstance(raw, (dict, PrefillSettings)) else raw


Gangs = Annotated[tuple[PrefillSettings, ...], BeforeValidator(_as_gangs), Field(min_length=1)]


class Whole(Section):
    """A cluster as it is written down; whether it can run is another question: see `problems`.

    The gangs of `prefill` are in the order of the prompt lengths that they take.
    """

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
