"""`safetensors`: one file a section with every array of its documents as a tensor, and an index by document.

A tensor is named `<document number>/<field>`; dtypes are those of the cache, states are BF16. `index.json` says of each
file which documents it holds. With `learned_only` predictions and states are those at learned positions; wherever not
all are there, `…_positions` says which.

Files are written from views of the mapped caches (`kd_assets.export.tensor_file`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_assets.contract import CACHES
from kd_assets.durable import atomic_write
from kd_assets.errors import RecipeError
from kd_assets.export.aside import export_file
from kd_assets.export.columns import CachesOfRecipe, Column, tensor
from kd_assets.export.documents import JoinedDocument
from kd_assets.export.fields import Field, field_columns, fields_of
from kd_assets.export.format import ExportOptions, Needs, SectionFiles, Source
from kd_assets.export.formats.dataset_card import meaning_of
from kd_assets.export.source import needs_of_chosen
from kd_assets.export.tensor_file import DTYPES, DescribedTensor, tensor_bytes, tensor_header

INDEX_NAME = "index.json"

STATES_DTYPE = "bfloat16"

_BYTES_PER_BYTE_OF_TOPK = 2.5
"""Written for each byte of a top-k cache, about: tensors are not compressed."""


@dataclass(frozen=True, slots=True)
class Safetensors:
    """The format; see the module."""

    name: str = "safetensors"

    def needs(self, source: Source, options: ExportOptions) -> Needs:
        if options.draft_vocabulary is not None:
            raise RecipeError("the safetensors export counts no draft vocabulary")
        needs = needs_of_chosen(source, options, CACHES)
        return dataclasses.replace(needs, expansion_of={"topk_cache": _BYTES_PER_BYTE_OF_TOPK})

    def columns(self, caches: CachesOfRecipe, options: ExportOptions) -> Sequence[Column]:
        states = caches.states if options.states is None else options.states
        return [
            tensor(f"NUMBER/{field.name}", field.dtype, field.shape, meaning_of(field.name))
            for field in field_columns(caches, states, learned_only=options.learned_only)
        ]

    def writer(self, folder: Path, source: Source, options: ExportOptions) -> _Writer:
        return _Writer(folder, options)


class _Writer:
    def __init__(self, folder: Path, options: ExportOptions) -> None:
        self._folder, self._options = folder, options

    def section(self, index: int, partition_key: str, documents: Iterable[JoinedDocument]) -> SectionFiles:
        name, index_name = f"section-{index:05d}.safetensors", f"section-{index:05d}.json"
        held, n_tokens, small, states = self._collected(documents)
        # Readers look at a tensor in place, so each begins at a multiple of its elements' size: widest elements first.
        before = [field for field in small if field[1].values.itemsize > 2]
        after = [field for field in small if field[1].values.itemsize <= 2]
        with export_file(self._folder / name) as file:
            file.write(tensor_header([*map(_described, before), *states, *map(_described, after)]))
            for _, field in before:
                file.write(tensor_bytes(field.values))
            for document in documents if states else ():
                for field in self._fields(document):
                    if field.dtype == STATES_DTYPE:
                        file.write(tensor_bytes(field.values))
            for _, field in after:
                file.write(tensor_bytes(field.values))
        listed = {"file": name, "partition_key": partition_key, "documents": held}
        atomic_write(self._folder / index_name, json.dumps(listed).encode() + b"\n")
        return SectionFiles(
            index=index,
            partition_key=partition_key,
            n_documents=len(held),
            n_tokens=n_tokens,
            names=(name, index_name),
            sha256={name: file.sha256},
        )

    def finish(self, sections: Sequence[SectionFiles]) -> Sequence[str]:
        files = [
            {"file": section.names[0], "documents_in": section.names[1], "n_documents": section.n_documents}
            for section in sections
        ]
        raw = {"files": files, "n_documents": sum(section.n_documents for section in sections)}
        atomic_write(self._folder / INDEX_NAME, json.dumps(raw, indent=1).encode() + b"\n")
        return [INDEX_NAME]

    def _collected(self, documents: Iterable[JoinedDocument]) -> _Collected:
        """What the index says of each document, the tokens of all, the arrays that are no states (widest elements
        first), and the states' descriptions."""
        held, n_tokens = [], 0
        small: list[tuple[str, Field]] = []
        states: list[DescribedTensor] = []
        for document in documents:
            held.append({"number": document.number, "document_id": document.document_id})
            n_tokens += len(document.input_ids_L)
            for field in self._fields(document):
                named = (f"{document.number}/{field.name}", field)
                if field.dtype == STATES_DTYPE:
                    states.append(_described(named))
                else:
                    small.append(named)
        small.sort(key=lambda named: -named[1].values.itemsize)
        return held, n_tokens, small, states

    def _fields(self, document: JoinedDocument) -> Iterator[Field]:
        return fields_of(document, learned_only=self._options.learned_only)


_Collected = tuple[list[dict[str, Any]], int, list[tuple[str, Field]], list[DescribedTensor]]


def _described(named: tuple[str, Field]) -> DescribedTensor:
    name, field = named
    return name, DTYPES[field.dtype], list(field.values.shape), field.values.nbytes
