"""`speculators`: what vLLM's trainer of draft heads reads offline (`ArrowDataset` of speculators 0.9.0).

A folder of `datasets.save_to_disk`, a document a row, with `input_ids`, `loss_mask` int64 [L] and `seq_len`, and
`hidden_states/hs_<row>.safetensors` for each with `token_ids` int64 [L] and `hidden_states` bfloat16 [L, m + 1, H]: the
outputs of m blocks, and last of all the state before the final norm, which the trainer applies itself with the head.
Nothing is shifted: the trainer does. Rows are numbered in each split for itself.

`layers.json` has the blocks in vLLM's numbers, for `--target-layer-ids`: number j is the output of block j − 1. Unless
others are named they are 1, n // 2 − 1 and n − 4 of n blocks counted from 0, the trainer's default. With
`draft_vocabulary`, `token_freq.pt` counts the learned tokens, and `d2t-<size>.npy` and `t2d-<size>.npy` are the maps
that it makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kd_assets.contract import Asset
from kd_assets.durable import atomic_file, atomic_write, prepare_folder
from kd_assets.errors import RecipeError
from kd_assets.export.aside import FileAside, FilesAside
from kd_assets.export.columns import CachesOfRecipe, Column, columns_of, tensor
from kd_assets.export.documents import Int64Array, JoinedDocument, StatesOfDocument
from kd_assets.export.draft_vocabulary import count_source, draft_vocabulary, require_can_count
from kd_assets.export.format import ExportOptions, Needs, SectionFiles, Source
from kd_assets.export.formats.draft_states import (
    DRAFT_MEANINGS,
    blocks_in_words,
    blocks_of_depth,
    chosen_blocks,
    chosen_final,
    default_blocks,
    require_blocks,
    require_finite,
    require_plain,
    save,
    share_of_states,
)
from kd_assets.export.saved_dataset import finish_saved_dataset, numbers, section_name, section_rows
from kd_assets.export.tensor_file import DTYPES, tensor_bytes, tensor_header
from kd_assets.store.schema import HiddenState

LAYERS_NAME = "layers.json"
STATES_FOLDER = "hidden_states"
FREQUENCIES_NAME = "token_freq.pt"
_DEFAULT_BLOCKS = 3

_TOKENS_AT_A_TIME_BYTES = 8 << 20
"""Of states, which are put beside each other in memory."""

_SCHEMA = pa.schema({"input_ids": numbers(pa.int64()), "loss_mask": numbers(pa.int64()), "seq_len": pa.int64()})


@dataclass(frozen=True, slots=True)
class Speculators:
    """The format; see the module."""

    name: str = "speculators"

    def needs(self, source: Source, options: ExportOptions) -> Needs:
        require_plain(options, self.name)
        if "after_norm" in chosen_final(options):
            raise RecipeError(
                f"{self.name}: the trainer applies the norm itself: it reads before_norm, never after_norm"
            )
        states: tuple[HiddenState, ...] = (*self._blocks(source, options), "before_norm")
        assets: tuple[Asset, ...] = ("hidden_state_cache",)
        if options.draft_vocabulary is not None:
            require_can_count(source, options.draft_vocabulary, self.name)
            assets = ("shards_manifest", *assets)
        return Needs(assets=assets, states=states, min_tokens=2, expansion=share_of_states(states, source))

    def writer(self, folder: Path, source: Source, options: ExportOptions) -> _Writer:
        require_finite(source, self.name)
        counts_V = None
        if options.draft_vocabulary is not None:
            counts_V = count_source(source, max_length=options.max_length)
        return _Writer(folder, self._blocks(source, options), counts_V, options.draft_vocabulary)

    def columns(self, caches: CachesOfRecipe, options: ExportOptions) -> Sequence[Column]:
        blocks = chosen_blocks(options)
        if blocks is None and caches.n_blocks is not None:
            blocks = blocks_of_depth(caches.n_blocks)
        n_states = (_DEFAULT_BLOCKS if blocks is None else len(blocks)) + 1
        states = f"{blocks_in_words(blocks)}, and last the state before the final norm"
        return [
            *columns_of(
                _SCHEMA,
                {name: f"[L] {meaning}" for name, meaning in DRAFT_MEANINGS.items()}
                | {"seq_len": "L: how many tokens the document has"},
            ),
            *(
                tensor(f"{STATES_FOLDER}/hs_ROW.safetensors: {name}", dtype, shape, meaning)
                for (name, dtype, shape), meaning in zip(
                    _tensors("L", n_states, caches.hidden()), ("token ids, as input_ids", states), strict=True
                )
            ),
        ]

    def _blocks(self, source: Source, options: ExportOptions) -> list[int]:
        blocks = chosen_blocks(options)
        if blocks is None:
            blocks = default_blocks(source, self.name)
        require_blocks(blocks, source, self.name)
        return blocks


_N = TypeVar("_N")


def _tensors(length: _N, n_states: _N, hidden_size: _N) -> list[tuple[str, str, tuple[_N, ...]]]:
    """Name, dtype and shape of the tensors beside a row: readers look at them in place, widest elements first."""
    return [
        ("token_ids", "int64", (length,)),
        ("hidden_states", "bfloat16", (length, n_states, hidden_size)),
    ]


class _Writer:
    def __init__(
        self, folder: Path, blocks: Sequence[int], counts_V: Int64Array | None, draft_size: int | None
    ) -> None:
        self._folder, self._blocks, self._counts_V, self._draft_size = folder, blocks, counts_V, draft_size

    def section(self, index: int, partition_key: str, documents: Iterable[JoinedDocument]) -> SectionFiles:
        n_documents = n_tokens = 0
        prepare_folder(self._folder / STATES_FOLDER)
        with section_rows(self._folder, index, _SCHEMA) as (rows, file), FilesAside() as files:
            for document in documents:
                path = self._folder / STATES_FOLDER / f"hs_{document.number}.safetensors"
                with files.file(path) as states_file:
                    self._write_states(states_file, document)
                length = len(document.input_ids_L)
                rows.add(
                    {
                        "input_ids": document.input_ids_L.astype(np.int64),
                        "loss_mask": document.loss_mask_L.astype(np.int64),
                        "seq_len": length,
                    }
                )
                n_documents, n_tokens = n_documents + 1, n_tokens + length
        hashes = {path.relative_to(self._folder).as_posix(): sha256 for path, sha256 in files.sha256.items()}
        hashes[section_name(index)] = file.sha256
        return SectionFiles(
            index=index,
            partition_key=partition_key,
            n_documents=n_documents,
            n_tokens=n_tokens,
            names=tuple(hashes),
            sha256=hashes,
        )

    def finish(self, sections: Sequence[SectionFiles]) -> Sequence[str]:
        layers = {"target_layer_ids": [block + 1 for block in self._blocks]}
        atomic_write(self._folder / LAYERS_NAME, json.dumps(layers).encode() + b"\n")
        names = [*finish_saved_dataset(self._folder, _SCHEMA, sections, as_torch=True), LAYERS_NAME]
        if self._counts_V is not None and self._draft_size is not None:
            counted = {int(i): int(self._counts_V[i]) for i in np.flatnonzero(self._counts_V)}
            save(self._folder / FREQUENCIES_NAME, counted)
            vocabulary = draft_vocabulary(self._counts_V, self._draft_size)
            names.append(FREQUENCIES_NAME)
            for stem, values in (("d2t", vocabulary.d2t_D), ("t2d", vocabulary.t2d_V)):
                names.append(f"{stem}-{self._draft_size}.npy")
                with atomic_file(self._folder / names[-1]) as file:
                    np.save(file, values)
        return names

    def _write_states(self, file: FileAside, document: JoinedDocument) -> None:
        assert document.states is not None, "needs() asked for them"
        states: list[HiddenState] = [*self._blocks, "before_norm"]
        token_ids_L = document.input_ids_L.astype(np.int64)
        length, hidden_size = document.states.bits_NH["before_norm"].shape
        n_bytes = (token_ids_L.nbytes, 2 * length * len(states) * hidden_size)
        tensors = zip(_tensors(length, len(states), hidden_size), n_bytes, strict=True)
        file.write(tensor_header((name, DTYPES[dtype], list(shape), n) for (name, dtype, shape), n in tensors))
        file.write(tensor_bytes(token_ids_L))
        _write_beside_each_other(file, document.states, states)


def _write_beside_each_other(file: FileAside, of: StatesOfDocument, states: Sequence[HiddenState]) -> None:
    """[L, m + 1, H], a few tokens at a time."""
    parts: list[npt.NDArray[Any]] = [of.bits_NH[state] for state in states]
    length, hidden_size = parts[0].shape
    step = max(_TOKENS_AT_A_TIME_BYTES // (2 * len(parts) * hidden_size), 1)
    for first in range(0, length, step):
        file.write(tensor_bytes(np.stack([part[first : first + step] for part in parts], axis=1)))
