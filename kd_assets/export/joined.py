"""The one iterator of all exports: committed caches in, sections of joined documents out.

A section is the documents of one part of one partition; the parts are those of the largest cache that is read, and the
others are joined to it by document id, whatever their parts are. Memory is bounded by a section: states are views of
the mapped file, of which pages are let go while documents go by, and of a partition only ids and lengths are held.

Documents are cut to the tokens that all needed caches have. The invariant: what is joined was made of one shard, and
its tokens are the same in every cache.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_assets.contract import CACHES, Asset
from kd_assets.durable import open_file, read_patiently
from kd_assets.errors import CorruptPartError, NotCommittedError, VariantConflictError
from kd_assets.export.documents import Int64Array, JoinedDocument, StatesOfDocument, TopkOfDocument
from kd_assets.store import CacheReader, Chosen, PartRecord
from kd_assets.store.partfile import PartFile
from kd_assets.store.ragged_topk import with_rows_of_k
from kd_assets.store.reading.columns import Column, column_of
from kd_assets.store.reading.parts import damage_named, require_unchanged
from kd_assets.store.reading.shapes import require_shapes
from kd_assets.store.schema import HiddenState, hidden_field

BY_SIZE: tuple[Asset, ...] = ("hidden_state_cache", "topk_cache", "embedding_cache")
"""The first that is read gives the sections."""

_DECODED_BYTES = 16 << 20
"""Of Parquet, for each cache; Arrow is mapped."""

_MAPPED_PAGES_BYTES = 32 << 20
"""Of mapped states, before the pages are let go."""

_TOKEN_FIELDS = ("input_ids", "loss_mask")
_FIELDS: dict[Asset, tuple[str, ...]] = {
    "topk_cache": (
        "topk_ids",
        "topk_logprobs",
        "logsumexp",
        "target_logprob",
        "sampled_ids",
        "sampled_counts",
        "outside_mass",
        "positions",
    ),
    "hidden_state_cache": ("positions",),
    "embedding_cache": ("mean_embedding", "last_token_embedding"),
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PartSpan:
    """Where the documents of one part are among those of its partition."""

    index: int
    first: int
    stop: int


class JoinedPartition:
    """The documents of one partition, as all of its caches have them.

    `lengths_D` int64 [D] are the tokens that all caches have, `whole_D` int64 [D] those of the longest.
    """

    def __init__(
        self, chosen: Mapping[Asset, Chosen], *, states: Sequence[HiddenState] = (), max_length: int | None = None
    ) -> None:
        """`chosen`: the results of exactly one partition.

        Raises NotCommittedError where a cache lacks documents that another has, CorruptPartError for damaged files.
        """
        caches: tuple[Asset, ...] = tuple(asset for asset in BY_SIZE if asset in chosen)
        self._leading = caches[0]
        self._states = tuple(states)
        self._readers = {asset: _reader(asset, chosen[asset]) for asset in caches}
        leading = self._readers[self._leading]
        topk = chosen["topk_cache"].manifests if "topk_cache" in caches else ()
        self._k = int(topk[0].params.get("k", 1)) if topk else 1
        self.partition_key = leading.partition_keys[0]
        self.document_ids = leading.document_ids
        self._rows = {asset: self._rows_in(asset) for asset in caches}
        lengths = [reader.n_tokens_D[self._rows[asset]] for asset, reader in self._readers.items()]
        self.whole_D: Int64Array = np.max(lengths, axis=0)
        self.lengths_D: Int64Array = np.min(lengths, axis=0)
        if max_length is not None:
            self.lengths_D = np.minimum(self.lengths_D, max_length)
        self._manifest, self._folder = leading.manifests[0], leading.folders[0]
        firsts = np.cumsum([0, *(record.n_documents for record in self._manifest.parts)])
        self.parts = tuple(
            PartSpan(index=record.index, first=int(firsts[i]), stop=int(firsts[i + 1]))
            for i, record in enumerate(self._manifest.parts)
        )
        self._mapped: _MappedPart | None = None
        self._verified: set[int] = set()

    def require_part_unchanged(self, part: int) -> None:
        """Raise CorruptPartError unless the bytes of this part of the states are what was committed. Reads all of
        it, once; other caches are verified as they are read. Threads may call it beside the one that reads."""
        if self._leading == "hidden_state_cache" and part not in self._verified:
            record = self._manifest.parts[part]
            require_unchanged(self._folder / record.name, record)
            self._verified.add(part)

    def documents(self, part: int, rows: Sequence[int], *, first_number: int) -> PartDocuments:
        """These documents of the partition, which are in this part, numbered from `first_number` on."""
        return PartDocuments(lambda: self._read(part, rows, first_number), len(rows))

    def close(self) -> None:
        """Let go of what is mapped."""
        self._mapped = None

    def _read(self, part: int, rows: Sequence[int], first_number: int) -> Iterator[JoinedDocument]:
        self.require_part_unchanged(part)
        first = self.parts[part].first
        for number, row in enumerate(rows, start=first_number):
            found = {
                asset: self._from_mapped(part, row - first)
                if asset == "hidden_state_cache"
                else self._readers[asset][int(self._rows[asset][row])]
                for asset in self._readers
            }
            yield self._joined(found, number=number, row=row)
            if self._mapped is not None:
                self._mapped.let_go_of_much()

    def _from_mapped(self, part: int, row: int) -> dict[str, Any]:
        if self._mapped is None or self._mapped.index != part:
            record = self._manifest.parts[part]
            names = [*self._readers["hidden_state_cache"].fields, *map(hidden_field, self._states)]
            self._mapped = _MappedPart(self._folder / record.name, record, ["document_id", *names])
        return self._mapped.row(row)

    def _joined(self, found: Mapping[Asset, dict[str, Any]], *, number: int, row: int) -> JoinedDocument:
        length = int(self.lengths_D[row])
        leading = found[self._leading]
        tokens_L = leading["input_ids"][:length]
        for asset, document in found.items():
            same = document["document_id"] == self.document_ids[row]
            if not same or not np.array_equal(document["input_ids"][:length], tokens_L):
                raise VariantConflictError(
                    f"document {self.document_ids[row]!r} of partition {self.partition_key!r} has other tokens in "
                    f"{asset} than in {self._leading}: materialize the older one again, they cannot teach together"
                )
        topk, embedding = found.get("topk_cache"), found.get("embedding_cache")
        states = found.get("hidden_state_cache")
        return JoinedDocument(
            number=number,
            partition_key=self.partition_key,
            document_id=self.document_ids[row],
            input_ids_L=tokens_L,
            loss_mask_L=leading["loss_mask"][:length],
            topk=None if topk is None else _topk_of(topk, length, self._k),
            states=None if states is None else _states_of(states, self._states, length, self._let_go),
            mean_embedding_H=None if embedding is None else embedding["mean_embedding"],
            last_token_embedding_H=None if embedding is None else embedding["last_token_embedding"],
            embedded_tokens=None if embedding is None else len(embedding["input_ids"]),
        )

    def _let_go(self) -> None:
        if self._mapped is not None:
            self._mapped.let_go()

    def _rows_in(self, asset: Asset) -> Int64Array:
        """int64 [D]: where in a cache each document is. Raises as the constructor does."""
        held = self._readers[asset].document_ids
        if held == self.document_ids:
            return np.arange(len(held))
        index = {document_id: row for row, document_id in enumerate(held)}
        if different := set(self.document_ids).symmetric_difference(index):
            for reader in (self._readers[self._leading], self._readers[asset]):  # ids that rotted differ, too
                reader.require_unchanged([self.partition_key])
            raise NotCommittedError(
                f"{self._leading} and {asset} of partition {self.partition_key!r} differ by {len(different)} "
                f"documents, the first is {min(different)!r}: materialize the partition of both again"
            )
        return np.array([index[document_id] for document_id in self.document_ids], dtype=np.int64)


class PartDocuments:
    """Documents of one part, read anew each time they are iterated."""

    def __init__(self, read: Callable[[], Iterator[JoinedDocument]], n: int) -> None:
        self._read, self._n = read, n

    def __iter__(self) -> Iterator[JoinedDocument]:
        return self._read()

    def __len__(self) -> int:
        return self._n


class _MappedPart:
    """The states of one part as views of its file, which this process maps itself, so that it can let go of pages."""

    def __init__(self, path: Path, record: PartRecord, names: Sequence[str]) -> None:
        self.index, self._path, self._names = record.index, path, list(names)

        def mapped() -> mmap.mmap:
            with open_file(path) as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

        if not record.n_bytes:  # which cannot be mapped
            raise CorruptPartError(f"{path} is empty, which no part file is")

        self._memory = read_patiently(mapped, path)
        # Every reader of the buffer protocol will do for Arrow; bytes are what the type names.
        self._file = PartFile(path, self._memory)  # type: ignore[arg-type]
        if self._file.n_rows != record.n_documents:
            raise CorruptPartError(f"{path}: expected {record.n_documents} documents, it has {self._file.n_rows}")
        self._group: tuple[int, dict[str, Column]] | None = None
        self._touched = 0

    def row(self, row: int) -> dict[str, Any]:
        group = self._file.group_of(row)
        if self._group is None or self._group[0] != group:
            table = self._file.read_group(group, self._names)
            with damage_named(self._path):
                columns = {name: column_of(table[name]) for name in self._names}
                require_shapes(self._path, columns, has_next=False)
            self._group = group, columns
        local = row - int(self._file.first_rows[group])
        found = {name: column.row(local) for name, column in self._group[1].items()}
        self._touched += sum(value.nbytes for value in found.values() if isinstance(value, np.ndarray))
        return found

    def let_go(self) -> None:
        """Give pages back; views stay valid, and read them from the file again."""
        with contextlib.suppress(OSError):  # only memory is saved by it
            self._memory.madvise(mmap.MADV_DONTNEED)
        self._touched = 0

    def let_go_of_much(self) -> None:
        """`let_go` once enough was read."""
        if self._touched > _MAPPED_PAGES_BYTES:
            self.let_go()


def partitions_of(chosen: Mapping[Asset, Chosen]) -> list[str]:
    """Keys of the partitions that are joined, in their order.

    Raises NotCommittedError, which names what is missing where, unless all caches have the same partitions, and
    VariantConflictError where two were not made of the same shard.
    """
    caches = [asset for asset in CACHES if asset in chosen]
    keys = {asset: [manifest.partition_key for manifest in results.manifests] for asset, results in chosen.items()}
    first, *others = caches
    for asset in others:
        if missing := sorted(set(keys[first]).symmetric_difference(keys[asset])):
            raise NotCommittedError(
                f"{first} and {asset} do not have the same partitions: {', '.join(missing[:20])} are in one of them "
                "only; materialize the others, or name the partitions to export"
            )
    made_of: dict[str, tuple[Any, str]] = {}
    for asset in caches:
        for manifest in chosen[asset].manifests:
            shard = manifest.identity.get("input")
            known, known_asset = made_of.setdefault(manifest.partition_key, (shard, asset))
            if shard != known:
                raise VariantConflictError(
                    f"partition {manifest.partition_key!r}: {asset} was made from shard {shard!r:.20}, {known_asset} "
                    f"from {known!r:.20}: materialize the older one again, they cannot teach together"
                )
    return keys[first]


def joined_partition(
    chosen: Mapping[Asset, Chosen], key: str, *, states: Sequence[HiddenState], max_length: int | None
) -> JoinedPartition:
    """The partition of this key."""
    of_key = {asset: results.only({key}) for asset, results in chosen.items() if asset in CACHES}
    return JoinedPartition(of_key, states=states, max_length=max_length)


def _reader(asset: Asset, chosen: Chosen) -> CacheReader:
    """A reader of the columns that are joined; of the states it gives the tokens alone, which is what they are for."""
    reader = CacheReader.of(chosen)
    there = reader.fields
    fields = [name for name in (*_TOKEN_FIELDS, *_FIELDS[asset]) if name in there]
    return CacheReader.of(chosen, fields=fields, cache_bytes=_DECODED_BYTES)


def _topk_of(document: Mapping[str, Any], length: int, k: int) -> TopkOfDocument:
    rows = with_rows_of_k(document, k)
    positions_M = _positions(document, len(document["topk_ids"]))
    m = int(np.searchsorted(positions_M, length - 1))  # the last token predicts nothing
    sampled_ids, outside_mass = document.get("sampled_ids"), document.get("outside_mass")
    return TopkOfDocument(
        positions_M=positions_M[:m],
        ids_Mk=rows["topk_ids"][:m],
        logprobs_Mk=rows["topk_logprobs"][:m],
        logsumexp_M=document["logsumexp"][:m] if "logsumexp" in document else None,
        target_logprob_M=document["target_logprob"][:m],
        sampled_ids=None if sampled_ids is None else sampled_ids[:m],
        sampled_counts=None if sampled_ids is None else document["sampled_counts"][:m],
        outside_mass_M=None if outside_mass is None else outside_mass[:m],
        keeps_all="positions" not in document,
    )


def _states_of(
    document: Mapping[str, Any], states: Sequence[HiddenState], length: int, let_go: Callable[[], None]
) -> StatesOfDocument:
    first = document[hidden_field(states[0])] if states else document["input_ids"]
    positions_N = _positions(document, len(first))
    n = int(np.searchsorted(positions_N, length))
    return StatesOfDocument(
        positions_N=positions_N[:n],
        bits_NH={state: document[hidden_field(state)][:n] for state in states},
        keeps_all="positions" not in document,
        let_go=let_go,
    )


def _positions(document: Mapping[str, Any], n: int) -> Int64Array:
    kept: npt.NDArray[np.uint32] | None = document.get("positions")
    return np.arange(n, dtype=np.int64) if kept is None else kept.astype(np.int64)
