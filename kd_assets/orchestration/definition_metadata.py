"""What the web UI shows of an asset before anything of it is made: where it will lie, its columns, and its parameters.

A pure function of the recipe and of the platform's settings: definitions load where neither teacher nor store is.
"""

from __future__ import annotations

from typing import Any

import dagster as dg
import pyarrow as pa

from kd_assets.contract import EmbeddingParams, ExportParams, HiddenStateParams, PositionChoice, TopkParams
from kd_assets.export.columns import CachesOfRecipe
from kd_assets.export.format import options_of
from kd_assets.export.formats import FORMATS
from kd_assets.orchestration.platform import Platform
from kd_assets.recipes.recipe import SHARD_PLAN, SHARDS_MANIFEST, STUDENT_SMOKE, Recipe
from kd_assets.store.column_words import SIZE_NOT_KNOWN, column_in_words, type_in_words
from kd_assets.store.schema import embedding_schema, hidden_state_schema, shard_schema, topk_schema

MADE_BY_JOBS = "slurm"
"""Kind of the assets that jobs make, where SLURM is the scheduler."""


def definition_metadata(recipe: Recipe, asset: str, platform: Platform | None = None) -> dict[str, Any]:
    """Of an asset's definition. `platform`: that of this deployment; without it nothing is said of where it lies."""
    metadata: dict[str, Any] = {}
    if recipe.description is not None:
        metadata["recipe"] = recipe.description
    if platform is not None:
        folder = platform.recipe_folder(recipe.name)
        metadata["dagster/uri"] = str(folder / asset) if asset in (SHARD_PLAN, *_results(recipe)) else str(folder)
    if (export := {str(a): p for a, p in recipe.export_params.items()}.get(asset)) is not None:
        metadata["dagster/column_schema"] = export_schema(recipe, export)
    elif (schema := _schema(recipe, asset)) is not None:
        metadata["dagster/column_schema"] = table_schema(schema)
    return metadata | parameters(recipe, asset)


def kinds(recipe: Recipe, asset: str, own: set[str], platform: Platform | None) -> set[str]:
    """What an asset's files are, and that SLURM's jobs make them."""
    by_slurm = platform is not None and platform.scheduler == "slurm" and asset in _results(recipe)
    return own | ({MADE_BY_JOBS} if by_slurm else set())


def _results(recipe: Recipe) -> tuple[str, ...]:
    return (*recipe.partitioned, STUDENT_SMOKE)


# ---------------------------------------------------------------------- columns


def _schema(recipe: Recipe, asset: str) -> pa.Schema | None:
    """The columns that a reader gets, whatever the codec; None of an asset that is no table."""
    size = recipe.teacher.size
    hidden_size = SIZE_NOT_KNOWN if size is None else size.hidden_size
    if asset == SHARDS_MANIFEST:
        return shard_schema()
    match {str(a): p for a, p in recipe.cache_params.items()}.get(asset):
        case TopkParams() as topk:
            return topk_schema(
                topk.k,
                topk.draws,
                is_cut=_is_cut(topk),
                positions=topk.positions.kept != "all",
                logsumexp=topk.logsumexp,
                top_p=topk.top_p,
            )
        case HiddenStateParams() as states:
            positions = states.positions.kept != "all"
            return hidden_state_schema(states.blocks, hidden_size, final=states.final, positions=positions)
        case EmbeddingParams():
            return embedding_schema(hidden_size)
        case _:
            return None


def table_schema(schema: pa.Schema) -> dg.TableSchema:
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                name=field.name,
                type=type_in_words(field),
                description=column_in_words(field),
                constraints=dg.TableColumnConstraints(nullable=field.nullable, unique=field.name == "document_id"),
            )
            for field in schema
        ]
    )


def export_schema(recipe: Recipe, export: ExportParams) -> dg.TableSchema:
    """What a record of an export has, by the format itself: columns, or tensors and keys of a file."""
    size = recipe.teacher.size
    schemas = {cache: _schema(recipe, cache) for cache in recipe.caches_of([export.asset])}
    caches = CachesOfRecipe(
        schemas={cache: schema for cache, schema in schemas.items() if schema is not None},
        n_blocks=None if size is None else size.n_blocks,
        hidden_size=None if size is None else size.hidden_size,
        vocabulary_size=None if size is None else size.vocabulary,
    )
    columns = FORMATS[export.format_name].columns(caches, options_of(export))
    return dg.TableSchema(columns=[dg.TableColumn(name=c.name, type=c.type, description=c.meaning) for c in columns])


# ---------------------------------------------------------------------- parameters


def parameters(recipe: Recipe, asset: str) -> dict[str, Any]:
    """What the recipe says of an asset: parameters of the cache, and of which teacher."""
    if asset == SHARD_PLAN:
        return {"sources": ", ".join(source.spec.name for source in recipe.sources)}
    if asset == SHARDS_MANIFEST:
        return {"tokenizer": recipe.teacher.model, "max_length_tokens": recipe.max_length}
    if asset == STUDENT_SMOKE:
        return {"teacher": recipe.teacher.model, "caches": ", ".join(recipe.caches)}
    params = {str(a): p for a, p in recipe.cache_params.items()}.get(asset)
    if params is None:
        return {}
    teacher = recipe.teacher
    said: dict[str, Any] = {
        "teacher": teacher.model if teacher.revision is None else f"{teacher.model} at {teacher.revision}",
        "dtype": f"{teacher.dtype} pass, float32 reductions",
        "max_length_tokens": params.max_length,
    }
    if teacher.quantization is not None:
        said["quantization"] = dg.MetadataValue.json(dict(teacher.quantization))
    match params:
        case TopkParams():
            said |= _of_topk(params)
        case HiddenStateParams():
            said |= _of_states(params)
        case EmbeddingParams():
            said["embeddings"] = "mean over the document, and the last token's"
    return said


def _of_topk(params: TopkParams) -> dict[str, Any]:
    said: dict[str, Any] = {"k": params.k}
    if params.top_p is not None:
        said["top_p"] = params.top_p
    if params.draws:
        said["draws"] = params.draws
    if _is_cut(params):
        ids = params.token_ids
        size = None if ids is None else ids.size_if_whole
        said["vocabulary"] = params.vocabulary or ("chosen token ids" if size is None else f"{size:,} token ids")
    return said | {"positions": positions_in_words(params.positions), "codec": params.codec}


def _of_states(params: HiddenStateParams) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if params.blocks:
        said["blocks"] = f"{', '.join(map(str, params.blocks))} (counted from 0)"
    if params.final:
        said["final"] = ", ".join(name.replace("_", " ") for name in params.final)
    return said | {"positions": positions_in_words(params.positions), "codec": params.codec}


def positions_in_words(choice: PositionChoice) -> str:
    if choice.kept == "share":
        return f"{100 * (choice.share or 0):g} % at random, seed {choice.seed}"
    return "all" if choice.kept == "all" else "those whose next token is learned"


def _is_cut(params: TopkParams) -> bool:
    return params.vocabulary is not None or params.token_ids is not None
