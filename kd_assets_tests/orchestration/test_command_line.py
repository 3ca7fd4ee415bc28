"""The dagster command line as CI uses it, and what becomes of a job when the run that started it dies."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from kd_assets_tests.orchestration.command_line import CommandLine, group_of
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS


def test_one_partition_and_a_range_materialize_from_the_command_line(command_line: CommandLine) -> None:
    status, text = command_line.run("shards_manifest", "topk_cache", partition=("--partition", SHARDS[1]))
    assert status == 0, text
    status, text = command_line.run(
        "shards_manifest", *CACHES, "student_smoke", partition=("--partition-range", f"{SHARDS[0]}...{SHARDS[2]}")
    )
    assert status == 0, text
    assert "Materialized value tiny student_smoke" in text


@pytest.mark.parametrize("partition", [("--partition", "tiny-99999"), ()])
def test_a_partition_that_is_wrong_or_missing_fails_the_command(
    command_line: CommandLine, partition: tuple[str, ...]
) -> None:
    status, _ = command_line.run("topk_cache", partition=partition)
    assert status != 0


def test_a_failed_partition_fails_the_command_and_is_named(command_line: CommandLine) -> None:
    lines = command_line.deployment.corpus.read_text().splitlines()
    lines[2] = json.dumps({"text": None})
    command_line.deployment.corpus.write_text("\n".join(lines) + "\n")
    command_line.deployment.plan()
    status, text = command_line.run("shards_manifest", partition=("--partition-range", f"{SHARDS[0]}...{SHARDS[2]}"))
    assert status == 1
    assert f"{SHARDS[0]} (shards_manifest): BadRecordError" in text
    assert "corpus.jsonl:3" in text


def test_a_killed_run_leaves_its_job_running_and_the_next_run_finds_it(command_line: CommandLine) -> None:
    assert command_line.run("shards_manifest", partition=("--partition", SHARDS[0]))[0] == 0
    first = command_line.start(*CACHES, partition=("--partition", SHARDS[0]))
    scheduler, submission = command_line.wait_for_task("teacher")
    os.killpg(group_of(submission), signal.SIGSTOP)  # so that it is still there when the next run looks
    first.kill()
    first.wait()
    assert scheduler.is_live(submission)
    second = command_line.start(*CACHES, partition=("--partition", SHARDS[0]))
    assert second.stdout is not None
    for line in second.stdout:
        if "found, still running" in line:
            break
    os.killpg(group_of(submission), signal.SIGCONT)
    text, _ = second.communicate(timeout=300)
    assert second.returncode == 0, text
    assert command_line.deployment.n_teacher_loads() == 1
    assert [p.name for p in submission.folder.parent.glob("[0-9]*")] == ["0001"]


def test_what_a_killed_run_had_committed_does_not_hide_its_job_from_the_next_run(command_line: CommandLine) -> None:
    everything = ("--partition-range", f"{SHARDS[0]}...{SHARDS[2]}")
    assert command_line.run("shards_manifest", partition=everything)[0] == 0
    first = command_line.start(*CACHES, partition=everything)
    _, submission = command_line.wait_for_task("teacher")
    store = command_line.deployment.platform.recipe_folder("tiny")
    while not list(store.glob("topk_cache/*/*/*/manifest.json")):  # the first partition is committed
        time.sleep(0.002)
    os.killpg(group_of(submission), signal.SIGSTOP)
    first.kill()
    first.wait()
    second = command_line.start(*CACHES, partition=everything)
    assert second.stdout is not None
    for line in second.stdout:
        if "found, still running" in line or "submitted" in line:
            break
    os.killpg(group_of(submission), signal.SIGCONT)
    text, _ = second.communicate(timeout=300)
    assert second.returncode == 0, text
    assert command_line.deployment.n_teacher_loads() == 1


def test_what_dagster_would_forget_is_not_made_and_the_cure_is_named(command_line: CommandLine) -> None:
    recipe_folder = command_line.deployment.platform.recipe_folder("tiny")
    before = sorted(recipe_folder.rglob("*"))
    status, said = command_line.run("shard_plan", "student_smoke", has_dagster_home=False)
    assert status == 1, said
    assert "DAGSTER_HOME is not set" in said
    assert "export DAGSTER_HOME=" in said
    assert sorted(recipe_folder.rglob("*")) == before


def test_a_reversed_range_fails_instead_of_doing_nothing(command_line: CommandLine) -> None:
    status, text = command_line.run("shards_manifest", partition=("--partition-range", f"{SHARDS[2]}...{SHARDS[0]}"))
    assert status == 1
    assert "the selection holds no partition: is the range reversed?" in text


def test_terminating_a_run_ends_its_job(command_line: CommandLine) -> None:
    assert command_line.run("shards_manifest", partition=("--partition", SHARDS[0]))[0] == 0
    run = command_line.start(*CACHES, partition=("--partition", SHARDS[0]))
    scheduler, submission = command_line.wait_for_task("teacher")
    run.send_signal(signal.SIGINT)
    text, _ = run.communicate(timeout=300)
    assert run.returncode != 0
    assert "cancelling local job" in text
    assert not scheduler.is_live(submission)


def test_a_command_line_that_the_machine_stops_leaves_its_job_to_the_next_run(command_line: CommandLine) -> None:
    """SIGTERM is no Ctrl-C: it is what a machine or a container that goes down sends."""
    assert command_line.run("shards_manifest", partition=("--partition", SHARDS[0]))[0] == 0
    run = command_line.start(*CACHES, partition=("--partition", SHARDS[0]))
    scheduler, submission = command_line.wait_for_task("teacher")
    os.killpg(group_of(submission), signal.SIGSTOP)
    run.send_signal(signal.SIGTERM)
    text, _ = run.communicate(timeout=300)
    assert run.returncode != 0
    assert "the jobs go on, and the next run finds them" in text
    assert scheduler.is_live(submission)
    os.killpg(group_of(submission), signal.SIGCONT)
    assert command_line.run(*CACHES, partition=("--partition", SHARDS[0]))[0] == 0
    assert command_line.deployment.n_teacher_loads() == 1
