"""A table that a live test fills while it runs, for a page."""

from collections.abc import Sequence
from pathlib import Path

_END = "<!-- end of table -->\n"


class Table:
    """What was sent, and what came of it with each of several things.

    Args:
        page: has a line `<!-- table: COMMAND -->` where the table begins, and one where it ends.
        columns: names of the things.
        command: which makes it.
    """

    def __init__(self, page: Path, columns: Sequence[str], command: str) -> None:
        self._page = page
        self._columns = columns
        self._begin = f"<!-- table: {command} -->\n"
        self._rows: dict[str, dict[str, str]] = {}

    def put(self, sent: str, column: str, came: str) -> None:
        """Fill a cell."""
        self._rows.setdefault(sent, {})[column] = came

    def lines(self) -> list[str]:
        """As Markdown; rows in the order in which they were begun.

        Raises:
            KeyError: a cell is empty: a test was left out, or failed.
        """
        head = ["sent", *self._columns]
        rows = [
            [sent, *(cells[name] for name in self._columns)] for sent, cells in self._rows.items()
        ]
        return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]

    def write(self) -> None:
        """Put it where the last one stands; raises as `lines`."""
        text = "\n".join(self.lines())
        before, rest = self._page.read_text(encoding="utf-8").split(self._begin)
        after = rest.split(_END, 1)[1]
        page = f"{before}{self._begin}\n{text}\n\n{_END}{after}"
        self._page.write_text(page, encoding="utf-8")
