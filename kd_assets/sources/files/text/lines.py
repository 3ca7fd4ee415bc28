"""JSON Lines (https://jsonlines.org): UTF-8, one object a line.

Blank lines are no records; a byte order mark, CRLF and a last line without newline are taken as they come.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from kd_assets.errors import InputError
from kd_assets.sources.files import raw
from kd_assets.sources.files.raw import RawRecord

BLANK = b" \t\r\n"
"""What JSON calls whitespace."""
BOM = b"\xef\xbb\xbf"

OTHER_FORMATS = {
    b"PAR1": "is a Parquet file: set its format to parquet",
    b"\x1f\x8b": "is compressed with gzip: end its name in .gz, or decompress it",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: end its name in .zst, or decompress it",
    b"BZh": "is compressed with bzip2: decompress it",
    b"\xfd7zXZ": "is compressed with xz: decompress it",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"ARROW1": "is an Arrow file: set its format to arrow",
    b"\xff\xff\xff\xff": "is an Arrow stream, as datasets.save_to_disk writes it: set its format to arrow",
    b"\xff\xfe": "is UTF-16: convert it to UTF-8",
    b"\xfe\xff": "is UTF-16: convert it to UTF-8",
}
"""First bytes that no file of text has, and what they mean."""


class Hash(Protocol):
    """What `hashlib.sha256()` returns, as far as it is used here."""

    def update(self, data: bytes, /) -> None: ...


def iter_jsonl(
    f: BinaryIO,
    path: Path | str,
    *,
    byte_offset: int = 0,
    first_record: int = 0,
    first_line: int = 1,
    file_hash: Hash | None = None,
) -> Iterator[RawRecord]:
    """The records of a JSONL file from where `f` stands; `file_hash` takes in every byte that is read.

    Raises InputError for a line above `MAX_RECORD_BYTES` and for a file that starts as another format does.
    """
    number, line_number, most = first_record, first_line, raw.MAX_RECORD_BYTES
    while line := f.readline(most + 1):
        if len(line) > most:
            raise InputError(
                f"{path}:{line_number}: the line is longer than {most >> 20} MiB; JSONL has one record a line"
            )
        if file_hash is not None:
            file_hash.update(line)
        start = byte_offset
        byte_offset += len(line)
        if start == 0:
            refuse_other_format(line, path)
            if line.startswith(BOM):
                line, start = line[len(BOM) :], len(BOM)
        if content := line.strip(BLANK):
            yield RawRecord(number, line_number, start, content)
            number += 1
        line_number += 1


def refuse_other_format(first_line: bytes, path: Path | str) -> None:
    """Raise InputError when a file that is said to be JSONL shows by its first line that it is something else."""
    refuse_other_magic(first_line, path)
    if first_line.removeprefix(BOM).strip(BLANK) == b"[" or first_line.removeprefix(BOM).lstrip(BLANK)[:2] == b"[{":
        raise InputError(
            f"{path} holds one JSON array; JSONL has one object a line: set its format to json, or convert it "
            "(`jq -c '.[]'`)"
        )


def refuse_other_magic(first_bytes: bytes, path: Path | str) -> None:
    """Raise InputError when a file that is said to be text shows by its first bytes that it is something else."""
    for magic, meaning in OTHER_FORMATS.items():
        if first_bytes.startswith(magic):
            raise InputError(f"{path} {meaning}")


def skip_to(f: BinaryIO, byte_offset: int, *, at: int = 0) -> None:
    """Go to a place of a text that stands at `at`; what a decompressor gives is read up to there."""
    if f.seekable():
        f.seek(byte_offset)
        return
    left = byte_offset - at
    while left > 0 and (data := f.read(min(left, 1 << 20))):
        left -= len(data)
