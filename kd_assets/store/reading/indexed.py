"""Ids and lengths of the documents of several results: each from its index, or from its parts where it has none.

An index that is damaged, or of another commit, is named in a warning and its parts are read instead: it says nothing
that they do not. What stands in memory are arrays, and of ids only what was asked for.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from kd_assets.errors import CorruptIndexError
from kd_assets.store.document_index import DocumentRows, IndexFile, Int32Array, ids_section, read_index, together
from kd_assets.store.manifest import Manifest
from kd_assets.store.reading.parts import damage_named, open_part

T = TypeVar("T")

log = logging.getLogger(__name__)


class IndexedDocuments:
    """The documents of these results, in their order. Nothing is read before it is asked for.

    Raises CorruptPartError or StorageUnavailableError where a result has no index to go by and its parts do not open.
    """

    def __init__(self, folders: Sequence[Path], manifests: Sequence[Manifest]) -> None:
        self._folders, self._manifests = folders, manifests
        self._indexes: dict[int, IndexFile | None] = {}
        self._from_parts: dict[int, DocumentRows] = {}

    def schema(self) -> pa.Schema | None:
        """That of the part files, as an index has it; None where the first result with parts has no index."""
        result = next(i for i, manifest in enumerate(self._manifests) if manifest.parts)
        return self._of_index(result, IndexFile.schema)

    def n_tokens(self, result: int) -> Int32Array:
        """int32 [D]: tokens of each document of one of the results."""
        found = self._of_index(result, IndexFile.n_tokens)
        return self._rows(result).n_tokens_D if found is None else found

    def document_ids(self, result: int) -> pa.LargeStringArray:
        """The ids of one of the results."""
        found = self._of_index(result, IndexFile.document_ids)
        return self._rows(result).document_ids if found is None else found

    def ids_sha256(self, result: int) -> str:
        """Equal for results whose documents have equal ids in the same order; of an index only its first line is
        read."""
        found = self._of_index(result, lambda index: index.ids_sha256)
        if found is None:
            return hashlib.sha256(ids_section(self._rows(result).document_ids)).hexdigest()
        return found

    def _of_index(self, result: int, ask: Callable[[IndexFile], T]) -> T | None:
        """What the index of a result answers; None where there is none to go by."""
        try:
            if result not in self._indexes:
                self._indexes[result] = read_index(self._folders[result], self._manifests[result])
            index = self._indexes[result]
            return None if index is None else ask(index)
        except CorruptIndexError as e:
            self._indexes[result] = None
            log.warning("%s. The parts are read instead", e)
            return None

    def _rows(self, result: int) -> DocumentRows:
        if result not in self._from_parts:
            rows = []
            for record in self._manifests[result].parts:
                path = self._folders[result] / record.name
                with open_part(path, record) as part, damage_named(path):
                    table = part.read(["document_id", "n_tokens"])
                    table.validate(full=True)
                    rows.append(DocumentRows.of(table))
                    if (rows[-1].n_tokens_D < 1).any():
                        raise ValueError("a document has no tokens")
            self._from_parts[result] = together(rows)
        return self._from_parts[result]
