"""A recipe's card for machines, read by mlcroissant: it validates, and its records are the cache's."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from kd_assets.cards.contents import contents_of
from kd_assets.cards.write import CROISSANT_NAME, write_card
from kd_assets.store import CacheReader
from kd_assets_tests.store import examples
from kd_assets_tests.store.planned import commit, commit_partition, hash_of, write_plan


def test_mlcroissant_validates_a_card_and_reads_the_caches_by_it(tmp_path: Path) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    folder = tmp_path / examples.RECIPE
    write_plan(folder, {"a": "first", "b": "second"})
    commit_partition(tmp_path, "a", "an earlier first")
    commit(tmp_path, "topk_cache", "a", hash_of("made badly"), passed=False)
    for key, content in {"a": "first", "b": "second"}.items():
        commit_partition(tmp_path, key, content)
    path = next(path for path in write_card(contents_of(folder)).files if path.name == CROISSANT_NAME)
    data_set = mlcroissant.Dataset(jsonld=str(path))
    assert not data_set.metadata.issues.errors
    assert not data_set.metadata.issues.warnings
    (topk,) = [c for c in contents_of(folder).caches if c.asset == "topk_cache"]
    reader = CacheReader.from_folders(topk.summary.folders)
    records = list(itertools.islice(data_set.records("topk_cache"), len(reader) + 1))
    for ours, record in zip((reader[i] for i in range(len(reader))), records, strict=True):
        assert record["topk_cache/document_id"].decode() == ours["document_id"]
        assert [list(row) for row in record["topk_cache/topk_ids"]] == ours["topk_ids"].tolist()
    assert json.loads(path.read_text())["conformsTo"].endswith("1.1")
