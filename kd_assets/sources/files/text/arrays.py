"""JSON arrays (RFC 8259) of records, read one element at a time.

An element's content is its JSON in compact form with its keys in the file's order: a chat template prints tools in the
order in which they are written. What is wrong in the syntax ends the file there: where the next record starts cannot be
told.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from kd_assets.errors import InputError
from kd_assets.sources.files import raw
from kd_assets.sources.files.raw import RawRecord
from kd_assets.sources.files.text.lines import BOM, refuse_other_magic

CHUNK_BYTES = 1 << 16
_NEAR_THE_END = 32
"""Characters: the longest that a parser may stop before the end of what it was given because that was cut."""

_BLANK = re.compile(r"[ \t\r\n]*")


def compact(value: Any) -> bytes:
    """The bytes of a value that is not a line of its own. Half surrogates stand for bytes that are not UTF-8."""
    return json.dumps(value, separators=(",", ":")).encode()


def iter_array(f: BinaryIO, path: str, *, byte_offset: int = 0, first_record: int = 0) -> Iterator[RawRecord]:
    """The elements of an array, from its beginning or from an element that starts at `byte_offset`, where `f` stands.

    Raises InputError, naming the element, for what is no JSON, for an array without its end and what follows it, and
    for an element above `MAX_RECORD_BYTES`.
    """
    text = _Text(f, path, byte_offset)
    number = first_record
    if byte_offset == 0:
        refuse_other_magic(text.start(), path)
        text.take(BOM.decode())
        if not text.take("["):
            raise InputError(f"{path} is no JSON array: it starts with {text.peek()!r}; set its format to what it is")
        if text.take("]"):
            text.require_end(number)
            return
    while True:
        start, value = text.element(number)
        yield RawRecord(number, None, start, compact(value))
        number += 1
        if text.take(","):
            continue
        if not text.take("]"):
            found = repr(text.peek()) if text.peek() else "the end of the file"
            raise InputError(
                f"{path}: after its element {number} comes {found} and no ',' or ']' (byte {text.byte_offset:,}): "
                "it was cut or damaged; write it again"
            )
        text.require_end(number)
        return


class _Text:
    """What is decoded of a file and not used yet, and where that starts."""

    def __init__(self, f: BinaryIO, path: str, byte_offset: int) -> None:
        self._f, self._path = f, path
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json = json.JSONDecoder()
        self._text, self._at = "", 0
        self._is_whole = False
        self.byte_offset = byte_offset
        """Of `_at`."""

    def start(self) -> bytes:
        self._read(CHUNK_BYTES)
        return self._text[:8].encode("utf-8", "surrogateescape")

    def peek(self) -> str:
        """The next character that is no whitespace; empty at the end of the file."""
        while True:
            found = _BLANK.match(self._text, self._at)
            assert found is not None
            self._move(found.end())
            if self._at < len(self._text) or self._is_whole:
                return self._text[self._at : self._at + 1]
            self._read(CHUNK_BYTES)

    def take(self, character: str) -> bool:
        """Step over the next character if it is this one."""
        if self.peek() != character:
            return False
        self._move(self._at + 1)
        return True

    def element(self, number: int) -> tuple[int, Any]:
        """The value that starts here, and its byte offset."""
        self.peek()
        start, n_more = self.byte_offset, CHUNK_BYTES
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as e:
                is_cut = e.pos >= len(self._text) - _NEAR_THE_END or e.msg.startswith("Unterminated string")
                if self._is_whole or not is_cut:
                    raise InputError(f"{self._where(number)}: {e.msg}: correct it, or write the file again") from e
            except (ValueError, RecursionError) as e:  # too many digits; nested too deeply
                reason = "nested too deeply" if isinstance(e, RecursionError) else str(e)
                raise InputError(f"{self._where(number)}: {reason}: correct it") from e
            else:
                if end < len(self._text) or self._is_whole:  # else a number may go on
                    self._move(end)
                    return start, value
            if len(self._text) - self._at > raw.MAX_RECORD_BYTES:
                raise InputError(f"{self._where(number)}: longer than {raw.MAX_RECORD_BYTES >> 20} MiB: no record is")
            self._read(n_more)
            n_more = max(n_more, len(self._text) - self._at)  # twice as much: a long element is not parsed often

    def require_end(self, number: int) -> None:
        if found := self.peek():
            raise InputError(
                f"{self._path}: after its array of {number} elements comes {found!r} (byte {self.byte_offset:,}): "
                "one array is expected, or one object a line"
            )

    def _where(self, number: int) -> str:
        return f"{self._path}: element {number + 1} of its array (byte {self.byte_offset:,}) is not JSON"

    def _move(self, to: int) -> None:
        self.byte_offset += len(self._text[self._at : to].encode("utf-8", "surrogateescape"))
        self._at = to

    def _read(self, n_bytes: int) -> None:
        data = self._f.read(n_bytes)
        self._is_whole = len(data) < n_bytes
        self._text = self._text[self._at :] + self._decoder.decode(data, final=self._is_whole)
        self._at = 0
