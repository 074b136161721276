"""Weights from a Hugging Face checkpoint folder: one safetensors file or several with an index."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..json_files import read_json

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class WeightSource(Protocol):
    """Whatever a model's tensors come from."""

    def read(
        self, name: str, shape: tuple[int, ...], rows: slice | None = None, axis: int = 0
    ) -> Tensor:
        """The tensor `name` of `shape`; only `rows` along `axis` where given."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that may have several."""
        ...


class CheckpointReader:
    """Reads single tensors, or slices of them, without loading a whole file.

    with CheckpointReader(folder) as reader:
        weight = reader.read("model.norm.weight", (hidden,))

    Raises:
        CheckpointError: no weights, a truncated file, a missing tensor, or another shape.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = ExitStack()
        self._readers: dict[str, safe_open] = {}
        self._file_of = _files_of_tensors(folder)

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()

    def read(
        self, name: str, shape: tuple[int, ...], rows: slice | None = None, axis: int = 0
    ) -> Tensor:
        """The tensor `name`, which must have `shape`; only `rows` along `axis` where given."""
        try:
            stored = self._reader_of(name).get_slice(name)
            if tuple(stored.get_shape()) != shape:
                raise CheckpointError(
                    f"{self._folder}: {name} has shape {tuple(stored.get_shape())}, but "
                    f"config.json makes it {shape}"
                )
            if rows is None:
                # A single number has no slices.
                return stored[:] if shape else self._reader_of(name).get_tensor(name)
            return stored[rows] if axis == 0 else stored[:, rows]
        except SafetensorError as error:
            raise CheckpointError(f"{self._folder}: {name} cannot be read: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor `name`."""
        try:
            return tuple(self._reader_of(name).get_slice(name).get_shape())
        except SafetensorError as error:
            raise CheckpointError(f"{self._folder}: {name} cannot be read: {error}") from error

    def _reader_of(self, name: str) -> safe_open:
        file_name = self._file_of.get(name)
        if file_name is None:
            raise CheckpointError(f"{self._folder} has no tensor {name}; the checkpoint is partial")
        if file_name not in self._readers:
            self._readers[file_name] = self._files.enter_context(_open(self._folder / file_name))
        return self._readers[file_name]


def _files_of_tensors(folder: Path) -> dict[str, str]:
    if (folder / _INDEX).exists():
        index = read_json(folder / _INDEX)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise CheckpointError(f"{folder / _INDEX} has no weight_map")
        return index["weight_map"]
    path = folder / _SINGLE
    if not path.exists():
        raise CheckpointError(f"{folder} has neither {_SINGLE} nor {_INDEX}")
    with _open(path) as reader:
        return dict.fromkeys(reader.keys(), _SINGLE)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is named in the index but does not exist") from error
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); download it again"
        ) from error
