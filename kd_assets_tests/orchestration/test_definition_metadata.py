"""What the web UI says of an asset before anything is made: where it will lie, its columns, its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from pydantic import ValidationError

from kd_assets.components import TeacherCaches
from kd_assets.export.formats import FORMATS
from kd_assets.orchestration.assets import recipe_definitions
from kd_assets.orchestration.definition_metadata import definition_metadata
from kd_assets.orchestration.platform import Platform
from kd_assets.recipes.recipe import Recipe
from kd_assets.store import read_manifest
from kd_assets.store.column_words import SHAPES
from kd_assets.store.partfile import PartFile
from kd_assets.store.schema import hidden_state_of
from kd_assets_tests.orchestration.deployment import CACHES
from kd_assets_tests.store import examples

CACHES_OF_ALL: dict[str, Any] = {
    "topk": {"k": 16, "max_length": 4096, "draws": 50, "vocabulary": 32_000, "positions": {"share": 0.1, "seed": 3}},
    "hidden_states": {"blocks": [22, 8], "max_length": 2048, "final": "both", "codec": "int8_32"},
    "embeddings": {"max_length": 4096},
}


def a_recipe(**changes: Any) -> Recipe:
    attributes = {
        "recipe": "mine",
        "sources": [{"name": "web", "path": "/data/web.jsonl"}, {"name": "chats", "path": "/data/chats.jsonl"}],
        "teacher": {"model_id": "some/model", "revision": "v1"},
        "caches": CACHES_OF_ALL,
        "student": {},
        "exports": ["hf"],
    }
    return TeacherCaches.model_validate(attributes | changes).to_recipe()


def specs_of(recipe: Recipe, platform: Platform | None = None) -> dict[str, dg.AssetSpec]:
    resources = dg.Definitions(resources={"kd_assets_platform": (platform or Platform(home="/nowhere")).as_resource()})
    definitions = dg.Definitions.merge(recipe_definitions(recipe, platform), resources)
    return {spec.key.path[-1]: spec for spec in definitions.resolve_all_asset_specs()}


def test_an_asset_says_where_it_will_lie_and_what_the_recipe_wants_of_it(tmp_path: Path) -> None:
    recipe = a_recipe(description="Web pages and chats.", owners=["team:language", "ann@example.org"], tags={"a": "b"})
    specs = specs_of(recipe, Platform(home=str(tmp_path), scheduler="slurm"))
    store = tmp_path / "store" / "mine"
    assert specs["topk_cache"].metadata["dagster/uri"] == str(store / "topk_cache")
    assert specs["cache_card"].metadata["dagster/uri"] == str(store)
    for asset, spec in specs.items():
        assert spec.metadata["recipe"] == "Web pages and chats.", asset
        assert spec.description, "what the asset is, beside what the recipe is"
        assert spec.description != "Web pages and chats."
        assert tuple(spec.owners) == ("team:language", "ann@example.org")
        assert spec.tags["a"] == "b"
        by_jobs = asset not in ("shard_plan", "cache_card")
        assert ("slurm" in spec.kinds) is by_jobs
        assert len(spec.kinds) <= 3
    topk, states = specs["topk_cache"].metadata, specs["hidden_state_cache"].metadata
    assert topk["teacher"] == "some/model at v1"
    assert (topk["k"], topk["draws"], topk["vocabulary"], topk["max_length_tokens"]) == (
        16,
        50,
        "32,000 token ids",
        4096,
    )
    assert (topk["positions"], topk["codec"]) == ("10 % at random, seed 3", "plain")
    assert (states["blocks"], states["final"]) == ("8, 22 (counted from 0)", "before norm, after norm")
    assert (states["positions"], states["codec"]) == ("all", "int8_32")
    assert states["dtype"] == "bfloat16 pass, float32 reductions"
    assert specs["shard_plan"].metadata["sources"] == "web, chats"
    assert not tmp_path.joinpath("store").exists(), "loading writes nothing"


def test_without_slurm_and_a_platform_nothing_is_said_of_them() -> None:
    spec = specs_of(a_recipe())["topk_cache"]
    assert "slurm" not in spec.kinds
    assert not {"dagster/uri", "recipe"} & spec.metadata.keys()


def columns_of(recipe: Recipe, asset: str) -> dict[str, dg.TableColumn]:
    return {c.name: c for c in definition_metadata(recipe, asset)["dagster/column_schema"].columns}


def test_columns_have_types_shapes_and_units() -> None:
    recipe = a_recipe()
    topk, states = columns_of(recipe, "topk_cache"), columns_of(recipe, "hidden_state_cache")
    assert topk["topk_ids"].type == "list<uint32[16]>"
    assert topk["topk_logprobs"].type == "list<float16[16]>"
    assert topk["topk_logprobs"].description == "[P, k] log-probabilities of these ids, in nats, at temperature 1"
    assert states["hidden_block_22"].type == "list<bfloat16[hidden_size]>"
    assert "output of decoder block 22" in str(states["hidden_block_22"].description)
    size = {"parameters": 7e9, "hidden_size": 4096, "n_blocks": 32, "vocabulary": 32_000}
    known = a_recipe(teacher={"model_id": "some/model", "size": size})
    assert columns_of(known, "hidden_state_cache")["hidden_block_22"].type == "list<bfloat16[4096]>"
    assert columns_of(known, "embedding_cache")["mean_embedding"].type == "float32[4096]"
    for asset in ("shards_manifest", *CACHES):
        for name, column in columns_of(recipe, asset).items():
            assert name in SHAPES or hidden_state_of(name) is not None
            assert column.description
            assert not column.constraints.nullable


def test_the_columns_are_those_of_the_files(tmp_path: Path) -> None:
    length = {"max_length": examples.MAX_LENGTH}
    caches = {"topk": {"k": examples.K} | length, "hidden_states": {"blocks": list(examples.BLOCKS)} | length}
    recipe = a_recipe(caches=caches | {"embeddings": length})
    for asset, folder in examples.commit_all(tmp_path).items():
        with PartFile(folder / read_manifest(folder).parts[0].name) as part:
            assert list(columns_of(recipe, asset)) == part.schema.names


EXPORTABLE: dict[str, Any] = {
    "topk": {"k": 16, "max_length": 4096},
    "hidden_states": {"blocks": [1, 15, 22, 28], "max_length": 2048, "final": "both"},
    "embeddings": {"max_length": 4096},
}
SIZE = {"parameters": 7e9, "hidden_size": 4096, "n_blocks": 32, "vocabulary": 32_000}


@pytest.mark.parametrize("name", list(FORMATS))
def test_an_export_has_the_columns_that_its_format_says(name: str) -> None:
    recipe = a_recipe(caches=EXPORTABLE, exports=[name], teacher={"model_id": "some/model", "size": SIZE})
    columns = columns_of(recipe, f"export_{name}")
    assert columns
    assert all(column.type and column.description for column in columns.values())


def test_columns_of_exports_go_by_the_recipes_caches_and_options() -> None:
    exports = [
        "hf",
        {"format": "safetensors", "states": [22, "after_norm"], "learned_only": True},
        {"format": "distillkit", "pack_to": 4096},
        "speculators",
        {"format": "modelopt", "states": [15, "before_norm"]},
    ]
    recipe = a_recipe(caches=EXPORTABLE, exports=exports, teacher={"model_id": "some/model", "size": SIZE})
    hf = columns_of(recipe, "export_hf")
    assert hf["topk_ids"].type == "list<uint32[16]>" == columns_of(recipe, "topk_cache")["topk_ids"].type
    assert hf["hidden_block_22"].type == "binary"
    assert str(hf["hidden_block_22"].description).startswith("bits of bfloat16 [N, 4096]: output of decoder block 22")
    assert "topk_positions" not in hf
    tensors = columns_of(recipe, "export_safetensors")
    assert tensors["NUMBER/hidden_block_22"].type == "bfloat16[N, 4096]"
    assert [name for name in tensors if "/hidden_" in name] == [
        "NUMBER/hidden_block_22",
        "NUMBER/hidden_final_after_norm",
        "NUMBER/hidden_positions",
    ]
    packed = columns_of(recipe, "export_distillkit")
    assert "attention_mask" in packed
    assert str(packed["bytepacked_indices"].description).startswith("[4096, 30]"), "16 ids of 15 bits"
    states = columns_of(recipe, "export_speculators")["hidden_states/hs_ROW.safetensors: hidden_states"]
    assert states.type == "bfloat16[L, 4, 4096]"
    assert str(states.description).startswith("the outputs of blocks 1, 15, 28, counted from 0")
    modelopt = columns_of(recipe, "export_modelopt")
    assert modelopt["aux_hidden_states"].type == "bfloat16[L, 4096]"
    assert modelopt["hidden_states"].description == "the decoder's last state, before the norm"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("owners", ["ann"], "an address"),
        ("owners", ["team:"], "a team"),
        ("tags", {"a b": "c"}, "a b"),
        ("tags", {"a": "x" * 64}, "63"),
    ],
)
def test_owners_and_tags_that_dagster_would_refuse_are_refused_with_their_field(
    field: str, value: Any, said: str
) -> None:
    schema = TeacherCaches.get_model_cls().model_json_schema()
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema)
    attributes = {
        "recipe": "mine",
        "sources": [{"name": "s", "path": "/s"}],
        "teacher": {"model_id": "m"},
        "caches": {"topk": {"k": 4, "max_length": 8}},
        field: value,
    }
    (error,) = validator.iter_errors(attributes)
    assert error.absolute_path[0] == field
    with pytest.raises(ValidationError, match=field) as refused:
        TeacherCaches.model_validate(attributes)
    assert said in str(refused.value)


def test_owners_and_tags_change_no_code_version() -> None:
    recipe, owned = a_recipe(), a_recipe(owners=["team:language"], tags={"domain": "web"})
    assert [recipe.code_version(a) for a in recipe.partitioned] == [owned.code_version(a) for a in owned.partitioned]
