"""The picture of the house shows the tree as it is."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from longreach.lab.house.imports import House, Module
from longreach.lab.house.layout import place
from longreach.lab.house.picture import arrows_shown, draw

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def shown(svg: str) -> tuple[set[str], set[tuple[str, ...]]]:
    """Rooms and arrows of a picture."""
    groups = ElementTree.fromstring(svg).iter(f"{SVG}g")
    data = [(each.get("data-room"), each.get("data-arrow")) for each in groups]
    rooms = {room for room, _ in data if room}
    arrows = {tuple(one.split()) for _, arrows in data if arrows for one in arrows.split(";")}
    return rooms, arrows


def test_the_picture_in_the_docs_is_of_this_tree(house: House) -> None:
    """Otherwise: `make house`. Lines may have changed since."""
    rooms, arrows = shown((ROOT / "docs" / "house.svg").read_text(encoding="utf-8"))
    assert rooms == set(house.rooms)
    assert arrows == {(room, to) for room, targets in arrows_shown(house).items() for to in targets}


def test_the_same_tree_makes_the_same_picture(house: House) -> None:
    backward = House(dict(sorted(house.modules.items(), reverse=True)))
    assert draw(house) == draw(backward)


def test_no_box_covers_another(house: House) -> None:
    boxes = [
        tuple(float(box.get(name, "nan")) for name in ("x", "y", "width", "height"))
        for box in ElementTree.fromstring(draw(house)).iter(f"{SVG}rect")
        if box.get("class") == "box"
    ]
    assert len(boxes) == len(house.rooms)
    for number, (x, y, width, height) in enumerate(boxes):
        for other_x, other_y, other_width, other_height in boxes[:number]:
            beside = x + width <= other_x or other_x + other_width <= x
            assert beside or y + height <= other_y or other_y + other_height <= y


def test_arrows_run_downward(house: House) -> None:
    tops = {
        group.get("data-room"): float(group[0].get("y", "nan"))
        for group in ElementTree.fromstring(draw(house)).iter(f"{SVG}g")
        if group.get("data-room")
    }
    for source, target in shown(draw(house))[1]:
        beside = source.startswith(("lab.", "deploy.", "plugins."))
        if not beside or source.partition(".")[0] == target.partition(".")[0]:
            assert tops[source] < tops[target]


def test_a_circle_cannot_be_drawn() -> None:
    modules = {
        name: Module(name, 1, frozenset({imported}), frozenset())
        for name, imported in (("engine.a", "engine.b"), ("engine.b", "engine.a"))
    }
    with pytest.raises(ValueError, match=re.escape("engine.a, engine.b")):
        draw(House(modules))


def test_a_long_arrow_passes_between_the_boxes_of_a_row() -> None:
    widths = dict.fromkeys("abcde", 100.0)
    layout = place([["a"], ["b", "c"], ["d", "e"]], widths, {"a": {"b", "c", "e"}, "c": {"d"}})
    [passed] = layout.passages["a", "e"]
    assert all(abs(passed - layout.centres[box]) >= 50 for box in "bc")
    assert abs(layout.centres["b"] - layout.centres["c"]) >= 100
    assert layout.width >= 200
