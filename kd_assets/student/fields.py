"""The fields of a sample: which are over tokens, over predictions or over the kept positions, and how they are cut."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from kd_assets.store.schema import FINAL_CONVENTIONS, hidden_field, hidden_state_of

KEY_FIELDS = ("partition_key", "document_id")
TOKEN_FIELDS = ("input_ids", "loss_mask")
POSITIONS_FIELDS = {"topk_cache": "topk_positions", "hidden_state_cache": "hidden_positions"}
"""Cache → the field of its kept positions, in the place of its column `positions`."""

_OVER_PREDICTIONS = (
    "topk_ids",
    "topk_logprobs",
    "logsumexp",
    "target_logprob",
    "outside_mass",
    "sampled_ids",
    "sampled_counts",
    "topk_positions",
)


def hidden_fields(fields: Iterable[str]) -> list[str]:
    """The names of hidden-state fields among `fields`: those of blocks in their order, then those of the decoder's
    end."""
    states = {state for f in fields if (state := hidden_state_of(f)) is not None}
    blocks = sorted(state for state in states if isinstance(state, int))
    return [hidden_field(state) for state in (*blocks, *(name for name in FINAL_CONVENTIONS if name in states))]


def is_over_predictions(name: str) -> bool:
    return name in _OVER_PREDICTIONS


def is_over_tokens(name: str) -> bool:
    """Whether a field has a row for each token, prediction or kept position."""
    return name in TOKEN_FIELDS or is_over_predictions(name) or positions_field(name) == "hidden_positions"


@functools.cache
def positions_field(name: str) -> str:
    """The field that says which positions the rows of a field are of, where they are not all; else a name of none."""
    if name == "hidden_positions" or hidden_state_of(name) is not None:
        return "hidden_positions"
    return "topk_positions" if is_over_predictions(name) else ""


def padded_length(name: str, n_tokens: int) -> int:
    """Rows of a field over a document of `n_tokens`: the last token predicts nothing."""
    return n_tokens - 1 if is_over_predictions(name) else n_tokens


def kept_rows(document: Mapping[str, Any], name: str, max_length: int) -> int:
    """Rows of a field over the first `max_length` tokens of its document."""
    n_positions, positions = padded_length(name, max_length), document.get(positions_field(name))
    return n_positions if positions is None else int((positions < n_positions).sum())


def cut(document: dict[str, Any], max_length: int) -> dict[str, Any]:
    """The document's first `max_length` tokens with the rows that are about them."""
    return {
        name: value[: kept_rows(document, name, max_length)] if is_over_tokens(name) else value
        for name, value in document.items()
    }
