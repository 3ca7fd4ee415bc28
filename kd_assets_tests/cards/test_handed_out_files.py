"""A card hands out what a reader of the recipe gets: no superseded, failed, unfinished or unplanned result, and no
coded column to those who cannot read it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kd_assets.cards.contents import contents_of
from kd_assets.cards.croissant import croissant
from kd_assets.cards.write import README_NAME, write_card
from kd_assets.errors import CorruptPartError
from kd_assets.store import CacheReader, coded, part_stats, plan_output
from kd_assets_tests.store import examples
from kd_assets_tests.store.planned import commit, commit_partition, hash_of, write_plan


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Of `a` an earlier result, one that failed, an unfinished one, and the current one; of `b` one that failed; of `c`
    one of another shard; `gone` is not planned any more."""
    folder = tmp_path / examples.RECIPE
    commit_partition(tmp_path, "a", "an earlier first")
    commit(tmp_path, "topk_cache", "a", hash_of("made badly"), passed=False)
    write_plan(folder, {"a": "first", "b": "second", "c": "third"})
    commit_partition(tmp_path, "a", "first")
    shard = commit(tmp_path, "shards_manifest", "b", hash_of("second"))
    commit(tmp_path, "topk_cache", "b", shard, passed=False)
    commit_partition(tmp_path, "c", "an earlier third")
    commit_partition(tmp_path, "gone", "fourth")
    part = next(folder.glob("topk_cache/*/a/*/part-00000.parquet"))
    (unfinished := part.parents[1] / "0123456789abcdef").mkdir()
    (unfinished / part.name).write_bytes(part.read_bytes())
    return folder


def current_documents(folder: Path, asset: str) -> list[tuple[str, list[int]]]:
    reader = CacheReader(folder, asset, missing="skip")
    assert set(reader.partition_keys) == {"a"}
    return [(row["document_id"], row["input_ids"].tolist()) for row in (reader[i] for i in range(len(reader)))]


def configs(folder: Path) -> dict[str, str]:
    """Asset → the name of its configuration in the README."""
    lines = (folder / README_NAME).read_text().splitlines()
    names = [line.removeprefix("- config_name: ") for line in lines if line.startswith("- config_name: ")]
    return {name.rpartition("-")[0]: name for name in names}


def rows(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    datasets = pytest.importorskip("datasets")
    yield from datasets.load_dataset(str(folder), name, split="train", cache_dir=str(folder.parent / "cache"))


@pytest.mark.parametrize("asset", ["topk_cache", "embedding_cache"])
def test_datasets_loads_the_current_results_and_no_other(recipe: Path, asset: str) -> None:
    write_card(contents_of(recipe))
    found = [(row["document_id"], row["input_ids"]) for row in rows(recipe, configs(recipe)[asset])]
    assert found == current_documents(recipe, asset)


def test_croissant_includes_the_current_results_and_no_other(recipe: Path) -> None:
    (topk,) = [files for files in croissant(contents_of(recipe))["distribution"] if files["@id"] == "topk_cache-files"]
    found = {path for pattern in topk["includes"] for path in recipe.glob(pattern)}
    assert {path.parent for path in found} == set(CacheReader(recipe, "topk_cache", missing="skip").folders)


def test_a_card_of_coded_caches_offers_the_shards_alone(tmp_path: Path) -> None:
    folder = tmp_path / examples.RECIPE
    write_plan(folder, {"a": "first"})
    shard = commit(tmp_path, "shards_manifest", "a", hash_of("first"))
    docs = examples.documents().slice(0, len(examples.LENGTHS), examples.MAX_LENGTH)
    identity = {"asset": "topk_cache", "format_version": 1, "params": examples.COMPACT, "input": shard}
    out = plan_output("topk_cache", identity, recipe_folder=folder, partition_key="a")
    with examples.writer(tmp_path, out, partition_key="a") as writer:
        table = coded(examples.table("topk_cache", docs), "compact")
        stats = part_stats("topk_cache", table.decoded) | table.error
        writer.write_part(0, table.stored, n_tokens=docs.n_tokens, stats=stats)
        writer.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={})
    contents = contents_of(folder)
    write_card(contents)
    assert list(configs(folder)) == ["shards_manifest"]
    assert "\nviewer: false\n" in (folder / README_NAME).read_text()
    assert len(list(rows(folder, configs(folder)["shards_manifest"]))) == len(examples.LENGTHS)
    said = croissant(contents)
    assert [records["@id"] for records in said["recordSet"]] == ["shards_manifest"]
    assert "topk_cache-files" in [files["@id"] for files in said["distribution"]]


@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
def test_a_damaged_first_part_is_named(recipe: Path, damage: str) -> None:
    (folder,) = CacheReader(recipe, "topk_cache", missing="skip").folders
    part = folder / "part-00000.parquet"
    if damage == "missing":
        part.unlink()
    else:
        os.truncate(part, part.stat().st_size // 2 if damage == "cut" else 0)
    with pytest.raises(CorruptPartError, match="part-00000"):
        croissant(contents_of(recipe))
