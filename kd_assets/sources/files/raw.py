"""A record as its file has it, and how long one may be."""

from __future__ import annotations

from typing import NamedTuple

MAX_RECORD_BYTES = 1 << 28
"""Longest line, or element of an array, of a file of text. 256 MiB of text is no document: such a file is of another
format."""


class RawRecord(NamedTuple):
    """A record as the file has it. A named tuple: a plan makes millions of them."""

    number: int
    """0-based, counting the file's records."""
    line: int | None
    """1-based line of a file of lines or of a table of text; None for others."""
    byte_offset: int | None
    """Where it starts in a file of text; None for a row of columns."""
    content: bytes
    """Of a file of lines: the line without the whitespace around it. Of others: its fields as compact JSON."""
    columns: tuple[str, ...] = ()
    """Those of the file that a row comes from, with values or without."""
    others: tuple[str, ...] = ()
    """Of a row that an earlier version planned: fields with a value that a template or a loss may read, and that are
    not in `content`."""
