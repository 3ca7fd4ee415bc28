"""A recipe's `exports`: names or mappings, and what cannot be exported is refused when the recipe is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kd_assets.components import TeacherCaches
from kd_assets.contract import CACHES, EXPORTS, Asset, ExportParams, FinalState
from kd_assets.errors import RecipeError
from kd_assets.export.format import ExportOptions
from kd_assets.export.formats import FORMATS
from kd_assets.export.planning import require_can_pack
from kd_assets.export.source import FolderCaches, source_of
from kd_assets.orchestration.assets import caches_specs
from kd_assets.recipes.exports import (
    CACHES_OF_FORMAT,
    DIFFERENT_K,
    FINAL_OF_FORMAT,
    FINALS_REFUSED,
    LEARNED_ONLY,
    PACKED,
    READER_OF_FORMAT,
    SOME_POSITIONS,
    TWO_TOKENS,
    ExportModel,
)
from kd_assets.recipes.recipe import Recipe
from kd_assets.store.computing_versions import FORMAT_VERSIONS
from kd_assets_tests.export import made_up

FINAL_STATES: tuple[FinalState, ...] = ("before_norm", "after_norm")

ALL_CACHES: dict[str, Any] = {
    "topk": {"k": 4, "max_length": 64},
    "hidden_states": {"blocks": [1, 2, 4], "final": "after_norm", "max_length": 8},
    "embeddings": {"max_length": 64},
}


def recipe(exports: list[Any], caches: dict[str, Any] = ALL_CACHES, **more: Any) -> Recipe:
    attributes: dict[str, Any] = {
        "recipe": "tiny",
        "sources": [{"name": "corpus", "path": "corpus.jsonl"}],
        "teacher": {"model_id": "nobody/teacher"},
        "caches": caches,
        "exports": exports,
    }
    return TeacherCaches(**attributes | more).to_recipe()


def test_names_and_mappings_stand_beside_each_other_in_yaml() -> None:
    said = """
    recipe: tiny
    sources: [{name: corpus, path: corpus.jsonl}]
    teacher: {model_id: nobody/teacher}
    caches: {topk: {k: 4, max_length: 64}, hidden_states: {blocks: [1, 2, 4], final: after_norm, max_length: 8}}
    exports:
      - hf
      - {format: specforge, states: [1, 2, 4]}
      - safetensors
      - format: distillkit
        pack_to: 64
    """
    made = TeacherCaches.resolve_from_yaml(said).to_recipe()
    assert (
        made.export_params
        == recipe(
            ["hf", {"format": "specforge", "states": [1, 2, 4]}, "safetensors", {"format": "distillkit", "pack_to": 64}]
        ).export_params
    )
    with pytest.raises(ValidationError, match="there is no export format 'hv'"):
        TeacherCaches.resolve_from_yaml(said.replace("- hf", "- hv"))
    with pytest.raises(ValidationError, match="packto"):
        TeacherCaches.resolve_from_yaml(said.replace("pack_to", "packto"))


def test_an_export_is_described_by_its_caches_its_reader_and_its_options() -> None:
    made = recipe(["hf", {"format": "specforge", "states": [1, 2, 4], "max_length": 8}])
    described = {spec.key.path[-1]: spec.description for spec in caches_specs(made)}
    assert described["export_hf"] == "topk_cache, hidden_state_cache, embedding_cache in files for `datasets`."
    assert described["export_specforge"] == (
        "hidden_state_cache in files for SpecForge's offline trainer of EAGLE-3 heads. max_length: 8. states: 1, 2, 4."
    )
    assert set(READER_OF_FORMAT) == set(FORMATS)


def test_the_contract_has_an_asset_for_every_format_and_no_other() -> None:
    assert set(EXPORTS) == {f"export_{name}" for name in FORMATS}


@pytest.mark.parametrize("name", list(FORMATS))
def test_what_the_recipe_believes_of_a_format_is_what_the_format_says(tmp_path: Path, name: str) -> None:
    asset = next(asset for asset in EXPORTS if asset == f"export_{name}")
    documents = made_up.truths(1)
    folders = {a: [folder] for a, folder in made_up.commit(tmp_path, documents).items()}
    source = source_of(FolderCaches(folders=folders).there())
    # Blocks are named, since the folder of the made-up teacher is nowhere.
    fixed = CACHES_OF_FORMAT.get(asset)
    blocks: tuple[int | FinalState, ...] | None = (1, 2, 4) if fixed == ("hidden_state_cache",) else None
    needs = FORMATS[name].needs(source, ExportOptions(states=blocks))
    assert needs.assets == (fixed or CACHES)
    assert needs.all_positions == (asset not in SOME_POSITIONS)
    assert needs.fixed_k == (asset not in DIFFERENT_K)
    assert (needs.min_tokens == 2) == (asset in TWO_TOKENS or asset == "export_original")
    if fixed == ("hidden_state_cache",):
        final = [state for state in needs.states if not isinstance(state, int)]
        assert final == ([FINAL_OF_FORMAT[asset]] if asset in FINAL_OF_FORMAT else [])

    def takes(options: ExportOptions) -> bool:
        try:
            require_can_pack(name, FORMATS[name].needs(source, options), options)
        except RecipeError:
            return False
        return True

    assert takes(ExportOptions(states=blocks, learned_only=True)) == (asset in LEARNED_ONLY)
    assert takes(ExportOptions(states=blocks, pack_to=64)) == (asset in PACKED)
    if fixed != ("topk_cache",):
        for final_state in FINAL_STATES:
            refused = final_state in FINALS_REFUSED.get(asset, ())
            assert takes(ExportOptions(states=(1, 2, 4, final_state))) != refused
    assert needs.version == FORMAT_VERSIONS.get(asset, 1)


def test_exports_are_names_or_mappings_and_their_order_decides_nothing() -> None:
    named = recipe(["safetensors", "hf"])
    assert named.exports == (ExportParams(asset="export_hf"), ExportParams(asset="export_safetensors"))
    assert named.exports == recipe([{"format": "hf"}, "safetensors"]).exports
    assert named.partitioned == ("shards_manifest", *CACHES, "export_hf", "export_safetensors")
    options = {"max_length": 5, "validation_share": 0.25, "seed": 3, "states": [4, "after_norm"]}
    (params,) = recipe([{"format": "hf", "assets": ["hidden_state_cache", "topk_cache"], **options}]).exports
    assert params == ExportParams(
        asset="export_hf",
        max_length=5,
        validation_share=0.25,
        seed=3,
        assets=("topk_cache", "hidden_state_cache"),
        states=(4, "after_norm"),
    )
    (packed,) = recipe([{"format": "distillkit", "pack_to": 64}]).exports
    assert packed == ExportParams(asset="export_distillkit", pack_to=64)
    assert recipe([]).exports == ()


def test_an_export_is_made_of_the_caches_that_its_format_takes() -> None:
    made = recipe(["hf", "specforge", {"format": "original", "assets": ["topk_cache"]}])
    assert made.caches_of(["export_hf"]) == CACHES
    assert made.caches_of(["export_specforge"]) == ("hidden_state_cache",)
    assert made.caches_of(["export_original"]) == ("topk_cache",)
    assert made.caches_of(["export_original", "export_specforge"]) == ("topk_cache", "hidden_state_cache")


@pytest.mark.parametrize(
    ("exports", "words"),
    [
        (["hv"], "there is no export format 'hv'; there are axolotl, distillkit, hf, modelopt, original, safetensors"),
        ([{"format": "hv"}], "there is no export format 'hv'; there are axolotl, distillkit"),
        ([{"format": "hf", "assets": ["topk"]}], "'topk' is no cache; there are topk_cache"),
        ([{"format": "hf", "assets": []}], "at least 1 item"),
        ([{"format": "hf", "max_length": 0}], "greater than 0"),
        ([{"format": "hf", "validation_share": 1}], "less than 1"),
        ([{"format": "hf", "split": "train"}], "Extra inputs are not permitted"),
        ([{"format": "specforge", "draft_vocabulary": 64}], r"kd-assets export FORMAT RECIPE --draft-vocabulary N"),
    ],
)
def test_what_is_no_export_is_refused_by_name(exports: list[Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        recipe(exports)


@pytest.mark.parametrize(
    ("exports", "without", "words"),
    [
        (["hf", {"format": "hf", "max_length": 3}], None, "exports: hf is there twice"),
        (["specforge"], "hidden_states", "specforge takes hidden_state_cache, .* add hidden_states to caches"),
        (["modelopt"], "hidden_states", "modelopt takes hidden_state_cache, .* add hidden_states to caches"),
        ([{"format": "hf", "assets": ["topk_cache"]}], "topk", "hf takes topk_cache, .* add topk to caches"),
        ([{"format": "specforge", "assets": ["topk_cache"]}], None, "takes hidden_state_cache, not topk_cache"),
        ([{"format": "hf", "states": [3]}], None, "keep 1, 2, 4, after_norm, not 3: add it"),
        ([{"format": "hf", "states": ["before_norm"]}], None, "not before_norm"),
        ([{"format": "hf", "states": [1]}], "hidden_states", "names states, and takes no hidden_state_cache"),
        ([{"format": "hf", "assets": ["topk_cache"], "states": [1]}], None, "takes no hidden_state_cache"),
    ],
)
def test_an_export_that_the_recipes_caches_cannot_become_is_refused_on_loading(
    exports: list[Any], without: str | None, words: str
) -> None:
    caches = {name: cache for name, cache in ALL_CACHES.items() if name != without}
    with pytest.raises(RecipeError, match=words):
        recipe(exports, caches)


LEARNED = {"positions": "learned"}


@pytest.mark.parametrize(
    ("exports", "changes", "words"),
    [
        (["speculators"], {}, "takes the state before_norm, which hidden_states do not keep: add it"),
        (["specforge"], {"hidden_states": {"final": None}}, "takes the state after_norm"),
        (["modelopt"], {"hidden_states": {"final": "before_norm"}}, "takes the state after_norm"),
        ([{"format": "modelopt", "states": [1, "before_norm"]}], {}, "not before_norm"),
        *(
            ([name], {"topk": {"top_p": 0.9}}, "leave top_p out of topk")
            for name in ("hf", "distillkit", "safetensors")
        ),
        (["distillkit"], {"topk": LEARNED}, "needs all positions of topk_cache"),
        (["original"], {"topk": LEARNED}, "needs all positions of topk_cache"),
        (["original"], {"hidden_states": LEARNED}, "needs all positions of hidden_state_cache"),
        (["specforge_dflash"], {"hidden_states": {"positions": {"share": 0.1}}}, "set positions: all in hidden_states"),
        (["specforge_dflash"], {"hidden_states": {"blocks": [], "final": "both"}}, "keep none: add blocks"),
        *(([{"format": name, "pack_to": 64}], {}, "leave pack_to out") for name in ("hf", "axolotl", "specforge")),
        *(([{"format": name, "learned_only": True}], {}, "learned_only out") for name in ("original", "distillkit")),
        *(([{"format": name, "max_length": 1}], {}, "make max_length 2") for name in ("axolotl", "original")),
        ([{"format": "original", "states": ["after_norm"]}], {}, "does not read after_norm"),
        ([{"format": "specforge", "states": [1, 2]}], {}, "exactly three blocks"),
        ([{"format": "specforge", "states": [4, 2, 1]}], {}, "ascending order"),
        ([{"format": "axolotl", "states": [1]}], {}, "takes no hidden_state_cache"),
    ],
)
def test_what_is_known_of_a_format_when_a_recipe_is_loaded_is_refused_there(
    exports: list[Any], changes: dict[str, dict[str, Any]], words: str
) -> None:
    caches = {name: {**cache, **changes.get(name, {})} for name, cache in ALL_CACHES.items()}
    caches = {name: {k: v for k, v in cache.items() if v is not None} for name, cache in caches.items()}
    with pytest.raises(RecipeError, match=words):
        recipe(exports, caches)


@pytest.mark.parametrize(
    ("exports", "changes"),
    [
        (["axolotl", "hf", "safetensors"], {"topk": LEARNED, "hidden_states": LEARNED}),
        (["specforge"], {"topk": LEARNED}),
        (["axolotl", "specforge"], {"topk": {"top_p": 0.9}}),
        (["speculators", "specforge", "modelopt"], {"hidden_states": {"final": "both"}}),
        ([{"format": "modelopt", "states": [1, "before_norm"]}], {"hidden_states": {"final": "both"}}),
        ([{"format": "original", "assets": ["hidden_state_cache"], "max_length": 1}], {"topk": LEARNED}),
        (["specforge_dflash"], {"hidden_states": {"final": None}}),
    ],
)
def test_what_a_format_takes_is_loaded(exports: list[Any], changes: dict[str, dict[str, Any]]) -> None:
    caches = {name: {**cache, **changes.get(name, {})} for name, cache in ALL_CACHES.items()}
    caches = {name: {k: v for k, v in cache.items() if v is not None} for name, cache in caches.items()}
    assert len(recipe(exports, caches).exports) == len(exports)


def test_exports_change_the_code_version_of_nothing_else_and_their_own_with_what_decides_their_bytes() -> None:
    plain, exported = recipe([]), recipe(["hf"])
    before: tuple[Asset, ...] = ("shards_manifest", *CACHES, "student_smoke")
    assert [plain.code_version(a) for a in before] == [exported.code_version(a) for a in before]
    of_topk = {"topk": ALL_CACHES["topk"]}
    versions = [
        made.code_version("export_hf")
        for made in (exported, recipe([{"format": "hf", "max_length": 3}]), recipe(["hf"], of_topk))
    ]
    assert len(set(versions)) == 3
    assert recipe(["hf", "original"]).code_version("export_hf") == versions[0]


def test_jobs_of_exports_ask_for_what_those_of_shards_do_unless_they_say_otherwise() -> None:
    jobs = {"shards": {"n_tasks": 7, "slurm": {"partition": "cpu"}}}
    asked = recipe(["hf"], jobs=jobs).tasks_of("export")
    assert (asked.n_tasks, asked.resources.slurm_partition) == (7, "cpu")
    own = recipe(["hf"], jobs={**jobs, "export": {"n_tasks": 2}}).tasks_of("export")
    assert (own.n_tasks, own.resources.slurm_partition) == (2, None)


def test_the_schema_of_exports_offers_names_and_mappings() -> None:
    schema = TeacherCaches.get_model_cls().model_json_schema()
    items = schema["properties"]["exports"]["else"]["items"]
    assert items["then"]["enum"] == list(FORMATS)
    assert items["else"] == {"$ref": "#/$defs/ExportModel"}
    assert set(schema["$defs"]["ExportModel"]["properties"]) == set(ExportModel.model_fields)
