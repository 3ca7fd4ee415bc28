"""Folders as `datasets.Dataset.save_to_disk` writes them, by pyarrow alone: an export runs where `datasets` is not.

A folder has Arrow stream files, one a section, `state.json`, which lists them in the order of the rows, and
`dataset_info.json` with the columns' types. `datasets.load_from_disk` maps the files. A row is written by `Rows`, which
holds a few megabytes of them at a time; Parquet files are written by it, too.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kd_assets.durable import atomic_write
from kd_assets.errors import RecipeError
from kd_assets.export.aside import FileAside, export_file
from kd_assets.export.format import SectionFiles
from kd_assets.store import fingerprint

STATE_NAME, INFO_NAME = "state.json", "dataset_info.json"

_BATCH_BYTES = 16 << 20
"""Of a batch of rows: what is held before it is written."""

_LARGEST_OFFSET = 2**31 - 1

_NAMES_OF_TYPES = {"float": "float32", "double": "float64", "halffloat": "float16"}
"""Arrow's names that are others than those of `datasets`."""


class Sink(Protocol):
    """Where batches of rows go: a stream writer of Arrow, or a Parquet writer."""

    def write_batch(self, batch: pa.RecordBatch) -> None: ...

    def close(self) -> None: ...


class Rows:
    """Rows on their way into a file, a batch at a time. A value is a number, or an array of one or two dimensions."""

    def __init__(self, sink: Sink, schema: pa.Schema) -> None:
        self._sink, self._schema = sink, schema
        self._held: list[Mapping[str, Any]] = []
        self._n_bytes = 0

    def add(self, row: Mapping[str, npt.NDArray[Any] | int]) -> None:
        """Raises RecipeError for an array that is too large for one value of a list column."""
        self._held.append(row)
        self._n_bytes += sum(value.nbytes for value in row.values() if isinstance(value, np.ndarray))
        if self._n_bytes >= _BATCH_BYTES:
            self._flush()

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self._sink.close()  # in any case: a Parquet writer would do it later, when the file is gone

    def _flush(self) -> None:
        if self._held:
            columns = [_column([row[field.name] for row in self._held], field.type) for field in self._schema]
            self._sink.write_batch(pa.record_batch(columns, schema=self._schema))
            self._held.clear()
            self._n_bytes = 0


def numbers(kind: pa.DataType) -> pa.DataType:
    """The type of a column of arrays [n] of this kind; `numbers(numbers(kind))` is that of arrays [n, m]."""
    return pa.list_(kind)


def section_name(index: int) -> str:
    return f"data-{index:05d}.arrow"


@contextlib.contextmanager
def section_rows(folder: Path, index: int, schema: pa.Schema) -> Iterator[tuple[Rows, FileAside]]:
    """The rows of the file of a section, which is there when the block ends well."""
    with export_file(folder / section_name(index)) as file, Rows(pa.ipc.new_stream(file, schema), schema) as rows:
        yield rows, file


def count_saved_rows(folder: Path, sections: Sequence[SectionFiles], *, enough: int) -> int:
    """Rows in the sections' files; no further file is read once there are `enough`."""
    n_rows = 0
    for section in sections:
        if n_rows >= enough:
            break
        with pa.memory_map(str(folder / section_name(section.index))) as file, pa.ipc.open_stream(file) as batches:
            n_rows += sum(batch.num_rows for batch in batches)
    return n_rows


def finish_saved_dataset(
    folder: Path, schema: pa.Schema, sections: Sequence[SectionFiles], *, as_torch: bool = False
) -> list[str]:
    """Write what makes the sections' files one data set; returns the names. `as_torch`: its rows are tensors.

    The data set's fingerprint, by which `datasets` knows what it computed of it before, is of the files' content.
    """
    files = [section_name(section.index) for section in sections]
    content = [section.sha256[name] for section, name in zip(sections, files, strict=True)]
    features = {field.name: _feature(field.type) for field in schema}
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": fingerprint({"features": features, "files": content})[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": "torch" if as_torch else None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    for name, said in ((STATE_NAME, state), (INFO_NAME, info)):
        atomic_write(folder / name, json.dumps(said, indent=2, sort_keys=True).encode() + b"\n")
    return [STATE_NAME, INFO_NAME]


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        # The name that every version of `datasets` reads; since 4.0 it writes "List".
        return {"feature": _feature(kind.value_type), "_type": "Sequence"}
    return {"dtype": _NAMES_OF_TYPES.get(str(kind), str(kind)), "_type": "Value"}


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    lengths = [len(value) for value in values]
    inner = kind.value_type
    elements = np.concatenate(values)
    if elements.size > _LARGEST_OFFSET:
        raise RecipeError(
            f"a document has {elements.shape} numbers of one kind, and a value of a list column has at most "
            f"{_LARGEST_OFFSET}: give --max-length"
        )
    return pa.ListArray.from_arrays(_offsets(lengths), _elements(elements, inner), type=kind)


def _elements(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    """The array as elements of this type: its rows are lists where it has two dimensions."""
    if not pa.types.is_list(kind):
        return pa.array(values.reshape(-1), kind)
    n, width = values.shape
    flat = pa.array(values.reshape(-1), kind.value_type)
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int64) * width, pa.int32()), flat, type=kind)


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *lengths], dtype=np.int64), pa.int32())
