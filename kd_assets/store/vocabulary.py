"""The student's vocabulary that a top-k cache is cut to: as its parameters have it, and in the file beside the result.

A vocabulary of the ids 0 to N - 1 is its number. Any other set is named by its hash, and lies beside the parts: a set
with many holes is too long for every manifest and identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_assets.contract import TokenIds, decode, parse_json
from kd_assets.durable import read_if_there
from kd_assets.errors import ContractError, MissingInputError, StoreError
from kd_assets.store.manifest import Manifest

VOCABULARY_NAME = "vocabulary.json"


def vocabulary_of(manifest: Manifest, folder: Path) -> TokenIds | None:
    """The ids that the result in `folder` is cut to; None: it is not.

    Raises MissingInputError where their file is not beside it, or not the one that the identity names, and StoreError
    for parameters that this version does not know.
    """
    said = manifest.params.get("vocabulary")
    if said is None:
        return None
    if isinstance(said, int) and said > 0:
        return TokenIds.below(said)
    if not isinstance(said, dict) or set(said) != {"n_ids", "sha256"}:
        raise StoreError(f"{folder} has the vocabulary {said!r:.80}, which this version of kd_assets does not know")
    data = read_if_there(folder / VOCABULARY_NAME)
    try:
        found = None if data is None else decode(TokenIds, {"runs": parse_json(data)}, where=VOCABULARY_NAME)
    except (ValueError, ContractError):
        found = None
    if found is None or found.sha256 != said["sha256"]:
        raise MissingInputError(
            f"{folder / VOCABULARY_NAME} {'is not there' if data is None else 'is not what was committed'}: it names "
            "the token ids that the cache is cut to; copy it from the store, or materialize the partition again"
        )
    return found


def mean_outside_mass(stats: Mapping[str, float]) -> float | None:
    """The mean of `outside_mass` over the positions of a cut cache, by its statistics; None where there is none."""
    if "max_outside_mass" not in stats:
        return None
    return stats["n_expected_outside"] / stats["n_positions"]


def is_among(token_ids: TokenIds, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """bool, in the shape of `ids` (integers): which are in the set."""
    if (size := token_ids.size_if_whole) is not None:
        return np.asarray(ids < size)
    firsts, ends = np.array(token_ids.runs, dtype=np.int64).T
    at = np.searchsorted(firsts, ids.astype(np.int64), side="right") - 1
    return np.asarray((at >= 0) & (ids < ends[at]))
