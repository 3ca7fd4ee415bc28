"""A result that was put aside: whoever tells how a partition stands says so, or treats it as missing, and it is made
again by what asks for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from kd_assets import cli
from kd_assets.cards.contents import contents_of
from kd_assets.contract import CONTRACT_VERSION, JobFile, WorkUnit
from kd_assets.dagster_internals import ASSET_PARTITION_RANGE_START_TAG
from kd_assets.diagnose.bill import bill_of
from kd_assets.diagnose.bill import text_lines as lines_of_bill
from kd_assets.diagnose.preview import preview
from kd_assets.diagnose.preview import text_lines as lines_of_preview
from kd_assets.errors import NotCommittedError
from kd_assets.orchestration.assets import caches_schedule
from kd_assets.orchestration.new_data import requests_for_missing
from kd_assets.orchestration.orphans import Orphan, requests_for
from kd_assets.orchestration.schedules import MOST_RANGES, WHY_TAG
from kd_assets.scheduler import Submission
from kd_assets.store import CacheReader, plan_output, put_aside, still_put_aside, verify
from kd_assets.store.reading.summary import inspect
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment, failure_text
from kd_assets_tests.orchestration.test_automation import Looks
from kd_assets_tests.orchestration.test_colours import Sensor as UpToDate
from kd_assets_tests.orchestration.test_new_data import Sensor as NewData
from kd_assets_tests.orchestration.test_new_data import ranges
from kd_assets_tests.orchestration.test_schedules import Night
from kd_assets_tests.orchestration.web_queries import web_queries


def requests_of_the_night(deployment: Deployment) -> list[tuple[str, set[str]]]:
    context = dg.build_schedule_context(
        instance=deployment.instance, resources={"kd_assets_platform": deployment.platform}
    )
    found = caches_schedule(deployment.recipe).evaluate_tick(context).run_requests or ()
    return [
        (request.tags[ASSET_PARTITION_RANGE_START_TAG], {key.path[-1] for key in request.asset_selection or ()})
        for request in found
    ]


def test_what_was_put_aside_is_asked_for_by_the_night_and_made_again(deployment: Deployment) -> None:
    everything = ("shards_manifest", *CACHES)
    assert deployment.run(*everything, partition_range=(SHARDS[0], SHARDS[-1])).success
    folder = deployment.platform.recipe_folder(deployment.recipe.name)
    before = CacheReader(folder, "topk_cache")
    versions = [manifest.data_version for manifest in before.manifests]
    assert requests_of_the_night(deployment) == []

    (moved,) = put_aside(folder, [SHARDS[1]], ["topk_cache"], why="a bad node")
    assert CacheReader(folder, "topk_cache", missing="skip").partition_keys == (SHARDS[0], SHARDS[2])
    assert requests_of_the_night(deployment) == [(SHARDS[1], {"topk_cache"})]

    n_loads = deployment.n_teacher_loads()
    assert deployment.run("topk_cache", partition=SHARDS[1]).success
    assert deployment.n_teacher_loads() == n_loads + 1
    after = CacheReader(folder, "topk_cache")
    assert [manifest.data_version for manifest in after.manifests] == versions
    assert after.folders[1] == moved.was
    assert requests_of_the_night(deployment) == []
    assert verify(folder).ok


# ------------------------------------------------------------------------------ what a person sees of it until then


@pytest.fixture(scope="module")
def aside(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Iterator[Deployment]:
    """All partitions are made, and one of one cache is in quarantine."""
    folder = tmp_path_factory.mktemp("aside")
    (folder / "instance").mkdir()
    with dg.DagsterInstance.local_temp(str(folder / "instance")) as instance:
        deployment = Deployment(folder, tiny_teacher, instance, exports=["hf"], student=None)
        deployment.plan()
        everything = ("shards_manifest", *CACHES, "export_hf")
        result = deployment.run(*everything, partition_range=(SHARDS[0], SHARDS[-1]))
        assert result.success, failure_text(result)
        put_aside(folder_of(deployment), [SHARDS[1]], ["topk_cache"], why="a bad node")
        yield deployment


def folder_of(deployment: Deployment) -> Path:
    return deployment.platform.recipe_folder(deployment.recipe.name)


def test_the_checks_of_the_assets_say_in_quarantine_and_not_stale(aside: Deployment) -> None:
    UpToDate(aside).tick()
    with web_queries(aside) as web:
        shown = {asset: web.checks(asset)["up_to_date"] for asset in ("topk_cache", "hidden_state_cache", "export_hf")}
        coverage = web.checks("shard_plan")["coverage"]
    made = "all 2 partitions that are made are those of today"
    assert shown["topk_cache"].description == f"{made}; 1 in quarantine, to be made again: {SHARDS[1]}"
    assert shown["export_hf"].description == f"1 of 3 partitions that are made are stale: {SHARDS[1]}"
    assert (shown["topk_cache"].status, shown["topk_cache"].severity) == ("FAILED", "WARN")
    assert (shown["export_hf"].status, shown["hidden_state_cache"].status) == ("FAILED", "SUCCEEDED")
    assert coverage.description == (
        "2 of 3 partitions are complete and those of today (topk_cache: 0 missing, 0 stale, 1 in quarantine; "
        "export_hf: 0 missing, 1 stale)"
    )
    assert (coverage.status, coverage.severity) == ("FAILED", "WARN")


def test_the_sensor_of_new_data_asks_for_it_once_and_once_more_when_it_is_put_aside_again(
    deployment: Deployment,
) -> None:
    assert deployment.run("shards_manifest", *CACHES, partition_range=(SHARDS[0], SHARDS[-1])).success
    sensor = NewData(deployment)
    assert "all 3 partitions are there" in sensor.reason()
    keys = set()
    for _ in range(2):
        put_aside(folder_of(deployment), [SHARDS[1]], ["topk_cache"], why="a bad node")
        (request,) = sensor.requests()
        assert ranges([request]) == [(SHARDS[1], SHARDS[1], {"topk_cache"})]
        assert request.tags[WHY_TAG] == "1 in quarantine"
        assert [again.run_key for again in sensor.requests()] == [request.run_key], "Dagster starts one key once"
        keys.add(request.run_key)
        assert deployment.run("topk_cache", partition=SHARDS[1]).success
        assert "all 3 partitions are there" in sensor.reason()
    assert len(keys) == 2


def test_a_condition_goes_by_what_dagster_recorded_and_leaves_it_to_the_sensor_of_new_data(
    aside: Deployment, tiny_teacher: Path
) -> None:
    by_condition = Deployment(
        aside.home, tiny_teacher, aside.instance, exports=["hf"], student=None, automation="condition"
    )
    assert Looks(by_condition).look() == set()
    found = requests_for_missing(
        aside.instance, by_condition.recipe, put_aside=still_put_aside(folder_of(by_condition))
    )
    requests = [request for request in found if isinstance(request, dg.RunRequest)]
    assert ranges(requests) == [(SHARDS[1], SHARDS[1], {"topk_cache", "export_hf"})]


def test_a_run_for_a_job_that_nobody_follows_does_not_make_what_is_in_quarantine_between(tmp_path: Path) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        history = Night(Deployment(tmp_path, tmp_path / "no teacher", instance))
        keys = [f"tiny-{i:05d}" for i in range(2 * MOST_RANGES + 3)]
        instance.add_dynamic_partitions("tiny_shards", keys)
        for key in keys:
            history.shard(key)
            for asset in CACHES:
                history.cache(asset, key)
        units = []
        for key in keys[::2]:
            identity = {"asset": "topk_cache", "format_version": 1, "params": {"k": 4}, "input": key}
            out = plan_output("topk_cache", identity, recipe_folder=tmp_path / "tiny", partition_key=key)
            units.append(WorkUnit(partition_key=key, outputs=(out,)))
        job = JobFile(
            contract_version=CONTRACT_VERSION,
            kind="teacher",
            recipe="tiny",
            key="0" * 32,
            recipe_folder=str(tmp_path / "tiny"),
            events_folder=str(tmp_path / "events"),
            tasks=(tuple(range(len(units))),),
            units=tuple(units),
        )
        orphan = Orphan(submission=Submission(folder=tmp_path / "0001"), job=job, n_followers=1, is_unwanted=False)
        whole = list(requests_for(instance, history.recipe, orphan))
        assert ranges(whole) == [(keys[0], keys[-1], {"topk_cache"})], "what lies between is there"
        found = requests_for(instance, history.recipe, orphan, put_aside=lambda: {"topk_cache": {keys[5]}})
        assert ranges(list(found)) == [(keys[0], keys[4], {"topk_cache"}), (keys[6], keys[-1], {"topk_cache"})]


def test_plan_and_preview_name_it_beside_the_job_that_makes_it_again(aside: Deployment) -> None:
    said = f"topk_cache: 1 in quarantine, to be made again: {SHARDS[1]} (a bad node)"
    shown = preview(aside.recipe, aside.platform, partitions=None, assets=None)
    assert [(job.spec.kind, job.tasks[0].partition_keys) for job in shown.jobs] == [("teacher", (SHARDS[1],))]
    assert f"  {said}" in list(lines_of_preview(shown))
    of_others = preview(aside.recipe, aside.platform, partitions=SHARDS[0], assets=None)
    assert not of_others.jobs
    assert said not in of_others.notes
    bill = bill_of(aside.recipe, aside.platform)
    assert f"note: {said}" in list(lines_of_bill(bill))
    assert {line.asset: line.n_there for line in bill.caches}["topk_cache"] == 2


def test_the_card_counts_it_as_missing(aside: Deployment) -> None:
    contents = contents_of(folder_of(aside))
    (topk,) = (cache for cache in contents.caches if cache.asset == "topk_cache")
    assert dict(topk.coverage) == {SHARDS[0]: "made", SHARDS[1]: "missing", SHARDS[2]: "made"}


def test_readers_and_commands_that_need_it_say_where_it_is(
    aside: Deployment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, said = folder_of(aside), r"its result was put aside on \S+ \(a bad node\), and has not been made again"

    def told(*arguments: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        status = cli.main([str(word) for word in arguments])
        return status, "".join(capsys.readouterr())

    with pytest.raises(NotCommittedError, match=said):
        CacheReader(folder, "topk_cache")
    assert re.search(said, inspect(folder / "topk_cache").caches[0].left_out[SHARDS[1]])
    for command, expected in (
        (("export", "hf", folder, "--to", tmp_path / "hf"), 1),
        (("serve", folder, "--port", "0"), 1),
        (("index", folder), 0),
        (("verify", folder), 0),
        (("inspect", folder), 0),
        (("gc", folder, "--dry-run"), 0),
        (("diff", folder, folder, "--asset", "topk_cache"), 0),
    ):
        status, text = told(*command)
        assert status == expected, text
        if command[0] in ("export", "serve", "inspect"):
            assert re.search(said, text), text
    assert "note, quarantined" in told("verify", folder)[1]
    assert "1 results in quarantine" in told("gc", folder, "--dry-run")[1]
