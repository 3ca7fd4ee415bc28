"""Exports that a recipe switches on: partitioned assets with lineage to their caches, made by a kind of job."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import dagster as dg
import pyarrow.parquet as pq
import pytest
from dagster._core.definitions.data_version import StaleStatus

from kd_assets.contract import Asset, JobKind
from kd_assets.dagster_internals import CODE_VERSION_TAG, DATA_VERSION_TAG, input_data_version_tag
from kd_assets.diagnose.preview import preview, select_assets
from kd_assets.orchestration.billing.bill import make_bill
from kd_assets.orchestration.materialize import planner_of
from kd_assets.orchestration.orphans import KINDS
from kd_assets.orchestration.planning.planned_exports import export_work
from kd_assets.orchestration.platform import Platform
from kd_assets.store import Manifest, put_aside, read_head, read_manifest, verify
from kd_assets.store.column_words import type_in_words
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment, documents, failure_text, is_reused
from kd_assets_tests.orchestration.test_quarantine import requests_of_the_night
from kd_assets_tests.orchestration.test_staleness import status
from kd_assets_tests.store.examples import flip_byte

EXPORTS: tuple[Asset, ...] = ("export_hf", "export_safetensors")
ALL = (SHARDS[0], SHARDS[-1])
SMALL: dict[str, Any] = {"caches": {"topk": {"k": 4, "max_length": 64}}, "student": None}


def result_of(deployment: Deployment, asset: str, partition: str) -> tuple[Path, Manifest]:
    """The partition's current result, of the one variant that there is."""
    (folder,) = deployment.platform.recipe_folder("tiny").glob(f"{asset}/*/{partition}")
    head = read_head(folder)
    assert head is not None
    return head, read_manifest(head)


def n_jobs(deployment: Deployment, kind: str) -> int:
    return len(list((deployment.home / "jobs" / "tiny").glob(f"{kind}-*/*/job.json")))


@dataclass(frozen=True, kw_only=True)
class Exported:
    deployment: Deployment
    result: dg.ExecuteInProcessResult


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Iterator[Exported]:
    """All partitions, from documents to exports, in one run."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "instance").mkdir()
    with dg.DagsterInstance.local_temp(str(folder / "instance")) as instance:
        exports = ["hf", {"format": "safetensors", "validation_share": 0.4, "assets": ["topk_cache"]}]
        deployment = Deployment(folder, tiny_teacher, instance, exports=exports, student=None)
        deployment.plan()
        result = deployment.run("shards_manifest", *CACHES, *EXPORTS, partition_range=ALL)
        assert result.success, failure_text(result)
        yield Exported(deployment=deployment, result=result)


def test_one_run_goes_from_documents_to_exports_and_the_checks_of_their_files(exported: Exported) -> None:
    deployment, run_id = exported.deployment, exported.result.run_id
    recorded = deployment.materializations(run_id)
    assert set(recorded) == {(a, key) for a in ("shards_manifest", *CACHES, *EXPORTS) for key in SHARDS}
    checks = [check for check in deployment.checks(run_id) if check.asset_key.path[-1] in EXPORTS]
    assert len(checks) == len(EXPORTS) * len(SHARDS)
    assert all(check.passed and check.check_name == "files" for check in checks)
    assert n_jobs(deployment, "export") == 1
    report = verify(deployment.platform.recipe_folder("tiny"))
    assert (report.problems, report.notes) == ((), ())


def test_an_export_says_what_it_is_made_of_and_how_it_is_loaded(exported: Exported) -> None:
    deployment, run_id = exported.deployment, exported.result.run_id
    for asset, caches in (("export_hf", CACHES), ("export_safetensors", ("topk_cache",))):
        (materialization,) = deployment.materializations(run_id, asset)[asset, SHARDS[1]]
        folder, manifest = result_of(deployment, asset, SHARDS[1])
        tags, metadata = materialization.tags or {}, materialization.metadata
        assert tags[DATA_VERSION_TAG] == manifest.data_version
        assert tags[CODE_VERSION_TAG] == deployment.recipe.code_version(asset)
        inputs = {name for name in tags if name.startswith("dagster/input_data_version/")}
        assert inputs == {input_data_version_tag(deployment.recipe.key(cache)) for cache in caches}
        for cache in caches:
            made_of = result_of(deployment, cache, SHARDS[1])[1]
            assert tags[input_data_version_tag(deployment.recipe.key(cache))] == made_of.data_version
            assert manifest.identity["input"][cache]["fingerprint"] == made_of.fingerprint
        assert str(metadata["contents"].value).startswith("4 documents, ")
        assert metadata["dagster/size_bytes"].value == manifest.n_bytes
        assert metadata["format"].value == asset.removeprefix("export_")
        data = folder / "data" if asset == "export_hf" else folder / "data" / "train"
        assert str(data) in str(metadata["how_to_load"].value)
        provenance: Any = metadata["provenance"].value
        assert provenance["teacher"] == deployment.recipe.teacher.model


def test_the_line_that_says_how_to_load_does(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    import safetensors

    deployment, run_id = exported.deployment, exported.result.run_id
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", deployment.home / "cache")
    ids = []
    for key in SHARDS:
        (hf,) = deployment.materializations(run_id, "export_hf")["export_hf", key]
        rows = eval(str(hf.metadata["how_to_load"].value), {"datasets": datasets})
        ids += rows["document_id"]
        (tensors,) = deployment.materializations(run_id, "export_safetensors")["export_safetensors", key]
        with eval(str(tensors.metadata["how_to_load"].value), {"safetensors": safetensors}) as file:
            assert any(name.endswith("/topk_logprobs") for name in file.keys())  # noqa: SIM118 - it is no dict
    assert ids == [document["id"] for document in documents(12)]


def test_an_export_has_the_columns_that_its_definition_says(exported: Exported) -> None:
    (spec,) = (
        spec
        for spec in exported.deployment.definitions.resolve_all_asset_specs()
        if spec.key == exported.deployment.recipe.key("export_hf")
    )
    columns = {column.name: column.type for column in spec.metadata["dagster/column_schema"].columns}
    folder, _ = result_of(exported.deployment, "export_hf", SHARDS[0])
    (path,) = (folder / "data").rglob("*.parquet")
    written = {field.name: type_in_words(field) for field in pq.read_schema(path)}
    assert columns == {name: kind.replace("float32[32]", "float32[hidden_size]") for name, kind in written.items()}


def test_what_is_there_is_found_and_recorded_again_without_a_job(exported: Exported) -> None:
    deployment = exported.deployment
    again = deployment.run(*EXPORTS, partition_range=ALL)
    assert again.success, failure_text(again)
    assert n_jobs(deployment, "export") == 1
    recorded = deployment.materializations(again.run_id)
    assert {is_reused(m) for ms in recorded.values() for m in ms} == {True}
    assert requests_of_the_night(deployment) == []


def test_preview_and_bill_know_of_exports(exported: Exported) -> None:
    deployment = exported.deployment
    recipe, platform = deployment.recipe, deployment.platform
    assert select_assets(recipe, None) == ["shards_manifest", *CACHES, *EXPORTS]
    shown = preview(recipe, platform, partitions=None, assets=None)
    assert not shown.jobs
    assert "export: 3 partitions committed already; reused" in shown.notes
    planner = planner_of(recipe, platform)
    lines = {line.asset: line for line in make_bill(recipe, platform, planner, planner.current_plan()).caches}
    for asset in EXPORTS:
        n_bytes = sum(result_of(deployment, asset, key)[1].n_bytes for key in SHARDS)
        assert (lines[asset].n_there, lines[asset].bytes_there, lines[asset].n_bytes) == (3, n_bytes, n_bytes)


def test_the_check_of_a_file_that_was_changed_since_fails_and_names_it(exported: Exported) -> None:
    deployment = exported.deployment
    folder, _ = result_of(deployment, "export_hf", SHARDS[2])
    path = folder / "data" / "data" / "part-00000.parquet"
    flip_byte(path)
    try:
        job = deployment.definitions.resolve_implicit_global_asset_job_def()
        key = dg.AssetCheckKey(deployment.recipe.key("export_hf"), "files")
        result = job.get_subset(asset_selection=set(), asset_check_selection={key}).execute_in_process(
            instance=deployment.instance, raise_on_error=False
        )
        assert not result.success
        assert f"{path} was changed after its commit" in failure_text(result)
        passed = {check.partition: check.passed for check in deployment.checks(result.run_id)}
        assert passed == {SHARDS[0]: True, SHARDS[1]: True, SHARDS[2]: False}
        report = verify(deployment.platform.recipe_folder("tiny"))
        assert [(problem.kind, problem.path) for problem in report.problems] == [("changed_part", path)]
    finally:
        flip_byte(path)


@pytest.mark.parametrize("damage", ["failed a check", "is not JSON"])
def test_a_cache_that_is_not_worth_it_is_not_exported_and_other_exports_are(exported: Exported, damage: str) -> None:
    deployment = exported.deployment
    folder, manifest = result_of(deployment, "embedding_cache", SHARDS[0])
    failed = {"recomputed": {**manifest.checks["recomputed"], "passed": False}}
    path, text = folder / "manifest.json", manifest.to_json()
    path.write_text(dataclasses.replace(manifest, checks=failed).to_json() if damage == "failed a check" else "{")
    try:
        planner = planner_of(deployment.recipe, deployment.platform)
        work = export_work(planner, deployment.recipe, SHARDS, EXPORTS)
        assert list(work.impossible) == [SHARDS[0]]
        assert damage in work.impossible[SHARDS[0]]
        assert "embedding_cache" in work.impossible[SHARDS[0]]
        made = {(unit.partition_key, output.asset) for unit in work.units for output in unit.outputs}
        whole = {(key, asset) for key in SHARDS[1:] for asset in EXPORTS}
        assert made == (whole | {(SHARDS[0], "export_safetensors")} if damage == "failed a check" else whole)
        assert not work.survey().missing.units
    finally:
        path.write_text(text)


def test_every_kind_of_job_is_looked_for_when_its_run_is_gone() -> None:
    assert set(KINDS) == set(get_args(JobKind))


def test_the_recipes_jobs_and_its_group_have_the_exports(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(exports=["hf"])
    graph = deployment.definitions.resolve_asset_graph()
    node = graph.get(deployment.recipe.key("export_hf"))
    assert node.parent_keys == {deployment.recipe.key(cache) for cache in CACHES}
    assert (node.group_name, node.partitions_def) == ("tiny", deployment.recipe.partitions)
    job = deployment.definitions.resolve_job_def("tiny_caches")
    assert deployment.recipe.key("export_hf") in job.asset_layer.executable_asset_keys


def test_an_export_without_its_caches_is_a_named_failure_and_others_are_made(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy(exports=["hf"], **SMALL)
    deployment.plan()
    shown = preview(deployment.recipe, deployment.platform, partitions=None, assets=None)
    assert "export: export_hf follow, in the run, of what these jobs make" in shown.notes
    nothing = deployment.run("export_hf", partition=SHARDS[0])
    assert not nothing.success
    assert "tiny/shards_manifest has no partition tiny-00000" in failure_text(nothing)
    assert deployment.run("shards_manifest", partition_range=ALL).success
    assert deployment.run("topk_cache", partition=SHARDS[1]).success
    some = deployment.run("export_hf", partition_range=ALL)
    assert not some.success
    text = failure_text(some)
    for key in (SHARDS[0], SHARDS[2]):
        assert f"tiny/export_hf is made of tiny/topk_cache, which has no partition {key}" in text
    assert "select it in the same run" in text
    assert set(deployment.materializations(some.run_id)) == {("export_hf", SHARDS[1])}


def test_a_cache_that_changed_makes_its_export_stale_and_the_old_one_stays(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(exports=["hf"], **SMALL)
    deployment.plan()
    assert deployment.run("shards_manifest", "topk_cache", "export_hf", partition_range=ALL).success
    old = {key: result_of(deployment, "export_hf", key) for key in SHARDS}
    assert status(deployment, "export_hf", SHARDS[1]) is StaleStatus.FRESH
    changed = documents(12)
    changed[5]["text"] += " again"
    deployment.write(changed)
    deployment.plan()
    assert deployment.run("shards_manifest", "topk_cache", partition_range=ALL).success
    assert status(deployment, "export_hf", SHARDS[0]) is StaleStatus.FRESH
    assert status(deployment, "export_hf", SHARDS[1]) is StaleStatus.STALE
    assert requests_of_the_night(deployment) == [(SHARDS[1], {"export_hf"})]
    assert deployment.run("export_hf", partition_range=ALL).success
    assert status(deployment, "export_hf", SHARDS[1]) is StaleStatus.FRESH
    folder, manifest = result_of(deployment, "export_hf", SHARDS[1])
    assert folder != old[SHARDS[1]][0]
    assert manifest.data_version != old[SHARDS[1]][1].data_version
    assert result_of(deployment, "export_hf", SHARDS[0]) == old[SHARDS[0]]
    assert read_manifest(old[SHARDS[1]][0]) == old[SHARDS[1]][1]
    report = verify(deployment.platform.recipe_folder("tiny"))
    assert (report.problems, report.notes) == ((), ())

    put_aside(deployment.platform.recipe_folder("tiny"), [SHARDS[2]], ["topk_cache"], why="a bad node")
    assert requests_of_the_night(deployment) == [(SHARDS[2], {"topk_cache", "export_hf"})]
    assert deployment.run("topk_cache", "export_hf", partition=SHARDS[2]).success
    put_aside(deployment.platform.recipe_folder("tiny"), [SHARDS[2]], ["export_hf"], why="a bad disk")
    assert requests_of_the_night(deployment) == [(SHARDS[2], {"export_hf"})]
    shown = preview(deployment.recipe, deployment.platform, partitions=None, assets=["tiny/export_hf"])
    assert [(job.spec.kind, job.n_partitions) for job in shown.jobs] == [("export", 1)]


KILLED_ONCE = '''
"""Loaded by every Python that is started with it: kills the first task that has written two sections of an export."""
import os, signal, sys
from pathlib import Path

if "kd_assets.worker" in " ".join(sys.orig_argv):
    from kd_assets.export.folder import Journal

    real, marker = Journal.append, Path(__file__).with_name("was killed")

    def append(self, line):
        real(self, line)
        if len(self.finished) == 2 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.append = append
'''


def test_a_task_that_is_killed_in_the_middle_of_an_export_goes_on_where_it_was(
    deploy: Callable[..., Deployment], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"exports": ["safetensors"], **SMALL, "documents_per_shard": 12, "part_documents": 4}
    plain = deploy(**changes)
    plain.plan()
    assert plain.run("shards_manifest", "topk_cache", "export_safetensors", partition=SHARDS[0]).success
    folder, manifest = result_of(plain, "export_safetensors", SHARDS[0])
    put_aside(plain.platform.recipe_folder("tiny"), [SHARDS[0]], ["export_safetensors"], why="to be made again")

    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(KILLED_ONCE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}:$PYTHONPATH" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    platform = Platform(home=str(plain.home), compute_python=str(python))
    killed = deploy(platform=platform, **changes)
    result = killed.run("export_safetensors", partition=SHARDS[0])
    assert result.success, failure_text(result)
    assert (site / "was killed").exists()
    assert result_of(killed, "export_safetensors", SHARDS[0])[0] == folder
    assert read_manifest(folder).parts == manifest.parts
    assert len(manifest.parts) == 8, "three sections of two files, the index and export.json"
    assert verify(folder).ok
