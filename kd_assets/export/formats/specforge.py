"""`specforge` and `specforge_dflash`: offline features of SpecForge's trainer (as version 0.2.0 reads them).

`rows_<g>-<g + 2000>/data_<number>.ckpt` is a dictionary in a file of `torch.save` for each document, with `input_ids`
and `loss_mask` int64 [L]. Nothing is shifted: the trainer does.

- `specforge` (EAGLE-3): `hidden_state` bfloat16 [1, L, H], after the final norm; `aux_hidden_state` [1, L, 3H], the
  outputs of three blocks beside each other. With `draft_vocabulary`, `vocab_mapping/vocab_mapping.pt` has `d2t` and
  `t2d` (model.vocab_mapping_path).
- `specforge_dflash` (DFlash, Domino): `hidden_states` [1, L, m · H] of the blocks in the draft's target_layer_ids; with
  `after_norm` among the chosen states `target_last_hidden_states` [1, L, H], too (DSpark).

The DFlash reader fails at a document in which no two tokens side by side are learned: those are left out, and
`left_out/<section>.json` names them. `layers.json` says which blocks the draft's configuration must name.

SpecForge takes the head, `lm_head.weight`, from the teacher's own folder, and wants an `*.index.json` there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kd_assets.contract import Asset
from kd_assets.durable import atomic_write
from kd_assets.errors import NothingToExportError, RecipeError
from kd_assets.export.aside import FilesAside
from kd_assets.export.columns import CachesOfRecipe, Column, tensor
from kd_assets.export.documents import JoinedDocument
from kd_assets.export.draft_vocabulary import DraftVocabulary, count_source, draft_vocabulary, require_can_count
from kd_assets.export.format import ExportOptions, Needs, SectionFiles, Source
from kd_assets.export.formats.draft_states import (
    DRAFT_MEANINGS,
    StatesBeside,
    blocks_in_words,
    blocks_of_depth,
    chosen_blocks,
    chosen_final,
    default_blocks,
    int64,
    require_blocks,
    require_finite,
    require_plain,
    save,
    save_aside,
    share_of_states,
)
from kd_assets.export.left_out import write_left_out
from kd_assets.export.torch_file import Tensor, tensor_of
from kd_assets.store.schema import HiddenState

FILES_A_FOLDER = 2000
VOCABULARY_NAME = "vocab_mapping/vocab_mapping.pt"
LAYERS_NAME = "layers.json"

_BLOCKS_OF_EAGLE3 = 3
_AFTER_NORM = "what comes out of the decoder's final norm and goes into the head"

_WHY_LEFT_OUT = "no two tokens side by side are learned"

Draft = Literal["eagle3", "dflash"]


@dataclass(frozen=True, slots=True)
class SpecForge:
    """The formats; see the module."""

    draft: Draft = "eagle3"

    @property
    def name(self) -> str:
        return "specforge" if self.draft == "eagle3" else "specforge_dflash"

    def needs(self, source: Source, options: ExportOptions) -> Needs:
        require_plain(options, self.name)
        states = (*self._blocks(source, options), *self._final(options))
        assets: tuple[Asset, ...] = ("hidden_state_cache",)
        if options.draft_vocabulary is not None:
            self._require_vocabulary(source, options.draft_vocabulary)
            assets = ("shards_manifest", *assets)
        return Needs(assets=assets, states=states, min_tokens=2, expansion=share_of_states(states, source))

    def writer(self, folder: Path, source: Source, options: ExportOptions) -> _Writer:
        require_finite(source, self.name)
        # Counted before any document is written, since shards of another tokenizer are found by it.
        vocabulary = None
        if options.draft_vocabulary is not None:
            counts_V = count_source(source, max_length=options.max_length)
            vocabulary = draft_vocabulary(counts_V, options.draft_vocabulary)
        blocks = self._blocks(source, options)
        if self.draft == "eagle3":
            return _Writer(folder, _Eagle3(blocks), vocabulary)
        return _Writer(folder, _Dflash(blocks, with_last="after_norm" in self._final(options)), None)

    def columns(self, caches: CachesOfRecipe, options: ExportOptions) -> Sequence[Column]:
        blocks = chosen_blocks(options)
        if blocks is None and self.draft == "dflash":
            blocks = _blocks_among(caches.states)
        elif blocks is None and caches.n_blocks is not None:
            blocks = blocks_of_depth(caches.n_blocks)
        beside = ("1", "L", caches.hidden(_BLOCKS_OF_EAGLE3 if blocks is None else len(blocks)))
        last = ("1", "L", caches.hidden())
        found = [
            tensor("input_ids", "int64", ("L",), DRAFT_MEANINGS["input_ids"]),
            tensor("loss_mask", "int64", ("L",), DRAFT_MEANINGS["loss_mask"]),
        ]
        if self.draft == "eagle3":
            return [
                *found,
                tensor("hidden_state", "bfloat16", last, _AFTER_NORM),
                tensor("aux_hidden_state", "bfloat16", beside, blocks_in_words(blocks)),
            ]
        found.append(tensor("hidden_states", "bfloat16", beside, blocks_in_words(blocks)))
        if "after_norm" in chosen_final(options):
            found.append(tensor("target_last_hidden_states", "bfloat16", last, _AFTER_NORM))
        return found

    def _blocks(self, source: Source, options: ExportOptions) -> list[int]:
        blocks = chosen_blocks(options)
        if blocks is None and self.draft == "eagle3":
            blocks = default_blocks(source, self.name)
        elif blocks is None:
            blocks = _blocks_among(source.states)
        if self.draft == "eagle3" and len(blocks) != _BLOCKS_OF_EAGLE3:
            raise RecipeError(
                f"{self.name}: EAGLE-3 takes exactly three blocks, and {len(blocks)} were named: {blocks}"
            )
        if not blocks:
            raise RecipeError(f"{self.name}: the hidden-state cache of recipe {source.recipe} has no blocks")
        require_blocks(blocks, source, self.name)
        return blocks

    def _final(self, options: ExportOptions) -> list[HiddenState]:
        final: list[HiddenState] = list(chosen_final(options))
        if "before_norm" in final:
            raise RecipeError(
                f"{self.name}: the trainer applies the head alone: it reads after_norm, never before_norm"
            )
        return ["after_norm"] if self.draft == "eagle3" else final

    def _require_vocabulary(self, source: Source, size: int) -> None:
        if self.draft != "eagle3":
            raise RecipeError(
                f"{self.name}: DFlash drafts have the teacher's vocabulary: draft_vocabulary is not for it"
            )
        require_can_count(source, size, self.name)


def _blocks_among(states: Sequence[HiddenState]) -> list[int]:
    return sorted(state for state in states if isinstance(state, int))


class _Eagle3:
    def __init__(self, blocks: Sequence[int]) -> None:
        self._blocks = list(blocks)
        self._hidden, self._aux = StatesBeside(["after_norm"]), StatesBeside(blocks)

    def content(self, document: JoinedDocument) -> dict[str, Any]:
        assert document.states is not None
        return {
            **_tokens(document),
            "hidden_state": _batch_of_one(self._hidden.tensor(document.states)),
            "aux_hidden_state": _batch_of_one(self._aux.tensor(document.states)),
        }

    def takes(self, document: JoinedDocument) -> bool:
        return True

    def layers(self) -> dict[str, Any]:
        return {"eagle_config": {"eagle_aux_hidden_state_layer_ids": self._blocks}}


class _Dflash:
    def __init__(self, blocks: Sequence[int], *, with_last: bool) -> None:
        self._blocks = list(blocks)
        self._hidden = StatesBeside(blocks)
        self._last = StatesBeside(["after_norm"]) if with_last else None

    def content(self, document: JoinedDocument) -> dict[str, Any]:
        assert document.states is not None
        content = {**_tokens(document), "hidden_states": _batch_of_one(self._hidden.tensor(document.states))}
        if self._last is not None:
            content["target_last_hidden_states"] = _batch_of_one(self._last.tensor(document.states))
        return content

    def takes(self, document: JoinedDocument) -> bool:
        return has_learned_neighbours(document.loss_mask_L)

    def layers(self) -> dict[str, Any]:
        return {"dflash_config": {"target_layer_ids": self._blocks}}


class _Writer:
    def __init__(self, folder: Path, kind: _Eagle3 | _Dflash, vocabulary: DraftVocabulary | None) -> None:
        self._folder, self._kind, self._vocabulary = folder, kind, vocabulary

    def section(self, index: int, partition_key: str, documents: Iterable[JoinedDocument]) -> SectionFiles:
        left_out: list[str] = []
        n_tokens = 0
        with FilesAside() as files:
            for document in documents:
                if not self._kind.takes(document):
                    left_out.append(document.document_id)
                    continue
                save_aside(files, self._folder / file_name(document.number), self._kind.content(document))
                n_tokens += len(document.input_ids_L)
        hashes = {path.relative_to(self._folder).as_posix(): sha256 for path, sha256 in files.sha256.items()}
        return SectionFiles(
            index=index,
            partition_key=partition_key,
            n_documents=len(hashes),
            n_tokens=n_tokens,
            names=(*hashes, *write_left_out(self._folder, index, partition_key, left_out, _WHY_LEFT_OUT)),
            sha256=hashes,
            left_out={_WHY_LEFT_OUT: left_out} if left_out else {},
        )

    def finish(self, sections: Sequence[SectionFiles]) -> Sequence[str]:
        if not any(section.n_documents for section in sections):
            raise NothingToExportError(
                "there is no document with two learned tokens side by side: DFlash learns from none"
            )
        layers = json.dumps(self._kind.layers(), indent=1, ensure_ascii=False)
        atomic_write(self._folder / LAYERS_NAME, layers.encode() + b"\n")
        if self._vocabulary is None:
            return [LAYERS_NAME]
        maps = {"d2t": tensor_of(self._vocabulary.d2t_D), "t2d": tensor_of(self._vocabulary.t2d_V)}
        save(self._folder / VOCABULARY_NAME, maps)
        return [LAYERS_NAME, VOCABULARY_NAME]


def file_name(number: int) -> str:
    """Of a document, 2,000 in a folder as SpecForge's own preparation has them."""
    first = number // FILES_A_FOLDER * FILES_A_FOLDER
    return f"rows_{first}-{first + FILES_A_FOLDER}/data_{number}.ckpt"


def has_learned_neighbours(loss_mask_L: npt.NDArray[np.bool_]) -> bool:
    """Whether any two tokens side by side are learned."""
    return bool((loss_mask_L[:-1] & loss_mask_L[1:]).any())


def _tokens(document: JoinedDocument) -> dict[str, Any]:
    return {"input_ids": int64(document.input_ids_L), "loss_mask": int64(document.loss_mask_L)}


def _batch_of_one(tensor: Tensor) -> Tensor:
    """[1, L, …] of [L, …]."""
    return dataclasses.replace(tensor, shape=(1, *tensor.shape))
