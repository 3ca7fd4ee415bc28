"""What a part file must be for its manifest to be true: for the checks of one result and for `verify`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from kd_assets.errors import CorruptPartError, StoreError
from kd_assets.store import schema as schemas
from kd_assets.store.arrays import flat
from kd_assets.store.codecs.codec import PLAIN
from kd_assets.store.codecs.state_columns import CodedStates
from kd_assets.store.codecs.topk_schema import COMPACT, compact_topk_schema
from kd_assets.store.manifest import Manifest
from kd_assets.store.partfile import PartFile
from kd_assets.store.reading.columns import column_of
from kd_assets.store.reading.parts import damage_named
from kd_assets.store.recorded_checks import codec_name, draws_of, require_readable, top_p_of
from kd_assets.store.writing.documents import Int64Array


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
        logsumexp, coded_draws = params.get("logsumexp", True), manifest.identity.get("draws_codec_version", 1) == 2
        return compact_topk_schema(
            k,
            draws,
            is_cut=is_cut,
            positions=positions,
            logsumexp=logsumexp,
            coded_draws=coded_draws,
            top_p=top_p_of(manifest),
        )
    return schemas.topk_schema(k, draws, is_cut=is_cut, positions=positions, top_p=top_p_of(manifest))


def schema_difference(expected: pa.Schema, found: pa.Schema) -> str | None:
    """The first difference in words; None for equal schemas, metadata included."""
    if expected.equals(found, check_metadata=True):
        return None
    if twice := [name for name in found.names if found.names.count(name) > 1]:
        return f"column {twice[0]} is there twice"
    for name in expected.names:
        if name not in found.names:
            return f"column {name} is missing"
        if not expected.field(name).equals(found.field(name), check_metadata=True):
            return f"column {name}: expected {_in_words(expected.field(name))}, found {_in_words(found.field(name))}"
    if extra := [name for name in found.names if name not in expected.names]:
        return f"column {extra[0]} is not of this format"
    of_all = f"schema metadata: expected {expected.metadata}, found {found.metadata}"
    in_order = f"columns are in the order {', '.join(found.names)}, expected {', '.join(expected.names)}"
    return of_all if expected.names == found.names else in_order


def part_documents(part: PartFile) -> tuple[list[str], Int64Array]:
    """Ids and token counts of a part's rows. Raises CorruptPartError where `input_ids` has another length."""
    ids: list[str] = []
    lengths = [np.zeros(0, np.int64)]
    for group in range(part.n_groups):
        table = part.read_group(group, ["document_id", "n_tokens", "input_ids"])
        with damage_named(part.path):
            table.validate(full=True)
            n_tokens = flat(table["n_tokens"]).astype(np.int64)
            counted = column_of(table["input_ids"]).lengths
            if counted is None or (counted != n_tokens).any():
                raise CorruptPartError(f"{part.path}: n_tokens differs from the length of input_ids")
            ids += table["document_id"].to_pylist()
        lengths.append(n_tokens)
    return ids, np.concatenate(lengths)


def _text(data: bytes) -> str:
    return data.decode(errors="backslashreplace")


def _in_words(field: pa.Field) -> str:
    null = " null" if field.nullable else ""
    metadata: dict[Any, Any] = field.metadata or {}
    return f"{field.type}{null} {({_text(k): _text(v) for k, v in metadata.items()}) or ''}".strip()
