"""A Dockerfile, read as far as ours go: stages, and their instructions."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from string import Template


@dataclass(frozen=True)
class Stage:
    """`image` is what it starts from: another's name, or another stage's.

    `steps` are keywords and what follows them, in their order.
    """

    image: str
    name: str | None
    steps: tuple[tuple[str, str], ...]

    def of(self, keyword: str) -> list[str]:
        """What follows each instruction of a kind."""
        return [text for word, text in self.steps if word == keyword]

    def environment(self, before: Mapping[str, str]) -> dict[str, str]:
        """What ARG and ENV add to variables, which they may name."""
        made = dict(before)
        for keyword, text in self.steps:
            if keyword in ("ARG", "ENV"):
                for pair in shlex.split(text):
                    name, _, value = pair.partition("=")
                    made[name] = Template(value).safe_substitute(made)
        return made


def stages(text: str) -> list[Stage]:
    """Those of a Dockerfile; the last one is what runs."""
    found: list[tuple[str, list[tuple[str, str]]]] = []
    for line in _instructions(text):
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            found.append((rest, []))
        elif found:
            found[-1][1].append((keyword, rest.strip()))
    return [_stage(start, steps) for start, steps in found]


def _stage(start: str, steps: list[tuple[str, str]]) -> Stage:
    image, _, name = start.partition(" AS ")
    return Stage(image.strip(), name.strip() or None, tuple(steps))


def _instructions(text: str) -> Iterator[str]:
    """Each in one line, without comments."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            yield line.strip()
