"""The tokenised shard that a partition is made of, read and checked against the teacher. No torch of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kd_assets.contract import TeacherParams, WorkUnit
from kd_assets.errors import ContractError, InputError, RecipeError, StorageUnavailableError
from kd_assets.model_files.folder import model_folder
from kd_assets.model_files.vocabulary import token_table
from kd_assets.store import Shard, read_shard
from kd_assets.store.partfile import PartFile
from kd_assets.store.vocabulary import is_among
from kd_assets.teacher.model.load import Teacher, Warn
from kd_assets.teacher.partition.batching import longest


def read_input_shard(unit: WorkUnit, teacher: Teacher, params: TeacherParams, *, warn: Warn) -> Shard:
    """The shard of a partition.

    Raises ContractError unless the unit has one, RecipeError for one that this teacher cannot run.
    """
    folders = unit.inputs.get("shards_manifest", ())
    if len(folders) != 1:
        raise ContractError(f"partition {unit.partition_key}: expected one shard as input, found {len(folders)}")
    shard = read_shard(Path(folders[0]))
    if not shard.document_ids:
        return shard  # every record was skipped, as the recipe says: its caches are empty, too
    check_token_ids(shard, Path(folders[0]), teacher.n_token_ids, unit.partition_key)
    if any(output.asset == "topk_cache" for output in unit.outputs):
        check_vocabulary(shard, Path(folders[0]), params, unit.partition_key)
    n_tokens = min(int(shard.n_tokens_D.max()), longest(params))
    if message := check_length(n_tokens, teacher, unit.partition_key):
        warn(message)
    return shard


def check_token_ids(shard: Shard, folder: Path, n_token_ids: int, partition_key: str) -> None:
    """Raise RecipeError for token ids that the teacher has no embedding for, with the first document that has one."""
    beyond = np.flatnonzero(shard.input_ids_N >= n_token_ids)
    if not len(beyond):
        return
    rows = np.unique(np.searchsorted(shard.offsets_D1, beyond, side="right") - 1)
    row = int(rows[0])
    source, number = read_origins(shard, folder)[row]
    raise RecipeError(
        f"partition {partition_key}: document {shard.document_ids[row]!r} (row {row} of the shard, record {number} of "
        f"source {source!r}) has token id {int(shard.input_ids_N[beyond[0]])}, and the teacher has embeddings for ids "
        f"0 to {n_token_ids - 1} ({len(rows):,} of {len(shard.document_ids):,} documents have such ids). Its tokenizer "
        "has more tokens than config.json's vocab_size, or was another one: leave these tokens out of the texts, or "
        "name a teacher whose embeddings were resized (a shard that is made now has no such documents)"
    )


def check_vocabulary(shard: Shard, folder: Path, params: TeacherParams, partition_key: str) -> None:
    """Raise RecipeError for documents with a token, among those that the top-k cache has, that is outside of the
    student's vocabulary: a student can neither read nor learn it. Names the first."""
    topk = params.topk
    if topk is None or topk.token_ids is None:
        return
    outside = np.flatnonzero(~is_among(topk.token_ids, shard.input_ids_N))
    rows_O = np.searchsorted(shard.offsets_D1, outside, side="right") - 1
    in_cache = outside - shard.offsets_D1[rows_O] < topk.max_length
    outside, rows_O = outside[in_cache], rows_O[in_cache]
    if not len(outside):
        return
    row, rows = int(rows_O[0]), np.unique(rows_O)
    source, number = read_origins(shard, folder)[row]
    at, token_id = int(outside[0] - shard.offsets_D1[row]), int(shard.input_ids_N[outside[0]])
    raise RecipeError(
        f"partition {partition_key}: document {shard.document_ids[row]!r} (row {row} of the shard, record {number} of "
        f"source {source!r}) has {named_token(token_id, params)} at position {at}, which is not among the "
        f"{len(topk.token_ids):,} ids of topk.vocabulary ({len(rows):,} of {len(shard.document_ids):,} documents have "
        "such tokens): a student without that token can neither read nor learn the document. Leave such documents out "
        "of the source, or name a vocabulary that has their tokens"
    )


def named_token(token_id: int, params: TeacherParams) -> str:
    """With what the teacher's tokenizer calls it, where its files say that."""
    try:
        token = token_table(model_folder(params.model, params.revision)).get(token_id)
    except (InputError, StorageUnavailableError):
        token = None
    return f"token id {token_id}" + ("" if token is None else f" ({token!r})")


def read_origins(shard: Shard, folder: Path) -> list[tuple[str, int]]:
    """Source and record number of each document, from the shard's files."""
    origins: list[tuple[str, int]] = []
    for record in shard.manifest.parts:
        with PartFile(folder / record.name) as part:
            table = part.read(["source", "source_record"])
        origins += zip(table["source"].to_pylist(), table["source_record"].to_pylist(), strict=True)
    return origins


def check_length(n_tokens: int, teacher: Teacher, partition_key: str) -> str | None:
    """What to warn of, given the longest document to run. Raises RecipeError where results would be arbitrary."""
    if teacher.repeatable_tokens is not None and n_tokens > teacher.repeatable_tokens:
        raise RecipeError(
            f"partition {partition_key} has a document of {n_tokens} tokens; beyond {teacher.repeatable_tokens} this "
            "teacher's dynamic rotary scaling depends on what ran before: lower max_length of every cache to that"
        )
    if teacher.learned_positions is not None and n_tokens > teacher.learned_positions:
        raise RecipeError(
            f"partition {partition_key} has a document of {n_tokens} tokens, and the teacher has positions for "
            f"{teacher.learned_positions}: lower max_length of every cache to that"
        )
    if teacher.context_tokens is not None and n_tokens > teacher.context_tokens:
        return (
            f"partition {partition_key} has a document of {n_tokens} tokens, the teacher's context is "
            f"{teacher.context_tokens}: what it says beyond is not what it was trained for; lower max_length"
        )
    return None
