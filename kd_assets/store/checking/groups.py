"""What is in the rows of a part file, decoded as readers get it, one group of rows at a time, for `verify`.

A hash says that bytes are those that were written, and nothing of what wrote them. The invariant: what a reader would
refuse of a part is found here, with the part and the document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from kd_assets.contract import TokenIds
from kd_assets.errors import CorruptPartError, KdAssetsError
from kd_assets.store.checking.report import ProblemKind
from kd_assets.store.codecs.topk_schema import COMPACT
from kd_assets.store.manifest import Manifest
from kd_assets.store.partfile import PartFile
from kd_assets.store.positions import choice_of, kept_positions
from kd_assets.store.ragged_topk import is_kept, mass_difference
from kd_assets.store.reading.columns import Column, Ragged, column_of
from kd_assets.store.reading.parts import damage_named
from kd_assets.store.reading.shapes import lists_difference, tokens_difference
from kd_assets.store.recorded_checks import codec_name, draws_of, top_p_of, vocabulary_size_of
from kd_assets.store.vocabulary import is_among
from kd_assets.store.writing.documents import Documents

Columns = Mapping[str, Column]


def part_difference(
    part: PartFile, manifest: Manifest, token_ids: TokenIds | None, *, document_ids: set[str]
) -> tuple[int, tuple[ProblemKind, str] | None]:
    """How many tokens the documents of a part have, and what is wrong with them, in words; None when all is well.

    `token_ids`: those of the vocabulary that the cache is cut to, where it is and they are known. `document_ids`: those
    of the parts before it, to which its own are added. Raises CorruptPartError, which names the document, for what
    cannot be decoded; StoreError for parameters that this version does not know.
    """
    n_tokens = 0
    for table in decoded_groups(part):
        with damage_named(part.path):
            columns = {name: column_of(table[name]) for name in table.schema.names}
            n_tokens += int(np.asarray(columns["n_tokens"].values).sum(dtype=np.int64))
            if (wrong := _difference(columns, manifest, token_ids)) is not None:
                return n_tokens, wrong
            for document_id in list(columns["document_id"].values):  # type: ignore[arg-type]
                if document_id in document_ids:
                    return n_tokens, ("wrong_documents", f"document {document_id!r:.200} is there twice")
                document_ids.add(document_id)
    return n_tokens, None


def decoded_groups(part: PartFile) -> Iterator[pa.Table]:
    """All columns of one group of rows after the other, as readers get them. Raises CorruptPartError, which names the
    first document that cannot be decoded."""
    for group in range(part.n_groups):
        try:
            table = part.read_group(group, part.names)
            with damage_named(part.path):
                table.validate(full=True)
        except CorruptPartError as e:
            raise CorruptPartError(f"{e}{_first_refused(part, group)}") from e
        yield table


def _first_refused(part: PartFile, group: int) -> str:
    """Which document of a group it is that cannot be decoded, in words; nothing where that cannot be told."""
    try:
        stored = part.stored_group(group)
        stored.select(["document_id"]).validate(full=True)  # offsets that lead elsewhere would end the process
        for row in range(stored.num_rows):
            one = stored.slice(row, 1)
            try:
                part.decoded(one).validate(full=True)
            except (CorruptPartError, pa.ArrowException, ValueError):
                first = int(part.first_rows[group]) + row
                return f"; the first document that cannot be decoded is {first}, {one['document_id'][0].as_py()!r:.200}"
    except (KdAssetsError, pa.ArrowException, ValueError, LookupError):  # not even that can be read of it
        pass
    return f"; it is in the rows from {int(part.first_rows[group])} on"


def _difference(columns: Columns, manifest: Manifest, token_ids: TokenIds | None) -> tuple[ProblemKind, str] | None:
    """What is wrong with a group of rows: what is asked first is what the others need."""
    has_next, vocabulary = manifest.asset == "topk_cache", vocabulary_size_of(manifest)
    looks: list[tuple[ProblemKind, Callable[[], str | None]]] = [("wrong_tokens", lambda: tokens_difference(columns))]
    if "positions" in manifest.params:
        looks.append(("wrong_positions", lambda: _positions_difference(columns, manifest, has_next=has_next)))
    if draws := draws_of(manifest):
        looks.append(("wrong_draws", lambda: _draws_difference(columns, draws, vocabulary, has_next=has_next)))
    if token_ids is not None:
        looks.append(("wrong_vocabulary", lambda: _vocabulary_difference(columns, token_ids)))
    looks.append(("wrong_lists", lambda: lists_difference(columns, has_next=has_next)))
    if codec_name(manifest) == COMPACT:
        looks.append(("wrong_ids", lambda: _ids_difference(columns, int(manifest.params["k"]), vocabulary)))
    elif (top_p := top_p_of(manifest)) is not None:
        looks.append(("wrong_kept", lambda: _kept_difference(columns, int(manifest.params["k"]), top_p)))
    return next(((kind, difference) for kind, look in looks if (difference := look())), None)


def _positions_difference(columns: Columns, manifest: Manifest, *, has_next: bool) -> str | None:
    """They are those that the parameters say, and every list over positions has as many elements."""
    tokens, mask = columns["input_ids"], columns["loss_mask"]
    assert tokens.offsets is not None
    documents = Documents(
        document_ids=list(columns["document_id"].values),  # type: ignore[arg-type]
        offsets=tokens.offsets.astype(np.int64),
        input_ids=_array(tokens),
        loss_mask=_array(mask),
    )
    expected, found = kept_positions(choice_of(manifest.params), documents, has_next=has_next), columns["positions"]
    assert expected is not None
    if found.lengths is None or (found.lengths != np.diff(expected.offsets)).any():
        return "a document has another number of positions than its parameters say"
    if not np.array_equal(_array(found), expected.positions_M):
        return "positions are not those that the parameters say"
    return lists_difference(columns, has_next=has_next)


def _draws_difference(columns: Columns, draws: int, vocabulary: int | None, *, has_next: bool) -> str | None:
    """`vocabulary` is the number of ids the teacher has, where it is known."""
    ids, counts = columns["sampled_ids"], columns["sampled_counts"]
    if lists_difference({name: columns[name] for name in columns if name in _OF_DRAWS}, has_next=has_next):
        return "a document has not one list of sampled_ids and of sampled_counts for each of its positions"
    assert isinstance(ids.values, Ragged)
    assert isinstance(counts.values, Ragged)
    return _lists_difference(ids.values, counts.values, draws, vocabulary)


_OF_DRAWS = ("n_tokens", "positions", "sampled_ids", "sampled_counts")


def _vocabulary_difference(columns: Columns, token_ids: TokenIds) -> str | None:
    """No id is outside of the vocabulary, and there is one outside mass for each position."""
    n_positions, n_masses = (columns[name].lengths for name in ("target_logprob", "outside_mass"))
    if n_positions is None or n_masses is None or not np.array_equal(n_positions, n_masses):
        return "outside_mass of a document has not one element for each of its positions"
    for name in (name for name in ("topk_ids", "sampled_ids", "input_ids") if name in columns):
        ids = _array(columns[name]).reshape(-1)
        if len(outside := ids[~is_among(token_ids, ids)]):
            return f"{name} has {int(outside[0])}, which is not in the vocabulary that the cache is cut to"
    return None


def _kept_difference(columns: Columns, k: int, top_p: float) -> str | None:
    """Of a part that is not coded, whose positions keep as many tokens as have a mass."""
    ids, logprobs = columns["topk_ids"].values, columns["topk_logprobs"].values
    assert isinstance(ids, Ragged)
    assert isinstance(logprobs, Ragged)
    if not np.array_equal(ids.offsets, logprobs.offsets):
        return "topk_ids and topk_logprobs have lists of different lengths"
    return mass_difference(logprobs, k, top_p)


def _ids_difference(columns: Columns, k: int, vocabulary: int | None) -> str | None:
    """`vocabulary` is the number of ids the teacher has, where it is known."""
    ids = columns["topk_ids"].values
    if isinstance(ids, Ragged):  # behind what is kept ids that are none, each once
        ids_Mk = np.repeat(-1 - np.arange(k)[None, :], len(ids), axis=0)
        ids_Mk[is_kept(ids.lengths, k)] = ids.values
    else:
        ids_Mk = np.asarray(ids)
    ordered_Mk = np.sort(ids_Mk, axis=1)
    if (ordered_Mk[:, 1:] == ordered_Mk[:, :-1]).any():
        return "topk_ids of a position has an id twice"
    largest = int(ordered_Mk.max(initial=0))
    if vocabulary is not None and largest >= vocabulary:
        return f"a top-k id is {largest}, the teacher knows ids 0 to {vocabulary - 1}"
    return None


def _lists_difference(ids: Ragged, counts: Ragged, draws: int, vocabulary: int | None) -> str | None:
    if not np.array_equal(ids.offsets, counts.offsets):
        return "sampled_ids and sampled_counts have lists of different lengths"
    summed = np.concatenate([[0], np.cumsum(counts.values, dtype=np.int64)])
    n_draws = np.diff(summed[counts.offsets])
    if counts.values.min(initial=1) < 1 or (n_draws != draws).any():
        return f"sampled_counts of a position are below 1, or add up to something else than {draws}"
    goes_on = np.ones(len(ids.values), dtype=np.bool_)
    goes_on[ids.offsets[:-1]] = False  # the first of a list; none is empty, as its counts add up to something
    if (np.diff(ids.values.astype(np.int64)) <= 0)[goes_on[1:]].any():
        return "sampled_ids of a position are not in ascending order, each once"
    largest = int(ids.values.max(initial=0))
    if vocabulary is not None and largest >= vocabulary:
        return f"a sampled id is {largest}, the teacher knows ids 0 to {vocabulary - 1}"
    return None


def _array(column: Column) -> Any:
    """All elements of a column."""
    return column.values.values if isinstance(column.values, Ragged) else np.asarray(column.values)
