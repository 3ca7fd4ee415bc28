"""`distillkit`: what DistillKit's capture writes, without loss, or with `pack_to` the rows that its trainer reads.

Of a document with L tokens L − 1 positions are kept, position i about token i + 1: `input_ids` and `labels` [L − 1],
`compressed_logprobs` uint8 [L − 1, 2k], k float16 in little-endian bytes, most probable first, `bytepacked_indices`
uint8 [L − 1, ⌈kb / 8⌉], k ids of b = ⌈log2 d⌉ bits, highest bit first. `compression_config.yaml` says this to its
reader (`logprob_compressor` of a run): all candidates exact, no terms, no bins. Log-probabilities are natural, at
temperature 1.

- Without `pack_to`: `data_<section>.parquet`, a document a row, as `distillkit-pack-logits` takes it.
- With `pack_to`: a folder of `datasets.save_to_disk` with rows of that many positions (`prepacked: true`). In
  `attention_mask` documents are numbered from 1 in each row, and the padding at its end is 0. Its packing patch
  (`functionary_packing: true`) keeps documents apart by these numbers.

`labels` are −100 where a token is not learned. The trainer's cross-entropy shifts them and its distillation losses do
not: these leave out position i where token i is not learned. They are NaN of a row in which nothing is: such documents
are left out, and `left_out/<section>.json` names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kd_assets.durable import atomic_write
from kd_assets.errors import NothingToExportError, RecipeError
from kd_assets.export.aside import export_file
from kd_assets.export.columns import CachesOfRecipe, Column, columns_of
from kd_assets.export.documents import JoinedDocument
from kd_assets.export.format import ExportOptions, Needs, Packing, SectionFiles, Source
from kd_assets.export.formats.topk_targets import IGNORED, labels_of, require_topk_alone
from kd_assets.export.left_out import write_left_out
from kd_assets.export.packing import first_fit
from kd_assets.export.saved_dataset import (
    Rows,
    count_saved_rows,
    finish_saved_dataset,
    numbers,
    section_name,
    section_rows,
)
from kd_assets.store import fingerprint

CONFIG_NAME, CARD_NAME = "compression_config.yaml", "README.md"

_WHY_LEFT_OUT = "nothing of them is learned"

_LARGEST_VOCABULARY = 1 << 20
"""Its reader takes the logarithm in float32, which is exact enough up to here."""

_BYTES_PER_BYTE, _BYTES_PER_BYTE_PACKED = 1.0, 2.0
"""Written for each byte of the cache, about: rows are not compressed, and have a mask and padding."""

_ROWS_OF_LOADER = 2
"""Its loader of packed rows refuses fewer."""

_BITS_AT_A_TIME = 1 << 24
"""That are held as a byte each while ids are packed."""

_SCHEMA = pa.schema(
    {
        "input_ids": numbers(pa.uint64()),
        "labels": numbers(pa.int32()),
        "compressed_logprobs": numbers(numbers(pa.uint8())),
        "bytepacked_indices": numbers(numbers(pa.uint8())),
    }
)
_PACKED_SCHEMA = pa.schema(
    {
        "input_ids": numbers(pa.int32()),
        "labels": numbers(pa.int32()),
        "attention_mask": numbers(pa.int32()),
        "compressed_logprobs": numbers(numbers(pa.uint8())),
        "bytepacked_indices": numbers(numbers(pa.uint8())),
    }
)

_Row = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class DistillKit:
    """The format; see the module."""

    name: str = "distillkit"

    def needs(self, source: Source, options: ExportOptions) -> Needs:
        require_topk_alone(options, self.name)
        if source.vocabulary_size is None:
            raise RecipeError(
                f"{self.name}: how many ids the vocabulary of the teacher of recipe {source.recipe} has is not known "
                "here, which its reader must be told: export where the teacher's folder is"
            )
        if not 2 <= source.vocabulary_size <= _LARGEST_VOCABULARY:
            raise RecipeError(
                f"{self.name}: the teacher's vocabulary has {source.vocabulary_size} ids, and its reader takes 2 to "
                f"{_LARGEST_VOCABULARY}"
            )
        return Needs(
            assets=("topk_cache",),
            min_tokens=2,
            expansion=_BYTES_PER_BYTE if options.pack_to is None else _BYTES_PER_BYTE_PACKED,
            packing=Packing(dropped_tokens=1, min_rows=_ROWS_OF_LOADER),
        )

    def columns(self, caches: CachesOfRecipe, options: ExportOptions) -> Sequence[Column]:
        k, size = caches.k, caches.vocabulary_size
        rows = "L - 1" if options.pack_to is None else options.pack_to
        n_id_bytes = f"⌈{k} · bits / 8⌉" if size is None else _Layout(vocabulary_size=size, k=k).id_bytes
        return columns_of(
            _SCHEMA if options.pack_to is None else _PACKED_SCHEMA,
            {
                "input_ids": f"[{rows}] token ids",
                "labels": f"[{rows}] the ids of tokens that are learned, {IGNORED} elsewhere; not shifted",
                "attention_mask": f"[{rows}] the number of the document in the row, from 1; 0 is padding",
                "compressed_logprobs": f"[{rows}, {2 * k}] {k} natural log-probabilities as float16, little-endian, "
                "the most probable first; row i is about token i + 1",
                "bytepacked_indices": f"[{rows}, {n_id_bytes}] their token ids, packed as {CONFIG_NAME} says",
            },
        )

    def writer(self, folder: Path, source: Source, options: ExportOptions) -> _Writer:
        assert source.vocabulary_size is not None, "needs() has refused that"
        k = int(source.manifests["topk_cache"][0].params["k"])
        return _Writer(folder, _Layout(vocabulary_size=source.vocabulary_size, k=k), options.pack_to)


class _Writer:
    def __init__(self, folder: Path, layout: _Layout, pack_to: int | None) -> None:
        self._folder, self._layout, self._pack_to = folder, layout, pack_to

    def section(self, index: int, partition_key: str, documents: Iterable[JoinedDocument]) -> SectionFiles:
        n_documents = n_tokens = 0
        left_out: list[str] = []

        def encoded() -> Iterator[_Row]:
            nonlocal n_documents, n_tokens
            for document in documents:
                row = self._layout.row(document)
                if not (row["labels"] != IGNORED).any():
                    left_out.append(document.document_id)
                    continue
                n_documents, n_tokens = n_documents + 1, n_tokens + len(document.input_ids_L)
                yield row

        if self._pack_to is None:
            name = f"data_{index}.parquet"
            with (
                export_file(self._folder / name) as file,
                Rows(pq.ParquetWriter(file, _SCHEMA, compression="zstd", write_statistics=False), _SCHEMA) as rows,
            ):
                for row in encoded():
                    rows.add(row)
        else:
            name = section_name(index)
            with section_rows(self._folder, index, _PACKED_SCHEMA) as (rows, file):
                items = ((len(row["input_ids"]), row) for row in encoded())
                for together in first_fit(items, self._pack_to):
                    rows.add(one_row(together, self._pack_to))
        return SectionFiles(
            index=index,
            partition_key=partition_key,
            n_documents=n_documents,
            n_tokens=n_tokens,
            names=(
                name,
                *write_left_out(self._folder, index, partition_key, left_out, _WHY_LEFT_OUT, ensure_ascii=True),
            ),
            sha256={name: file.sha256},
            left_out={_WHY_LEFT_OUT: left_out} if left_out else {},
        )

    def finish(self, sections: Sequence[SectionFiles]) -> Sequence[str]:
        if not any(section.n_documents for section in sections):
            raise NothingToExportError(
                "there is no document with a learned token: DistillKit's losses are NaN of the others"
            )
        if self._pack_to is not None:
            n_rows = count_saved_rows(self._folder, sections, enough=_ROWS_OF_LOADER)
            if n_rows < _ROWS_OF_LOADER:
                raise NothingToExportError(
                    f"all documents fit into {n_rows} row of {self._pack_to} tokens (pack_to), and DistillKit's loader "
                    f"takes {_ROWS_OF_LOADER} or more: choose shorter rows"
                )
        atomic_write(self._folder / CONFIG_NAME, self._layout.config().encode())
        if self._pack_to is None:
            atomic_write(self._folder / CARD_NAME, card(sections).encode())
            return [CONFIG_NAME, CARD_NAME]
        return [CONFIG_NAME, *finish_saved_dataset(self._folder, _PACKED_SCHEMA, sections)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """How the bytes of a position are to be read."""

    vocabulary_size: int
    k: int

    @property
    def bits(self) -> int:
        """Of an id, as the reader counts them."""
        return (self.vocabulary_size - 1).bit_length()

    @property
    def id_bytes(self) -> int:
        """Of the ids of a position."""
        return (self.k * self.bits + 7) // 8

    def row(self, document: JoinedDocument) -> _Row:
        topk, m = document.topk, len(document.input_ids_L) - 1
        assert topk is not None, "needs() asked for it"
        assert topk.ids_Mk.shape == (m, self.k), "all positions, with as many candidates as the manifest says"
        return {
            "input_ids": document.input_ids_L[:m].astype(np.int32),
            "labels": labels_of(document)[:m].astype(np.int32),
            "compressed_logprobs": np.ascontiguousarray(topk.logprobs_Mk, dtype="<f2").view(np.uint8),
            "bytepacked_indices": packed_ids(topk.ids_Mk, self.bits),
        }

    def config(self) -> str:
        """`compression_config.yaml`, with all that the reader would otherwise take a default for."""
        said = {
            "d": self.vocabulary_size,
            "delta_encoding": "false",
            "error_diffusion": "false",
            "exact_dtype": "float16",
            "exact_k": self.k,
            "k": self.k,
            "normalize_t": "false",
            "polynomial_terms": "null",
            "residual_bins": "[]",
            "term_dtype": "float32",
        }
        return "".join(f"{name}: {value}\n" for name, value in said.items())


def packed_ids(ids_Mk: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint8]:
    """uint8 [M, ⌈k · bits / 8⌉]: the lowest `bits` of each id, highest first, filled up with zeros to a whole byte."""
    m, k = ids_Mk.shape
    packed_MB = np.empty((m, (k * bits + 7) // 8), dtype=np.uint8)
    step = max(_BITS_AT_A_TIME // (32 * k), 1)
    for first in range(0, m, step):
        of_ids = ids_Mk[first : first + step]
        bytes_Nk4 = np.ascontiguousarray(of_ids, dtype=">u4").view(np.uint8).reshape(len(of_ids), k, 4)
        bits_NkB = np.unpackbits(bytes_Nk4, axis=2)[:, :, 32 - bits :]
        packed_MB[first : first + step] = np.packbits(bits_NkB.reshape(len(of_ids), k * bits), axis=1)
    return packed_MB


def one_row(together: Sequence[_Row], row_tokens: int) -> _Row:
    """The documents one after the other, numbered from 1 in `attention_mask`, and what fills the row up.

    That is id 0, label −100 and mask 0, with the prediction of the last position again: losses multiply by the mask
    what they computed of it, so that it must be a distribution (SYMMETRIC_UNIFORM makes NaN of zeros).
    """
    lengths = [len(row["input_ids"]) for row in together]
    filling = (0, row_tokens - sum(lengths))
    whole = {name: np.concatenate([row[name] for row in together]) for name in together[0]}
    return {
        "input_ids": np.pad(whole["input_ids"], filling),
        "labels": np.pad(whole["labels"], filling, constant_values=IGNORED),
        "attention_mask": np.pad(np.repeat(np.arange(1, len(together) + 1, dtype=np.int32), lengths), filling),
        "compressed_logprobs": np.pad(whole["compressed_logprobs"], (filling, (0, 0)), mode="edge"),
        "bytepacked_indices": np.pad(whole["bytepacked_indices"], (filling, (0, 0)), mode="edge"),
    }


def card(sections: Sequence[SectionFiles]) -> str:
    """`README.md`: which files are the data set's, since the loader would guess from all that lie in the folder.

    The configuration's name tells the content: for a folder with an equal name and an equal card `datasets` (5.2.0)
    takes what it has in its cache, whatever files are there now.
    """
    content = fingerprint({"files": [section.sha256[section.names[0]] for section in sections]})[:16]
    return f"""---
configs:
- config_name: export-{content}
  data_files:
  - split: train
    path: data_*.parquet
---
Top-k log-probabilities of a teacher in DistillKit's format. `distillkit-pack-logits --dataset FOLDER --split train`
packs them; `{CONFIG_NAME}` is what the run's `teacher.logprob_compressor` must say.
"""
