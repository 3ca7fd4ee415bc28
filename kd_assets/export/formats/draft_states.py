"""What the formats of draft-head trainers (SpecForge, ModelOpt) share: which blocks they take, what they cannot have,
and tensors of states in files of `torch.save`.

A teacher of n blocks has its auxiliary states at the outputs of blocks 1, n // 2 − 1 and n − 4, counted from 0, unless
the draft's configuration names others. That is the default of SpecForge 0.2.0 and of ModelOpt 0.47.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from kd_assets.contract import FinalState
from kd_assets.durable import prepare_folder
from kd_assets.errors import FailedCheckError, RecipeError
from kd_assets.export.aside import FilesAside
from kd_assets.export.documents import StatesOfDocument
from kd_assets.export.format import ExportOptions, Source
from kd_assets.store.schema import HiddenState

_ROWS_BYTES = 8 << 20
"""Of a state that are looked at before their memory is given back."""


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
    """States of a document beside each other in one tensor, document after document in the same memory."""

    def __init__(self, which: Sequence[HiddenState]) -> None:
        """`which`: in this order. Imports torch, so that it is there before the first document is."""
        import torch

        self._torch, self._which = torch, tuple(which)
        self._memory = np.empty(0, dtype=np.uint16)

    def tensor(self, states: StatesOfDocument) -> Any:
        """torch.bfloat16 [N, m · H] of m states. The next call takes its memory."""
        n, hidden_size = states.bits_NH[self._which[0]].shape
        width = len(self._which) * hidden_size
        if len(self._memory) < n * width:
            self._memory = np.empty(n * width, dtype=np.uint16)
        beside = self._memory[: n * width].reshape(n, width)
        rows = max(_ROWS_BYTES // (2 * max(hidden_size, 1)), 1)
        for at, state in enumerate(self._which):
            bits_NH, columns = states.bits_NH[state], slice(at * hidden_size, (at + 1) * hidden_size)
            for first in range(0, n, rows):
                beside[first : first + rows, columns] = bits_NH[first : first + rows]
                if n > rows:
                    states.let_go()
        return self._torch.from_numpy(beside.view(np.int16)).view(self._torch.bfloat16)


def int64(values: npt.NDArray[Any]) -> Any:
    """torch.int64 of the same shape."""
    import torch

    return torch.from_numpy(values.astype(np.int64))


def save(path: Path, content: Mapping[Any, Any]) -> str:
    """Write as `torch.save` does; returns the file's hash. Equal contents give equal bytes, whatever its name."""
    with FilesAside() as files:
        save_aside(files, path, content)
    return files.sha256[path]


def save_aside(files: FilesAside, path: Path, content: Mapping[str, Any]) -> None:
    """`save` one of several files; what `content` looks at may change afterwards."""
    import torch

    prepare_folder(path.parent)
    with files.file(path) as file:
        torch.save(dict(content), cast(IO[bytes], file))  # it only writes


def share_of_states(which: Sequence[HiddenState], source: Source) -> float:
    """Of the bytes of the hidden-state cache, about."""
    return len(which) / max(len(source.states), 1)
