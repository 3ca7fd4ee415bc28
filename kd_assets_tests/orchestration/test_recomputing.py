"""`recompute`: what is wrong, or all that was asked for, is put aside and made again; nothing is deleted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from kd_assets.contract import Asset
from kd_assets.errors import StorageUnavailableError
from kd_assets.locks import Lease
from kd_assets.orchestration import recomputing
from kd_assets.orchestration.materialize import planner_of
from kd_assets.orchestration.planning.planned_work import PlannedWork
from kd_assets.orchestration.recomputing import Recomputing, attempts_of
from kd_assets.store import read_manifest, verify
from kd_assets.store.layout import LEASE_NAME
from kd_assets_tests.orchestration.deployment import SHARDS, Deployment, failure_text, is_reused

ALL = (SHARDS[0], SHARDS[-1])
ASSETS = ("shards_manifest", "topk_cache", "embedding_cache")


@pytest.fixture
def made(deploy: Callable[..., Deployment]) -> Deployment:
    """Shards and two caches of all partitions."""
    deployment = deploy()
    deployment.plan()
    result = deployment.run(*ASSETS, partition_range=ALL)
    assert result.success, failure_text(result)
    return deployment


def reused(deployment: Deployment, result: dg.ExecuteInProcessResult) -> dict[tuple[str, str | None], bool]:
    assert result.success, failure_text(result)
    recorded = deployment.materializations(result.run_id)
    return {key: is_reused(record) for key, (record,) in recorded.items()}


def part_of(deployment: Deployment, asset: str, partition: str) -> Path:
    (part,) = (deployment.platform.recipe_folder("tiny") / asset).glob(f"*/{partition}/*/part-*")
    return part


def quarantined(deployment: Deployment) -> list[tuple[str, str]]:
    folder = deployment.platform.recipe_folder("tiny") / "quarantine"
    return sorted((path.parts[-5], path.parts[-3]) for path in folder.glob("*/*/*/*/*/manifest.json"))


def work_of(deployment: Deployment, asset: Asset) -> PlannedWork:
    return planner_of(deployment.recipe, deployment.platform).teacher_work(SHARDS, [asset])


def test_what_is_wrong_is_put_aside_and_made_again_and_the_rest_is_reused(made: Deployment) -> None:
    part = part_of(made, "topk_cache", SHARDS[1])
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    result = made.run(*ASSETS, partition_range=ALL, settings={"recompute": "wrong"})
    assert {key for key, was in reused(made, result).items() if not was} == {("topk_cache", SHARDS[1])}
    assert quarantined(made) == [("topk_cache", SHARDS[1])]
    assert verify(made.platform.recipe_folder("tiny")).problems == ()
    (said,) = [line for line in made.log_lines(result.run_id) if "put aside" in line]
    assert said.startswith("teacher: 1 results are put aside and made again: check files failed")


def test_a_damaged_shard_is_made_again_and_its_good_caches_are_not(made: Deployment) -> None:
    part = part_of(made, "shards_manifest", SHARDS[0])
    part.write_bytes(b"damaged")
    only_the_cache = made.run("topk_cache", partition=SHARDS[0], settings={"recompute": "wrong"})
    assert not quarantined(made), "what is wrong with the shard is not what is wrong with the cache"
    assert not only_the_cache.success
    result = made.run(*ASSETS, partition=SHARDS[0], settings={"recompute": "wrong"})
    assert {asset for (asset, _), was in reused(made, result).items() if not was} == {"shards_manifest"}


def test_all_that_was_asked_for_is_made_again_to_the_same_bytes_and_once(made: Deployment) -> None:
    versions = {asset: read_manifest(part_of(made, asset, SHARDS[0]).parent).data_version for asset in ASSETS}
    result = made.run("topk_cache", partition=SHARDS[0], settings={"recompute": "all"})
    assert reused(made, result) == {("topk_cache", SHARDS[0]): False}
    assert quarantined(made) == [("topk_cache", SHARDS[0])]
    assert read_manifest(part_of(made, "topk_cache", SHARDS[0]).parent).data_version == versions["topk_cache"]
    assert [line for line in made.log_lines(result.run_id) if line.startswith("1 made, 0 reused, 0 failed, ")]


def started_again(deployment: Deployment, run: dg.DagsterRun, tags: dict[str, str]) -> dg.DagsterRun:
    """A run with the settings of another, as its child."""
    return deployment.instance.create_run_for_job(
        deployment.definitions.resolve_implicit_global_asset_job_def(),
        run_config=run.run_config,
        tags=tags,
        root_run_id=run.root_run_id or run.run_id,
        parent_run_id=run.run_id,
        asset_selection=run.asset_selection,
    )


def test_a_run_that_dagster_starts_again_keeps_what_it_has_made_and_one_that_somebody_re_executes_does_not(
    made: Deployment,
) -> None:
    first = made.instance.get_runs()[0]
    work = work_of(made, "topk_cache")
    retry = {"dagster/retry_number": "1"}
    after_a_crash = started_again(made, first, retry)
    by_hand = started_again(made, first, {})
    said: list[str] = []
    Recomputing(made.instance, after_a_crash, "all", say=said.append).first(work)
    Recomputing(made.instance, started_again(made, after_a_crash, retry), "all", say=said.append).first(work)
    assert said == ["teacher: 3 results stay: this run, or an earlier attempt at it, has made them"] * 2
    assert quarantined(made) == []
    assert attempts_of(made.instance, started_again(made, by_hand, retry)).isdisjoint({first.run_id})
    Recomputing(made.instance, by_hand, "all", say=said.append).first(work)
    assert said[2:] == ["teacher: 3 results are put aside and made again: recompute: all (3 of them)"]
    assert quarantined(made) == [("topk_cache", key) for key in SHARDS]


def test_what_a_live_task_is_at_stays_and_is_named_and_what_was_moved_is_said_when_something_fails(
    made: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = started_again(made, made.instance.get_runs()[0], {}), list[str]()
    again = Recomputing(made.instance, run, "all", say=said.append)
    lease = Lease(part_of(made, "topk_cache", SHARDS[0]).parent / LEASE_NAME)
    lease.acquire({})
    try:
        again.first(work_of(made, "topk_cache"))
    finally:
        lease.release()
    assert quarantined(made) == [("topk_cache", key) for key in SHARDS[1:]]
    assert said[0] == "teacher: 2 results are put aside and made again: recompute: all (2 of them)"
    assert said[1].startswith("teacher: 1 results stay, though to be made again: ")
    assert "topk_cache/" in said[1]
    assert SHARDS[0] in said[1]

    moved: list[Path] = []

    def fails_at_the_second(recipe_folder: Path, folder: Path, *, why: str) -> None:
        if moved:
            raise StorageUnavailableError("the disk is away")
        moved.append(folder)

    monkeypatch.setattr(recomputing, "put_result_aside", fails_at_the_second)
    with pytest.raises(StorageUnavailableError):
        again.first(work_of(made, "embedding_cache"))
    assert said[2:] == ["teacher: 1 results are put aside and made again: recompute: all"]


def test_never_is_what_a_run_does_by_itself(made: Deployment) -> None:
    result = made.run("topk_cache", partition=SHARDS[0])
    assert reused(made, result) == {("topk_cache", SHARDS[0]): True}
    assert quarantined(made) == []
