"""The codec `compact` of top-k caches: a table with its columns, and back.

What the bytes are: `topk_compact`. The columns: `topk_schema`. The two ways: `topk_encoding` and `topk_decoding`. Used
by `codec`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kd_assets.store import schema as schemas
from kd_assets.store.codecs.coded import Coded
from kd_assets.store.codecs.topk_decoding import StoredRows
from kd_assets.store.codecs.topk_encoding import PlainRows
from kd_assets.store.codecs.topk_schema import (
    COMPACT,
    COMPACT_2,
    KEPT,
    LOGSUMEXP_COLUMN,
    TAIL,
    coded_draws_of,
    compact_topk_schema,
    draws_of,
    made_of,
    number_of,
    top_p_of,
)


class CompactTopk:
    """`codec.Codec` of top-k caches."""

    def __init__(self, form: str = COMPACT) -> None:
        """`form`: as the schema of a part names it."""
        self._form = form

    def plain_schema(self, stored: pa.Schema) -> pa.Schema:
        names = stored.names
        draws = draws_of(stored)
        of = {
            "is_cut": "outside_mass" in names,
            "positions": "positions" in names,
            "logsumexp": LOGSUMEXP_COLUMN in names,
        }
        k, top_p = number_of(stored, TAIL, "k"), top_p_of(stored) if self._form == COMPACT_2 else None
        expected = compact_topk_schema(k, draws, coded_draws=self._form == COMPACT_2, top_p=top_p, **of)
        if names != expected.names:
            raise ValueError(f"its columns are {', '.join(names)}, expected {', '.join(expected.names)}")
        return schemas.topk_schema(k, draws, top_p=top_p, **of)

    def stored_names(self, stored: pa.Schema, names: Sequence[str]) -> list[str]:
        of_file = made_of(number_of(stored, TAIL, "k"), coded_draws_of(stored), ragged=KEPT in stored.names)
        if not of_file.keys() & set(names):
            return list(names)
        counts = ["n_tokens", *(["positions"] if "positions" in stored.names else [])]
        return list(dict.fromkeys([*counts, *(column for name in names for column in of_file.get(name, (name,)))]))

    def decode(self, stored: pa.Table, wanted: pa.Schema, *, vocabulary: int | None) -> pa.Table:
        rows = StoredRows(stored, vocabulary)
        columns = [rows.column(name) if name in rows.decoded else stored[name] for name in wanted.names]
        return pa.Table.from_arrays(columns, schema=wanted)

    def encode(self, plain: pa.Table) -> Coded:
        """The error: `max_codec_kl`, the largest of a position, and `max_codec_mean_kl`, the mean of the part, at
        temperature 1, over the kept tokens and all others as one."""
        rows = PlainRows(plain)
        coded, coded_Mk, kl_M = rows.coded()
        return Coded(
            stored=rows.stored(coded),
            decoded=rows.decoded(coded_Mk),
            error={
                "max_codec_kl": float(kl_M.max(initial=0.0)),
                "max_codec_mean_kl": float(kl_M.mean()) if len(kl_M) else 0.0,
            },
        )


def with_coded_draws(stored: pa.Table, plain: pa.Table) -> pa.Table:
    """A part as it was made before draws were coded, in the form of now: its own planes, and those of its draws.

    `plain`: the same rows as readers get them. Raises CodecRangeError.
    """
    return PlainRows(plain).with_coded_draws(stored)


def divergence_on_disk(stored: pa.Table, plain: pa.Table) -> npt.NDArray[np.float64]:
    """float64 [M]: of each position, the KL of what the file decodes to from the numbers that were encoded, over the
    kept tokens and all others as one. Raises CodeError."""
    coded_Mk, tails_M = StoredRows(stored, None).logprobs
    return PlainRows(plain).divergence(coded_Mk, tails_M)
