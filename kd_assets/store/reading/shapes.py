"""Whether a part has its asset's columns, and their lists are as long as FORMAT.md says: one element for each token, or
for each kept position.

Asked of every part and every group of rows that is read, as what is not so would stand beside the wrong token, or end a
training with an error that names nothing. Behind a right hash it is a bug of the task that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from kd_assets.errors import CorruptPartError
from kd_assets.store.codecs.codec import stored_codec_name
from kd_assets.store.manifest import Manifest
from kd_assets.store.reading.columns import Column, Ragged
from kd_assets.store.recorded_checks import codec_name
from kd_assets.store.schema import COMMON_COLUMNS, hidden_field
from kd_assets.store.writing.documents import Int64Array

_OF_ASSETS = {
    "topk_cache": ("topk_ids", "topk_logprobs", "target_logprob"),
    "embedding_cache": ("mean_embedding", "last_token_embedding"),
}
_REMEDY = "it was written so: move the result away and materialize the partition again"
_OF_DOCUMENTS = ("document_id", "n_tokens", "input_ids", "loss_mask", "positions")


def require_shapes(path: Path, columns: Mapping[str, Column], *, has_next: bool, k: object = None) -> None:
    """Raise CorruptPartError, which names the file, unless the lists of these columns are as long as they must be.

    `has_next`: of a cache whose last token has no element, as nothing follows it. `k`: the most tokens that a position
    keeps, of a cache whose positions keep different numbers of them.
    """
    difference = tokens_difference(columns) or lists_difference(columns, has_next=has_next)
    if difference := difference or kept_difference(columns, k):
        raise CorruptPartError(f"{path}: {difference}; {_REMEDY}")


def require_columns(path: Path, stored: pa.Schema, names: Sequence[str], manifest: Manifest) -> None:
    """Raise CorruptPartError, which names the file, for a part of another codec than its manifest says, and for one
    whose readers' columns, `names`, have one twice, or lack one that every part of the asset has."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise CorruptPartError(f"{path} has the column {twice[0]} twice; {_REMEDY}")
    if (found := stored_codec_name(stored)) != (expected := codec_name(manifest)):
        raise CorruptPartError(f"{path} is of codec {found!r:.80}, its manifest says {expected}; {_REMEDY}")
    if "top_p" in manifest.params and "topk_ids" in stored.names:  # readers make rows of as many as this says
        said = (stored.field(stored.names.index("topk_ids")).metadata or {}).get(b"k", b"").decode(errors="replace")
        if said != str(manifest.params.get("k")):
            raise CorruptPartError(f"{path} has {said!r:.80} as k, its manifest {manifest.params.get('k')}; {_REMEDY}")
    states = [] if manifest.asset != "hidden_state_cache" else [*_states_of(manifest)]
    for name in (*COMMON_COLUMNS, *_OF_ASSETS.get(manifest.asset, ()), *states):
        if name not in names:
            raise CorruptPartError(f"{path} has no column {name}; {_REMEDY}")


def _states_of(manifest: Manifest) -> Iterator[str]:
    for name in ("blocks", "final"):
        said = manifest.params.get(name, ())
        yield from (hidden_field(state) for state in (said if isinstance(said, (list, tuple)) else ()))


def tokens_difference(columns: Mapping[str, Column]) -> str | None:
    """What is wrong with the lists over tokens, in words; None when all is well."""
    n_tokens_D = _n_tokens(columns)
    if n_tokens_D is None:
        return None
    for name in ("input_ids", "loss_mask"):
        if name in columns and not _has_lengths(columns[name], n_tokens_D):
            return f"n_tokens differs from the length of {name}"
    return "a document has no tokens" if (n_tokens_D < 1).any() else None


def lists_difference(columns: Mapping[str, Column], *, has_next: bool) -> str | None:
    """What is wrong with the lists over positions, in words; None when all is well, or nothing says how many there
    are."""
    n_tokens_D = _n_tokens(columns)
    if n_tokens_D is None:
        return None
    n_elements_D = n_tokens_D - int(has_next)
    if "positions" in columns:
        kept, lengths_D = columns["positions"], columns["positions"].lengths
        if lengths_D is None or not isinstance(kept.values, np.ndarray) or kept.values.dtype.kind not in "iu":
            return "positions of a document are no list of whole numbers"
        if (np.asarray(kept.values) >= np.repeat(n_elements_D, lengths_D)).any():
            return "a position is beyond the end of its document"
        n_elements_D = lengths_D.astype(np.int64)
    for name, column in columns.items():
        if name not in _OF_DOCUMENTS and column.offsets is not None and not _has_lengths(column, n_elements_D):
            return f"{name} of a document has not one element for each of its positions"
    return None


def kept_difference(columns: Mapping[str, Column], k: object) -> str | None:
    """What is wrong with how many tokens positions keep, in words; None when all is well, or all keep k."""
    lists = {name: columns[name].values for name in ("topk_ids", "topk_logprobs") if name in columns}
    offsets = [of.offsets for of in lists.values() if isinstance(of, Ragged)]
    for name, of in lists.items():
        if isinstance(of, Ragged) and len(of):
            fewest, most = of.lengths.min(), of.lengths.max()
            if not 1 <= fewest <= most <= (k if isinstance(k, int) else 0):
                return f"{name} of a position has {fewest} to {most} elements, and it must be 1 to {k}"
    if len(offsets) == 2 and not np.array_equal(offsets[0], offsets[1]):
        return "topk_ids and topk_logprobs have lists of different lengths"
    return None


def _has_lengths(column: Column, lengths_D: Int64Array) -> bool:
    """Whether the lists of a column have these lengths, and their elements are there."""
    offsets = column.offsets
    return (
        offsets is not None
        and np.array_equal(np.diff(offsets), lengths_D)
        and len(column.values) == (int(offsets[-1]) if len(offsets) else 0)
    )


def _n_tokens(columns: Mapping[str, Column]) -> Int64Array | None:
    """int64 [D]: of each document, by its number or else by its ids; None where neither was read."""
    if "n_tokens" in columns:
        return np.asarray(columns["n_tokens"].values).astype(np.int64)
    lengths_D = columns["input_ids"].lengths if "input_ids" in columns else None
    return None if lengths_D is None else lengths_D.astype(np.int64)
