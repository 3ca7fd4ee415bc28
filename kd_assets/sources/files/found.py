"""What a search finds: a source's files as they are now."""

from __future__ import annotations

from dataclasses import dataclass

from kd_assets.contract import Compression, FileFormat


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file of a source, and what the storage says of it."""

    name: str
    """Its path within the source; empty for a source that is one file."""
    path: str
    """Absolute path, or URL."""
    file_format: FileFormat
    compression: Compression | None = None
    n_bytes: int
    changed: str
    """What the storage says of its version: when a local file was changed (ns), an object's ETag."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundSource:
    """A source's files as they are now."""

    files: tuple[SourceFile, ...]
    """Sorted by name, which is the order of their records."""
    revision: str | None = None
    """The commit that is pinned, of a data set of the hub."""
    licence: str | None = None
    """As the data set's card says it; None where there is none, or it says none."""
    said: tuple[str, ...] = ()
    """Lines for people: what was left out, what could not be reached."""
