"""Random access to the documents of a cache, across partitions: what training reads through.

A reader sees results of exactly one variant, as the plan and the partitions' heads were when it was made. It keeps
file names and counts, and learns ids and lengths from the indexes (`indexed`); files are opened when they are first
needed, in each process for itself, so a reader may be pickled, forked and shared by threads. Before a part is believed
its SHA-256 is compared with the manifest's, once for a reader and all processes that are forked off it. Arrow files are
mapped: a document costs the pages it lies on. Of Parquet files and coded states one group of rows is decoded at a time,
and the last few are kept.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kd_assets.errors import NotCommittedError, UnknownCodecError, UnknownFieldError, VariantConflictError
from kd_assets.store.codecs.codec import plain_schema
from kd_assets.store.manifest import Manifest, PartRecord, read_manifest
from kd_assets.store.partfile import PartFile
from kd_assets.store.reading.chosen import Chosen, Missing, choose, require_passed, require_place
from kd_assets.store.reading.columns import Column, column_of
from kd_assets.store.reading.indexed import IndexedDocuments
from kd_assets.store.reading.parts import VerifiedParts, damage_named, open_part
from kd_assets.store.reading.shapes import require_columns, require_shapes
from kd_assets.store.recorded_checks import require_readable, vocabulary_size_of
from kd_assets.store.writing.documents import Int64Array, offsets_of

CACHE_BYTES = 256 << 20
"""What a process keeps decoded, unless told otherwise."""

_OPEN_FILES = 128
"""Files a process keeps open: well below the usual limit of 1,024, many loader workers included."""

_MAPPED_BYTES = 4096
"""What a mapped group counts as: its arrays are views of the file, so only the bookkeeping takes memory."""


class CacheReader:
    """The documents of one variant of an asset, in the order of partitions and, within each, of the shard.

    `reader[i]` is a dict with `partition_key`, `document_id` and the columns named by `fields` (all, unless given);
    arrays are read-only views. Shapes and dtypes are those of FORMAT.md; bfloat16 comes as its bits in uint16.
    """

    def __init__(
        self,
        recipe_folder: Path,
        asset: str,
        *,
        variant: str | None = None,
        partition_keys: Iterable[str] | None = None,
        fields: Iterable[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
        missing: Missing = "refuse",
        allow_failed: bool = False,
    ) -> None:
        """Open the results of `asset` that the current plan of a recipe names (see `chosen`).

        `partition_keys` gives which and in which order (default: all of the plan's; without a plan all that is
        committed, sorted); `cache_bytes` bounds what a process keeps decoded. With `missing="skip"` partitions without
        a result are left out and named in `left_out`; with `allow_failed` results are read whose checks failed.
        Raises VariantConflictError when there are several variants and none is named, NotCommittedError or
        FailedCheckError for a partition that is missing, UnknownFieldError for a column it lacks.
        """
        chosen = choose(
            recipe_folder,
            asset,
            variant=variant,
            partition_keys=partition_keys,
            missing=missing,
            allow_failed=allow_failed,
        )
        self._open(chosen, fields=fields, cache_bytes=cache_bytes)

    @classmethod
    def from_folders(
        cls,
        folders: Sequence[Path],
        *,
        fields: Iterable[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
        allow_failed: bool = False,
    ) -> CacheReader:
        """A reader of these result folders, in this order, whether or not they are current and planned.

        Raises FailedCheckError for one whose recorded checks failed, unless `allow_failed`.
        """
        manifests = tuple(read_manifest(folder) for folder in folders)
        for folder, manifest in zip(folders, manifests, strict=True):
            require_place(folder, manifest)
            if not allow_failed:
                require_passed(folder, manifest)
        chosen = Chosen(folders=tuple(folders), manifests=manifests, left_out={}, plan_hash=None)
        return cls.of(chosen, fields=fields, cache_bytes=cache_bytes)

    @classmethod
    def of(cls, chosen: Chosen, *, fields: Iterable[str] | None = None, cache_bytes: int = CACHE_BYTES) -> CacheReader:
        """A reader of what was chosen."""
        reader = cls.__new__(cls)
        reader._open(chosen, fields=fields, cache_bytes=cache_bytes)
        return reader

    def _open(self, chosen: Chosen, *, fields: Iterable[str] | None, cache_bytes: int) -> None:
        self.folders, self.manifests = chosen.folders, chosen.manifests
        self.left_out = chosen.left_out
        """Partition key → why the reader has nothing of it, though it is planned or committed."""
        self.plan_hash = chosen.plan_hash
        """Of the plan that named the partitions; None where there is none, or folders were named."""
        _require_one_variant(self.manifests, self.folders)
        for manifest, folder in zip(self.manifests, self.folders, strict=True):
            _require_readable(manifest, folder)
        self._cache_bytes = cache_bytes
        self._parts: tuple[tuple[int, Path, PartRecord], ...] = tuple(
            (i, folder / record.name, record)
            for i, (folder, manifest) in enumerate(zip(self.folders, self.manifests, strict=True))
            for record in manifest.parts
        )
        self._verified = VerifiedParts(len(self._parts))
        self._first_documents = offsets_of(np.array([r.n_documents for _, _, r in self._parts], dtype=np.int64))
        self._documents = IndexedDocuments(self.folders, self.manifests)
        self._start_in_process()
        self._fields = None if fields is None else tuple(fields)
        if self._parts:
            available = self.schema.names
            self._fields = tuple(available) if self._fields is None else self._fields
            if unknown := [name for name in self._fields if name not in available]:
                left_out = ": its recipe leaves it out, and logits cannot be had" if unknown[0] == "logsumexp" else ""
                raise UnknownFieldError(
                    f"{self.asset} in {self.folders[0]} has no field {unknown[0]!r}{left_out}; it has "
                    f"{', '.join(available)}"
                )

    @property
    def asset(self) -> str:
        return self.manifests[0].asset

    @property
    def variant(self) -> str:
        return self.manifests[0].variant

    @property
    def partition_keys(self) -> tuple[str, ...]:
        return tuple(manifest.partition_key for manifest in self.manifests)

    @property
    def fields(self) -> tuple[str, ...]:
        return self._fields or ()

    @property
    def schema(self) -> pa.Schema:
        """The schema of what is read. Raises NotCommittedError when there are no parts, so no documents."""
        if not self._parts:
            raise NotCommittedError(f"the results in {[str(f) for f in self.folders[:3]]} hold no documents")
        if (stored := self._documents.schema()) is not None:
            first, path, _ = self._parts[0]
            with damage_named(path):
                schema = plain_schema(stored)
            require_columns(path, stored, schema.names, self.manifests[first])
            return schema
        with self._locked():
            return self._part(0).schema

    @property
    def document_ids(self) -> list[str]:
        """The id of every document, read on first use: from the indexes, or from the parts of results without one.

        No part is hashed for it, as that would read all of a cache before its first document: a part whose ids were
        changed is found when one of its documents is read.
        """
        ids: list[str] = []
        for result in range(len(self.folders)):
            ids += self._documents.document_ids(result).to_pylist()
        return ids

    @property
    def n_tokens_D(self) -> Int64Array:
        """int64 [D]: tokens of every document; read as the ids are."""
        lengths = [self._documents.n_tokens(result) for result in range(len(self.folders))]
        return np.concatenate([np.zeros(0, np.int64), *lengths])

    def ids_sha256(self) -> dict[str, str]:
        """Partition key → a hash of its documents' ids in their order; reads no id that is indexed."""
        return {key: self._documents.ids_sha256(result) for result, key in enumerate(self.partition_keys)}

    def keys(self) -> list[tuple[str, str]]:
        """(partition key, document id) of every document: what names a document across the caches of a recipe."""
        counts = [manifest.n_documents for manifest in self.manifests]
        of_document = (key for key, n in zip(self.partition_keys, counts, strict=True) for _ in range(n))
        return list(zip(of_document, self.document_ids, strict=True))

    def __len__(self) -> int:
        return int(self._first_documents[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return self.documents([int(i) % len(self)])[0]

    def documents(self, rows: Sequence[int] | Int64Array) -> list[dict[str, Any]]:
        """These documents, each as `reader[i]` has it. One call for a batch: what they share is looked up once.

        Raises IndexError for a row that is not there.
        """
        rows_R = np.asarray(rows, dtype=np.int64)
        if len(rows_R) and not 0 <= int(rows_R.min()) <= int(rows_R.max()) < len(self):
            raise IndexError(f"documents {int(rows_R.min())} to {int(rows_R.max())} of {len(self)}")
        part_R = np.searchsorted(self._first_documents, rows_R, side="right") - 1
        in_part_R = rows_R - self._first_documents[part_R]
        with self._locked():
            return [self._document(part, row) for part, row in zip(part_R.tolist(), in_part_R.tolist(), strict=True)]

    def _document(self, part: int, row: int) -> dict[str, Any]:
        file = self._verified_part(part)
        group = file.group_of(row)
        columns = self._group(part, group)
        row -= int(file.first_rows[group])
        manifest = self.manifests[self._parts[part][0]]
        document = {"partition_key": manifest.partition_key, "document_id": columns["document_id"].row(row)}
        return document | {name: columns[name].row(row) for name in self.fields}

    def _group(self, part: int, group: int) -> dict[str, Column]:
        """The columns of a group of rows, from memory or from the file."""
        columns = self._groups.pop((part, group), None)
        if columns is None:
            path = self._parts[part][1]
            file = self._verified_part(part)
            counting = [name for name in ("n_tokens", "positions") if name in file.names]
            names = list(dict.fromkeys(("document_id", *counting, *self.fields)))
            table = file.read_group(group, names)
            with damage_named(path):
                columns = {name: column_of(table[name]) for name in names}
                k = self.manifests[self._parts[part][0]].params.get("k")
                require_shapes(path, columns, has_next=self.asset == "topk_cache", k=k)
            n_bytes = sum(column.n_bytes for column in columns.values()) if not file.is_view else _MAPPED_BYTES
            self._groups_cost[part, group] = n_bytes
            self._groups_bytes += n_bytes
        self._groups[part, group] = columns  # as the one used last
        while self._groups_bytes > self._cache_bytes and len(self._groups) > 1:
            oldest, _ = self._groups.popitem(last=False)
            self._groups_bytes -= self._groups_cost.pop(oldest)
        return columns

    def _part(self, part: int) -> PartFile:
        """The open file of a part, of which nothing but its size and the number of its rows is known to be right."""
        file = self._files.pop(part, None)
        if file is None:
            of_manifest, path, record = self._parts[part]
            manifest = self.manifests[of_manifest]
            file = open_part(path, record, vocabulary=vocabulary_size_of(manifest))
            require_columns(path, file.stored_schema, file.names, manifest)
        self._files[part] = file
        if len(self._files) > _OPEN_FILES:
            closed, _ = self._files.popitem(last=False)  # closed when the last view of it is gone
            self._believed.discard(closed)
        return file

    def _verified_part(self, part: int) -> PartFile:
        """The open file of a part whose bytes are those that were committed."""
        if part not in self._believed:
            _, path, record = self._parts[part]
            self._verified.require(part, path, record)
            self._files.pop(part, None)  # it may have been opened before another took its place
            self._believed.add(part)
        return self._part(part)

    def keep_decoded(self, n_bytes: int) -> None:
        """Let a process keep at least so much decoded, for who comes back to the same groups of rows."""
        self._cache_bytes = max(self._cache_bytes, n_bytes)

    def require_unchanged(self, partition_keys: Iterable[str]) -> None:
        """Raise CorruptPartError, which names the file, unless all parts of these partitions are what was committed."""
        keys = set(partition_keys)
        for part, (of_manifest, path, record) in enumerate(self._parts):
            if self.manifests[of_manifest].partition_key in keys:
                self._verified.require(part, path, record)

    def _locked(self) -> threading.RLock:
        """The lock of this process. A process that was forked off starts anew: the lock it inherited may be taken."""
        if self._process_id != os.getpid():
            self._start_in_process()
        return self._lock

    def _start_in_process(self) -> None:
        self._lock = threading.RLock()
        self._process_id = os.getpid()
        self._files: OrderedDict[int, PartFile] = OrderedDict()
        self._believed: set[int] = set()
        """Parts whose open file, or the one that is opened next, has been verified."""
        self._groups: OrderedDict[tuple[int, int], dict[str, Column]] = OrderedDict()
        self._groups_cost: dict[tuple[int, int], int] = {}
        self._groups_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        names = (
            "folders",
            "manifests",
            "left_out",
            "plan_hash",
            "_cache_bytes",
            "_parts",
            "_first_documents",
            "_fields",
        )
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._documents = IndexedDocuments(self.folders, self.manifests)
        self._verified = VerifiedParts(len(self._parts))
        self._start_in_process()


def _require_one_variant(manifests: Sequence[Manifest], folders: Sequence[Path]) -> None:
    if not manifests:
        raise NotCommittedError("no result folders were given to read")
    first = manifests[0]
    for manifest, folder in zip(manifests, folders, strict=True):
        if (manifest.asset, manifest.variant) != (first.asset, first.variant):
            raise VariantConflictError(
                f"{folders[0]} is {first.asset} of variant {first.variant}, {folder} is {manifest.asset} of variant "
                f"{manifest.variant}: one reader reads one variant of one asset"
            )
    keys = [manifest.partition_key for manifest in manifests]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []:
        raise VariantConflictError(f"partition {repeated[0]!r} is given twice: its documents would count double")


def _require_readable(manifest: Manifest, folder: Path) -> None:
    try:
        require_readable(manifest)
    except UnknownCodecError as e:
        raise UnknownCodecError(f"{folder}: {e}") from e
