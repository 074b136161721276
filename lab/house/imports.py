"""Who imports whom, read from the source without running it.

Imports inside functions and those for type checkers count like all others. A room is a package
directly beneath a floor, or a module directly in one.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

FLOORS = ("cluster", "engine", "kernels", "deploy", "plugins", "lab", "loadtest")
_PACKAGE = "longreach"

Arrows = Mapping[str, Set[str]]
"""From a name to those that it imports."""


@dataclass(frozen=True)
class Module:
    """One source file, by its name without the package's, such as "engine.kv.pages".

    `imports` are modules of ours, `foreign` the first names of all others' packages.
    """

    name: str
    lines: int
    imports: frozenset[str]
    foreign: frozenset[str]

    @property
    def floor(self) -> str:
        """The folder at the root."""
        return self.name.partition(".")[0]

    @property
    def room(self) -> str:
        """Where it belongs, such as "engine.kv"; the floor itself for its own `__init__`."""
        return ".".join(self.name.split(".")[:2])


@dataclass(frozen=True)
class House:
    """All modules, by name."""

    modules: Mapping[str, Module]

    @classmethod
    def read(cls, root: Path) -> "House":
        """The tree of a repository."""
        paths = {
            _name(path.relative_to(root)): path
            for floor in FLOORS
            for path in sorted((root / floor).rglob("*.py"))
        }
        return cls({name: _module(name, path, paths.keys()) for name, path in paths.items()})

    @property
    def rooms(self) -> dict[str, int]:
        """Lines of each room, by name and in order of names."""
        lines: defaultdict[str, int] = defaultdict(int)
        for module in self.modules.values():
            if module.room != module.floor:
                lines[module.room] += module.lines
        return dict(sorted(lines.items()))

    @property
    def module_arrows(self) -> Arrows:
        """Which module imports which."""
        return {name: module.imports for name, module in self.modules.items()}

    @property
    def room_arrows(self) -> dict[str, set[str]]:
        """Which room imports which other."""
        arrows: dict[str, set[str]] = {room: set() for room in self.rooms}
        for module in self.modules.values():
            targets = {self.modules[name].room for name in module.imports}
            if module.room in arrows:
                arrows[module.room] |= targets & arrows.keys() - {module.room}
        return arrows

    def reach(self, *names: str) -> set[str]:
        """These modules, all that they may ever import, and the packages that those lie in."""
        seen: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            waiting += self.modules[name].imports
            if "." in name:
                waiting.append(name.rpartition(".")[0])
        return seen


def circles(arrows: Arrows) -> list[list[str]]:
    """Groups of names that reach one another: Tarjan's strongly connected components."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        path.append(name)
        for target in sorted(arrows.get(name, ())):
            if target not in order:
                visit(target)
            if target in path:
                lowest[name] = min(lowest[name], lowest[target])
        if lowest[name] == order[name]:
            start = path.index(name)
            group = path[start:]
            del path[start:]
            if len(group) > 1 or name in arrows.get(name, ()):
                found.append(sorted(group))

    for name in sorted(arrows):
        if name not in order:
            visit(name)
    return found


def direct(arrows: Arrows) -> dict[str, set[str]]:
    """The arrows that do not follow from others, of a graph without circles."""

    def beyond(name: str) -> set[str]:
        """All that is reached from a name in one step or more."""
        if name not in reached:
            targets = arrows.get(name, ())
            reached[name] = set(targets).union(*map(beyond, targets))
        return reached[name]

    reached: dict[str, set[str]] = {}
    return {name: set(arrows[name]).difference(*map(beyond, arrows[name])) for name in arrows}


def _name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _module(name: str, path: Path, known: Set[str]) -> Module:
    source = path.read_text(encoding="utf-8")
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    ours: set[str] = set()
    foreign: set[str] = set()
    for imported in _imported(ast.parse(source), package):
        if not imported.startswith(f"{_PACKAGE}."):
            foreign.add(imported.partition(".")[0])
            continue
        target = imported.removeprefix(f"{_PACKAGE}.")
        # `from package import name` names a module, or something within the package's own file.
        ours.add(target if target in known else target.rpartition(".")[0])
    return Module(name, len(source.splitlines()), frozenset(ours - {name}), frozenset(foreign))


def _imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Everything imported, in full: what is relative becomes `longreach.…`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parts = package.split(".")
                source = ".".join(
                    (_PACKAGE, *parts[: len(parts) - node.level + 1], *filter(None, [node.module]))
                )
            yield from (f"{source}.{alias.name}" for alias in node.names)
