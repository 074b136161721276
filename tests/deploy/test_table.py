"""Tables of pages that live tests write."""

from pathlib import Path

import pytest

from .table import Table


def test_a_table_takes_the_place_of_the_last_one(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: make it -->\nold\n<!-- end of table -->\nafter\n")
    table = Table(page, ["one", "two"], "make it")
    table.put("a", "one", "1")
    with pytest.raises(KeyError):
        table.write()
    table.put("a", "two", "2")
    table.write()
    table.write()
    assert page.read_text() == (
        "before\n<!-- table: make it -->\n\n| sent | one | two |\n| --- | --- | --- |\n"
        "| a | 1 | 2 |\n\n<!-- end of table -->\nafter\n"
    )
