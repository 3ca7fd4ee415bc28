"""Readers of a recipe read what its plan names: all of it, nothing else, and nothing that failed a check."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from kd_assets.contract import CACHES, Asset
from kd_assets.errors import CorruptPlanError, FailedCheckError, NotCommittedError, VariantConflictError
from kd_assets.store import CacheReader, choose, planned_partitions
from kd_assets.store.current_variants import CURRENT_NAME, say_current
from kd_assets_tests.store import examples
from kd_assets_tests.store.planned import commit, commit_partition, hash_of, write_plan

KEYS = ("tiny-00000", "tiny-00001", "tiny-00002")


@pytest.fixture
def recipe(store: Path) -> Path:
    """Three planned partitions, all committed."""
    for key in KEYS:
        commit_partition(store, key, f"content of {key}")
    write_plan(store / examples.RECIPE, {key: f"content of {key}" for key in KEYS})
    return store / examples.RECIPE


def test_the_plan_is_read_as_it_was_written(recipe: Path) -> None:
    plan = planned_partitions(recipe)
    assert plan is not None
    assert dict(plan.input_hashes) == {key: hash_of(f"content of {key}") for key in KEYS}
    assert plan.plan_hash == json.loads((recipe / "shard_plan" / "plan.json").read_bytes())["plan_hash"]


@pytest.mark.parametrize("asset", ["shards_manifest", *CACHES])
def test_a_whole_recipe_is_read_in_the_order_of_its_plan_and_nothing_is_left_out(recipe: Path, asset: Asset) -> None:
    write_plan(recipe, {key: f"content of {key}" for key in reversed(KEYS)})
    reader = CacheReader(recipe, asset)
    assert reader.partition_keys == tuple(reversed(KEYS))
    assert reader.left_out == {}
    assert reader.plan_hash is not None


def test_partitions_that_are_no_longer_planned_are_left_out_and_named(
    recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_plan(recipe, {KEYS[0]: f"content of {KEYS[0]}"})
    with caplog.at_level(logging.WARNING):
        reader = CacheReader(recipe, "topk_cache")
    assert reader.partition_keys == KEYS[:1]
    assert reader.left_out == dict.fromkeys(KEYS[1:], "the current plan has no such partition")
    assert "topk_cache: 1 partitions are read, 2 left out (tiny-00001: the current plan has no" in caplog.text
    with pytest.raises(NotCommittedError, match=r"'tiny-00001' \(1 missing of 2\): the current plan has no such"):
        CacheReader(recipe, "topk_cache", partition_keys=KEYS[:2])


def test_planned_partitions_that_are_not_there_are_refused_unless_they_may_be_left_out(
    recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planned = {key: f"content of {key}" for key in (*KEYS, "tiny-00003", "tiny-00004")}
    write_plan(recipe, planned)
    with pytest.raises(NotCommittedError, match=r"'tiny-00003' \(2 missing of 5\): it has no committed result"):
        CacheReader(recipe, "topk_cache")
    with caplog.at_level(logging.WARNING):
        reader = CacheReader(recipe, "topk_cache", missing="skip")
    assert reader.partition_keys == KEYS
    assert reader.left_out == dict.fromkeys(("tiny-00003", "tiny-00004"), "it has no committed result")
    assert "3 partitions are read, 2 left out" in caplog.text


def test_results_of_what_a_partition_was_made_of_before_are_missing_until_they_are_made_again(recipe: Path) -> None:
    write_plan(recipe, {key: f"content of {key}" for key in KEYS[:2]} | {KEYS[2]: "changed"})
    for asset in ("shards_manifest", "topk_cache"):
        with pytest.raises(NotCommittedError, match=r"'tiny-00002' .* it was made of another shard than"):
            CacheReader(recipe, asset)
        assert CacheReader(recipe, asset, missing="skip").partition_keys == KEYS[:2]
    before = CacheReader(recipe, "topk_cache", missing="skip")[0]
    commit_partition(recipe.parent, KEYS[2], "changed", assets=["topk_cache"])
    assert CacheReader(recipe, "topk_cache").partition_keys == KEYS
    assert CacheReader(recipe, "topk_cache")[0]["input_ids"].tolist() == before["input_ids"].tolist()


def test_caches_without_their_shards_are_read_by_the_names_of_the_plan(recipe: Path) -> None:
    (recipe / "shards_manifest").rename(recipe / "elsewhere")
    assert CacheReader(recipe, "topk_cache").partition_keys == KEYS


def test_a_recipe_without_a_plan_is_read_as_far_as_it_is_committed_and_says_so(
    recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (recipe / "shard_plan" / "plan.json").unlink()
    with caplog.at_level(logging.INFO):
        reader = CacheReader(recipe, "topk_cache")
    assert (reader.partition_keys, reader.plan_hash) == (KEYS, None)
    assert "no shard plan says what should be there; all 3 committed partitions are read" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"{",
        lambda raw: b"null",
        lambda raw: b"[" * 5000 + b"]" * 5000,
        lambda raw: b"\xff\xfe",
        lambda raw: raw.replace(b"tiny-00000", b"tiny-00009"),
        lambda raw: raw.replace(b'"blocks"', b'"block"', 1),
        lambda raw: raw.replace(b'"n_shards": 3', b'"n_shards": 2', 1),
        lambda raw: raw.replace(b'"sha256": "', b'"sha256": "1', 1),
    ],
)
def test_a_plan_that_is_not_the_one_that_was_made_is_refused(recipe: Path, damage: Any) -> None:
    plan = recipe / "shard_plan" / "plan.json"
    plan.write_bytes(damage(plan.read_bytes()))
    with pytest.raises(CorruptPlanError, match=r"plan\.json is not the plan that was made .*materialize shard_plan"):
        CacheReader(recipe, "topk_cache")


@pytest.mark.parametrize("damage", [lambda raw: raw.replace(b'"input_hash":"', b'"input_hash":"0', 1), None])
def test_a_block_of_the_plan_that_is_not_the_one_that_was_made_is_refused(recipe: Path, damage: Any) -> None:
    (block,) = (recipe / "shard_plan" / "blocks").iterdir()
    if damage is None:
        block.unlink()
    else:
        block.write_bytes(damage(block.read_bytes()))
    with pytest.raises(CorruptPlanError, match=rf"{block.name} is not the plan that was made .*materialize shard_plan"):
        CacheReader(recipe, "topk_cache")


def test_a_partition_whose_result_failed_a_check_is_refused_unless_it_is_allowed(recipe: Path) -> None:
    write_plan(recipe, {key: f"content of {key}" for key in (*KEYS, "tiny-00003")})
    docs = examples.documents(seed=3)
    shard = commit(recipe.parent, "shards_manifest", "tiny-00003", hash_of("content of tiny-00003"), docs=docs)
    commit(recipe.parent, "topk_cache", "tiny-00003", shard, docs=docs, passed=False)
    with pytest.raises(FailedCheckError, match=r"'tiny-00003' \(1 missing of 4\): .*check recomputed failed: .*allow"):
        CacheReader(recipe, "topk_cache")
    skipping = CacheReader(recipe, "topk_cache", missing="skip")
    assert skipping.partition_keys == KEYS
    assert "check recomputed failed" in skipping.left_out["tiny-00003"]
    allowed = CacheReader(recipe, "topk_cache", allow_failed=True)
    assert allowed.partition_keys == (*KEYS, "tiny-00003")
    assert allowed[-1]["input_ids"].tolist() == docs.slice(3, 1, examples.MAX_LENGTH).input_ids.tolist()


def test_a_head_of_before_that_names_a_failed_result_is_not_believed(store: Path) -> None:
    failed = examples.RECOMPUTED | {"passed": False}
    folder, manifest = examples.commit(store, "embedding_cache", checks={"recomputed": failed})
    (folder.parent / "head.json").write_text(json.dumps({"fingerprint": manifest.fingerprint}))
    with pytest.raises(FailedCheckError, match="check recomputed failed"):
        CacheReader(store / examples.RECIPE, "embedding_cache")


def test_a_variant_of_failed_results_alone_keeps_nobody_from_the_other(store: Path) -> None:
    recipe_folder = store / examples.RECIPE
    good, _ = examples.commit(store, "topk_cache")
    other = {"k": examples.K, "max_length": 7}
    failed = {"recomputed": examples.RECOMPUTED | {"passed": False}}
    folder, manifest = examples.commit(store, "topk_cache", params=other, checks=failed)
    assert CacheReader(recipe_folder, "topk_cache").folders == (good,)
    with pytest.raises(FailedCheckError, match=f"{folder.name}: check recomputed failed"):
        choose(recipe_folder, "topk_cache", variant=manifest.variant)
    assert choose(recipe_folder, "topk_cache", variant=manifest.variant, allow_failed=True).folders == (folder,)
    examples.commit(store, "topk_cache", params=other | {"max_length": 8})
    with pytest.raises(VariantConflictError):
        CacheReader(recipe_folder, "topk_cache")


def test_of_several_variants_a_reader_gets_that_of_the_last_run(tmp_path: Path) -> None:
    _, plain = examples.commit(tmp_path, "topk_cache")
    _, compact = examples.commit(tmp_path, "topk_cache", params=examples.COMPACT)
    folder = tmp_path / examples.RECIPE
    with pytest.raises(VariantConflictError, match="several variants"):
        choose(folder, "topk_cache")
    say_current(folder, "topk_cache", compact.variant)
    assert [m.variant for m in choose(folder, "topk_cache").manifests] == [compact.variant]
    assert [m.variant for m in choose(folder, "topk_cache", variant=plain.variant).manifests] == [plain.variant]


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b'{"topk_cache": "../../elsewhere"}', b'{"topk_cache": "0123456789ab"}']
)
def test_what_is_no_choice_among_the_variants_is_not_believed(tmp_path: Path, damage: bytes) -> None:
    examples.commit(tmp_path, "topk_cache")
    examples.commit(tmp_path, "topk_cache", params=examples.COMPACT)
    (tmp_path / examples.RECIPE / CURRENT_NAME).write_bytes(damage)
    with pytest.raises(VariantConflictError, match="several variants"):
        choose(tmp_path / examples.RECIPE, "topk_cache")
