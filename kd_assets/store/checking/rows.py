"""What the rows of a part file must be for its manifest to be true: for the checks of one result and for `verify`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from kd_assets.contract import TokenIds
from kd_assets.errors import CorruptPartError, StoreError
from kd_assets.store import schema as schemas
from kd_assets.store.arrays import flat
from kd_assets.store.codecs.codec import PLAIN
from kd_assets.store.codecs.state_columns import CodedStates
from kd_assets.store.codecs.topk_columns import COMPACT, compact_topk_schema
from kd_assets.store.manifest import Manifest
from kd_assets.store.partfile import PartFile
from kd_assets.store.positions import choice_of, kept_positions
from kd_assets.store.reading.columns import Ragged, column_of
from kd_assets.store.reading.parts import damage_named
from kd_assets.store.recorded_checks import codec_name, draws_of, require_readable
from kd_assets.store.vocabulary import is_among
from kd_assets.store.writing.documents import Documents, Int64Array


class MissingParameterError(StoreError):
    """The identity of a result lacks a parameter that tells its columns."""


def expected_schema(manifest: Manifest, hidden_size: int | None) -> pa.Schema | None:
    """The schema that the part files of a result must have; None for an asset whose files are no tables.

    `hidden_size` is the teacher's, which no parameter tells. Raises MissingParameterError, and UnknownCodecError for a
    codec of another version of kd_assets.
    """
    require_readable(manifest)
    try:
        match manifest.asset:
            case "shards_manifest":
                return schemas.shard_schema()
            case "topk_cache":
                return _topk_schema(manifest)
            case "hidden_state_cache":
                blocks = [int(b) for b in manifest.params["blocks"]]
                final = manifest.params.get("final", ())
                positions = "positions" in manifest.params
                plain = schemas.hidden_state_schema(blocks, hidden_size or 0, final=final, positions=positions)
                codec = codec_name(manifest)
                return plain if codec == PLAIN else CodedStates(codec).stored_schema(plain)
            case "embedding_cache":
                return schemas.embedding_schema(hidden_size or 0)
            case _:
                return None
    except KeyError as e:
        raise MissingParameterError(f"the identity of {manifest.asset} lacks params[{e}]") from e


def _topk_schema(manifest: Manifest) -> pa.Schema:
    params = manifest.params
    k, draws = int(params["k"]), draws_of(manifest)
    is_cut, positions = params.get("vocabulary") is not None, "positions" in params
    if codec_name(manifest) == COMPACT:
        logsumexp = params.get("logsumexp", True)
        return compact_topk_schema(k, draws, is_cut=is_cut, positions=positions, logsumexp=logsumexp)
    return schemas.topk_schema(k, draws, is_cut=is_cut, positions=positions)


def schema_difference(expected: pa.Schema, found: pa.Schema) -> str | None:
    """The first difference in words; None for equal schemas, metadata included."""
    if expected.equals(found, check_metadata=True):
        return None
    for name in expected.names:
        if name not in found.names:
            return f"column {name} is missing"
        if not expected.field(name).equals(found.field(name), check_metadata=True):
            return f"column {name}: expected {_in_words(expected.field(name))}, found {_in_words(found.field(name))}"
    if extra := [name for name in found.names if name not in expected.names]:
        return f"column {extra[0]} is not of this format"
    if expected.names != found.names:
        return f"columns are in the order {', '.join(found.names)}, expected {', '.join(expected.names)}"
    return f"schema metadata: expected {expected.metadata}, found {found.metadata}"


def part_documents(part: PartFile) -> tuple[list[str], Int64Array]:
    """Ids and token counts of a part's rows. Raises CorruptPartError where `input_ids` has another length."""
    ids: list[str] = []
    lengths = [np.zeros(0, np.int64)]
    for group in range(part.n_groups):
        table = part.read_group(group, ["document_id", "n_tokens", "input_ids"])
        with damage_named(part.path):
            table.validate(full=True)
            n_tokens = table["n_tokens"].to_numpy().astype(np.int64)
            counted = column_of(table["input_ids"]).lengths
            if counted is None or (counted != n_tokens).any():
                raise CorruptPartError(f"{part.path}: n_tokens differs from the length of input_ids")
            ids += table["document_id"].to_pylist()
        lengths.append(n_tokens)
    return ids, np.concatenate(lengths)


def positions_difference(part: PartFile, manifest: Manifest) -> str | None:
    """What is wrong with the kept positions of a part's documents, in words; None when all is well: they are those that
    the parameters say, and every list over positions has as many elements. Raises StoreError for parameters that this
    version does not know."""
    choice, has_next = choice_of(manifest.params), manifest.asset == "topk_cache"
    common = ("document_id", "n_tokens", "input_ids", "loss_mask", "positions")
    for group in range(part.n_groups):
        table = part.read_group(group, [name for name in part.schema.names if name != "n_tokens"])
        columns = {name: column_of(table[name]) for name in table.schema.names}
        offsets = columns["input_ids"].offsets
        assert offsets is not None
        documents = Documents(
            document_ids=table["document_id"].to_pylist(),
            offsets=offsets.astype(np.int64),
            input_ids=flat(table["input_ids"]),
            loss_mask=flat(table["loss_mask"]),
        )
        expected, found = kept_positions(choice, documents, has_next=has_next), columns["positions"]
        assert expected is not None
        counts = np.diff(expected.offsets)
        if found.lengths is None or (found.lengths != counts).any():
            return "a document has another number of positions than its parameters say"
        if not np.array_equal(flat(table["positions"]), expected.positions_M):
            return "positions are not those that the parameters say"
        for name, column in columns.items():
            if name not in common and (column.lengths is None or (column.lengths != counts).any()):
                return f"{name} of a document has not one element for each of its positions"
    return None


def draws_difference(part: PartFile, draws: int, vocabulary: int | None) -> str | None:
    """What is wrong with the random draws of a part's documents, in words; None when all is well.

    `vocabulary` is the number of ids the teacher has, where it is known.
    """
    columns = ["n_tokens", "sampled_ids", "sampled_counts"]
    has_positions = "positions" in part.schema.names
    for group in range(part.n_groups):
        table = part.read_group(group, [*columns, *(["positions"] if has_positions else [])])
        n_positions = column_of(table["positions"]).lengths if has_positions else table["n_tokens"].to_numpy() - 1
        ids, counts = (column_of(table[name]) for name in columns[1:])
        for column in (ids, counts):
            if column.lengths is None or (column.lengths != n_positions).any():
                return "a document has not one list of sampled_ids and of sampled_counts for each of its positions"
        assert isinstance(ids.values, Ragged)
        assert isinstance(counts.values, Ragged)
        if difference := _lists_difference(ids.values, counts.values, draws, vocabulary):
            return difference
    return None


def vocabulary_difference(part: PartFile, token_ids: TokenIds) -> str | None:
    """What ids a part has that are outside of the vocabulary that its cache is cut to, in words; None when it has none,
    and one outside mass for each position."""
    names = [name for name in ("topk_ids", "sampled_ids", "input_ids") if name in part.schema.names]
    for group in range(part.n_groups):
        table = part.read_group(group, ["target_logprob", "outside_mass", *names])
        n_positions, n_masses = (column_of(table[name]).lengths for name in ("target_logprob", "outside_mass"))
        if n_positions is None or n_masses is None or not np.array_equal(n_positions, n_masses):
            return "outside_mass of a document has not one element for each of its positions"
        for name in names:
            ids = flat(table[name])
            if len(outside := ids[~is_among(token_ids, ids)]):
                return f"{name} has {int(outside[0])}, which is not in the vocabulary that the cache is cut to"
    return None


def coded_difference(part: PartFile, vocabulary: int | None) -> str | None:
    """What is wrong with a part's coded top-k rows, in words; None when all is well. `vocabulary` is the number of ids
    the teacher has, where it is known. Raises CorruptPartError for bytes that no encoder writes."""
    columns = [name for name in ("topk_ids", "topk_logprobs", "logsumexp", "target_logprob") if name in part.names]
    for group in range(part.n_groups):
        ids_Mk = column_of(part.read_group(group, columns)["topk_ids"]).values
        assert isinstance(ids_Mk, np.ndarray)
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


def _text(data: bytes) -> str:
    return data.decode(errors="backslashreplace")


def _in_words(field: pa.Field) -> str:
    null = " null" if field.nullable else ""
    metadata: dict[Any, Any] = field.metadata or {}
    return f"{field.type}{null} {({_text(k): _text(v) for k, v in metadata.items()}) or ''}".strip()
