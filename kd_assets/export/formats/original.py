"""`original`: the columns of the scripts that this project replaces, for their trainer, which globs Parquet files.

`topk_k<k>/rb_topk_<number>.parquet` has `input_ids`, `attn_mask`, `topk_ids` and `topk_logprobs`,
`fb_hints_L<block>/fb_hints_<number>.parquet` has `hidden_L<block>` in place of the last two, and
`relb_embeds/relb_embeds_<number>.parquet` `pooled_embedding` and `length`. Numbers are float32, int32 and int8 in
nested lists, as they were there. The trainer knows no loss mask, so `attn_mask` is 1, and it takes the number of
candidates from the first document of a batch, so that one without a prediction cannot be in it.

Its loss compares `hidden_L<block>` with the student's `hidden_states[index]`, which is the output of block index − 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kd_assets.contract import CACHES, Asset
from kd_assets.durable import prepare_folder
from kd_assets.errors import RecipeError
from kd_assets.export.aside import FileAside, FilesAside
from kd_assets.export.columns import CachesOfRecipe, Column, Dimension
from kd_assets.export.documents import Float32Array, JoinedDocument
from kd_assets.export.format import ExportOptions, Needs, SectionFiles, Source
from kd_assets.export.formats.alike_files import FileOutline, NotedFile
from kd_assets.export.formats.dataset_card import meaning_of
from kd_assets.export.source import needs_of_chosen
from kd_assets.store.arrays import arrow_numbers, flat
from kd_assets.store.schema import hidden_field

_GROUP_BYTES = 8 << 20
"""Of a group of rows: the trainer makes Python lists of a whole group at a time."""

FLOAT32_PER_BFLOAT16 = 2.0


@dataclass(frozen=True, slots=True)
class Original:
    """The format; see the module."""

    name: str = "original"

    def needs(self, source: Source, options: ExportOptions) -> Needs:
        if options.draft_vocabulary is not None or options.learned_only:
            raise RecipeError(
                "the original trainer reads whole documents and has no loss mask: learned_only and draft_vocabulary "
                "are not for it"
            )
        needs = needs_of_chosen(source, options, CACHES)
        if final := [state for state in needs.states if options.states and not isinstance(state, int)]:
            raise RecipeError(f"the original trainer reads outputs of blocks, and {final[0]!r} is none")
        return Needs(
            assets=needs.assets,
            states=tuple(state for state in needs.states if isinstance(state, int)),
            min_tokens=2 if "topk_cache" in needs.assets else 1,
            expansion=FLOAT32_PER_BFLOAT16,
        )

    def columns(self, caches: CachesOfRecipe, options: ExportOptions) -> Sequence[Column]:
        states = caches.states if options.states is None else options.states
        k, h = caches.k if "topk_cache" in caches.schemas else "", caches.hidden()
        kinds = _kinds_of(caches.schemas, [state for state in states if isinstance(state, int)], k)
        found = [
            Column(name="input_ids", type="list<int32>", meaning="[L] token ids; in every file"),
            Column(name="attn_mask", type="list<int8>", meaning="[L] all ones; in every file"),
        ]
        for kind in kinds:
            where = f"; in {kind.stem}_NUMBER.parquet"
            if kind.asset == "topk_cache":
                ids = f"[L - 1, {k}] token ids, the most probable first"
                logprobs = f"[L - 1, {k}] their natural log-probabilities at temperature 1"
                found += [
                    Column(name="topk_ids", type="list<list<int32>>", meaning=ids + where),
                    Column(name="topk_logprobs", type="list<list<float32>>", meaning=logprobs + where),
                ]
            elif kind.block is not None:
                states_LH = f"[L, {h}] {meaning_of(hidden_field(kind.block))}"
                found.append(Column(name=kind.column, type="list<list<float32>>", meaning=states_LH + where))
            else:
                mean_H = f"[{h}] {meaning_of('mean_embedding')}"
                found += [
                    Column(name="pooled_embedding", type="list<float32>", meaning=mean_H + where),
                    Column(name="length", type="int32", meaning="tokens that the embedding is of" + where),
                ]
        return found

    def writer(self, folder: Path, source: Source, options: ExportOptions) -> _Writer:
        return _Writer(folder, _kinds(source, self.needs(source, options)))


class _Writer:
    def __init__(self, folder: Path, kinds: Sequence[_Kind]) -> None:
        self._folder, self._kinds = folder, kinds
        self._memory = _Float32Memory()

    def section(self, index: int, partition_key: str, documents: Iterable[JoinedDocument]) -> SectionFiles:
        """Goes through the documents once for each kind of file, so that one group of rows is held at a time.

        The files of all blocks are alike but for their states: pyarrow encodes the first.
        """
        names: list[str] = []
        outline: FileOutline | None = None
        counted = _Counted(documents)
        with FilesAside() as files:
            for kind in self._kinds:
                names.append(f"{kind.stem}_{index:06d}.parquet")
                path = self._folder / names[-1]
                prepare_folder(path.parent)
                counted = _Counted(documents)
                with files.file(path) as file:
                    if kind.block is None:
                        self._encode(file, counted, kind)
                    elif outline is None:
                        outline = self._encode(file, counted, kind)
                    else:
                        outline.write(file, kind.column, self._states(counted, kind.block))
        sha256 = {name: files.sha256[self._folder / name] for name in names}
        return SectionFiles(
            index=index,
            partition_key=partition_key,
            n_documents=counted.n_documents,
            n_tokens=counted.n_tokens,
            names=tuple(names),
            sha256=sha256,
        )

    def finish(self, sections: Sequence[SectionFiles]) -> Sequence[str]:
        return []

    def _encode(self, file: FileAside, documents: Iterable[JoinedDocument], kind: _Kind) -> FileOutline | None:
        """By pyarrow. Returns the outline of a file of states."""
        noted = None if kind.block is None else NotedFile(file)
        with _Rows(noted or file, self._memory) as rows:
            for document in documents:
                columns = _columns(document, kind, self._memory)
                if noted is not None:
                    noted.expect(flat(columns[kind.column]))
                rows.add(columns)
        if noted is None or rows.written is None:
            return None
        return noted.outline(*rows.written)

    def _states(self, documents: Iterable[JoinedDocument], block: int) -> Iterator[Float32Array]:
        """The states of all documents, a few tokens at a time: each array until the next is asked for."""
        for document in documents:
            assert document.states is not None
            bits_NH = document.states.bits_NH[block]
            step = max(_GROUP_BYTES // max(4 * bits_NH.shape[1], 1), 1)
            for first in range(0, len(bits_NH), step):
                yield self._memory.float32_of(bits_NH[first : first + step])
                self._memory.take_back()
            document.states.let_go()


class _Counted:
    """Documents, counted as they go by."""

    def __init__(self, documents: Iterable[JoinedDocument]) -> None:
        self._documents = documents
        self.n_documents = self.n_tokens = 0

    def __iter__(self) -> Iterator[JoinedDocument]:
        for document in self._documents:
            self.n_documents, self.n_tokens = self.n_documents + 1, self.n_tokens + len(document.input_ids_L)
            yield document


class _Rows:
    """Rows on their way into a Parquet file, a group at a time."""

    def __init__(self, file: FileAside | NotedFile, memory: _Float32Memory) -> None:
        self._file, self._memory = file, memory
        self._writer: pq.ParquetWriter | None = None
        self._held: list[pa.RecordBatch] = []
        self._n_bytes = 0
        self.written: tuple[pa.Schema, pq.FileMetaData] | None = None
        """What was written, after the block; None: there was no row."""

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self._flush()
        if self._writer is not None:
            self._writer.close()
            self.written = self._writer.schema, self._writer.writer.metadata

    def add(self, columns: Mapping[str, pa.Array]) -> None:
        batch = pa.record_batch(list(columns.values()), names=list(columns))
        self._held.append(batch)
        self._n_bytes += batch.nbytes
        if self._n_bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        table = pa.Table.from_batches(self._held)
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._file,
                table.schema,
                compression="none",
                use_dictionary=False,
                write_statistics=False,
            )
        self._writer.write_table(table, row_group_size=table.num_rows)
        del table
        self._held.clear()
        self._n_bytes = 0
        self._memory.take_back()


class _Float32Memory:
    """States as float32 in memory that is used again for each group of rows: new memory takes as long as filling it."""

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.float32)
        self._n_used = 0

    def float32_of(self, bits: npt.NDArray[np.uint16]) -> Float32Array:
        """The numbers of which these are the bits of bfloat16, exactly; until `take_back`."""
        if self._n_used + bits.size > len(self._memory):  # rows that are held keep the memory they look at
            self._memory, self._n_used = np.empty(bits.size + _GROUP_BYTES // 4, dtype=np.float32), 0
        numbers = self._memory[self._n_used : self._n_used + bits.size].reshape(bits.shape)
        self._n_used += bits.size
        wide = numbers.view(np.uint32)
        wide[...] = bits
        wide <<= 16
        return numbers

    def take_back(self) -> None:
        """All that was given: nobody looks at it any longer."""
        self._n_used = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """One of the trainer's three kinds of files."""

    stem: str
    asset: Asset
    block: int | None = None

    @property
    def column(self) -> str:
        """The last column of a file of states."""
        return f"hidden_L{self.block}"


def _kinds(source: Source, needs: Needs) -> list[_Kind]:
    k = source.manifests["topk_cache"][0].params.get("k", "") if "topk_cache" in needs.assets else ""
    return _kinds_of(needs.assets, [state for state in needs.states if isinstance(state, int)], k)


def _kinds_of(assets: Collection[Asset], blocks: Sequence[int], k: Dimension) -> list[_Kind]:
    """Those of these caches."""
    kinds = []
    if "topk_cache" in assets:
        kinds.append(_Kind(stem=f"topk_k{k}/rb_topk", asset="topk_cache"))
    kinds += [_Kind(stem=f"fb_hints_L{block}/fb_hints", asset="hidden_state_cache", block=block) for block in blocks]
    if "embedding_cache" in assets:
        kinds.append(_Kind(stem="relb_embeds/relb_embeds", asset="embedding_cache"))
    return kinds


def _columns(document: JoinedDocument, kind: _Kind, memory: _Float32Memory) -> dict[str, pa.Array]:
    """The columns of this document in a file of this kind, each an array of one row."""
    length = len(document.input_ids_L)
    columns = {
        "input_ids": _row(document.input_ids_L.astype(np.int32)),
        "attn_mask": _row(np.ones(length, dtype=np.int8)),
    }
    if kind.asset == "topk_cache":
        assert document.topk is not None
        columns["topk_ids"] = _row(document.topk.ids_Mk.astype(np.int32))
        columns["topk_logprobs"] = _row(document.topk.logprobs_Mk.astype(np.float32))
    elif kind.block is not None:
        assert document.states is not None
        columns[kind.column] = _row(memory.float32_of(document.states.bits_NH[kind.block]))
        document.states.let_go()
    else:
        assert document.mean_embedding_H is not None
        columns["pooled_embedding"] = _row(document.mean_embedding_H)
        columns["length"] = pa.array([document.embedded_tokens], pa.int32())
    return columns


def _row(values: npt.NDArray[Any]) -> pa.Array:
    """One row: a list of numbers, or a list of lists."""
    lists = arrow_numbers(np.ascontiguousarray(values).reshape(-1))
    if values.ndim == 2:
        ends = np.arange(values.shape[0] + 1, dtype=np.int64) * values.shape[1]
        lists = pa.ListArray.from_arrays(arrow_numbers(ends.astype(np.int32)), lists)
    return pa.ListArray.from_arrays(arrow_numbers(np.array([0, len(lists)], dtype=np.int32)), lists)
