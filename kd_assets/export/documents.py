"""A document with all that a recipe's caches say of it, as every export takes it: numpy only, nothing shifted.

Names: L = tokens of the document, M = its kept predictions (position i predicts token i + 1), N = its kept states,
H = hidden size, k as in top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kd_assets.store.reading.columns import Ragged
from kd_assets.store.schema import HiddenState

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TopkOfDocument:
    """Predictions of one document: natural log at temperature 1; row j is of position `positions_M[j]`."""

    positions_M: Int64Array
    """Ascending; 0 to L - 2 of a cache that keeps all positions."""
    ids_Mk: npt.NDArray[np.uint32]
    """Most probable first."""
    logprobs_Mk: npt.NDArray[np.float16]
    logsumexp_M: Float32Array | None
    """None: of a cache that leaves it out."""
    target_logprob_M: Float32Array
    """Of the token that is really at `positions_M + 1`."""
    sampled_ids: Ragged | None = None
    """M lists, of a cache with random draws."""
    sampled_counts: Ragged | None = None
    outside_mass_M: Float32Array | None = None
    """Of a cache that is cut to a student's vocabulary: the teacher's probability of all other ids."""
    keeps_all: bool = True
    """Whether the cache keeps all positions of every document."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StatesOfDocument:
    """Hidden states of one document: the bits of bfloat16."""

    positions_N: Int64Array
    """Ascending; 0 to L - 1 of a cache that keeps all positions."""
    bits_NH: Mapping[HiddenState, npt.NDArray[np.uint16]] = field(default_factory=dict)
    """By state: uint16 [N, H]."""
    keeps_all: bool = True
    """Whether the cache keeps all positions of every document."""
    let_go: Callable[[], None] = lambda: None
    """Gives back the memory of what was looked at, for a format that is done with one of several states. The arrays
    stay valid, and are read from the file again."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class JoinedDocument:
    """One document, cut to the tokens that all of the caches in it have."""

    number: int
    """0-based among all documents of the export."""
    partition_key: str
    document_id: str
    input_ids_L: npt.NDArray[np.uint32]
    loss_mask_L: npt.NDArray[np.bool_]
    """Unshifted: which tokens a student learns to predict."""
    topk: TopkOfDocument | None = None
    states: StatesOfDocument | None = None
    mean_embedding_H: Float32Array | None = None
    last_token_embedding_H: Float32Array | None = None
    embedded_tokens: int | None = None
    """How many tokens the embeddings are of: all that their cache has, also where the document is cut."""
