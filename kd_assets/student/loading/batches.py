"""Batches straight from numpy documents: padded, one document a row, or packed, several in a row of one length.

Each value is copied once, into its place in the batch, and converted on the way. A padded batch is what
`kd_assets.student.collate` makes of the same samples. In a packed row position i still predicts token i + 1, and no
prediction crosses documents: the last token of each predicts nothing, the first one is not learned.

Legend: B rows, T tokens of a row, D documents of the batch; k, s, H as of `kd_assets.student.dataset`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kd_assets.errors import CorruptPartError
from kd_assets.store import Ragged
from kd_assets.store.schema import hidden_state_of
from kd_assets.student.dataset import at_topk_positions, padded_lists
from kd_assets.student.fields import (
    KEY_FIELDS,
    POSITIONS_FIELDS,
    hidden_fields,
    is_over_tokens,
    padded_length,
    positions_field,
)

Document = Mapping[str, Any]
"""As `TeacherCacheDataset.documents` gives it."""

_WHOLE_NUMBERS = ("input_ids", "topk_ids", "sampled_ids", "sampled_counts", *POSITIONS_FIELDS.values())


def padded_batch(documents: Sequence[Document]) -> dict[str, Any]:
    """What `collate` makes of these documents: fields over tokens padded on the right to the longest, with masks."""
    rows = [[document] for document in documents]
    batch: dict[str, Any] = {name: [document[name] for document in documents] for name in KEY_FIELDS}
    n_tokens = max(len(document["input_ids"]) for document in documents)
    batch |= _fields(rows, n_tokens)
    return batch | _masks(rows, batch, n_tokens)


def packed_batch(rows: Sequence[Sequence[Document]], length: int) -> dict[str, Any]:
    """Rows of documents, one after the other, filled up to `length` tokens.

    As a padded batch with B rows and T = `length`, but that `partition_key` and `document_id` are lists of lists, and
    the fields of whole documents (embeddings) are [D, …], row after row. Added: `position_ids` int64 [B, T], from 0 on
    in every document; `segment_ids` int64 [B, T], 1, 2, … and 0 on padding; `document_rows`, `document_starts` and
    `document_lengths` int64 [D]. Give the student `position_ids` and no `attention_mask`: transformers then keep
    documents apart. `loss_mask` is False on the first token of a document, which no token of its own predicts.
    """
    for of_row in rows:
        if (n_tokens := sum(len(document["input_ids"]) for document in of_row)) > length:
            first = of_row[0]
            raise CorruptPartError(
                f"the documents from {first['document_id']!r:.80} of partition {first['partition_key']!r} on have "
                f"{n_tokens} tokens, and were to have {length} at most: what an index or n_tokens says of them is not "
                "what their part has: run kd-assets verify on the recipe"
            )
    batch: dict[str, Any] = {name: [[document[name] for document in row] for row in rows] for name in KEY_FIELDS}
    batch |= _fields(rows, length)
    position_ids = np.zeros((len(rows), length), np.int64)
    segment_ids = np.zeros((len(rows), length), np.int64)
    places = []
    for row, documents in enumerate(rows):
        end = 0
        for number, document in enumerate(documents, start=1):
            start, end = end, end + len(document["input_ids"])
            position_ids[row, start:end] = np.arange(end - start)
            segment_ids[row, start:end] = number
            batch["loss_mask"][row, start] = False
            places.append((row, start, end - start))
        position_ids[row, end:] = np.arange(length - end)
    batch["position_ids"], batch["segment_ids"] = torch.from_numpy(position_ids), torch.from_numpy(segment_ids)
    columns = torch.tensor(places, dtype=torch.int64).reshape(-1, 3).T.contiguous()
    batch |= dict(zip(("document_rows", "document_starts", "document_lengths"), columns, strict=True))
    return batch | _masks(rows, batch, length)


def _fields(rows: Sequence[Sequence[Document]], n_tokens: int) -> dict[str, Any]:
    first = rows[0][0]
    fields: dict[str, Any] = {}
    for name, value in first.items():
        if name in KEY_FIELDS:
            continue
        if is_over_tokens(name):
            fields[name] = _over_tokens(name, rows, n_tokens)
        elif isinstance(value, int):
            fields[name] = torch.tensor([document[name] for row in rows for document in row])
        else:
            vectors = np.stack([document[name] for row in rows for document in row])
            fields[name] = torch.from_numpy(vectors.astype(np.float32, copy=False))
    return fields


def _over_tokens(name: str, rows: Sequence[Sequence[Document]], n_tokens: int) -> Tensor:
    """A field in its place in every row, with zeros where no document has a value."""
    values = [[_values(name, document[name]) for document in row] for row in rows]
    widths = zip(*(value.shape[1:] for row in values for value in row), strict=True)
    width = _width(name, rows, n_tokens)
    batch = np.empty((len(rows), width, *map(max, widths)), _dtype(name))
    for row, row_values in enumerate(values):
        end = 0
        for (start, shift, _), value in zip(_places(name, rows[row]), row_values, strict=True):
            batch[row, end:start] = 0
            end = start + len(value)
            place = batch[row, start:end]
            if value.shape[1:] != place.shape[1:]:  # lists of draws, shorter than the batch's longest
                place[:] = 0
                place = place[:, : value.shape[1]]
            place[:] = value
            if shift:
                place += shift
        batch[row, end:] = 0
    tensor = torch.from_numpy(batch)
    return tensor.view(torch.bfloat16) if hidden_state_of(name) is not None else tensor


def _places(name: str, documents: Sequence[Document]) -> Iterator[tuple[int, int, int]]:
    """Of each document of a row: where its values of a field start, what is to be added to them, how many there are.

    Values over kept positions follow each other; the positions themselves count from the row's first token.
    """
    kept = positions_field(name)
    start = token = 0
    for document in documents:
        n = len(document[name])
        yield start, token if name == kept else 0, n
        token += len(document["input_ids"])
        start = start + n if kept in document else token


def _width(name: str, rows: Sequence[Sequence[Document]], n_tokens: int) -> int:
    if positions_field(name) not in rows[0][0]:
        return padded_length(name, n_tokens)
    return max(sum(len(document[name]) for document in row) for row in rows)


def _values(name: str, value: Any) -> npt.NDArray[Any]:
    """[rows, …]; lists of draws are filled up with zeros to the document's longest."""
    return padded_lists(value) if isinstance(value, Ragged) else value


def _dtype(name: str) -> npt.DTypeLike:
    if hidden_state_of(name) is not None:
        return np.uint16
    if name == "loss_mask":
        return np.bool_
    return np.int64 if name in _WHOLE_NUMBERS else np.float32


def _masks(rows: Sequence[Sequence[Document]], fields: Mapping[str, Any], n_tokens: int) -> dict[str, Any]:
    """The masks that go with the fields of a batch."""
    masks: dict[str, Any] = {"attention_mask": _there("input_ids", rows, n_tokens)}
    if "topk_ids" in fields:
        wanted = at_topk_positions(fields["loss_mask"][:, 1:], fields)
        masks["topk_mask"] = _there("topk_ids", rows, n_tokens) & wanted
    if "sampled_counts" in fields:
        masks["sampled_mask"] = fields["sampled_counts"] > 0
    if names := hidden_fields(fields):
        masks["hidden_mask"] = _there(names[0], rows, n_tokens)
    return masks


def _there(name: str, rows: Sequence[Sequence[Document]], n_tokens: int) -> Tensor:
    """bool [B, rows of the field]: where a document has a value."""
    there = np.zeros((len(rows), _width(name, rows, n_tokens)), np.bool_)
    for row, documents in enumerate(rows):
        for start, _, n in _places(name, documents):
            there[row, start : start + n] = True
    return torch.from_numpy(there)
