"""`modelopt`: dumps for ModelOpt's offline training of draft heads (`OfflineSupervisedDataset` of version 0.47.0).

`<number>.pt` is a dictionary in a file of `torch.save` for each document: `input_ids` and `loss_mask` int64 [L],
`hidden_states` bfloat16 [L, H], `aux_hidden_states` bfloat16 [L, m · H] of m blocks beside each other,
`hidden_states_prenorm` whether `hidden_states` are before the final norm, and `conversation_id`, the partition's key
and the document's id. Nothing is shifted. The reader uses `loss_mask` with answer_only_loss alone.

`hidden_states` are after the norm unless `before_norm` is among the chosen states, which is for DFlash heads alone: of
EAGLE's the loss does not look at `hidden_states_prenorm` and takes all states as after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_assets.contract import FinalState
from kd_assets.errors import RecipeError
from kd_assets.export.aside import FilesAside
from kd_assets.export.columns import CachesOfRecipe, Column, tensor
from kd_assets.export.documents import JoinedDocument
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
    save_aside,
    share_of_states,
)


@dataclass(frozen=True, slots=True)
class ModelOpt:
    """The format; see the module."""

    name: str = "modelopt"

    def needs(self, source: Source, options: ExportOptions) -> Needs:
        require_plain(options, self.name)
        if options.draft_vocabulary is not None:
            raise RecipeError(
                f"{self.name}: ModelOpt makes its file of draft ids with a tool of its own, and this format has none: "
                "leave draft_vocabulary out"
            )
        states = (*self._blocks(source, options), self._final(options))
        return Needs(
            assets=("hidden_state_cache",),
            states=states,
            min_tokens=2,
            expansion=share_of_states(states, source),
        )

    def writer(self, folder: Path, source: Source, options: ExportOptions) -> _Writer:
        require_finite(source, self.name)
        return _Writer(folder, self._blocks(source, options), self._final(options))

    def columns(self, caches: CachesOfRecipe, options: ExportOptions) -> Sequence[Column]:
        final = self._final(options)
        blocks = chosen_blocks(options)
        if blocks is None and caches.n_blocks is not None:
            blocks = _once_each(blocks_of_depth(caches.n_blocks))
        aux = caches.hidden("m" if blocks is None else len(blocks))
        end = "before" if final == "before_norm" else "after"
        return [
            tensor("input_ids", "int64", ("L",), DRAFT_MEANINGS["input_ids"]),
            tensor("loss_mask", "int64", ("L",), DRAFT_MEANINGS["loss_mask"]),
            tensor("hidden_states", "bfloat16", ("L", caches.hidden()), f"the decoder's last state, {end} the norm"),
            tensor("aux_hidden_states", "bfloat16", ("L", aux), blocks_in_words(blocks)),
            Column(name="hidden_states_prenorm", type="bool", meaning="whether hidden_states are before the norm"),
            Column(name="conversation_id", type="string", meaning="the partition's key and the document's id"),
        ]

    def _blocks(self, source: Source, options: ExportOptions) -> list[int]:
        blocks = chosen_blocks(options)
        if blocks is None:  # of a shallow teacher two of the three may be one
            blocks = _once_each(default_blocks(source, self.name))
        require_blocks(blocks, source, self.name)
        return blocks

    def _final(self, options: ExportOptions) -> FinalState:
        final = chosen_final(options)
        if len(final) > 1:
            raise RecipeError(
                f"{self.name}: a file has one state at the decoder's end, choose one of {', '.join(final)}"
            )
        return final[0] if final else "after_norm"


def _once_each(blocks: Sequence[int]) -> list[int]:
    return sorted({max(block, 0) for block in blocks})


class _Writer:
    def __init__(self, folder: Path, blocks: Sequence[int], final: FinalState) -> None:
        self._folder, self._is_before_norm = folder, final == "before_norm"
        self._hidden, self._aux = StatesBeside([final]), StatesBeside(blocks)

    def section(self, index: int, partition_key: str, documents: Iterable[JoinedDocument]) -> SectionFiles:
        n_tokens = 0
        with FilesAside() as files:
            for document in documents:
                save_aside(files, self._folder / f"{document.number:08d}.pt", self._content(document))
                n_tokens += len(document.input_ids_L)
        hashes = {path.name: sha256 for path, sha256 in files.sha256.items()}
        return SectionFiles(
            index=index,
            partition_key=partition_key,
            n_documents=len(hashes),
            n_tokens=n_tokens,
            names=tuple(hashes),
            sha256=hashes,
        )

    def finish(self, sections: Sequence[SectionFiles]) -> Sequence[str]:
        return []

    def _content(self, document: JoinedDocument) -> dict[str, Any]:
        assert document.states is not None, "needs() asked for them"
        return {
            "input_ids": int64(document.input_ids_L),
            "loss_mask": int64(document.loss_mask_L),
            "hidden_states": self._hidden.tensor(document.states),
            "aux_hidden_states": self._aux.tensor(document.states),
            "hidden_states_prenorm": self._is_before_norm,
            "conversation_id": f"{document.partition_key}/{document.document_id}",
        }
