"""What a check finds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """`where`: a file or an object of a manifest; `what`: what is wrong, and what helps."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"
