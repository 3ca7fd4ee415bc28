"""The index of a result, made of its parts: at the commit, and when a result without a sound one is reused.

Results of earlier versions have none. The invariant: an index is made of parts that are those of the manifest, and
nothing that goes wrong with it stands in the way of the result, which is whole without.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from kd_assets.durable import atomic_write
from kd_assets.errors import CorruptIndexError, KdAssetsError
from kd_assets.store.document_index import DocumentRows, index_bytes, read_index, together
from kd_assets.store.layout import INDEX_NAME
from kd_assets.store.manifest import Manifest
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
    if not _has_index(manifest):
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
    if not _has_index(manifest) or manifest.n_bytes > MOST_BYTES:
        return False
    try:
        index = read_index(folder, manifest)
        if index is not None:
            index.schema(), index.rows()
    except CorruptIndexError:
        return True
    except KdAssetsError as e:  # it cannot be told now
        log.warning("the index of %s was not looked at: %s", folder, e)
        return False
    return index is None


def restore_index(folder: Path, manifest: Manifest) -> None:
    """Write the index of a committed result anew where it is absent or damaged; for who holds the result's lease.

    Its parts are hashed first: an index of changed ones would outlive their repair. Where it cannot be written, a
    warning says why, and readers go on asking the parts.
    """
    if not has_lost_index(folder, manifest):
        return
    try:
        for part in manifest.parts:
            require_unchanged(folder / part.name, part)
        with damage_named(folder):
            data = index_of(folder, manifest, rows={}, schema=None)
        assert data is not None
        atomic_write(folder / INDEX_NAME, data)
    except (KdAssetsError, OSError) as e:
        log.warning("the index of %s was not written anew, readers ask the parts instead: %s", folder, e)
    else:
        log.info("the index of %s was absent or damaged and is written anew", folder)


def _has_index(manifest: Manifest) -> bool:
    return manifest.asset in CONVENTIONS and manifest.n_documents > 0
