"""The house as an SVG: floors above each other, beside them what deploys and measures.

An arrow means "imports". Those that follow from others are left out: who imports decode, which
imports the model, has no arrow of its own to the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from xml.sax.saxutils import escape

from .imports import House, circles, direct
from .layout import place

MAIN, CLIENTS, LAB, DEPLOY = ("cluster", "engine", "kernels"), "loadtest", "lab", "deploy"
PLUGINS = "plugins"
BESIDE = (CLIENTS, DEPLOY, LAB, PLUGINS)

_BOX_HEIGHT, _ROW_HEIGHT = 40.0, 82.0
_MARGIN, _PADDING, _TITLE_HEIGHT, _FLOOR_GAP, _SIDE_GAP = 24.0, 22.0, 52.0, 26.0, 104.0
_CHARACTER, _LEAST_WIDTH, _TITLE_WIDTH = 8.0, 84.0, 76.0

_LIGHT = {
    "paper": "#ffffff", "box": "#ffffff", "text": "#1f2328", "note": "#59636e",
    "cluster": ("#2563c9", "#eef4ff"), "engine": ("#0f7a55", "#ebf8f1"),
    "kernels": ("#b45309", "#fff5e6"), "lab": ("#7c3aed", "#f5f0ff"),
    "loadtest": ("#59636e", "#f3f5f7"), "deploy": ("#b3246b", "#fdf0f6"),
    "plugins": ("#0b7285", "#e8f7f9"),
}  # fmt: skip
_DARK = {
    "paper": "#0d1117", "box": "#161b22", "text": "#e6edf3", "note": "#9aa4af",
    "cluster": ("#6ea8ff", "#101c31"), "engine": ("#4ec994", "#0d2119"),
    "kernels": ("#f0a848", "#261a0a"), "lab": ("#b794ff", "#1c1430"),
    "loadtest": ("#9aa4af", "#161b22"), "deploy": ("#f28cbb", "#2a1020"),
    "plugins": ("#66c7d6", "#0c2126"),
}  # fmt: skip
_LEGEND = (
    "An arrow: imports.",
    "What follows from other arrows",
    "has none of its own.",
    "Lines are rounded.",
)
_FONT = "-apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"


def draw(house: House) -> str:
    """The SVG.

    Raises:
        ValueError: rooms import each other in a circle.
    """
    for rooms in circles(house.room_arrows):
        raise ValueError(f"{', '.join(rooms)} import each other in a circle; take that out first")
    return _Picture(house).svg()


def arrows_shown(house: House) -> dict[str, set[str]]:
    """The arrows of the picture, as they are named in its `data-arrow`."""
    return direct(house.room_arrows)


@dataclass(frozen=True)
class _Box:
    """Of a room, or of a whole floor."""

    x: float
    y: float
    width: float
    height: float

    @property
    def centre(self) -> float:
        return self.x + self.width / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height


class _Picture:
    def __init__(self, house: House) -> None:
        self._house = house
        self._sizes = house.rooms
        self._arrows = arrows_shown(house)
        self._floors: dict[str, _Box] = {}
        self._rooms: dict[str, _Box] = {}
        self._passages: dict[tuple[str, str], list[float]] = {}
        self._row_of: dict[str, float] = {}

    def svg(self) -> str:
        self._place_main()
        self._place_beside()
        width = max(floor.x + floor.width for floor in self._floors.values()) + _MARGIN
        height = max(floor.bottom for floor in self._floors.values()) + _MARGIN
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'font-family="{_FONT}">',
            "<title>Longreach's floors and rooms, and what imports what</title>",
            _style(),
            f'<rect class="paper" width="{width:.0f}" height="{height:.0f}" rx="10"/>',
            *(self._floor(floor) for floor in self._floors),
            *(self._arrow(*arrow) for arrow in self._curved()),
            *self._arrows_from(DEPLOY),
            *self._arrows_from(LAB),
            *self._arrows_from(PLUGINS),
            *self._arrows_between(LAB, PLUGINS),
            *(self._room(room) for room in self._sizes),
            *self._legend(),
            "</svg>",
        ]
        return "\n".join(lines) + "\n"

    def _place_main(self) -> None:
        rows = {floor: self._rows(floor) for floor in MAIN}
        layout = place(
            [row for floor in MAIN for row in rows[floor]],
            {room: _width(room) for room in self._sizes},
            {room: self._arrows[room] for room in self._sizes if _floor_of(room) in MAIN},
        )
        # No arrow crosses the floors' titles.
        left = _MARGIN + _PADDING + _TITLE_WIDTH
        self._passages = {
            arrow: [left + x for x in passed] for arrow, passed in layout.passages.items()
        }
        y = _MARGIN
        for floor in MAIN:
            height = _TITLE_HEIGHT + _PADDING + _ROW_HEIGHT * (len(rows[floor]) - 1) + _BOX_HEIGHT
            self._floors[floor] = _Box(
                _MARGIN, y, _TITLE_WIDTH + layout.width + 2 * _PADDING, height
            )
            self._put(rows[floor], layout.centres, left, y + _TITLE_HEIGHT)
            y += height + _FLOOR_GAP

    def _place_beside(self) -> None:
        """Clients, deployment, the lab and plugins, above each other."""
        first = self._floors[MAIN[0]]
        x, y = first.x + first.width + _SIDE_GAP, first.y
        for floor in BESIDE:
            rows = self._rows(floor)
            widths = {room: _width(room) for row in rows for room in row}
            layout = place(rows, widths, {room: self._arrows[room] & {*widths} for room in widths})
            height = _TITLE_HEIGHT + _PADDING + _ROW_HEIGHT * (len(rows) - 1) + _BOX_HEIGHT
            self._floors[floor] = _Box(x, y, layout.width + 2 * _PADDING, height)
            self._put(rows, layout.centres, x + _PADDING, y + _TITLE_HEIGHT)
            self._passages |= {
                arrow: [x + _PADDING + each for each in passed]
                for arrow, passed in layout.passages.items()
            }
            y += height + _FLOOR_GAP
        width = max(self._floors[floor].width for floor in BESIDE)
        for floor in BESIDE:
            self._floors[floor] = replace(self._floors[floor], width=width)

    def _put(
        self, rows: Sequence[Sequence[str]], centres: Mapping[str, float], x: float, y: float
    ) -> None:
        for number, row in enumerate(rows):
            for room in row:
                left = x + centres[room] - _width(room) / 2
                self._rooms[room] = _Box(left, y + number * _ROW_HEIGHT, _width(room), _BOX_HEIGHT)

    def _rows(self, floor: str) -> list[list[str]]:
        """A floor's rooms by the longest way down within it, the uppermost first."""
        depths: dict[str, int] = {}

        def depth(room: str) -> int:
            if room not in depths:
                depths[room] = 1 + max(
                    (depth(to) for to in self._arrows[room] if _floor_of(to) == floor), default=-1
                )
            return depths[room]

        own = [room for room in self._sizes if _floor_of(room) == floor]
        most = max(map(depth, own), default=0)
        return [[room for room in own if depth(room) == row] for row in range(most, -1, -1)]

    def _curved(self) -> list[tuple[str, str]]:
        """Arrows that are drawn one by one: all but those to a floor beside their own."""
        return [
            (source, target)
            for source, targets in self._arrows.items()
            for target in sorted(targets)
            if _floor_of(source) in MAIN or _floor_of(source) == _floor_of(target)
        ]

    def _port(self, source: str, target: str, leaving: bool) -> float:
        """Where an arrow leaves or arrives: beside the room's others, in the order they lie in."""
        room = source if leaving else target
        mine = [arrow for arrow in self._curved() if arrow[0 if leaving else 1] == room]

        def towards(arrow: tuple[str, str]) -> float:
            passed = self._passages[arrow]
            if passed:
                return passed[0 if leaving else -1]
            return self._rooms[arrow[1 if leaving else 0]].centre

        mine.sort(key=lambda arrow: (towards(arrow), arrow))
        box = self._rooms[room]
        step = min(13.0, (box.width - 20) / len(mine))
        return box.centre + (mine.index((source, target)) - (len(mine) - 1) / 2) * step

    def _arrow(self, source: str, target: str) -> str:
        """A curve from the lower edge of one room to the upper edge of another."""
        x, y = self._port(source, target, True), self._rooms[source].bottom
        parts = [f"M{x:.1f} {y:.1f}"]
        stops = self._stops(source, target)
        for passed, top, bottom in stops:
            middle = (y + top) / 2
            parts.append(f"C{x:.1f} {middle:.1f} {passed:.1f} {middle:.1f} {passed:.1f} {top:.1f}")
            parts.append(f"V{bottom:.1f}")
            x, y = passed, bottom
        end_x, end_y = self._port(source, target, False), self._rooms[target].y - 7
        middle = (y + end_y) / 2
        parts.append(f"C{x:.1f} {middle:.1f} {end_x:.1f} {middle:.1f} {end_x:.1f} {end_y:.1f}")
        floor = _floor_of(source)
        tip = f"M{end_x - 4:.1f} {end_y:.1f}h8l-4 7z"
        return (
            f'<g class="{floor}" data-arrow="{source} {target}"><path class="arrow" '
            f'd="{"".join(parts)}"/><path class="head" d="{tip}"/></g>'
        )

    def _stops(self, source: str, target: str) -> list[tuple[float, float, float]]:
        """x, upper and lower edge of each row that an arrow passes."""
        tops = sorted({box.y for room, box in self._rooms.items() if _floor_of(room) in MAIN})
        if _floor_of(source) not in MAIN:
            floor = _floor_of(source)
            tops = sorted({box.y for room, box in self._rooms.items() if _floor_of(room) == floor})
        first, last = self._rooms[source].y, self._rooms[target].y
        between = [top for top in tops if first < top < last]
        passed = self._passages[(source, target)]
        return [(x, top, top + _BOX_HEIGHT) for x, top in zip(passed, between, strict=True)]

    def _arrows_from(self, beside: str) -> list[str]:
        """One arrow to each floor, with the names of the rooms that it points to."""
        drawn = []
        for number, floor in enumerate(MAIN):
            arrows = [
                (source, target)
                for source in self._arrows
                for target in sorted(self._arrows[source])
                if _floor_of(source) == beside and _floor_of(target) == floor
            ]
            if arrows:
                drawn.append(self._arrow_from(beside, self._floors[floor], arrows, number))
        return drawn

    def _arrow_from(
        self, beside: str, floor: _Box, arrows: Sequence[tuple[str, str]], number: int
    ) -> str:
        """Straight to a floor beside the box; to one further down along the gap between them."""
        box, end = self._floors[beside], floor.x + floor.width + 8
        low, high = max(box.y, floor.y), min(box.bottom, floor.bottom)
        y = (low + high) / 2
        way = f"M{box.x:.1f} {y:.1f}H{end:.1f}"
        if high - low < 2 * _PADDING:
            y = floor.y + floor.height / 2
            # Close to the box, so that it passes by the names at other arrows.
            side, leave = box.x - 6 - 5 * number, box.bottom - 14
            way = f"M{box.x:.1f} {leave:.1f}H{side + 5:.1f}q-5 0 -5 5V{y - 12:.1f}"
            way += f"q0 12 -12 12H{end:.1f}"
        targets = sorted({_label(target) for _, target in arrows})
        names = "".join(
            f'<text class="note middle" x="{(end + box.x) / 2:.1f}" y="{y - 9 - 14 * up:.1f}">'
            f"{escape(target)}</text>"
            for up, target in enumerate(reversed(targets))
        )
        data = ";".join(f"{source} {target}" for source, target in arrows)
        return (
            f'<g class="{beside}" data-arrow="{data}"><path class="arrow wide" d="{way}"/>'
            f'<path class="head" d="M{end:.1f} {y - 6:.1f}v12l-8 -6z"/>{names}</g>'
        )

    def _arrows_between(self, beside: str, below: str) -> list[str]:
        """One arrow from a floor beside the others to the one below it, with names as these."""
        arrows = [
            (source, target)
            for source in self._arrows
            for target in sorted(self._arrows[source])
            if _floor_of(source) == beside and _floor_of(target) == below
        ]
        if not arrows:
            return []
        box, end = self._floors[beside], self._floors[below].y - 8
        x, y = box.centre, (box.bottom + end) / 2
        names = ", ".join(sorted({_label(target) for _, target in arrows}))
        data = ";".join(f"{source} {target}" for source, target in arrows)
        return [
            f'<g class="{beside}" data-arrow="{data}"><path class="arrow wide" '
            f'd="M{x:.1f} {box.bottom:.1f}V{end:.1f}"/>'
            f'<path class="head" d="M{x - 6:.1f} {end:.1f}h12l-6 8z"/>'
            f'<text class="note" x="{x + 12:.1f}" y="{y + 4:.1f}">{escape(names)}</text></g>'
        ]

    def _legend(self) -> list[str]:
        """Below the lab."""
        box, last = self._floors[LAB], self._floors[MAIN[-1]]
        x, y = box.x + 3 * 36, last.bottom - 14.0 * len(_LEGEND) + 8
        return [
            f'<text class="note" x="{x:.1f}" y="{y + 15 * number:.1f}">{escape(line)}</text>'
            for number, line in enumerate(_LEGEND)
        ]

    def _floor(self, floor: str) -> str:
        box = self._floors[floor]
        lines = sum(size for room, size in self._sizes.items() if _floor_of(room) == floor)
        x, y = box.x + 16, box.y + 24
        return (
            f'<g class="{floor}"><rect class="floor" x="{box.x:.1f}" y="{box.y:.1f}" '
            f'width="{box.width:.1f}" height="{box.height:.1f}" rx="10"/>'
            f'<text class="title" x="{x:.1f}" y="{y:.1f}">{floor}/</text>'
            f'<text class="note" x="{x:.1f}" y="{y + 16:.1f}">{_lines(lines)}</text></g>'
        )

    def _room(self, room: str) -> str:
        box = self._rooms[room]
        return (
            f'<g class="{_floor_of(room)}" data-room="{room}"><rect class="box" x="{box.x:.1f}" '
            f'y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="6"/>'
            f'<text class="name" x="{box.centre:.1f}" y="{box.y + 18:.1f}">'
            f"{escape(_label(room))}</text>"
            f'<text class="note middle" x="{box.centre:.1f}" y="{box.y + 32:.1f}">'
            f"{_lines(self._sizes[room])}</text></g>"
        )


def _floor_of(room: str) -> str:
    return room.partition(".")[0]


def _label(room: str) -> str:
    return room.partition(".")[2]


def _width(room: str) -> float:
    return max(_LEAST_WIDTH, len(_label(room)) * _CHARACTER + 22)


def _lines(count: int) -> str:
    """Two digits of a number are enough to compare, and change less often than it does."""
    unit = 10 ** max(len(str(count)) - 2, 0)
    return f"{round(count / unit) * unit:,} lines"


def _style() -> str:
    fixed = (
        ".note { font-size: 11.5px; } .middle, .name { text-anchor: middle; } "
        ".title { font-size: 17px; font-weight: bold; } "
        ".name { font-size: 13.5px; font-weight: 600; } .box { stroke-width: 1.4; } "
        ".arrow { fill: none; stroke-width: 1.4; } .wide { stroke-width: 2.4; } "
    )
    return (
        f"<style>\n{fixed}\n{_colours(_LIGHT)}\n"
        f"@media (prefers-color-scheme: dark) {{\n{_colours(_DARK)}\n}}\n</style>"
    )


def _colours(of: Mapping[str, str | tuple[str, str]]) -> str:
    rules = [
        f".paper {{ fill: {of['paper']}; }}",
        f".box {{ fill: {of['box']}; }}",
        f"text {{ fill: {of['text']}; }}",
        f"text.note {{ fill: {of['note']}; }}",
    ]
    for floor in (*MAIN, *BESIDE):
        line, band = of[floor]
        rules += [
            f".{floor} .floor {{ fill: {band}; stroke: {line}; }}",
            f".{floor} .box, .{floor} .arrow {{ stroke: {line}; }}",
            f".{floor} .head {{ fill: {line}; }}",
        ]
    return "\n".join(rules)
