"""A file of JSON lines as UTF-8, however it was packed: by gzip or zstd, in UTF-16 or UTF-32 with a byte order mark.

What a file is, is seen from its first bytes, not from its name.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa

from twinloop.common.errors import UserError, one_line

GZIP = b"\x1f\x8b"
ZSTD = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPED = b"\x2a\x4d\x18"
"""Of a zstd frame without content, after its first byte: tools that compress on many cores begin files with one."""
OTHERS = {
    b"PAR1": "is Parquet; give it the ending .parquet",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"BZh": "is compressed with bzip2; unpack it, or compress it with gzip or zstd",
    b"\xfd7zXZ": "is compressed with xz; unpack it, or compress it with gzip or zstd",
}
MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    '{"'.encode("utf-16-le"): "utf-16-le",
    '{"'.encode("utf-16-be"): "utf-16-be",
}
HEAD = 8
TEXT_CHARACTERS = 1 << 16


@contextmanager
def open_lines(path: Path) -> Iterator[IO[bytes]]:
    """The lines of a file, as bytes of UTF-8. Raises UserError for what is no file of lines, and OSError."""
    with path.open("rb") as raw:
        try:
            unpacked = _unpacked(raw)
            head = unpacked.peek(HEAD)
            for start, problem in OTHERS.items():
                if head.startswith(start):
                    raise UserError(f"{path}: {problem}")
            encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
            yield io.BufferedReader(_Utf8(unpacked, encoding)) if encoding else unpacked
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _broken(path, error) from None
        except OSError as error:
            if error.errno is not None:  # Arrow's errors of decompression have none
                raise
            raise _broken(path, error) from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: {error.encoding.upper()} that ends within a character, or is broken; save it as UTF-8"
            ) from None


def _broken(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be decompressed ({one_line(error)}); copy or compress it again")


def _unpacked(raw: io.BufferedReader) -> io.BufferedReader:
    head = raw.peek(HEAD)
    if head.startswith(GZIP):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if head.startswith(ZSTD) or head[1:4] == ZSTD_SKIPPED:
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))
    return raw


class _Utf8(io.RawIOBase):
    """A stream of another encoding, as UTF-8. Half of a surrogate pair becomes bytes that are not UTF-8, so that its
    line is quarantined and no other."""

    def __init__(self, stream: io.BufferedReader, encoding: str):
        self._text = io.TextIOWrapper(stream, encoding, errors="surrogatepass", newline="")
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if not self._rest:
            self._rest = self._text.read(TEXT_CHARACTERS).encode("utf-8", "surrogatepass")
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
