"""`hf`: a plain `datasets` folder, Parquet files with a data-set card, for `datasets.load_dataset(folder)`.

A row is a document; columns have the cache's own names and numbers (`kd_assets.export.fields`). States are bytes: the
bits of bfloat16, which neither Parquet nor `datasets` has a type for, row after row of H numbers. The card says how to
look at them, and under which licences the texts are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kd_assets.contract import CACHES
from kd_assets.durable import atomic_write, prepare_folder
from kd_assets.errors import RecipeError
from kd_assets.export.aside import export_file
from kd_assets.export.columns import CachesOfRecipe, Column
from kd_assets.export.documents import JoinedDocument
from kd_assets.export.fields import Field, FieldColumn, field_columns, fields_of
from kd_assets.export.format import ExportOptions, Needs, SectionFiles, Source
from kd_assets.export.formats.dataset_card import CARD_NAME, dataset_card, meaning_of
from kd_assets.export.source import needs_of_chosen
from kd_assets.store.arrays import arrow_numbers, arrow_strings
from kd_assets.store.schema import element, list_of, split_columns, vector_of

_VERSION = 2
"""The card names its content."""

_GROUP_BYTES = 16 << 20
"""Of a group of rows: what is held before it is written."""

_NAMES_OF_DOCUMENT = ("partition_key", "document_id")

_LARGEST_VALUE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class HuggingFace:
    """The format; see the module."""

    name: str = "hf"

    def needs(self, source: Source, options: ExportOptions) -> Needs:
        if options.draft_vocabulary is not None:
            raise RecipeError("the hf export counts no draft vocabulary")
        return dataclasses.replace(needs_of_chosen(source, options, CACHES), version=_VERSION)

    def columns(self, caches: CachesOfRecipe, options: ExportOptions) -> Sequence[Column]:
        states = caches.states if options.states is None else options.states
        fields = field_columns(caches, states, learned_only=options.learned_only)
        return [
            *(Column(name=name, type="string", meaning=meaning_of(name)) for name in _NAMES_OF_DOCUMENT),
            *(Column(name=field.name, type=_type_in_words(field), meaning=_meaning(field)) for field in fields),
        ]

    def writer(self, folder: Path, source: Source, options: ExportOptions) -> _Writer:
        return _Writer(folder, source, options)


def _type_in_words(field: FieldColumn) -> str:
    """The type of the column that `_column` makes of such a field."""
    if field.dtype == "bfloat16":
        return "binary"
    if field.name.endswith("_embedding"):
        return f"{field.dtype}[{field.shape[0]}]"
    return f"list<{field.dtype}>" if len(field.shape) == 1 else f"list<{field.dtype}[{field.shape[1]}]>"


def _meaning(field: FieldColumn) -> str:
    bits = f"bits of bfloat16 [{', '.join(map(str, field.shape))}]: " if field.dtype == "bfloat16" else ""
    return bits + meaning_of(field.name)


class _Writer:
    def __init__(self, folder: Path, source: Source, options: ExportOptions) -> None:
        self._folder, self._source, self._options = folder, source, options

    def section(self, index: int, partition_key: str, documents: Iterable[JoinedDocument]) -> SectionFiles:
        name = f"data/part-{index:05d}.parquet"
        prepare_folder(self._folder / "data")
        n_documents = n_tokens = 0
        with export_file(self._folder / name) as file:
            rows = _Rows(file)
            for document in documents:
                rows.add(document, list(fields_of(document, learned_only=self._options.learned_only)))
                n_documents, n_tokens = n_documents + 1, n_tokens + len(document.input_ids_L)
            rows.close()
        return SectionFiles(
            index=index,
            partition_key=partition_key,
            n_documents=n_documents,
            n_tokens=n_tokens,
            names=(name,),
            sha256={name: file.sha256},
        )

    def finish(self, sections: Sequence[SectionFiles]) -> Sequence[str]:
        schema = pq.read_schema(self._folder / sections[0].names[0])
        card = dataset_card(
            self._source,
            schema,
            self._options,
            n_documents=sum(section.n_documents for section in sections),
            n_tokens=sum(section.n_tokens for section in sections),
        )
        atomic_write(self._folder / CARD_NAME, card.encode())
        return [CARD_NAME]


class _Rows:
    """Documents on their way into a Parquet file, a group of rows at a time."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._writer: pq.ParquetWriter | None = None
        self._held: list[tuple[JoinedDocument, list[Field]]] = []
        self._n_bytes = 0

    def add(self, document: JoinedDocument, fields: list[Field]) -> None:
        self._held.append((document, fields))
        self._n_bytes += sum(field.values.nbytes for field in fields)
        if self._n_bytes >= _GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        if self._held:
            self._flush()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        keys = arrow_strings([document.partition_key for document, _ in self._held])
        ids = arrow_strings([document.document_id for document, _ in self._held])
        names = [field.name for field in self._held[0][1]]
        columns = [_column([fields[at] for _, fields in self._held]) for at in range(len(names))]
        table = pa.table([keys, ids, *columns], names=[*_NAMES_OF_DOCUMENT, *names])
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._file,
                table.schema,
                compression=_codecs(table.schema),
                use_dictionary=False,
                use_byte_stream_split=split_columns(table.schema),
                write_statistics=False,
            )
        self._writer.write_table(table, row_group_size=table.num_rows)
        self._held.clear()
        self._n_bytes = 0


def _column(fields: Sequence[Field]) -> pa.Array | pa.ChunkedArray:
    """One field of several documents."""
    first = fields[0]
    if first.dtype == "bfloat16":  # a chunk a document, so that states are not copied together
        return pa.chunked_array([_as_bytes(field.values) for field in fields])
    values = np.concatenate([field.values for field in fields])
    elements = arrow_numbers(values.reshape(-1))
    if first.name.endswith("_embedding"):
        return pa.FixedSizeListArray.from_arrays(elements, type=vector_of(elements.type, len(first.values)))
    offsets = arrow_numbers(np.cumsum([0, *(len(field.values) for field in fields)], dtype=np.int32))
    if values.ndim == 1:
        return pa.ListArray.from_arrays(offsets, elements, type=list_of(elements.type))
    vectors = pa.FixedSizeListArray.from_arrays(elements, type=vector_of(elements.type, values.shape[1]))
    return pa.ListArray.from_arrays(offsets, vectors, type=pa.list_(element(vectors.type)))


def _as_bytes(values: npt.NDArray[Any]) -> pa.Array:
    """One value of type binary, a view of the array where that is in one piece. Raises RecipeError for more bytes than
    one can have."""
    whole = np.ascontiguousarray(values)
    if whole.nbytes > _LARGEST_VALUE:
        raise RecipeError(
            f"states of {whole.shape[0]} tokens are {whole.nbytes} bytes, and a value in Parquet has at most "
            f"{_LARGEST_VALUE}: give --max-length, or export as safetensors"
        )
    offsets = np.array([0, whole.nbytes], dtype=np.int32)
    return pa.Array.from_buffers(pa.binary(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(whole)])


def _codecs(schema: pa.Schema) -> dict[str, str]:
    """Column in Parquet's words → codec: bfloat16 of a teacher does not get smaller."""
    return {path: "none" if is_binary else "zstd" for path, is_binary in _leaves(schema)}


def _leaves(schema: pa.Schema) -> Iterable[tuple[str, bool]]:
    for field in schema:
        path, kind = field.name, field.type
        while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            path, kind = f"{path}.list.element", kind.value_type
        yield path, pa.types.is_binary(kind)
