"""The engine and the kernels know no settings: only the cluster says how they are called."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from longreach.cluster.settings import Settings

ROOT = Path(__file__).parents[2]
SOURCES = [path for floor in ("engine", "kernels") for path in sorted((ROOT / floor).rglob("*.py"))]


def keys_of(sections: type[BaseModel]) -> dict[str, set[str]]:
    """The keys of each section."""
    found = {}
    for name, field in sections.model_fields.items():
        # Of a section that may come several times, the annotation is a tuple.
        section = next(iter(get_args(field.annotation)), field.annotation)
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        found[name] = set(section.model_fields)
    return found


def setting_names() -> re.Pattern[str]:
    """Whatever names a setting: with its section, or by a key that is no word of its own."""
    sections = keys_of(Settings)
    whole = [f"{name}\\.{key}" for name, keys in sections.items() for key in keys]
    return re.compile(rf"\b(?:{'|'.join(whole)})\b")


def bare_keys() -> re.Pattern[str]:
    """Keys of several words, without their section. Those of one word are words like others."""
    keys = {key for keys in keys_of(Settings).values() for key in keys if "_" in key}
    return re.compile(rf"\b(?:{'|'.join(sorted(keys))})\b")


def strings_of(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Every string of a module, and whether it explains code: those name parameters as well."""
    explaining = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, node in explaining


def names_in(source: str) -> list[str]:
    """Settings that a module's strings name."""
    found: list[str] = []
    for text, explains in strings_of(ast.parse(source)):
        found += setting_names().findall(text)
        if not explains:
            found += bare_keys().findall(text)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_string_names_a_setting(path: Path) -> None:
    assert names_in(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        'raise Error("lower prefill.chunk_tokens")',
        'raise Error(f"{tokens} are too many; raise kv_cache_tokens")',
        '"""Explains that transport.kind decides."""',
    ],
)
def test_a_name_would_be_found(source: str) -> None:
    assert names_in(source)


@pytest.mark.parametrize(
    "source", ['read("model.norm.weight")', '"""`tensor_parallel` ranks of a mesh."""', "max_batch"]
)
def test_parameters_and_tensors_are_no_settings(source: str) -> None:
    assert names_in(source) == []
