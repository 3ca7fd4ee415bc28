"""Whether the index of a result is what its parts say, for `verify`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from kd_assets.errors import CorruptIndexError
from kd_assets.store.document_index import REMEDY, DocumentRows, read_index, together
from kd_assets.store.layout import INDEX_NAME
from kd_assets.store.manifest import Manifest
from kd_assets.store.reading.parts import damage_named, open_part


def index_difference(folder: Path, manifest: Manifest, *, with_parts: bool) -> str | None:
    """What is wrong with the index of a result, in words; None when all is well, or there is none.

    `with_parts`: also compare it with the parts, which are known to be those that were committed. Raises StoreError
    where the file system does not let us look.
    """
    try:
        index = read_index(folder, manifest)
        if index is None:
            return None
        found, schema = index.rows(), index.schema()
    except CorruptIndexError as e:
        return str(e)
    if not with_parts:
        return None
    rows, of_parts = _of_parts(folder, manifest)
    differs = None
    if not np.array_equal(found.n_tokens_D, rows.n_tokens_D):
        differs = "lengths"
    elif not found.document_ids.equals(rows.document_ids):
        differs = "document ids"
    elif of_parts is not None and not schema.equals(of_parts, check_metadata=True):
        differs = "columns"
    return None if differs is None else f"{folder / INDEX_NAME} has other {differs} than the parts; {REMEDY}"


def _of_parts(folder: Path, manifest: Manifest) -> tuple[DocumentRows, pa.Schema | None]:
    rows, schema = [], None
    for record in manifest.parts:
        path = folder / record.name
        with open_part(path, record) as part, damage_named(path):
            rows.append(DocumentRows.of(part.read(["document_id", "n_tokens"])))
            schema = part.stored_schema if schema is None else schema
    return together(rows), schema
