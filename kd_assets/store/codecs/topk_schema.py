"""The columns of a `compact` top-k part: their names, the schema of the file, and what its metadata say.

Names: k as in top-k; a column of codes or of draws has the slots of a band.
"""

from __future__ import annotations

import pyarrow as pa

from kd_assets.store import schema as schemas
from kd_assets.store.codecs import draws_columns, topk_compact

COMPACT = "compact"
COMPACT_2 = "compact_2"
"""Of the schema of parts whose random draws are coded, too, or whose positions keep different numbers of tokens.
Recipes and identities know `COMPACT` alone."""
SINCE = {COMPACT: "0.1.0", COMPACT_2: "0.2.0"}
"""The first version of kd_assets that reads each."""

_CONVENTION = "bytes by the codec compact of FORMAT.md, where a decoder stands"

IDS = tuple(f"topk_ids_byte_{n}" for n in range(topk_compact.N_ID_PLANES))
KEPT = "topk_kept"
TAIL = "topk_tail"
TARGET = "target_logprob_outside"
LOGSUMEXP_COLUMN = "logsumexp_float16"
_LARGEST_NUMBER = 1 << 24
"""Of what a column's metadata may say: there are no more token ids."""


def compact_topk_schema(
    k: int,
    draws: int = 0,
    *,
    is_cut: bool = False,
    positions: bool = False,
    logsumexp: bool = True,
    coded_draws: bool = True,
    top_p: float | None = None,
) -> pa.Schema:
    """The columns in the file; arguments as of `schema.topk_schema`. `coded_draws`: not of the parts that were made
    before draws were coded."""
    plain = schemas.topk_schema(k, draws, is_cut=is_cut, positions=positions, logsumexp=logsumexp, top_p=top_p)
    names = [*IDS, *code_names(k), TAIL, TARGET, *([LOGSUMEXP_COLUMN] if logsumexp else [])]
    coded = [schemas.column(name, pa.binary(), k=str(k)) for name in names]
    if top_p is not None:
        coded.insert(0, schemas.column(KEPT, pa.binary(), k=str(k), top_p=repr(top_p)))
    if draws and coded_draws:
        coded += draws_columns.fields(k, draws)
    form = COMPACT_2 if (draws and coded_draws) or top_p is not None else COMPACT
    as_they_are = [field for field in plain if field.name not in made_of(k, draws if coded_draws else 0)]
    n_common = len(schemas.COMMON_COLUMNS)
    metadata = {
        **plain.metadata,
        b"kd_assets.convention": f"{_CONVENTION}; {schemas.topk_convention(is_cut)}".encode(),
        b"kd_assets.codec": form.encode(),
        b"kd_assets.codec_since": SINCE[form].encode(),
    }
    return pa.schema([*as_they_are[:n_common], *coded, *as_they_are[n_common:]], metadata=metadata)


def number_of(schema: pa.Schema, name: str, key: str) -> int:
    """What a column's metadata say, a number above 0. Raises ValueError where they do not."""
    said = (schema.field(name).metadata or {}).get(key.encode(), b"").decode(errors="backslashreplace")
    if not said.isdecimal() or not 0 < int(said) <= _LARGEST_NUMBER:
        raise ValueError(f"the metadata of column {name} have {said!r:.40} as {key}")
    return int(said)


def draws_of(schema: pa.Schema) -> int:
    """Draws of a position, of the columns in the file or of those that a reader gets."""
    name = draws_columns.draws_field(schema)
    return 0 if name is None else number_of(schema, name, "draws")


def coded_draws_of(schema: pa.Schema) -> int:
    return draws_of(schema) if draws_columns.is_coded(schema) else 0


def top_p_of(stored: pa.Schema) -> float | None:
    """Of the columns in the file. Raises ValueError where they do not say it."""
    if KEPT not in stored.names:
        return None
    said = (stored.field(KEPT).metadata or {}).get(b"top_p", b"").decode(errors="backslashreplace")
    if not 0 < float(said) < 1:
        raise ValueError(f"the metadata of column {KEPT} have {said!r:.40} as top_p")
    return float(said)


def code_names(k: int) -> tuple[str, ...]:
    """Of the bands, by their slots: `topk_codes_4_15`."""
    return tuple(
        f"topk_codes_{first}" if stop == first + 1 else f"topk_codes_{first}_{stop - 1}"
        for first, stop in topk_compact.bands(k)
    )


def made_of(k: int, draws: int, *, ragged: bool = False) -> dict[str, tuple[str, ...]]:
    """Column that a reader gets → those of the file that it is made of, but for what counts positions. `draws` of a
    position, where they are coded."""
    kept = (KEPT,) if ragged else ()
    codes, ids = (*kept, *code_names(k), TAIL), (*kept, *IDS)
    of_draws = (*ids, *draws_columns.made_of(k, draws)) if draws else ()
    return {
        **(dict.fromkeys(draws_columns.NAMES, of_draws) if draws else {}),
        "topk_ids": ids,
        "topk_logprobs": codes,
        "logsumexp": (LOGSUMEXP_COLUMN,),
        # of a token among the k it is that of its slot, and which token it is stands in the document
        "target_logprob": (*ids, *codes, TARGET, "input_ids"),
    }
