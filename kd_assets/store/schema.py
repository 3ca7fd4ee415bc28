"""The columns of every asset's part files: one Arrow schema an asset, with its conventions in the metadata.

Encoders build exactly these, `check_schema` compares with exactly these. Every column and element is non-null. Numbers
without an Arrow type of their own (bfloat16) are stored as their bits, and the field says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from kd_assets.contract import FinalState
from kd_assets.store.fingerprint import FORMAT_VERSION

BLOCK_CONVENTION = (
    "output of decoder block <block>, counted from 0: transformers' hidden_states[<block> + 1] before any final norm"
)
_POSITION_CONVENTION = "row i is predicted from tokens 0..i and concerns token i+1; a document of L tokens has L-1 rows"
_TOPK_CONVENTION = (
    f"one row a document; {_POSITION_CONVENTION}; log-probabilities are natural logarithms at temperature 1 "
    "against <all>, computed in float32; logsumexp is that of <their> float32 logits"
)
CONVENTIONS = {
    "shards_manifest": "one row a document; loss_mask marks the tokens a student learns to predict",
    "topk_cache": _TOPK_CONVENTION.replace("<all>", "the full vocabulary").replace("<their>", "the"),
    "hidden_state_cache": f"one row a document, one vector a token; {BLOCK_CONVENTION}",
    "embedding_cache": (
        "one row a document; mean_embedding is the mean over the document's tokens of the final hidden states (after "
        "the final norm), last_token_embedding the one of its last token; accumulated in float32"
    ),
}
"""What the numbers of each asset mean: the schema's metadata `kd_assets.convention`."""

CUT_TOPK_CONVENTION = _TOPK_CONVENTION.replace("<all>", "the ids of a student's vocabulary").replace("<their>", "their")
"""Of a top-k cache that is cut to such a vocabulary, in the place of the one above."""

OUTSIDE_CONVENTION = (
    "the probability, at temperature 1 and over all ids of the teacher, of those that the student's vocabulary lacks; "
    "every other column is of the distribution without them"
)

_DRAWS_CONVENTION = (
    "token ids drawn at random, with replacement, from <the distribution> at temperature 1: sampled_ids are the "
    "different ones in ascending order, sampled_counts how often each was drawn; they add up to draws"
)
DRAWS_CONVENTION = _DRAWS_CONVENTION.replace("<the distribution>", "the whole distribution")
CUT_DRAWS_CONVENTION = _DRAWS_CONVENTION.replace(
    "<the distribution>", "the distribution over the ids of a student's vocabulary"
)

RAGGED_CONVENTION = (
    "of each position the fewest most likely tokens whose probabilities add up to top_p, at least 1 and at most k; "
    "what they leave of 1 is the mass of all others"
)

POSITIONS_CONVENTION = (
    "which positions of the document are kept, ascending: element j of every list over positions is that of position "
    "positions[j]"
)

FINAL_CONVENTIONS: dict[FinalState, str] = {
    "before_norm": "what goes into the decoder's final norm: the last block's output",
    "after_norm": "what comes out of the decoder's final norm and goes into the head",
}

COMMON_COLUMNS = ("document_id", "n_tokens", "input_ids", "loss_mask")
"""Those that every part file starts with."""

HIDDEN_PREFIX = "hidden_"
"""Every column of token-wise states starts with it."""

_BLOCK_PREFIX = "hidden_block_"

HiddenState = int | FinalState
"""A state that a hidden-state cache keeps of every token: of decoder block n, or one at the decoder's end."""


def element(value_type: pa.DataType) -> pa.Field:
    # Parquet's own name for a list's element, so that a schema read back equals the one written.
    return pa.field("element", value_type, nullable=False)


def list_of(value_type: pa.DataType) -> pa.DataType:
    return pa.list_(element(value_type))


def vector_of(value_type: pa.DataType, size: int) -> pa.DataType:
    return pa.list_(element(value_type), size)


def hidden_field(state: HiddenState) -> str:
    """The name of the column that holds a state: `hidden_block_<n>`, or `hidden_final_<before_norm | after_norm>`."""
    return f"{_BLOCK_PREFIX}{state}" if isinstance(state, int) else f"hidden_final_{state}"


def hidden_state_of(field_name: str) -> HiddenState | None:
    """The state that the column of this name holds; None where it holds none."""
    number = field_name.removeprefix(_BLOCK_PREFIX)
    if number != field_name and number.isdecimal():
        return int(number)
    return next((final for final in FINAL_CONVENTIONS if hidden_field(final) == field_name), None)


def shard_schema() -> pa.Schema:
    return table_schema("shards_manifest", [column("source", pa.string()), column("source_record", pa.int64())])


def topk_schema(
    k: int,
    draws: int = 0,
    *,
    is_cut: bool = False,
    positions: bool = False,
    logsumexp: bool = True,
    top_p: float | None = None,
) -> pa.Schema:
    """`draws` of a position, of random-sampling KD: two more columns where there are any. `is_cut`: of a cache that is
    cut to a student's vocabulary; `positions`: of one that keeps some of the positions: one more column each. Without
    `logsumexp` that is left out. `top_p`: of one whose positions keep as many tokens as have this mass, up to k."""
    if top_p is None:
        topk = [list_of(vector_of(pa.uint32(), k)), list_of(vector_of(pa.float16(), k))]
        of_topk = {}
    else:
        topk = [list_of(list_of(pa.uint32())), list_of(list_of(pa.float16()))]
        of_topk = {"k": str(k), "top_p": repr(top_p), "convention": RAGGED_CONVENTION}
    columns = [
        column("topk_ids", topk[0], **of_topk),
        column("topk_logprobs", topk[1], **of_topk),
        *([column("logsumexp", list_of(pa.float32()))] if logsumexp else []),
        column("target_logprob", list_of(pa.float32())),
    ]
    if draws:
        said = {"draws": str(draws), "convention": CUT_DRAWS_CONVENTION if is_cut else DRAWS_CONVENTION}
        columns += [
            column("sampled_ids", list_of(list_of(pa.uint32())), **said),
            column("sampled_counts", list_of(list_of(pa.uint16())), **said),
        ]
    if is_cut:
        columns.append(column("outside_mass", list_of(pa.float32()), convention=OUTSIDE_CONVENTION))
    return table_schema("topk_cache", [*columns, *([positions_column()] if positions else [])], topk_convention(is_cut))


def k_of(topk: pa.Schema) -> int:
    """k of a top-k cache by the columns that a reader gets, where they have top-k ids. Raises ValueError where they do
    not say it."""
    field = topk.field("topk_ids")
    if pa.types.is_fixed_size_list(field.type.value_type):
        return int(field.type.value_type.list_size)
    return int((field.metadata or {}).get(b"k", b"").decode(errors="backslashreplace"))


def is_ragged(topk: pa.Schema) -> bool:
    """Whether positions of this top-k cache keep different numbers of tokens."""
    return "topk_ids" in topk.names and pa.types.is_list(topk.field("topk_ids").type.value_type)


def top_p_of(topk: pa.Schema) -> float | None:
    """Of a cache whose positions keep as many tokens as have this mass. Raises ValueError where it does not say it."""
    if not is_ragged(topk):
        return None
    return float((topk.field("topk_ids").metadata or {}).get(b"top_p", b"").decode(errors="backslashreplace"))


def topk_convention(is_cut: bool) -> str:
    """What the numbers of a top-k cache mean; `is_cut`: of one that is cut to a student's vocabulary."""
    return CUT_TOPK_CONVENTION if is_cut else CONVENTIONS["topk_cache"]


def hidden_state_schema(
    blocks: Sequence[int], hidden_size: int, *, final: Sequence[FinalState] = (), positions: bool = False
) -> pa.Schema:
    """`final`: the states at the decoder's end besides; `positions`: of a cache that keeps some of the positions."""
    states = list_of(vector_of(pa.uint16(), hidden_size))
    columns = [
        column(
            hidden_field(block),
            states,
            dtype="bfloat16",
            block=str(block),
            convention=BLOCK_CONVENTION.replace("<block>", str(block)),
        )
        for block in sorted(blocks)
    ]
    columns += [
        column(hidden_field(name), states, dtype="bfloat16", final=name, convention=convention)
        for name, convention in FINAL_CONVENTIONS.items()
        if name in final
    ]
    return table_schema("hidden_state_cache", [*columns, *([positions_column()] if positions else [])])


def positions_column() -> pa.Field:
    return column("positions", list_of(pa.uint32()), convention=POSITIONS_CONVENTION)


def embedding_schema(hidden_size: int) -> pa.Schema:
    vector = vector_of(pa.float32(), hidden_size)
    return table_schema("embedding_cache", [column("mean_embedding", vector), column("last_token_embedding", vector)])


def hidden_size_of(schema: pa.Schema) -> int | None:
    """H as the first column of vectors has it; None where the schema has no such column."""
    for field in schema:
        if hidden_state_of(field.name) is not None and pa.types.is_list(field.type):
            inner = field.type.value_type
        elif field.name == "mean_embedding":
            inner = field.type
        else:
            continue
        if pa.types.is_fixed_size_list(inner):
            return int(inner.list_size)
    return None


def split_columns(schema: pa.Schema) -> list[str]:
    """Parquet paths of the columns to store with BYTE_STREAM_SPLIT: 4-byte floats, token ids and counts.

    Ids and counts are small numbers in 4 bytes (Parquet has no shorter integers): split into byte planes, most planes
    are zeros. Not float16: DuckDB reads no 2-byte BYTE_STREAM_SPLIT, and a cache that opens everywhere is worth 10 %.
    """
    return [path for path, leaf in _leaves(schema) if leaf in (pa.float32(), pa.uint32(), pa.uint16())]


def _leaves(schema: pa.Schema) -> Iterator[tuple[str, pa.DataType]]:
    for field in schema:
        path, leaf = str(field.name), field.type
        while pa.types.is_list(leaf) or pa.types.is_fixed_size_list(leaf):
            path, leaf = f"{path}.list.element", leaf.value_type
        yield path, leaf


def table_schema(asset: str, columns: list[pa.Field], convention: str | None = None) -> pa.Schema:
    common = [
        column("document_id", pa.string()),
        column("n_tokens", pa.int32()),
        column("input_ids", list_of(pa.uint32())),
        column("loss_mask", list_of(pa.bool_())),
    ]
    metadata = {
        "kd_assets.asset": asset,
        "kd_assets.format_version": str(FORMAT_VERSION),
        "kd_assets.convention": convention or CONVENTIONS[asset],
    }
    return pa.schema([*common, *columns], metadata=metadata)


def column(name: str, data_type: pa.DataType, **metadata: str) -> pa.Field:
    return pa.field(name, data_type, nullable=False, metadata=metadata or None)
