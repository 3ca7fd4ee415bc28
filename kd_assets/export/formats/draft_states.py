"""What the formats of draft-head trainers (SpecForge, ModelOpt) share: which blocks they take, what they cannot have,
and tensors of states in files as `torch.save` writes them (`kd_assets.export.torch_file`).

A teacher of n blocks has its auxiliary states at the outputs of blocks 1, n // 2 − 1 and n − 4, counted from 0, unless
the draft's configuration names others. That is the default of SpecForge 0.2.0 and of ModelOpt 0.47.0.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_assets.contract import FinalState
from kd_assets.durable import prepare_folder
from kd_assets.errors import FailedCheckError, RecipeError
from kd_assets.export.aside import FilesAside
from kd_assets.export.documents import StatesOfDocument
from kd_assets.export.format import ExportOptions, Source
from kd_assets.export.torch_file import Tensor, tensor_of, write_torch_file
from kd_assets.store.schema import HiddenState

_PIECE_BYTES = 1 << 20
"""Of states that are put beside each other at once: little enough to be in a processor's cache until it is written."""

_LET_GO_BYTES = 8 << 20
"""Of states that are looked at before their memory is given back."""


DRAFT_MEANINGS = {
    "input_ids": "token ids; not shifted",
    "loss_mask": "1 for tokens that a student learns to predict; not shifted",
}
"""Of the tensors that all of these formats have."""


def blocks_in_words(blocks: Sequence[int] | None) -> str:
    """`the outputs of blocks 1, 15 and 28, beside each other`. None: they hang on the teacher, whose size is not known
    here."""
    if blocks is None:
        return "the outputs of blocks 1, n // 2 - 1 and n - 4 of the teacher's n, counted from 0, beside each other"
    return f"the outputs of blocks {', '.join(map(str, blocks))}, counted from 0, beside each other"


def default_blocks(source: Source, format_name: str) -> list[int]:
    """Blocks 1, n // 2 − 1 and n − 4. Raises RecipeError where n is not known."""
    n = source.n_blocks
    if n is None:
        raise RecipeError(
            f"{format_name}: how many decoder blocks the teacher of recipe {source.recipe} has is not known here (its "
            "folder is not on this machine), so that the blocks of the auxiliary states are not known: name them "
            "(states: [1, …])"
        )
    return blocks_of_depth(n)


def blocks_of_depth(n: int) -> list[int]:
    """The default blocks of a teacher of n."""
    return [1, n // 2 - 1, n - 4]


def chosen_blocks(options: ExportOptions) -> list[int] | None:
    """The blocks that the options name, in their order; None where they name none."""
    return [state for state in options.states or () if isinstance(state, int)] or None


def chosen_final(options: ExportOptions) -> list[FinalState]:
    """The states at the decoder's end that the options name."""
    return [state for state in options.states or () if not isinstance(state, int)]


def require_blocks(blocks: Sequence[int], source: Source, format_name: str) -> None:
    """Raise RecipeError unless these are blocks of the teacher, each once and in ascending order.

    Trainers collect states in the order in which the teacher computes them, whatever the order in a configuration.
    """
    n = source.n_blocks
    listed = ", ".join(map(str, blocks))
    if list(blocks) != sorted(set(blocks)) or any(block < 0 for block in blocks):
        whose = "" if n is None else f" of a teacher with {n} blocks"
        raise RecipeError(
            f"{format_name}: the blocks of the auxiliary states{whose} are {listed}, which are not in ascending order, "
            "each once: name others in the draft's configuration and here (states: …)"
        )
    if n is not None and blocks and blocks[-1] >= n:
        raise RecipeError(
            f"{format_name}: block {blocks[-1]} was asked for, and the teacher of recipe {source.recipe} has blocks 0 "
            f"to {n - 1}"
        )


def require_finite(source: Source, format_name: str) -> None:
    """Raise FailedCheckError where a part has states that are no numbers: the trainers' losses turn to NaN of them.

    Of the source that is exported: a partition that is not chosen may have them.
    """
    for manifest in source.manifests.get("hidden_state_cache", ()):
        for record in manifest.parts:
            if n := int(record.stats.get("n_non_finite", 0)):
                raise FailedCheckError(
                    f"{format_name}: {record.name} of partition {manifest.partition_key!r} has {n} states that are NaN "
                    "or infinite, and its trainer has no way to leave them out: materialize the partition again, or "
                    "leave it out of the export"
                )


def require_plain(options: ExportOptions, format_name: str) -> None:
    """Raise RecipeError for options of formats with rows of other shapes."""
    if options.learned_only:
        raise RecipeError(
            f"{format_name}: its trainer reads whole documents and leaves out by the loss mask: learned_only is not "
            "for it"
        )


class StatesBeside:
    """States of a document beside each other in one tensor, a few rows at a time in the same memory."""

    def __init__(self, which: Sequence[HiddenState]) -> None:
        """`which`: in this order."""
        self._which = tuple(which)
        self._memory = np.empty(0, dtype=np.uint16)

    def tensor(self, states: StatesOfDocument) -> Tensor:
        """bfloat16 [N, m · H] of m states."""
        n, hidden_size = states.bits_NH[self._which[0]].shape
        return Tensor(
            dtype="bfloat16", shape=(n, len(self._which) * hidden_size), pieces=functools.partial(self._pieces, states)
        )

    def _pieces(self, states: StatesOfDocument) -> Iterator[npt.NDArray[np.uint16]]:
        """uint16 [rows, m · H]: the next piece, of whichever document, takes the memory of the last."""
        all_NH = [states.bits_NH[state] for state in self._which]
        n, hidden_size = all_NH[0].shape
        width = len(all_NH) * hidden_size
        rows = max(_PIECE_BYTES // max(2 * width, 1), 1)
        looked_at = 0
        for first in range(0, n, rows):
            of_piece = [bits_NH[first : first + rows] for bits_NH in all_NH]
            piece = self._beside(of_piece, width)
            yield piece
            looked_at += piece.nbytes
            if looked_at >= _LET_GO_BYTES:
                states.let_go()
                looked_at = 0

    def _beside(self, of_piece: Sequence[npt.NDArray[np.uint16]], width: int) -> npt.NDArray[np.uint16]:
        if len(of_piece) == 1:
            return np.ascontiguousarray(of_piece[0])
        n = len(of_piece[0])
        if len(self._memory) < n * width:
            self._memory = np.empty(n * width, dtype=np.uint16)
        return np.concatenate(of_piece, axis=1, out=self._memory[: n * width].reshape(n, width))


def int64(values: npt.NDArray[Any]) -> Tensor:
    """int64 of the same shape."""
    return tensor_of(values.astype(np.int64))


def save(path: Path, content: Mapping[Any, Any]) -> str:
    """Write as `torch.save` does; returns the file's hash. Equal contents give equal bytes, whatever its name."""
    with FilesAside() as files:
        save_aside(files, path, content)
    return files.sha256[path]


def save_aside(files: FilesAside, path: Path, content: Mapping[Any, Any]) -> None:
    """`save` one of several files; what `content` looks at may change afterwards."""
    prepare_folder(path.parent)
    with files.file(path) as file:
        write_torch_file(file, content)


def share_of_states(which: Sequence[HiddenState], source: Source) -> float:
    """Of the bytes of the hidden-state cache, about."""
    return len(which) / max(len(source.states), 1)
