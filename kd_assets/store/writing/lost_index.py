"""The index of a result, made of its parts: at the commit, when a small result without a sound one is reused, and when
somebody asks for it.

Results of earlier versions have none. The invariant: an index is made of parts that are those of the manifest, and
nothing that goes wrong with it stands in the way of the result, which is whole without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa

from kd_assets.durable import atomic_write
from kd_assets.errors import CorruptIndexError, KdAssetsError
from kd_assets.store.document_index import DocumentRows, index_bytes, read_index, together
from kd_assets.store.layout import INDEX_NAME
from kd_assets.store.manifest import Manifest, PartRecord
from kd_assets.store.partfile import PartFile
from kd_assets.store.reading.parts import damage_named, require_unchanged
from kd_assets.store.schema import CONVENTIONS

log = logging.getLogger(__name__)

MOST_BYTES = 64 << 20
"""Of a result whose index is made anew on reuse: the run that reuses thousands of results reads each of these whole."""


def index_of(
    folder: Path, manifest: Manifest, *, rows: Mapping[int, DocumentRows], schema: pa.Schema | None
) -> bytes | None:
    """The index of a result; None of one that is not made of tables, or without documents.

    `rows` and `schema`: of the parts that are known already, by index. The others are read: raises as `PartFile` does.
    """
    if not has_index(manifest):
        return None
    of_parts = []
    for part in manifest.parts:
        if part.index in rows:
            of_parts.append(rows[part.index])
            continue
        with PartFile(folder / part.name) as file:
            of_parts.append(DocumentRows.of(file.read(["document_id", "n_tokens"])))
            schema = file.stored_schema if schema is None else schema
    assert schema is not None
    return index_bytes(asset=manifest.asset, data_version=manifest.data_version, schema=schema, rows=together(of_parts))


def has_lost_index(folder: Path, manifest: Manifest) -> bool:
    """Whether a committed result of up to `MOST_BYTES` should have an index and has no sound one. Reads all of the
    index and no part."""
    if manifest.n_bytes > MOST_BYTES:
        return False
    try:
        return is_index_lost(folder, manifest)
    except KdAssetsError as e:  # it cannot be told now
        log.warning("the index of %s was not looked at: %s", folder, e)
        return False


def is_index_lost(folder: Path, manifest: Manifest) -> bool:
    """Whether a committed result, however large, should have an index and has no sound one. Reads all of the index and
    no part; raises StorageUnavailableError where it cannot be told."""
    if not has_index(manifest):
        return False
    try:
        index = read_index(folder, manifest)
        if index is not None:
            index.schema(), index.rows()
    except CorruptIndexError:
        return True
    return index is None


def restore_index(folder: Path, manifest: Manifest) -> None:
    """Write the index of a committed result anew where it is absent or damaged; for who holds the result's lease.

    Where it cannot be written, a warning says why, and readers go on asking the parts.
    """
    if not has_lost_index(folder, manifest):
        return
    try:
        write_index_anew(folder, manifest)
    except (KdAssetsError, OSError) as e:
        log.warning("the index of %s was not written anew, readers ask the parts instead: %s", folder, e)
    else:
        log.info("the index of %s was absent or damaged and is written anew", folder)


def write_index_anew(folder: Path, manifest: Manifest, *, on_part: Callable[[PartRecord], None] | None = None) -> None:
    """Write the index of a committed result from its parts, with the bytes that it had or would have had.

    The parts are hashed first: an index of changed ones would outlive their repair. `on_part` is told of each before
    that. Raises CorruptPartError, which names the file, ObstructedError for what stands in the index's place, and
    StorageUnavailableError.
    """
    for part in manifest.parts:
        if on_part is not None:
            on_part(part)
        require_unchanged(folder / part.name, part)
    with damage_named(folder):
        data = index_of(folder, manifest, rows={}, schema=None)
    assert data is not None
    atomic_write(folder / INDEX_NAME, data)


def has_index(manifest: Manifest) -> bool:
    """Whether a result of this kind is to have an index."""
    return manifest.asset in CONVENTIONS and manifest.n_documents > 0
