"""Bodies that come compressed, unpacked piece by piece and never beyond what a body may have."""

import zlib
from collections.abc import Iterator

from .errors import RestError, invalid

_PIECE_BYTES = 1 << 20
# zlib's own words for what its window is wrapped in.
_WINDOW_BITS = {
    "gzip": 16 + zlib.MAX_WBITS,
    "x-gzip": 16 + zlib.MAX_WBITS,
    "deflate": zlib.MAX_WBITS,
}


class Inflater:
    """Unpacks one body of one gzip member, or of one zlib stream ("deflate")."""

    def __init__(self, encoding: str, max_bytes: int) -> None:
        self._stream = zlib.decompressobj(_WINDOW_BITS[encoding])
        self._max_bytes = max_bytes
        self._size = 0

    @classmethod
    def of(cls, encoding: str, max_bytes: int) -> "Inflater | None":
        """For a `Content-Encoding`; None where the body comes as it is.

        Raises:
            RestError: an encoding that is not understood.
        """
        name = encoding.strip().lower()
        if name in ("", "identity"):
            return None
        if name not in _WINDOW_BITS:
            raise RestError(
                415,
                "the body's Content-Encoding is not understood; send gzip, deflate or none",
                code="unsupported_content_encoding",
                headers={"Accept-Encoding": "gzip, deflate"},
            )
        return cls(name, max_bytes)

    def unpack(self, data: bytes) -> Iterator[bytes]:
        """What these bytes stand for, in pieces that take little memory; computes for long.

        Raises:
            RestError: they are not of this encoding, go on behind its end, or become too many.
        """
        try:
            while data and not self._stream.eof:
                piece = self._stream.decompress(data, _PIECE_BYTES)
                data = self._stream.unconsumed_tail
                self._size += len(piece)
                if self._size > self._max_bytes:
                    raise too_large(self._max_bytes)
                yield piece
        except zlib.error as error:
            raise _broken(str(error)) from error
        if data or self._stream.unused_data:
            raise _broken("something follows its end")

    def end(self) -> None:
        """There is no more.

        Raises:
            RestError: the body is cut off.
        """
        if not self._stream.eof:
            raise _broken("it is cut off")


def too_large(max_bytes: int) -> RestError:
    """A body of more bytes than are read, unpacked or not."""
    said = f"the body is larger than {max_bytes} bytes, the most that is read"
    return RestError(413, said, code="body_too_large")


def _broken(why: str) -> RestError:
    return invalid(f"the body cannot be unpacked: {why}", code="invalid_content_encoding")
