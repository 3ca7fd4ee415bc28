"""The tokenised shard that a partition is made of, read and checked against the teacher. No torch of its own."""

from __future__ import annotations

from pathlib import Path

from kd_assets.contract import TeacherParams, WorkUnit
from kd_assets.errors import ContractError, MissingInputError, RecipeError
from kd_assets.store import Shard, read_shard
from kd_assets.teacher.model.load import Teacher, Warn
from kd_assets.teacher.partition.batching import longest


def read_input_shard(unit: WorkUnit, teacher: Teacher, params: TeacherParams, *, warn: Warn) -> Shard:
    """The shard of a partition.

    Raises ContractError unless the unit has one, MissingInputError for an empty one, RecipeError for one that this
    teacher cannot run.
    """
    folders = unit.inputs.get("shards_manifest", ())
    if len(folders) != 1:
        raise ContractError(f"partition {unit.partition_key}: expected one shard as input, found {len(folders)}")
    shard = read_shard(Path(folders[0]))
    if not len(shard.input_ids_N):
        raise MissingInputError(f"partition {unit.partition_key}: the shard in {folders[0]} has no documents")
    check_token_ids(int(shard.input_ids_N.max()), teacher.n_token_ids, unit.partition_key)
    n_tokens = min(int(shard.n_tokens_D.max()), longest(params))
    if message := check_length(n_tokens, teacher, unit.partition_key):
        warn(message)
    return shard


def check_token_ids(largest_id: int, n_token_ids: int, partition_key: str) -> None:
    """Raise RecipeError for a shard that was made for another teacher's vocabulary."""
    if largest_id >= n_token_ids:
        raise RecipeError(
            f"partition {partition_key} has token id {largest_id}, the teacher knows ids 0 to {n_token_ids - 1}: the "
            "shard was tokenised with another tokenizer; name the teacher's own in the recipe"
        )


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
