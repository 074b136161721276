"""What people have, as text: files, folders, PDFs, standard input, in whatever encoding."""

import codecs
import io
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...engine.errors import InvalidRequestError

STANDARD_INPUT = "-"
_PDF = b"%PDF-"
# What begins with one of these may hold zero bytes and be text.
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


@dataclass(frozen=True)
class Document:
    """A text, and what it is called."""

    name: str
    text: str


@dataclass(frozen=True)
class LeftOut:
    """A file of a folder that is no text, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Documents:
    """All that was named, in that order; files of a folder in the order of their names."""

    documents: tuple[Document, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def text(self) -> str:
        """As a prompt has it: a document alone as it is, several with their names as headings."""
        if len(self.documents) == 1:
            return self.documents[0].text
        return "\n\n".join(f"# {each.name}\n\n{each.text}" for each in self.documents)


class _NoTextError(Exception):
    """Why something cannot be read as text; a sentence without its subject."""


def read_documents(names: Iterable[str]) -> Documents:
    """Read files, folders (what git tracks there, or all but hidden files) and `-`.

    Raises:
        InvalidRequestError: one that was named cannot be read as text, or nothing is left.
    """
    read: list[Document] = []
    left_out: list[LeftOut] = []
    for name in names:
        path = Path(name)
        if name != STANDARD_INPUT and path.is_dir():
            for document in _read_folder(path):
                (read if isinstance(document, Document) else left_out).append(document)  # type: ignore[arg-type]
            continue
        try:
            read.append(Document(name, _text_of(_bytes_of(name))))
        except _NoTextError as error:
            raise InvalidRequestError(f"{name} {error}") from error
    if not read:
        raise InvalidRequestError(
            f"no text in what was named, {len(left_out)} files left out; name a file with text"
        )
    return Documents(tuple(read), tuple(left_out))


def _read_folder(folder: Path) -> Iterator[Document | LeftOut]:
    for path in sorted(_files_of(folder)):
        try:
            yield Document(str(path), _text_of(_bytes_of(str(path))))
        except _NoTextError as error:
            yield LeftOut(str(path), str(error))


def _files_of(folder: Path) -> Iterator[Path]:
    """What git tracks below a folder; where git knows nothing of it, all but what is hidden."""
    try:
        listed = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "-z"], capture_output=True, check=False
        )
    except OSError as error:
        raise InvalidRequestError(f"git cannot be run ({error.strerror}); install it") from error
    if listed.returncode == 0:
        names = listed.stdout.decode(errors="surrogateescape").split("\0")
        yield from (folder / name for name in names if name)
        return
    for path in folder.rglob("*"):
        inside = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in inside):
            yield path


def _bytes_of(name: str) -> bytes:
    try:
        if name == STANDARD_INPUT:
            return sys.stdin.buffer.read()
        return Path(name).read_bytes()
    except OSError as error:
        raise _NoTextError(f"cannot be read: {error.strerror}") from error


def _text_of(data: bytes) -> str:
    text = _text_of_pdf(data) if data.startswith(_PDF) else _decoded(data)
    if not text.strip():
        raise _NoTextError("has no text in it")
    return text


def _text_of_pdf(data: bytes) -> str:
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        return "\n\n".join(page.extract_text() for page in PdfReader(io.BytesIO(data)).pages)
    # Besides its own errors pypdf lets through whatever a broken file makes it stumble over.
    except (PyPdfError, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise _NoTextError(f"is a PDF that cannot be read: {error}") from error


def _decoded(data: bytes) -> str:
    """UTF-8 where it is that, else what charset-normalizer takes it for."""
    from charset_normalizer import from_bytes

    try:
        return data.decode("utf-8-sig") if b"\0" not in data else _decoded_wide(data)
    except UnicodeDecodeError:
        best = from_bytes(data).best()
    if best is None:
        raise _NoTextError("is no text in any encoding that is known")
    return str(best)


def _decoded_wide(data: bytes) -> str:
    if not data.startswith(_WIDE_MARKS):
        raise _NoTextError("is no text: it holds zero bytes")
    # Of UTF-32 first, because its mark begins with that of UTF-16.
    for encoding in ("utf-32", "utf-16"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise _NoTextError("is no text: it begins as UTF-16 and does not go on so")
