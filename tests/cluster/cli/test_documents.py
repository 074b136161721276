"""Whatever people have becomes text, or is refused or left out by its name."""

import codecs
import io
import subprocess
from pathlib import Path

import pytest

from longreach.cluster.cli.documents import read_documents
from longreach.engine.errors import InvalidRequestError

GERMAN = "Der Bär saß über den Köpfen der Mäuse, und niemand grüßte. " * 20
RUSSIAN = "Всё смешалось в доме Облонских, и никто не знал, что будет завтра. " * 20


def pdf_with(text: str) -> bytes:
    """A PDF of one page, as short as one can be."""
    shown = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(shown), shown),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    tail = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n"
    return data + head + table + tail % (len(objects) + 1, len(data))


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (GERMAN, "utf-8"),
        (GERMAN, "utf-8-sig"),
        (GERMAN, "latin-1"),
        (GERMAN, "utf-16"),
        (GERMAN, "utf-32"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
    ],
)
def test_text_in_any_encoding(tmp_path: Path, text: str, encoding: str) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(text.encode(encoding))
    assert read_documents([str(path)]).text == text


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02", b"\x7fELF\x02\x01\x01\x00", b"\x89PNG\r\n\x1a\n\x00\x00", b"", b" \n",
        codecs.BOM_UTF16_LE + b"\x00", b"%PDF-1.4\nnothing", pdf_with(""),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_by_name_and_left_out_of_folders(
    tmp_path: Path, data: bytes
) -> None:
    path = tmp_path / "book.bin"
    path.write_bytes(data)
    with pytest.raises(InvalidRequestError, match=r"book\.bin"):
        read_documents([str(path)])
    with pytest.raises(InvalidRequestError):
        read_documents([str(tmp_path)])
    (tmp_path / "a.txt").write_text("text")
    found = read_documents([str(tmp_path)])
    assert [each.name for each in found.documents] == [str(tmp_path / "a.txt")]
    assert [each.name for each in found.left_out] == [str(path)]


def test_the_text_of_a_pdf(tmp_path: Path) -> None:
    path = tmp_path / "report"
    path.write_bytes(pdf_with("Call me Ishmael."))
    assert read_documents([str(path)]).text.strip() == "Call me Ishmael."


def test_several_files_have_their_names_for_headings(tmp_path: Path) -> None:
    first, second = tmp_path / "b.txt", tmp_path / "a.txt"
    first.write_text("one")
    second.write_text("two")
    assert read_documents([str(first)]).text == "one"
    both = read_documents([str(first), str(second)])
    assert both.text == f"# {first}\n\none\n\n# {second}\n\ntwo"


def test_of_a_repository_what_git_tracks(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    (tmp_path / "src").mkdir()
    for name in ("src/b.py", "a.md", ".hidden", "untracked.txt", "gone.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\x00")
    git("init")
    git("add", "src/b.py", "a.md", ".hidden", "gone.txt", "image.png")
    (tmp_path / "gone.txt").unlink()
    found = read_documents([str(tmp_path)])
    assert [each.text for each in found.documents] == [".hidden", "a.md", "src/b.py"]
    assert [Path(each.name).name for each in found.left_out] == ["gone.txt", "image.png"]
    inside = read_documents([str(tmp_path / "src")])
    assert [each.text for each in inside.documents] == ["src/b.py"]


def test_of_another_folder_all_but_what_is_hidden(tmp_path: Path) -> None:
    for name in ("deep/er/a.txt", ".cache/b.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = read_documents([str(tmp_path)])
    assert [each.text for each in found.documents] == ["c.txt", "deep/er/a.txt"]


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    piped = io.TextIOWrapper(io.BytesIO(GERMAN.encode("latin-1")))
    monkeypatch.setattr("sys.stdin", piped)
    assert read_documents(["-"]).text == GERMAN


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="none"):
        read_documents([str(tmp_path / "none")])
