"""Any selection works and nothing is silent: runs over real jobs of a tiny teacher, and what Dagster has of them."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster_postgres.utils import DagsterPostgresException
from safetensors.torch import load_file, save_file

from kd_assets.dagster_internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    input_data_version_tag,
)
from kd_assets.errors import NotCommittedError
from kd_assets.orchestration import materialize as materialize_module
from kd_assets.orchestration import platform as platform_module
from kd_assets.orchestration.driving import driver as driver_module
from kd_assets.orchestration.driving.results import FailedResult
from kd_assets.orchestration.failure_report import (
    as_markdown,
    failed_in_words,
    failure_report,
    log_tails_markdown,
)
from kd_assets.orchestration.materialize import PLAN_TAG, planner_of, register_partitions
from kd_assets.orchestration.planning import planner as planner_module
from kd_assets.orchestration.planning.planned_work import PlannedWork
from kd_assets.orchestration.planning.planner import Planner
from kd_assets.orchestration.platform import Platform
from kd_assets.orchestration.retries import FailureClass
from kd_assets.orchestration.run import as_failure
from kd_assets.scheduler import LocalScheduler, Submission
from kd_assets.sources.planning.plan import ShardPlan
from kd_assets.store import CacheReader, read_manifest, verify
from kd_assets.store import manifest as manifest_module
from kd_assets.student.dataset import TeacherCacheDataset
from kd_assets_tests.orchestration.deployment import (
    CACHES,
    DOCUMENTS_PER_SHARD,
    SHARDS,
    Deployment,
    documents,
    failure_text,
    folder_of,
    is_reused,
)

ALL = (SHARDS[0], SHARDS[-1])


@pytest.fixture(scope="module")
def full_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path
) -> Iterator[tuple[Deployment, dg.ExecuteInProcessResult]]:
    """One run of everything over all partitions, for the tests that only look at it."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "instance").mkdir()
    with dg.DagsterInstance.local_temp(str(folder / "instance")) as instance:
        deployment = Deployment(folder, tiny_teacher, instance)
        deployment.plan()
        result = deployment.run(*deployment.everything, partition_range=ALL)
        assert result.success, failure_text(result)
        yield deployment, result


FullRun = tuple[Deployment, dg.ExecuteInProcessResult]


def test_everything_in_one_run_over_all_partitions_records_each_partition_once(full_run: FullRun) -> None:
    deployment, result = full_run
    found = deployment.materializations(result.run_id)
    expected = {(asset, key) for asset in ("shards_manifest", *CACHES) for key in SHARDS}
    assert set(found) == expected | {("shard_plan", None), ("student_smoke", None)}
    assert all(len(records) == 1 for records in found.values())
    assert deployment.n_teacher_loads() == 1


def test_a_runs_last_line_counts_what_was_made_reused_and_failed(full_run: FullRun) -> None:
    deployment, result = full_run
    assert [
        line for line in deployment.log_lines(result.run_id) if re.fullmatch(r"3 made, 0 reused, 0 failed, \d+ s", line)
    ]


def test_what_a_run_shows_of_files_is_text_since_a_browser_opens_none(full_run: FullRun) -> None:
    deployment, result = full_run
    of_type = {dg.DagsterEventType.ASSET_OBSERVATION, dg.DagsterEventType.ASSET_MATERIALIZATION}
    records = deployment.instance.all_logs(result.run_id, of_type=of_type)
    shown = [r.asset_observation or r.asset_materialization for r in records]
    metadata = [value for s in shown if s is not None for value in s.metadata.values()]
    assert any(isinstance(value, dg.PathMetadataValue) for value in metadata)
    assert not [value for value in metadata if isinstance(value, dg.UrlMetadataValue)]


def test_each_partition_has_its_own_metadata_and_versions(full_run: FullRun) -> None:
    deployment, result = full_run
    partitioned = {k: v for k, v in deployment.materializations(result.run_id).items() if k[1] is not None}
    found = {k: v[0] for k, v in partitioned.items()}
    for (asset, key), materialization in found.items():
        manifest = read_manifest(folder_of(materialization))
        tags = materialization.tags or {}
        assert (manifest.asset, manifest.partition_key) == (asset, key)
        assert tags[DATA_VERSION_TAG] == manifest.data_version
        assert tags[CODE_VERSION_TAG] == deployment.recipe.code_version(asset)
        assert str(materialization.metadata["contents"].value).startswith("4 documents, ")
        assert materialization.metadata["dagster/size_bytes"].value == manifest.n_bytes
        assert materialization.metadata["provenance"].value["dagster_run_id"] == result.run_id  # type: ignore[call-overload,index]
        if asset in CACHES:
            shard = found["shards_manifest", key].tags or {}
            assert tags[input_data_version_tag(deployment.recipe.key("shards_manifest"))] == shard[DATA_VERSION_TAG]
    versions = {(m.tags or {})[DATA_VERSION_TAG] for m in found.values()}
    assert len(versions) == len(found), "every partition of every asset has content of its own"


def test_the_page_of_an_asset_has_a_dozen_rows_and_no_number_that_is_always_the_same(full_run: FullRun) -> None:
    deployment, result = full_run
    recorded = deployment.materializations(result.run_id) | deployment.materializations(result.run_id, "cache_card")
    assert {asset for asset, _ in recorded} == {*deployment.everything, "cache_card"}
    for (asset, _), (materialization,) in recorded.items():
        assert len(materialization.metadata) <= 12, (asset, list(materialization.metadata))
        assert not any(isinstance(value, dg.NullMetadataValue) for value in materialization.metadata.values())
        assert "slurm" not in str(materialization.metadata), "there is no SLURM"
    picture = recorded["cache_card", None][0].metadata["shards"].value
    assert str(picture).startswith("![tokens/s, largest difference, kept probability of each shard]")
    shown = [recorded["topk_cache", key][0].metadata for key in SHARDS]
    numbers = {name for name, value in shown[0].items() if isinstance(value.value, int | float)} - {"reused"}
    assert numbers == {
        *("dagster/size_bytes", "bytes_per_token", "largest_logprob_difference_nats", "kept_mass", "tokens_per_s"),
    }
    for name in numbers:
        assert len({metadata[name].value for metadata in shown}) > 1, name


def test_a_run_that_made_shards_shows_the_lengths_of_all_of_them_once(full_run: FullRun) -> None:
    deployment, first = full_run
    second = deployment.run("shards_manifest", partition_range=ALL)
    pictures = [observed_lengths(deployment, result.run_id) for result in (first, second)]
    assert [len(found) for found in pictures] == [1, 0], "nothing was made by the second"
    (observation,) = pictures[0]
    assert (observation.asset_key, observation.partition) == (deployment.recipe.key("shards_manifest"), None)
    assert (observation.metadata["shards"].value, observation.metadata["documents"].value) == (3, 12)
    assert str(observation.metadata["lengths"].value).startswith("![")


def observed_lengths(deployment: Deployment, run_id: str) -> list[dg.AssetObservation]:
    records = deployment.instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ASSET_OBSERVATION).records
    events = [r.event_log_entry.dagster_event for r in records]
    found = [e.asset_observation_data.asset_observation for e in events if e is not None]
    return [observation for observation in found if "lengths" in observation.metadata]


def test_fields_that_nothing_was_made_of_and_licences_are_in_the_metadata_of_a_shard(deployment: Deployment) -> None:
    lines = [json.loads(line) for line in deployment.corpus.read_text().splitlines()]
    lines[0] |= {"meta": 1, "url": "x"}
    lines[1] |= {"meta": None}
    deployment.corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    deployment.plan()
    result = deployment.run("shards_manifest", partition=SHARDS[0])
    assert result.success, failure_text(result)
    ((record,),) = deployment.materializations(result.run_id).values()
    assert record.metadata["fields ignored"].value == "meta (2 documents), url (1 document)"
    assert record.metadata["licences"].value == deployment.recipe.sources[0].spec.licence
    assert record.metadata["learned_share"].value == 1.0


@pytest.mark.parametrize("part", ["plan.json", "blocks/*.json"])
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_damaged_plan_is_mended_by_planning_again_as_its_error_says(
    deployment: Deployment, part: str, harm: str
) -> None:
    (path,) = (deployment.platform.recipe_folder("tiny") / "shard_plan").glob(part)
    made = path.read_bytes()
    path.write_bytes(made[:100])
    if harm == "gone":
        path.unlink()
    failed = deployment.run("shards_manifest", partition=SHARDS[0])
    assert "materialize" in failure_text(failed)
    assert "shard_plan" in failure_text(failed)
    assert deployment.run("shard_plan").success
    assert path.read_bytes() == made
    assert deployment.run("shards_manifest", partition=SHARDS[0]).success


def test_one_cache_of_one_partition_makes_that_and_no_other(deployment: Deployment) -> None:
    assert deployment.run("shards_manifest", partition_range=ALL).success
    result = deployment.run("hidden_state_cache", partition=SHARDS[1])
    assert result.success, failure_text(result)
    assert set(deployment.materializations(result.run_id)) == {("hidden_state_cache", SHARDS[1])}
    store = deployment.platform.recipe_folder("tiny")
    assert not (store / "topk_cache").exists()
    assert [p.name for p in (store / "hidden_state_cache").glob("*/*")] == [SHARDS[1]]


def test_what_is_committed_is_recorded_again_and_never_computed_again(full_run: FullRun) -> None:
    deployment, first = full_run
    second = deployment.run("shards_manifest", *CACHES, partition_range=ALL)
    assert second.success
    assert deployment.n_teacher_loads() == 1
    before, after = (deployment.materializations(r.run_id) for r in (first, second))
    assert set(after) == {key for key in before if key[1] is not None}
    for key, (materialization,) in after.items():
        assert is_reused(materialization)
        assert (materialization.tags or {})[DATA_VERSION_TAG] == (before[key][0].tags or {})[DATA_VERSION_TAG]
        made_by = str(materialization.metadata["made_by"].value)
        assert made_by == f"reused: {before[key][0].metadata['made_by'].value}", "its log, job and node"
        log = made_by.rpartition("log ")[2]
        assert Path(log).is_file()


def test_a_third_cache_is_added_to_two_by_one_more_pass_that_makes_only_it(deployment: Deployment) -> None:
    assert deployment.run("shards_manifest", "topk_cache", "embedding_cache", partition=SHARDS[0]).success
    result = deployment.run(*CACHES, partition=SHARDS[0])
    assert result.success, failure_text(result)
    reused = {k[0]: is_reused(m[0]) for k, m in deployment.materializations(result.run_id).items()}
    assert reused == {"topk_cache": True, "embedding_cache": True, "hidden_state_cache": False}
    last = max(deployment.job_events("committed"), key=lambda event: event.time)
    assert last.data["asset"] == "hidden_state_cache"


def test_caches_without_their_shard_fail_and_say_what_to_materialize(deployment: Deployment) -> None:
    result = deployment.run("topk_cache", partition=SHARDS[0])
    assert not result.success
    assert f"tiny/shards_manifest has no partition {SHARDS[0]}" in failure_text(result)
    assert "select it in the same run" in failure_text(result)


def test_a_shard_that_cannot_be_tokenised_fails_alone_and_by_name(deployment: Deployment) -> None:
    lines = deployment.corpus.read_text().splitlines()
    lines[5] = '{"text": 7}'
    deployment.corpus.write_text("\n".join(lines) + "\n")
    deployment.plan()
    result = deployment.run("shards_manifest", *CACHES, "student_smoke", partition_range=ALL)
    assert not result.success
    assert set(deployment.materializations(result.run_id)) == {
        (asset, key) for asset in ("shards_manifest", *CACHES) for key in (SHARDS[0], SHARDS[2])
    }
    text = failure_text(result)
    assert SHARDS[1] in text
    assert "corpus.jsonl:6" in text
    assert SHARDS[0] not in text


def test_re_execution_after_a_failure_does_only_what_is_missing(deployment: Deployment) -> None:
    good = deployment.corpus.read_text()
    lines = good.splitlines()
    lines[5] = "not json"
    deployment.corpus.write_text("\n".join(lines) + "\n")
    deployment.plan()
    failed = deployment.run("shards_manifest", *CACHES, partition_range=ALL)
    assert not failed.success
    assert {key for _, key in deployment.materializations(failed.run_id)} == {SHARDS[0], SHARDS[2]}, failure_text(
        failed
    )
    deployment.corpus.write_text(good)
    deployment.plan()
    result = deployment.run("shards_manifest", *CACHES, partition_range=ALL)
    assert result.success, failure_text(result)
    reused = {k: is_reused(m[0]) for k, m in deployment.materializations(result.run_id).items()}
    assert {key for (_, key), value in reused.items() if not value} == {SHARDS[1]}
    assert len(reused) == len(SHARDS) * 4


def test_a_run_that_dagster_was_made_to_call_cancelled_ends_and_cancels_its_job(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As "force termination" does, where the run's code server is gone: no signal comes."""
    monkeypatch.setattr(driver_module, "CANCELED_INTERVAL_S", 0.0)
    submit = LocalScheduler.submit

    def submit_and_cancel_the_run(*arguments: Any) -> Submission:
        submission = submit(*arguments)
        (run,) = deployment.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
        deployment.instance.report_run_canceled(run)
        return submission

    monkeypatch.setattr(LocalScheduler, "submit", submit_and_cancel_the_run)
    result = deployment.run("shards_manifest", partition_range=ALL)
    (run,) = deployment.instance.get_runs(limit=1)
    assert run.status is dg.DagsterRunStatus.CANCELED, failure_text(result)
    lines = deployment.log_lines(run.run_id)
    assert [line for line in lines if line.startswith("terminated: cancelling")]
    assert [line for line in lines if line.startswith("nothing runs any more of")]


def test_a_partition_outside_the_plan_fails_by_name(deployment: Deployment) -> None:
    deployment.write(documents(4))
    deployment.plan()
    deployment.instance.add_dynamic_partitions("tiny_shards", [SHARDS[1]])
    result = deployment.run("shards_manifest", partition=SHARDS[1])
    assert not result.success
    assert f"has no shard {SHARDS[1]}" in failure_text(result)
    whole_range = deployment.run("shards_manifest", partition_range=(SHARDS[0], SHARDS[1]))
    assert whole_range.success, "a range is what the plan has of it"
    assert set(deployment.materializations(whole_range.run_id)) == {("shards_manifest", SHARDS[0])}


def test_skipped_bad_records_are_counted_in_the_metadata(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(on_bad_record="skip")
    deployment.corpus.write_text(
        deployment.corpus.read_text() + "{broken\n" + json.dumps({"text": "a last one"}) + "\n"
    )
    deployment.plan()
    result = deployment.run("shards_manifest", partition="tiny-00003")
    assert result.success, failure_text(result)
    ((record,),) = deployment.materializations(result.run_id).values()
    assert record.metadata["records"].value == "left out as bad: 1"
    assert str(record.metadata["contents"].value).startswith("1 document, ")


def test_a_shard_of_skipped_records_alone_is_empty_all_the_way_to_the_student(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy(on_bad_record="skip")
    lines = deployment.corpus.read_text().splitlines()
    lines[DOCUMENTS_PER_SHARD : 2 * DOCUMENTS_PER_SHARD] = ["{broken"] * DOCUMENTS_PER_SHARD
    deployment.corpus.write_text("\n".join(lines) + "\n")
    deployment.plan()
    result = deployment.run("shards_manifest", *CACHES, "student_smoke", partition_range=ALL)
    assert result.success, failure_text(result)
    assert all(check.passed for check in deployment.checks(result.run_id))
    recipe_folder = deployment.platform.recipe_folder("tiny")
    for asset in ("shards_manifest", *CACHES):
        reader = CacheReader(recipe_folder, asset)
        assert [manifest.n_documents for manifest in reader.manifests] == [4, 0, 4]
        assert len(reader) == len(reader.document_ids) == 8
    assert verify(recipe_folder).problems == ()
    again = deployment.run("shards_manifest", *CACHES, partition_range=ALL)
    assert again.success, failure_text(again)
    recorded = deployment.materializations(again.run_id).values()
    assert all(is_reused(record) for (record,) in recorded)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"sources": [{"name": "a", "path": "$KD_NO_SUCH_VARIABLE"}]},
            "environment variable KD_NO_SUCH_VARIABLE",
        ),
        ({"sources": [{"name": "a", "path": "/no/such/file.jsonl"}]}, "/no/such/file.jsonl"),
    ],
)
def test_a_source_that_is_not_there_fails_the_plan_and_writes_nothing(
    deploy: Callable[..., Deployment], changes: dict[str, object], expected: str
) -> None:
    deployment = deploy(**changes)
    result = deployment.run("shard_plan")
    assert not result.success
    assert expected in failure_text(result)
    assert not (deployment.home / "store").exists()
    assert list(deployment.instance.get_dynamic_partitions("tiny_shards")) == []


def test_an_empty_source_fails_the_plan(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy()
    deployment.corpus.write_text("")
    result = deployment.run("shard_plan")
    assert not result.success
    assert "corpus.jsonl is empty" in failure_text(result)


def test_a_missing_teacher_fails_the_run_with_its_path(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(teacher={"model_id": "$KD_HOME/no-teacher"})
    deployment.plan()
    result = deployment.run("shards_manifest", *CACHES, partition=SHARDS[0])
    assert not result.success
    assert "no-teacher" in failure_text(result)


def test_materializing_before_there_is_a_plan_says_so(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy()
    deployment.instance.add_dynamic_partitions("tiny_shards", list(SHARDS))
    result = deployment.run("topk_cache", partition=SHARDS[0])
    assert not result.success
    assert "materialize tiny/shard_plan first" in failure_text(result)


def test_the_checks_of_every_partition_are_recorded_with_their_numbers(full_run: FullRun) -> None:
    deployment, result = full_run
    evaluations = deployment.checks(result.run_id)
    assert {(e.asset_key.path[-1], e.partition, e.check_name) for e in evaluations} == {
        (asset, key, name)
        for asset in CACHES
        for key in SHARDS
        for name in ("complete", "schema", "finite", "recomputed")
    }
    assert all(e.passed and e.target_materialization_data is not None for e in evaluations)
    assert all(str(e.description).startswith(f"{e.partition}: ") for e in evaluations)
    recomputed = next(e for e in evaluations if (e.check_name, e.asset_key.path[-1]) == ("recomputed", "topk_cache"))
    assert 0 < recomputed.metadata["max_abs_logprob_difference"].value < 0.05  # type: ignore[operator]


def test_a_failed_check_is_recorded_and_fails_the_run_by_name(deployment: Deployment) -> None:
    assert deployment.run("shards_manifest", *CACHES, partition=SHARDS[0]).success
    (part,) = (deployment.platform.recipe_folder("tiny") / "embedding_cache").glob("*/*/*/part-*")
    good = part.read_bytes()
    part.write_bytes(good[:8] + bytes(len(good) - 16) + good[-8:])  # of the size it should have, and nothing else
    result = deployment.run(*CACHES, partition=SHARDS[0])
    assert not result.success
    failed = {(e.asset_key.path[-1], e.check_name) for e in deployment.checks(result.run_id) if not e.passed}
    assert ("embedding_cache", "schema") in failed
    assert {asset for asset, _ in failed} == {"embedding_cache"}
    assert "embedding_cache: check schema failed" in failure_text(result)


def test_readers_keep_to_the_plan_when_a_source_is_cut_and_when_partitions_are_missing(deployment: Deployment) -> None:
    assert deployment.run("shards_manifest", *CACHES, partition_range=ALL).success
    recipe_folder = deployment.platform.recipe_folder("tiny")
    assert len(TeacherCacheDataset.from_recipe(recipe_folder)) == 12
    deployment.write(documents(4))
    deployment.plan()
    cut = TeacherCacheDataset.from_recipe(recipe_folder)
    assert len(cut) == 4
    assert set(cut.left_out) == set(SHARDS[1:])
    deployment.write([*documents(4), *documents(6, seed=5)[4:]])
    deployment.plan()
    with pytest.raises(NotCommittedError, match=rf"'{SHARDS[1]}' \(1 missing of 2\): it was made of another shard"):
        TeacherCacheDataset.from_recipe(recipe_folder)
    assert len(TeacherCacheDataset.from_recipe(recipe_folder, missing="skip")) == 4
    assert deployment.run("shards_manifest", *CACHES, partition=SHARDS[1]).success
    assert len(TeacherCacheDataset.from_recipe(recipe_folder)) == 6


def test_a_result_that_failed_a_check_is_kept_and_named_and_never_current_however_often_it_is_asked_for(
    deploy: Callable[..., Deployment], tiny_teacher: Path, tmp_path: Path
) -> None:
    """A head scaled so far that log-probabilities fall below the range of float16."""
    teacher = shutil.copytree(tiny_teacher, tmp_path / "loud teacher")
    weights = load_file(teacher / "model.safetensors")
    weights["lm_head.weight"] *= 1e6
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    deployment = deploy(teacher={"model_id": str(teacher), "dtype": "float32", "token_budget": 256})
    deployment.plan()
    recipe_folder = deployment.platform.recipe_folder("tiny")
    assert not deployment.run("shards_manifest", *CACHES, partition_range=ALL).success
    (folder,) = recipe_folder.glob(f"topk_cache/*/{SHARDS[0]}/*/")
    for _ in range(2):
        again = deployment.run("topk_cache", partition=SHARDS[0])
        assert not again.success
        assert f"NaN or infinite. It stays in {folder}" in failure_text(again)
        assert {e.check_name for e in deployment.checks(again.run_id) if not e.passed} >= {"finite"}
        assert not list(recipe_folder.glob("topk_cache/*/*/head.json"))
    assert len(list(recipe_folder.glob("embedding_cache/*/*/head.json"))) == len(SHARDS), "these numbers are right"
    assert deployment.n_teacher_loads() == 1, "what is there is not computed again"
    student = deployment.run("student_smoke")
    assert not student.success
    assert "no partition of tiny has all its caches" in failure_text(student)


@pytest.mark.parametrize("asset", ["shards_manifest", "topk_cache"])
def test_one_damaged_manifest_fails_its_partition_alone_and_says_what_to_do(deployment: Deployment, asset: str) -> None:
    assert deployment.run("shards_manifest", partition_range=(SHARDS[0], SHARDS[1])).success
    assert deployment.run("topk_cache", partition=SHARDS[0]).success
    (manifest,) = deployment.platform.recipe_folder("tiny").glob(f"{asset}/*/{SHARDS[0]}/*/manifest.json")
    manifest.write_text(manifest.read_text().replace('"n_documents": 4', '"n_documents": 5', 1))
    result = deployment.run("topk_cache", partition_range=(SHARDS[0], SHARDS[1]))
    assert not result.success
    assert set(deployment.materializations(result.run_id)) == {("topk_cache", SHARDS[1])}
    assert f"Move {manifest.parent} away and materialize" in failure_text(result)


def test_checks_can_be_executed_alone_and_compute_nothing(full_run: FullRun) -> None:
    deployment, _ = full_run
    key = dg.AssetCheckKey(deployment.recipe.key("topk_cache"), "complete")
    job = dg.define_asset_job("only_checks", selection=dg.AssetSelection.checks(key)).resolve(
        asset_graph=deployment.definitions.resolve_asset_graph()
    )
    jobs_before = len(deployment.job_events("task_started"))
    result = (
        dg.Definitions(
            assets=deployment.definitions.assets, jobs=[job], resources={"kd_assets_platform": deployment.platform}
        )
        .resolve_job_def("only_checks")
        .execute_in_process(instance=deployment.instance, raise_on_error=False)
    )
    assert result.success, failure_text(result)
    assert {(e.partition, e.passed) for e in deployment.checks(result.run_id)} == {(key, True) for key in SHARDS}
    assert deployment.materializations(result.run_id) == {}
    assert len(deployment.job_events("task_started")) == jobs_before


def test_the_student_learns_and_its_curve_is_a_picture(full_run: FullRun) -> None:
    deployment, result = full_run
    ((record,),) = deployment.materializations(result.run_id, "student_smoke").values()
    assert record.metadata["last_loss"].value < record.metadata["first_loss"].value  # type: ignore[operator]
    assert (record.metadata["shards"].value, record.metadata["shards_in_plan"].value) == (3, 3)
    assert "data:image/png;base64,iVBOR" in str(record.metadata["loss_curve"].value)


def test_the_student_without_a_complete_shard_says_so(deployment: Deployment) -> None:
    result = deployment.run("student_smoke")
    assert not result.success
    assert "no partition of tiny has all its caches" in failure_text(result)


def test_partitions_are_registered_in_sorted_order_also_when_the_source_grows_and_shrinks(
    deployment: Deployment,
) -> None:
    def partitions() -> list[str]:
        return list(deployment.instance.get_dynamic_partitions("tiny_shards"))

    assert partitions() == list(SHARDS)
    deployment.write(documents(45))
    deployment.plan()
    assert partitions() == [f"tiny-{i:05d}" for i in range(12)]
    deployment.write(documents(3))
    deployment.plan()
    assert partitions() == [SHARDS[0]]
    deployment.instance.delete_dynamic_partition("tiny_shards", SHARDS[0])
    deployment.instance.add_dynamic_partitions("tiny_shards", [SHARDS[2], SHARDS[0]])
    deployment.write(documents(12))
    deployment.plan()
    assert partitions() == [f"tiny-{i:05d}" for i in range(4)], "the first shard keeps its three documents"


def test_a_run_that_includes_the_plan_works_from_that_plan(deployment: Deployment) -> None:
    deployment.write(documents(12, seed=3))
    result = deployment.run("shard_plan", "shards_manifest", partition=SHARDS[0])
    assert result.success, failure_text(result)
    plan_version = result.asset_materializations_for_node("tiny__shard_plan")[0].tags or {}
    ((shard,),) = deployment.materializations(result.run_id, "shards_manifest").values()
    assert (shard.tags or {})[input_data_version_tag(deployment.recipe.key("shard_plan"))] == plan_version[
        DATA_VERSION_TAG
    ]


def test_a_plan_that_is_made_during_a_run_is_for_the_runs_after_it(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a nightly plan, after the shards of a long run are tokenised and before its teacher has begun."""
    before = planner_of(deployment.recipe, deployment.platform).current_plan()
    teacher_work, made = Planner.teacher_work, list[ShardPlan]()

    def after_a_new_plan(self: Planner, *args: Any, **kwargs: Any) -> PlannedWork:
        if not made:
            deployment.write(documents(len(SHARDS) * DOCUMENTS_PER_SHARD, seed=9))
            made.append(planner_of(deployment.recipe, deployment.platform).make_plan())
        return teacher_work(self, *args, **kwargs)

    monkeypatch.setattr(Planner, "teacher_work", after_a_new_plan)
    result = deployment.run("shards_manifest", *CACHES, "student_smoke", partition=SHARDS[0])
    assert result.success, failure_text(result)
    assert made[0].plan_hash != before.plan_hash
    found = deployment.materializations(result.run_id)
    assert set(found) == {("student_smoke", None), *((asset, SHARDS[0]) for asset in ("shards_manifest", *CACHES))}
    plans = {m.metadata["provenance"].value["plan_hash"] for (m,) in found.values()}  # type: ignore[call-overload,index]
    assert plans == {before.plan_hash}
    shard = found["shards_manifest", SHARDS[0]][0].tags or {}
    assert shard[input_data_version_tag(deployment.recipe.key("shard_plan"))] == before.plan_hash
    (run,) = deployment.instance.get_runs(dg.RunsFilter(run_ids=[result.run_id]))
    assert run.tags[PLAN_TAG] == before.plan_hash
    again = deployment.run("topk_cache", partition=SHARDS[0])
    assert f"tiny/shards_manifest has no partition {SHARDS[0]} for the current plan" in failure_text(again)


def test_a_run_reads_its_plan_its_profile_and_each_manifest_that_it_reuses_once(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a cluster profile: the local scheduler stands in for the cluster."""
    profile = tmp_path / "site.yaml"
    profile.write_text("setup: ''\n")
    slurm = Platform(home=str(deployment.home), scheduler="slurm", slurm_profile=str(profile))
    monkeypatch.setattr(
        platform_module,
        "SlurmScheduler",
        lambda jobs_folder, *, profile, script, python, secrets_file: LocalScheduler(
            jobs_folder, script=script, python=python
        ),
    )
    n_profiles = counted(monkeypatch, platform_module, "read_profile", lambda path: "profile")
    n_plans = counted(monkeypatch, planner_module, "read_plan", lambda path: "plan")
    # The card reads them all again, as often as it is worth it.
    monkeypatch.setattr(materialize_module, "refresh_card", lambda *_: None)
    n_manifests = counted(monkeypatch, manifest_module, "parse_manifest", lambda data, path: str(path.parent))
    on_slurm = Deployment(deployment.home, Path("unused"), deployment.instance, platform=slurm, **deployment.attributes)
    assert on_slurm.run("shards_manifest", *CACHES, partition_range=ALL).success
    assert n_profiles == {"profile": 1}
    assert n_plans == {"plan": 1}
    n_manifests.clear()
    assert on_slurm.run(*CACHES, partition_range=ALL).success
    caches = {folder: n for folder, n in n_manifests.items() if Path(folder).parts[-4] in CACHES}
    assert len(caches) == len(SHARDS) * len(CACHES)
    assert set(caches.values()) == {1}


def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, what: Callable[..., str]) -> Counter[str]:
    """Count the calls of a function by what they are about."""
    real, calls = getattr(owner, name), Counter[str]()

    def call(*args: object, **kwargs: object) -> object:
        calls[what(*args, **kwargs)] += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


class FakePartitions:
    """Stands for a Dagster instance's dynamic partitions, and counts what is asked of it."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = list(keys)
        self.calls: Counter[str] = Counter()

    def get_dynamic_partitions(self, name: str) -> list[str]:
        self.calls["get"] += 1
        return list(self.keys)

    def add_dynamic_partitions(self, name: str, keys: Sequence[str]) -> None:
        self.calls["add"] += 1
        self.keys += keys

    def delete_dynamic_partition(self, name: str, key: str) -> None:
        self.calls["delete"] += 1
        self.keys.remove(key)


class Key(str):
    """A partition key that counts how often it is looked up in a set or a dict."""

    __slots__ = ()
    n_lookups = 0

    def __hash__(self) -> int:
        Key.n_lookups += 1
        return str.__hash__(self)


@pytest.mark.parametrize(
    ("present", "wanted", "expected"),
    [
        (range(3), range(3), {"get": 1}),
        (range(0), range(25_000), {"get": 1, "add": 3}),
        (range(3), range(5), {"get": 1, "add": 1}),
        (range(5), range(3), {"get": 1, "delete": 2}),
        ([2, 0], range(3), {"get": 1, "delete": 2, "add": 1}),
    ],
)
def test_registering_partitions_changes_what_differs_and_no_more(
    present: Sequence[int], wanted: Sequence[int], expected: dict[str, int]
) -> None:
    partitions = FakePartitions([f"s-{i:05d}" for i in present])
    keys = [f"s-{i:05d}" for i in wanted]
    register_partitions(partitions, "tiny_shards", keys)  # type: ignore[arg-type]
    assert partitions.keys == keys
    assert partitions.calls == expected


def test_partitions_that_live_runs_hold_stay_until_a_plan_after_their_end() -> None:
    keys = [f"s-{i:05d}" for i in range(5)]
    partitions = FakePartitions(keys)
    register_partitions(partitions, "tiny_shards", keys[:2], held={keys[0], keys[3]})  # type: ignore[arg-type]
    assert partitions.keys == [*keys[:2], keys[3]]
    register_partitions(partitions, "tiny_shards", keys[:2])  # type: ignore[arg-type]
    assert partitions.keys == keys[:2]


def test_a_plan_that_shrinks_leaves_the_partitions_of_live_and_queued_runs(deployment: Deployment) -> None:
    deployment.plan()
    job = deployment.definitions.resolve_job_def("tiny_caches")
    tags = {ASSET_PARTITION_RANGE_START_TAG: SHARDS[1], ASSET_PARTITION_RANGE_END_TAG: SHARDS[2]}
    queued = deployment.instance.create_run_for_job(job, status=dg.DagsterRunStatus.NOT_STARTED, tags=tags)
    deployment.write(documents(8))
    deployment.plan()
    assert list(deployment.instance.get_dynamic_partitions("tiny_shards")) == list(SHARDS)
    result = deployment.run("shards_manifest", partition_range=(SHARDS[1], SHARDS[2]))
    assert result.success, failure_text(result)
    assert set(deployment.materializations(result.run_id)) == {("shards_manifest", SHARDS[1])}
    said = "\n".join(entry.user_message for entry in deployment.instance.all_logs(result.run_id))
    assert f"1 partitions of the range are not in the plan any more, and are left out: {SHARDS[2]}" in said
    alone = deployment.run("shards_manifest", partition=SHARDS[2])
    assert not alone.success
    assert SHARDS[2] in failure_text(alone)
    deployment.instance.report_run_canceled(queued)
    deployment.plan()
    assert list(deployment.instance.get_dynamic_partitions("tiny_shards")) == list(SHARDS[:2])


def test_registering_partitions_costs_what_they_are_many_and_not_their_square() -> None:
    keys = [Key(f"s-{i:05d}") for i in range(2000)]
    Key.n_lookups = 0
    register_partitions(FakePartitions(keys[:1900]), "tiny_shards", keys)  # type: ignore[arg-type]
    assert Key.n_lookups < 10 * len(keys)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("<img src=x onerror=alert(1)>", r"\<img src=x onerror=alert\(1\)\>"),
        ("[here](http://x)", r"\[here\]\(http://x\)"),
        ("**bold** `code` | # x", r"\*\*bold\*\* \`code\` \| \# x"),
        ("plain words, of 12 %", "plain words, of 12 %"),
    ],
)
def test_causes_are_shown_as_they_are_and_not_as_markdown(said: str, shown: str) -> None:
    assert as_markdown(said) == shown


def test_a_cause_moves_no_cursor_and_turns_no_direction() -> None:
    cause = "bad id \x1b[2J\u202e\nsecond line"
    failed = FailedResult(partition_key="p", asset="topk_cache", failure=FailureClass.WORK, cause=cause)
    assert failed_in_words([failed]) == ["p (topk_cache): bad id \\x1b[2J\\u202e\nsecond line"]


def test_a_full_disk_of_dagsters_own_is_said_to_be_that() -> None:
    full = sqlite3.OperationalError("database or disk is full")
    with pytest.raises(dg.Failure, match="disk of DAGSTER_HOME"), as_failure():
        raise sa.exc.OperationalError("INSERT", {}, full)


def test_a_postgresql_that_takes_no_connections_is_said_to_be_that() -> None:
    with pytest.raises(dg.Failure, match=r"too many retries.*the server of its `storage`"), as_failure():
        raise DagsterPostgresException("too many retries for DB connection")


def test_the_end_of_a_log_is_shown_as_it_is_whatever_it_holds() -> None:
    shown = log_tails_markdown({"/jobs/0.log": "first\n```\n\x1b[31m<b>red</b>", "/jobs/1.log": "second"})
    first, second = shown.split("\n\n/jobs/1")
    assert first == "/jobs/0\\.log\n\n````text\nfirst\n```\n\\x1b[31m<b>red</b>\n````"
    assert second == "\\.log\n\n```text\nsecond\n```"
    assert log_tails_markdown({f"/{n}": "x" for n in range(7)}).endswith("and 2 more")
    assert log_tails_markdown({"/0": "a `word`\n\n<img src=x>"}) == "/0\n\n```text\na `word`\n\n<img src=x>\n```"


def test_a_failure_holds_the_end_of_each_log_and_its_path_as_text() -> None:
    failed = [
        FailedResult(
            partition_key=key,
            asset="topk_cache",
            failure=FailureClass.WORK,
            cause="it broke",
            log_file=Path("/jobs/0.log"),
            log_tail="Traceback\nBoom",
        )
        for key in ("a", "b")
    ]
    failure = failure_report("tiny", failed, checks={}, failures={FailureClass.WORK: 1}, node_faults=[])
    assert failure is not None
    assert str(failure.description).startswith("2 partitions not done in recipe tiny:")
    assert failure.metadata["logs"] == dg.MetadataValue.json(["/jobs/0.log"])
    assert "Traceback\nBoom" in str(failure.metadata["log_tails"].value)
    assert failure_report("tiny", [], checks={}, failures={}, node_faults=[]) is None
    one = failure_report("tiny", failed[:1], checks={}, failures={}, node_faults=[])
    assert one is not None
    assert str(one.description).startswith("1 partition not done in recipe tiny:")
