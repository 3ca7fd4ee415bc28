"""The index of a result: which documents it holds, so that a cache is opened without touching its parts.

One file beside the parts, `documents.index`, written before the manifest. It says nothing that the parts do not say:
results of earlier versions have none, a lost one is written anew when its result is reused, and until then readers ask
the parts. The invariant: what is
read of an index is what was written for exactly the bytes that the manifest names, or a CorruptIndexError. The first
line is JSON and names the sections that follow, each with its own hash, so that lengths are read without the ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kd_assets.contract import parse_json
from kd_assets.durable import open_file, read_patiently, size_if_there
from kd_assets.errors import CorruptIndexError, ObstructedError
from kd_assets.store.arrays import flat
from kd_assets.store.fingerprint import canonical_json, fingerprint
from kd_assets.store.layout import INDEX_NAME
from kd_assets.store.manifest import Manifest

INDEX_VERSION = 1
SECTIONS = ("schema", "n_tokens", "document_ids")
_SELF_HASH = "index_sha256"
_LONGEST_HEADER = 1 << 16
REMEDY = (
    "kd-assets index RECIPE writes it anew, and so does materializing its partition again (of up to 64 MiB); or remove "
    "this file: readers then take from the parts what it says, only slower"
)

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DocumentRows:
    """Ids and lengths of consecutive documents."""

    document_ids: pa.LargeStringArray
    n_tokens_D: Int32Array

    @classmethod
    def of(cls, table: pa.Table) -> DocumentRows:
        """Of the rows of a part; their lists are not copied."""
        ids = table["document_id"].combine_chunks().cast(pa.large_string())
        if isinstance(ids, pa.ChunkedArray):
            ids = ids.chunk(0) if ids.num_chunks else pa.array([], pa.large_string())
        return cls(document_ids=ids, n_tokens_D=flat(table["n_tokens"]).astype(np.int32))


def together(rows: list[DocumentRows]) -> DocumentRows:
    """The rows of all, in their order."""
    ids = [part.document_ids for part in rows] or [pa.array([], pa.large_string())]
    lengths = [np.zeros(0, np.int32), *(part.n_tokens_D for part in rows)]
    return DocumentRows(document_ids=pa.concat_arrays(ids), n_tokens_D=np.concatenate(lengths))


def index_bytes(*, asset: str, data_version: str, schema: pa.Schema, rows: DocumentRows) -> bytes:
    """The index of a result of this content. Equal results have equal bytes."""
    sections = {
        "schema": schema.serialize().to_pybytes(),
        "n_tokens": rows.n_tokens_D.astype("<i4").tobytes(),
        "document_ids": ids_section(rows.document_ids),
    }
    said = {name: {"n_bytes": len(data), "sha256": _sha256(data)} for name, data in sections.items()}
    header: dict[str, Any] = {
        "index_version": INDEX_VERSION,
        "asset": asset,
        "data_version": data_version,
        "n_documents": len(rows.n_tokens_D),
        "sections": said,
    }
    line = canonical_json(header | {_SELF_HASH: fingerprint(header)}).encode()
    return line + b"\n" + b"".join(sections.values())


def ids_section(document_ids: pa.LargeStringArray) -> bytes:
    """Where each id starts and the last one ends, int64 little-endian [D + 1], then all of them in UTF-8."""
    offsets = np.frombuffer(document_ids.buffers()[1] or b"", dtype="<i8") if len(document_ids) else np.zeros(1, "<i8")
    offsets = offsets[document_ids.offset : document_ids.offset + len(document_ids) + 1]
    text = document_ids.buffers()[2] if len(document_ids) else None
    data = b"" if text is None else bytes(text.slice(int(offsets[0]), int(offsets[-1] - offsets[0])))
    return bytes((offsets - offsets[0]).astype("<i8").tobytes() + data)


class IndexFile:
    """An index on disk whose first line was found to be of a result; its sections are read when they are asked for."""

    def __init__(self, path: Path, header: Mapping[str, Any], start: int) -> None:
        self._path, self._header = path, header
        self._starts: dict[str, int] = {}
        for name in SECTIONS:
            self._starts[name] = start
            start += header["sections"][name]["n_bytes"]

    @property
    def ids_sha256(self) -> str:
        """Equal for results whose documents have the same ids in the same order."""
        return str(self._header["sections"]["document_ids"]["sha256"])

    def schema(self) -> pa.Schema:
        """That of the part files. Raises CorruptIndexError, as the others do."""
        data = self._section("schema")
        try:
            return pa.ipc.read_schema(pa.py_buffer(data))
        except (pa.ArrowException, OSError, ValueError) as e:
            raise _corrupt(self._path, f"its schema is none ({e})") from e

    def n_tokens(self) -> Int32Array:
        """int32 [D]."""
        lengths = np.frombuffer(self._section("n_tokens"), dtype="<i4").astype(np.int32)
        if len(lengths) != self._header["n_documents"]:
            raise _corrupt(self._path, f"it has the lengths of {len(lengths)} documents")
        if (lengths < 1).any():
            raise _corrupt(self._path, "it has a document without tokens")
        return lengths

    def document_ids(self) -> pa.LargeStringArray:
        data, n = pa.py_buffer(self._section("document_ids")), int(self._header["n_documents"])
        n_bytes = 8 * (n + 1)
        if data.size < n_bytes:
            raise _corrupt(self._path, f"it has no room for the ids of {n} documents")
        try:
            ids = pa.LargeStringArray.from_buffers(n, data.slice(0, n_bytes), data.slice(n_bytes))
            ids.validate(full=True)
        except pa.ArrowException as e:
            raise _corrupt(self._path, f"its ids are no text ({e})") from e
        return ids

    def rows(self) -> DocumentRows:
        return DocumentRows(document_ids=self.document_ids(), n_tokens_D=self.n_tokens())

    def _section(self, name: str) -> bytes:
        said = self._header["sections"][name]

        def read() -> bytes:
            with open_file(self._path) as file:
                file.seek(self._starts[name])
                return file.read(said["n_bytes"])

        try:
            data = read_patiently(read, self._path)
        except FileNotFoundError as e:
            raise _corrupt(self._path, "it was removed while it was read") from e
        if _sha256(data) != said["sha256"]:
            raise _corrupt(self._path, f"its {name} were changed after they were written")
        return data


def read_index(folder: Path, manifest: Manifest) -> IndexFile | None:
    """The index of a result; None where it has none.

    Raises CorruptIndexError for one that was changed, cut, made by a later version, or that is of another result or
    commit than the manifest; StorageUnavailableError. Reads the first line only.
    """
    path = folder / INDEX_NAME
    try:
        n_bytes = size_if_there(path)
    except ObstructedError as e:
        raise _corrupt(path, str(e)) from e
    if n_bytes is None:
        return None

    def read() -> bytes:
        with open_file(path) as file:
            return file.readline(_LONGEST_HEADER)

    try:
        line = read_patiently(read, path)
    except FileNotFoundError:
        return None
    header = _header(path, line)
    expected = {"asset": manifest.asset, "data_version": manifest.data_version, "n_documents": manifest.n_documents}
    for name, value in expected.items():
        if header[name] != value:
            raise _corrupt(path, f"it is of another commit: its {name} is {header[name]!r:.80}, expected {value!r:.80}")
    promised = len(line) + sum(header["sections"][name]["n_bytes"] for name in SECTIONS)
    if promised != n_bytes:
        raise _corrupt(path, f"it has {n_bytes} bytes, its first line says {promised}")
    return IndexFile(path, header, len(line))


def _header(path: Path, line: bytes) -> dict[str, Any]:
    """The first line as JSON. Raises CorruptIndexError."""
    try:
        header = parse_json(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError) as e:
        raise _corrupt(path, "its first line is not JSON") from e
    if not isinstance(header, dict):
        raise _corrupt(path, "its first line is no JSON object")
    version = header.get("index_version")
    if type(version) is not int or version != INDEX_VERSION:  # to Python, `true` is 1
        raise _corrupt(path, f"it is of version {version!r:.40}, this one reads {INDEX_VERSION}")
    claimed = header.pop(_SELF_HASH, None)
    if claimed != fingerprint(header):
        raise _corrupt(path, "its first line was changed after it was written")
    sections = header.get("sections")
    is_ours = isinstance(sections, dict) and all(
        isinstance(said := sections.get(name), dict)
        and type(said.get("n_bytes")) is int
        and said["n_bytes"] >= 0
        and isinstance(said.get("sha256"), str)
        for name in SECTIONS
    )
    if not is_ours or {"asset", "data_version"} - header.keys() or type(header.get("n_documents")) is not int:
        raise _corrupt(path, "its first line is not that of an index")
    return header


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _corrupt(path: Path, why: str) -> CorruptIndexError:
    return CorruptIndexError(f"{path} is not the index of this result: {why}; {REMEDY}")
