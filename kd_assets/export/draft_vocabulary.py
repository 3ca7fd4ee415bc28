"""A draft head's vocabulary: the most frequent tokens of a recipe's shards, and the two maps that EAGLE-3's tools read.

Frequencies are those of learned tokens (those where the loss mask is set), as SpecForge and speculators count them. The
maps are theirs, too: `d2t[i]` is what is added to a draft id i to get the target's id, `t2d[v]` whether the target's id
v is in the draft vocabulary. Ties go to the lower id; where fewer different tokens were seen than the vocabulary has
places, the lowest ids that were not seen fill it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kd_assets.errors import RecipeError
from kd_assets.export.documents import Int64Array
from kd_assets.export.format import Source
from kd_assets.store import read_shard


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DraftVocabulary:
    """D draft ids for V ids of the target."""

    d2t_D: Int64Array
    """Target id minus draft id, in ascending order of target ids."""
    t2d_V: npt.NDArray[np.bool_]

    @property
    def target_ids_D(self) -> Int64Array:
        return self.d2t_D + np.arange(len(self.d2t_D))


def count_tokens(
    shard_folders: Sequence[Path], vocabulary_size: int, *, learned_only: bool = True, max_length: int | None = None
) -> Int64Array:
    """int64 [V]: how often each id stands in these shards, one held at a time.

    `learned_only`: where the loss mask is set. `max_length`: in the first tokens of each document. Raises RecipeError
    for an id that the vocabulary does not have, and as `read_shard` does.
    """
    counts_V = np.zeros(vocabulary_size, dtype=np.int64)
    for folder in shard_folders:
        shard = read_shard(folder)
        documents = shard.slice(0, len(shard.document_ids), max_length)
        ids_N = documents.input_ids[documents.loss_mask] if learned_only else documents.input_ids
        if len(ids_N) and int(ids_N.max()) >= vocabulary_size:
            raise RecipeError(
                f"{folder} has token id {int(ids_N.max())}, and the teacher's vocabulary {vocabulary_size} ids: the "
                "shards are of another tokenizer"
            )
        counts_V += np.bincount(ids_N, minlength=vocabulary_size)
    return counts_V


def require_can_count(source: Source, size: int, format_name: str) -> None:
    """Raise RecipeError where a vocabulary of this size cannot be counted for the teacher of these caches."""
    if source.vocabulary_size is None:
        raise RecipeError(
            f"{format_name}: how many ids the vocabulary of the teacher of recipe {source.recipe} has is not known "
            "here, so that draft_vocabulary cannot be counted: export where the teacher's folder is"
        )
    if size > source.vocabulary_size:
        raise RecipeError(
            f"{format_name}: a draft vocabulary of {size} tokens was asked for, and the teacher's has "
            f"{source.vocabulary_size}"
        )


def count_source(source: Source, *, max_length: int | None) -> Int64Array:
    """int64 [V]: how often each id is learned in the shards of this source. Raises as `count_tokens` does."""
    assert source.vocabulary_size is not None, "require_can_count has refused that"
    return count_tokens(source.folders["shards_manifest"], source.vocabulary_size, max_length=max_length)


def draft_vocabulary(counts_V: Int64Array, size: int) -> DraftVocabulary:
    """The `size` most frequent ids. Raises RecipeError for more than there are."""
    if not 1 <= size <= len(counts_V):
        raise RecipeError(
            f"a draft vocabulary of {size} tokens was asked for, and the teacher's has {len(counts_V)}: choose 1 to "
            f"{len(counts_V)}"
        )
    by_frequency = np.lexsort((np.arange(len(counts_V)), -counts_V))
    target_ids_D = np.sort(by_frequency[:size])
    t2d_V = np.zeros(len(counts_V), dtype=np.bool_)
    t2d_V[target_ids_D] = True
    return DraftVocabulary(d2t_D=target_ids_D - np.arange(size), t2d_V=t2d_V)
