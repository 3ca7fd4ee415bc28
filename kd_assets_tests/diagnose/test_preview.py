"""`kd-assets preview` says what a run then does, and does nothing itself. On a cluster: `slurm/test_doctor.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_assets.contract import CONTRACT_VERSION, read_job
from kd_assets.diagnose import preview as preview_module
from kd_assets.diagnose.preview import (
    UNKNOWN_KEY,
    JobPreview,
    preview,
    resources_in_words,
    select_assets,
    text_lines,
)
from kd_assets.errors import MissingInputError, RecipeError, StorageUnavailableError
from kd_assets.locks import locked
from kd_assets.model_files import digests
from kd_assets.orchestration.materialize import planner_of
from kd_assets.orchestration.planning import planned_work
from kd_assets.scheduler import Resources, Submission
from kd_assets.scheduler.submissions import read_spec
from kd_assets.store.reading.selection import select_partitions
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment

JOBS = {"shards": {"n_tasks": 2, "concurrency": 2}, "teacher": {"n_tasks": 3, "concurrency": 2}}


@pytest.fixture
def deployment(deploy: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch) -> Deployment:
    """With a teacher whose weights were hashed before (where they were not: `orchestration/test_weights.py`)."""
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    made = deploy(jobs=JOBS)
    made.plan()
    planner_of(made.recipe, made.platform).teacher()
    return made


def jobs_of(
    deployment: Deployment, partitions: str | None = None, assets: list[str] | None = None
) -> dict[str, JobPreview]:
    shown = preview(deployment.recipe, deployment.platform, partitions=partitions, assets=assets)
    return {job.spec.kind: job for job in shown.jobs}


def notes_of(deployment: Deployment, assets: list[str] | None = None) -> str:
    return "\n".join(preview(deployment.recipe, deployment.platform, partitions=None, assets=assets).notes)


def files_in(home: Path) -> set[tuple[str, int]]:
    """The digests of the teacher's files are kept, whoever computed them."""
    return {(str(p), p.stat().st_mtime_ns) for p in home.rglob("*") if p.is_file() and "digests" not in p.name}


def submitted(deployment: Deployment, kind: str) -> list[Submission]:
    folders = sorted((deployment.home / "jobs" / "tiny").glob(f"{kind}-*/0*"))
    return [Submission(folder=folder) for folder in folders]


def test_before_anything_is_tokenised_the_teachers_job_is_an_estimate(deployment: Deployment) -> None:
    jobs = jobs_of(deployment)
    assert list(jobs) == ["shards", "teacher"]
    assert [job.n_partitions for job in jobs.values()] == [3, 3]
    assert [job.spec.n_tasks for job in jobs.values()] == [2, 3]
    assert jobs["teacher"].spec.key == UNKNOWN_KEY
    assert jobs["teacher"].n_tokens == jobs["shards"].n_tokens > 0
    (note,) = jobs["teacher"].notes
    assert "follows the shards job" in note
    assert "3 partitions not tokenised yet" in note


def test_what_was_previewed_is_what_a_run_submits(deployment: Deployment) -> None:
    shards = jobs_of(deployment)["shards"]
    assert deployment.run("shards_manifest", partition_range=(SHARDS[0], SHARDS[-1])).success
    teacher = jobs_of(deployment)["teacher"]
    assert deployment.run(*CACHES, partition_range=(SHARDS[0], SHARDS[-1])).success
    for previewed in (shards, teacher):
        (submission,) = submitted(deployment, previewed.spec.kind)
        assert previewed.spec == read_spec(submission)
        job = read_job(submission.job_file)
        keys = [tuple(unit.partition_key for unit in job.units_of_task(i)) for i in range(len(job.tasks))]
        tokens = [sum(unit.n_tokens for unit in job.units_of_task(i)) for i in range(len(job.tasks))]
        assert [(t.partition_keys, t.n_tokens) for t in previewed.tasks] == list(zip(keys, tokens, strict=True))
        folder = str(submission.folder)
        assert [c[-1].replace("NUMBER", "0001") for c in previewed.commands] == [f"{folder}/job.json"] * len(keys)
        logs = sorted((Path(previewed.log_files.replace("NUMBER", "0001")).parent).glob(Path(previewed.log_files).name))
        assert len(logs) == len(keys)


def test_nothing_is_written_and_nothing_submitted(deployment: Deployment) -> None:
    before = files_in(deployment.home)
    jobs_of(deployment)
    assert files_in(deployment.home) == before


def test_what_is_committed_is_not_submitted_again(deployment: Deployment) -> None:
    assert deployment.run("shards_manifest", "topk_cache", partition=SHARDS[0]).success
    assert jobs_of(deployment)["shards"].n_partitions == 2
    assert "shards: 1 partition committed already; reused" in notes_of(deployment)
    one = jobs_of(deployment, SHARDS[0])
    assert list(one) == ["teacher"], "its other two caches"
    assert one["teacher"].spec.key != UNKNOWN_KEY
    assert list(jobs_of(deployment, SHARDS[0], ["topk_cache"])) == []


def test_a_result_that_failed_a_check_is_named_before_the_run_fails_on_it(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert deployment.run("shards_manifest", "topk_cache", partition=SHARDS[0]).success
    assert "failed" not in notes_of(deployment)
    # A fake: that a real result fails is in the tests of materializing.
    monkeypatch.setattr(preview_module, "failed_check", lambda manifest: "check finite failed: all of it")
    assert (
        f"teacher: topk_cache of {SHARDS[0]} is committed and not made again, and fails the run: "
        "check finite failed: all of it"
    ) in notes_of(deployment)


def test_the_student_comes_after_the_caches(deployment: Deployment) -> None:
    assert "student_smoke is trained on what these jobs make" in notes_of(deployment)
    assert "no partition of tiny has all its caches" in notes_of(deployment, ["student_smoke"])
    assert deployment.run("shards_manifest", *CACHES, partition_range=(SHARDS[0], SHARDS[-1])).success
    jobs = jobs_of(deployment)
    assert list(jobs) == ["student"]
    assert jobs["student"].spec.n_tasks == 1


def test_caches_alone_need_their_shards(deployment: Deployment) -> None:
    assert jobs_of(deployment, assets=["topk_cache"]) == {}
    assert f"teacher: {SHARDS[0]} is impossible: tiny/shards_manifest has no partition" in notes_of(
        deployment, ["topk_cache"]
    )


def test_work_in_the_hands_of_a_live_job_is_joined_and_not_submitted(deployment: Deployment) -> None:
    assert deployment.run("shards_manifest", partition=SHARDS[0]).success
    (theirs,) = submitted(deployment, "shards")
    for result in (deployment.home / "store" / "tiny" / "shards_manifest").glob("*/*/*/manifest.json"):
        result.unlink()
    with locked(theirs.job_lock):  # held as long as any of its processes lives, and from now on by us
        assert jobs_of(deployment)["shards"].n_partitions == 2
        assert f"{theirs.folder} is at some of it; joined" in notes_of(deployment)
    assert jobs_of(deployment)["shards"].n_partitions == 3


def test_a_live_job_of_another_version_is_not_joined_and_does_not_fail_a_preview(deployment: Deployment) -> None:
    assert deployment.run("shards_manifest", partition=SHARDS[0]).success
    (theirs,) = submitted(deployment, "shards")
    ours = f'"contract_version": {CONTRACT_VERSION}'
    text = theirs.job_file.read_text()
    assert ours in text
    theirs.job_file.write_text(text.replace(ours, '"contract_version": 1'))
    for result in (deployment.home / "store" / "tiny" / "shards_manifest").glob("*/*/*/manifest.json"):
        result.unlink()
    with locked(theirs.job_lock):
        assert jobs_of(deployment)["shards"].n_partitions == 3


def test_results_that_cannot_be_reached_are_shown_with_the_reason(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(folder: Path, fingerprint: str) -> None:
        raise StorageUnavailableError(f"cannot read {folder}: Stale file handle")

    monkeypatch.setattr(planned_work, "committed", stale)
    assert jobs_of(deployment)["shards"].n_partitions == 3
    assert "shards: nobody can tell whether it is there: cannot read " in notes_of(deployment)


def test_the_text_says_tasks_resources_logs_and_command_lines(deployment: Deployment) -> None:
    text = "\n".join(text_lines(preview(deployment.recipe, deployment.platform, partitions=None, assets=None)))
    home = deployment.home
    for words in (
        "recipe tiny, 3 partitions selected, scheduler local",
        "shards: 3 partitions, about ",
        "tokens, in 2 tasks, at most 2 at once",
        f"tiny/teacher-{UNKNOWN_KEY}/NUMBER/logs/task-*.log",
        "each task asks for: what the site gives by default",
        "SLURM_ARRAY_TASK_ID=1",
        f"'{home}/jobs/tiny/shards-",  # quoted: this home has spaces
        "Nothing was submitted.",
    ):
        assert words in text, words


def test_the_json_has_the_same(deployment: Deployment) -> None:
    shown = preview(deployment.recipe, deployment.platform, partitions=None, assets=None)
    record = json.loads(json.dumps(shown.to_json()))
    assert [(job["kind"], job["n_partitions"]) for job in record["jobs"]] == [("shards", 3), ("teacher", 3)]
    assert record["jobs"][0]["tasks"][0]["partition_keys"] == [SHARDS[0], SHARDS[2]]


def test_without_a_plan_it_says_what_to_do(deploy: Callable[..., Deployment]) -> None:
    with pytest.raises(MissingInputError, match="materialize tiny/shard_plan first"):
        jobs_of(deploy())


@pytest.mark.parametrize(
    ("selection", "keys"),
    [
        (None, ["a", "b", "c", "d"]),
        ("b..c", ["b", "c"]),
        ("b...d", ["b", "c", "d"]),
        ("c", ["c"]),
        ("a,c..d,c", ["a", "c", "d"]),
    ],
)
def test_partitions_are_chosen_by_range_list_or_key(selection: str | None, keys: list[str]) -> None:
    assert select_partitions(["a", "b", "c", "d"], selection) == keys


def test_a_selection_that_cannot_be_is_refused(deployment: Deployment) -> None:
    with pytest.raises(RecipeError, match=r"no partition 'e'; there are 2: a to b"):
        select_partitions(["a", "b"], "a..e")
    with pytest.raises(RecipeError, match=r"b\.\.a is reversed"):
        select_partitions(["a", "b"], "b..a")
    with pytest.raises(RecipeError, match="submits nothing for 'shard_plan'; it has shards_manifest, topk_cache"):
        select_assets(deployment.recipe, ["tiny/shard_plan"])
    assert select_assets(deployment.recipe, ["tiny/topk_cache", "shards_manifest"]) == ["shards_manifest", "topk_cache"]


def test_resources_read_as_a_sentence() -> None:
    wanted = Resources(slurm_partition="h100", gpus_per_node=4, time_minutes=2890, exclusive=True, memory_gib=1.5)
    assert resources_in_words(wanted) == "partition h100, 4 GPUs, 1.5 GiB of memory, 48 h 10 min, the whole node"
    of_gpus = Resources(memory_gib=80, memory_of="gpu", exclude="n1", nodelist="n2")
    assert resources_in_words(of_gpus) == "node n2, not on n1, 80 GiB of memory per GPU"
    assert resources_in_words(Resources(memory_of="site")) == "memory as the site gives it"
    refused = Resources(slurm_partition="cpu", gpus_per_node=0, exclusive=False, sbatch_options=())
    assert resources_in_words(refused) == "partition cpu, no GPUs"
