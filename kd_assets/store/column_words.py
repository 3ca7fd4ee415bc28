"""The columns of an asset in words: types, shapes and units, for people who have not read FORMAT.md.

Names come from `schema`; what a column means beyond its shape is what its own metadata says.
"""

from __future__ import annotations

import pyarrow as pa

from kd_assets.store.schema import hidden_state_of

SIZE_NOT_KNOWN = 0
"""In the place of a hidden size, where the teacher's files are not at hand."""

SHAPES = {
    "document_id": "the document's name, different from all others of the shard",
    "n_tokens": "L: tokens of the document that this asset keeps",
    "input_ids": "[L] token ids",
    "loss_mask": "[L] true for tokens that a student learns to predict",
    "source": "the recipe's name of the source that the document is from",
    "source_record": "number of its record in the source, from 0",
    "topk_ids": "[P, k] token ids, the most likely first",
    "topk_logprobs": "[P, k] log-probabilities of these ids, in nats, at temperature 1",
    "logsumexp": "[P] logarithm of the sum of the exponentials of all logits, in nats",
    "target_logprob": "[P] log-probability of the document's own next token, in nats",
    "sampled_ids": "[P, different ids that were drawn] token ids, ascending",
    "sampled_counts": "[P, different ids that were drawn] how often each was drawn",
    "outside_mass": "[P] probability of the ids that the student lacks, 0 to 1",
    "positions": "[P] positions of the document that are kept, from 0",
    "mean_embedding": "[H] mean of the final hidden states over the document's tokens",
    "last_token_embedding": "[H] final hidden state of the document's last token",
}
"""L: tokens; P: positions, of which all are L - 1; H: the teacher's hidden size; k: the recipe's."""

_NAMES = {"halffloat": "float16", "float": "float32", "double": "float64"}


def type_in_words(field: pa.Field) -> str:
    """`list<uint32[16]>`: a list, one element a position, of 16 numbers each; a bfloat16 is called what it is."""
    stored = (field.metadata or {}).get(b"dtype", b"").decode(errors="replace")

    def words(kind: pa.DataType) -> str:
        if pa.types.is_fixed_size_list(kind):
            size = "hidden_size" if kind.list_size == SIZE_NOT_KNOWN else kind.list_size
            return f"{words(kind.value_type)}[{size}]"
        if pa.types.is_list(kind):
            return f"list<{words(kind.value_type)}>"
        return stored or _NAMES.get(str(kind), str(kind))

    return words(field.type)


def column_in_words(field: pa.Field) -> str:
    """Shape and unit of a column, and the convention that it follows."""
    state = hidden_state_of(field.name)
    shape = SHAPES.get(field.name) if state is None else "[L, H], or [P, H] of the positions that are kept"
    convention = (field.metadata or {}).get(b"convention", b"").decode(errors="replace")
    return ": ".join(part for part in (shape, convention) if part)
