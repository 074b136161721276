"""What the endpoint is told of a cluster."""

from dataclasses import asdict, fields
from pathlib import Path

from longreach.cluster.ingress import ingress_limits
from longreach.cluster.rest import IngressLimits
from longreach.cluster.settings import load_settings

LAPTOP = Path(__file__).parents[2] / "configs" / "laptop.yaml"


def test_every_limit_is_the_settings() -> None:
    settings = load_settings(LAPTOP)
    said = {
        **settings.limits.model_dump(),
        **settings.ingress.model_dump(),
        "model_name": settings.model.name,
    }
    limits = ingress_limits(settings)
    told = {field.name: getattr(limits, field.name) for field in fields(IngressLimits)}
    told |= asdict(told.pop("signs_of_life"))
    assert told == {name: said[name] for name in told}
