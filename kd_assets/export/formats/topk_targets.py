"""What the formats of top-k trainers (axolotl, DistillKit) share: labels, and what they cannot have."""

from __future__ import annotations

import numpy as np

from kd_assets.errors import RecipeError
from kd_assets.export.documents import Int64Array, JoinedDocument
from kd_assets.export.format import ExportOptions

IGNORED = -100
"""A label that losses leave out (torch's `ignore_index`)."""


def labels_of(document: JoinedDocument) -> Int64Array:
    """int64 [L], not shifted: the ids of learned tokens, IGNORED elsewhere.

    A document's first token is never learned, whatever the mask says: where a trainer puts documents one after the
    other, the last row of the document before would be taught to predict it.
    """
    learned_L = document.loss_mask_L.copy()
    learned_L[:1] = False
    return np.where(learned_L, document.input_ids_L.astype(np.int64), IGNORED)


def require_topk_alone(options: ExportOptions, format_name: str) -> None:
    """Raise RecipeError for options of other caches, and of formats with rows of other shapes."""
    if options.states or options.assets not in (None, ("topk_cache",)):
        raise RecipeError(f"{format_name}: it has the top-k log-probabilities alone: leave states and other caches out")
    if options.draft_vocabulary is not None:
        raise RecipeError(f"{format_name}: it trains no draft head: draft_vocabulary is not for it")
    if options.learned_only:
        raise RecipeError(
            f"{format_name}: its trainer reads whole documents and leaves out by labels: learned_only is not for it"
        )
