"""`kd-assets doctor` and `preview` on a real cluster."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from kd_assets.diagnose.doctor import examine
from kd_assets.diagnose.preview import preview, text_lines
from kd_assets.orchestration.platform import Platform
from kd_assets.scheduler import SlurmScheduler, Submission
from kd_assets_tests.orchestration.deployment import Deployment
from kd_assets_tests.patience import PATIENCE_S
from kd_assets_tests.slurm.cluster import SlurmCluster
from kd_assets_tests.slurm.conftest import SshLogin
from kd_assets_tests.slurm.fakes import put_first

SITE = {"kinds": {"shards": {"partition": "batch", "cpus": 2, "memory_gib": 2, "time": "01:00:00"}}}
TOKEN = "hf_token_of_this_test"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Platform]:
    """Makes deployments on a cluster; their profile is that of `SITE`, with changes."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def make(cluster: SlurmCluster, **changes: object) -> Platform:
        for name, value in cluster.env.items():
            monkeypatch.setenv(name, value)
        profile = tmp_path / "site.yaml"
        profile.write_text(json.dumps(SITE | {"visibility_grace_s": 3} | changes))  # JSON is YAML, too
        home = tmp_path / "home with a space and 100%"
        return Platform(home=str(home), scheduler="slurm", slurm_profile=str(profile), compute_python=sys.executable)

    return make


def lines_of(platform: Platform, **how: object) -> list[str]:
    patient = {"wait_s": 10 * PATIENCE_S} | how
    return [str(finding) for finding in examine(None, platform, **patient)]  # type: ignore[arg-type]


def that_say(lines: list[str], words: str) -> str:
    found = [line for line in lines if words in line]
    assert found, f"no line has {words!r}:\n" + "\n".join(lines)
    return found[0]


def test_a_cluster_without_gpus_asked_for_is_sound(slurm: SlurmCluster, site: Callable[..., Platform]) -> None:
    lines = lines_of(site(slurm))
    assert not [line for line in lines if line.startswith("FAIL")], "\n".join(lines)
    assert that_say(lines, "accounting").startswith("warn accounting: none")
    that_say(lines, "ok   SLURM commands: version ")
    that_say(lines, "ok   controller: answers, version ")
    for query in ("squeue", "scontrol show config", "scontrol show job", "sinfo"):
        that_say(lines, f"ok   {query}: understands what runs ask")
    that_say(lines, "ok   partition for shards: batch: 4 nodes fit partition batch, 2 CPUs, 2 GiB of memory, 1 h")
    that_say(lines, "ok   partition for teacher: batch: 4 nodes fit what the site gives by default")
    that_say(lines, "ok   request for shards: SLURM would take it: Job ")
    seen = [line for line in lines if "and what it writes is seen here" in line]
    places = ["ok   node for shards, export", "ok   node for teacher, student"]
    assert [line.partition(": ")[0] for line in seen] == places
    that_say(lines, f"{sys.executable} has torch ")


@pytest.mark.parametrize(
    ("command", "asked", "said", "what"),
    [
        ("squeue", "--array", "squeue: unrecognized option '--array'", "squeue"),
        ("squeue", "--states=PENDING", "squeue: error: Invalid job state specified: PENDING", "squeue"),
        ("sacct", "--duplicates", 'sacct: error: Invalid field requested: "Comment"', "accounting"),
        ("sinfo", "--Node", "Invalid node format specification: N", "sinfo"),
        ("scontrol", "job", "invalid entity:job for keyword:show", "scontrol show job"),
    ],
)
def test_what_a_version_does_not_understand_of_the_questions_of_a_run_fails_with_the_question(
    command: str,
    asked: str,
    said: str,
    what: str,
    slurm_accounting: SlurmCluster,
    site: Callable[..., Platform],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    platform = site(slurm_accounting, kinds={})
    body = f"[[ \" $* \" != *' {asked} '* ]] || {{ echo {shlex.quote(said)} >&2; exit 1; }}"
    put_first(tmp_path / "fakes", command, body, monkeypatch)
    failed = [line for line in lines_of(platform, test_job=False) if line.startswith("FAIL")]
    assert len(failed) == 1, failed
    assert failed[0].startswith(f"FAIL {what}: SLURM does not understand `{command} ")
    assert said in failed[0]


def test_accounting_is_found_where_there_is_one(slurm_accounting: SlurmCluster, site: Callable[..., Platform]) -> None:
    that_say(lines_of(site(slurm_accounting), test_job=False), "ok   accounting: sacct answers")


def test_a_gpu_partition_whose_nodes_show_none_fails(slurm: SlurmCluster, site: Callable[..., Platform]) -> None:
    """The test cluster's GPUs are devices with nothing behind them."""
    lines = lines_of(site(slurm, kinds={"teacher": {"partition": "batch", "gpus_per_node": 2}}))
    assert that_say(lines, "partition for teacher").startswith("ok")
    assert that_say(lines, "no GPU visible (CUDA_VISIBLE_DEVICES is ").startswith("FAIL node for teacher")


def test_what_no_node_can_give_is_named(slurm: SlurmCluster, site: Callable[..., Platform]) -> None:
    kinds = {
        "shards": {"partition": "btach"},
        "teacher": {"partition": "batch", "gpus_per_node": 9, "cpus": 999},
        "student": {"account": "nobody", "memory_gib": 10_000},
    }
    lines = lines_of(site(slurm, kinds=kinds), test_job=False)
    assert "FAIL partition for shards: there is no partition btach → name one of batch, high" in lines
    that_say(lines, "FAIL partition for teacher: no node of batch fits: 9 GPUs asked for, 4 there; 999 CPUs asked for")
    that_say(lines, "FAIL partition for student: no node of batch fits: 10000 GiB asked for")
    for kind in kinds:
        that_say(lines, f"FAIL request for {kind}: ")


def test_a_full_cluster_is_no_failure_and_the_test_job_is_taken_back(
    slurm: SlurmCluster, site: Callable[..., Platform]
) -> None:
    slurm.sbatch("--nodes=4", "--exclusive", "--wrap=sleep 600")
    lines = lines_of(site(slurm, kinds={}), wait_s=2)
    line = that_say(lines, "did not start within 2 s")
    assert line.startswith("warn node for shards, teacher, student, export: test job ")
    assert "Resources" in line or "Priority" in line
    jobs = slurm.run("squeue", "--noheader", "--format=%j %T").stdout.splitlines()
    assert not [job for job in jobs if job.startswith("doctor-") and "PENDING" in job]


def test_memory_that_does_not_suffice_for_the_imports_fails(slurm: SlurmCluster, site: Callable[..., Platform]) -> None:
    if not slurm.cgroup:
        pytest.skip("this machine's control groups cannot limit memory")
    lines = lines_of(site(slurm, memory_gib=0.05, kinds={}))
    assert that_say(lines, "killed by signal 9: did the test job's memory not suffice?").startswith("FAIL node for")


def test_a_node_without_the_compute_python_fails(slurm: SlurmCluster, site: Callable[..., Platform]) -> None:
    platform = site(slurm, kinds={})
    wrong = dataclasses.replace(platform, compute_python="/nowhere/bin/python")
    assert that_say(lines_of(wrong), "/nowhere/bin/python: ").startswith("FAIL node for shards, teacher, student")


def test_a_controller_that_is_down_is_one_failure(
    make_cluster: Callable[..., SlurmCluster], site: Callable[..., Platform]
) -> None:
    cluster = make_cluster(nodes=1)
    platform = site(cluster, command_timeout_s=3)
    cluster.kill("slurmctld")
    lines = lines_of(platform)
    assert lines[-1].startswith("FAIL controller: ")
    assert "is slurmctld up (scontrol ping)" in lines[-1]


def test_over_ssh_it_looks_at_the_login_nodes_cluster(
    slurm: SlurmCluster, sshd: SshLogin, site: Callable[..., Platform], monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = site(slurm, ssh=sshd.target, ssh_options=sshd.options, kinds={})
    monkeypatch.delenv("SLURM_CONF")
    lines = lines_of(platform)
    assert not [line for line in lines if line.startswith("FAIL")], "\n".join(lines)
    that_say(lines, f"on {sshd.target}")


def test_no_secret_is_left_by_the_doctor_itself(slurm: SlurmCluster, site: Callable[..., Platform]) -> None:
    platform = site(slurm)
    assert platform.secrets_file() is not None
    lines = lines_of(platform)
    assert TOKEN not in "\n".join(lines)
    assert that_say(lines_of(platform, test_job=False), "secrets: ").startswith("ok   secrets: HF_TOKEN: in none of")
    shown = slurm.run("scontrol", "show", "jobs").stdout
    assert "doctor-shards" in shown
    assert TOKEN not in shown
    written = [p for p in platform.home_folder.rglob("*") if p.is_file() and TOKEN in p.read_text(errors="replace")]
    assert written == [platform.secrets_path()]


# ------------------------------------------------------------------------------------------------------- preview


def test_preview_prints_the_very_command_lines_that_are_submitted(
    make_cluster: Callable[..., SlurmCluster],
    site: Callable[..., Platform],
    tmp_path: Path,
    tiny_teacher: Path,
) -> None:
    cluster = make_cluster(nodes=1, max_array_size=2)
    jobs = {"shards": {"n_tasks": 3, "concurrency": 2, "slurm": {"time": "00:07:00", "account": "us"}}}
    home = tmp_path / "a home"
    home.mkdir()
    with dg.DagsterInstance.ephemeral() as instance:
        deployment = Deployment(home, tiny_teacher, instance, jobs=jobs)
        deployment.plan()
    platform = site(cluster, kinds={"shards": {"partition": "high"}}, setup="module() { :; }\n")
    platform = dataclasses.replace(platform, home=str(deployment.home))
    shown = preview(deployment.recipe, platform, partitions=None, assets=["shards_manifest"])
    (job,) = shown.jobs
    assert cluster.run("squeue", "--noheader").stdout == "", "nothing was submitted"
    assert not (deployment.home / "secrets").exists()
    assert len(job.commands) == 2, "three tasks, and arrays of two at most"
    for word in ("--partition=high", "--account=us", "--time=7", "--array=0-1%1"):  # two at once, over two arrays
        assert word in job.commands[0]

    scheduler = platform.make_scheduler()
    assert isinstance(scheduler, SlurmScheduler)
    submission = scheduler.submit(job.spec, lambda new: new.job_file.write_text("{}"))
    assert [like_preview(argv, submission) for argv in submitted(submission)] == [list(c) for c in job.commands]
    assert (submission.folder / "environment.sh").read_text() == job.environment
    scheduler.cancel([submission])

    text = "\n".join(text_lines(shown))
    assert TOKEN not in text
    assert "HF_TOKEN (set)" in text
    assert "module() { :; }" in text
    assert shlex.join(job.commands[1]) in text


def submitted(submission: Submission) -> list[list[str]]:
    paths = sorted((submission.folder / "arrays").glob("[0-9][0-9][0-9][0-9].json"))
    return [json.loads(path.read_text())["argv"] for path in paths]


def like_preview(argv: list[str], submission: Submission) -> list[str]:
    """With the words in the place of what differs from one submission to the next."""
    name = next(word.partition("=")[2] for word in argv if word.startswith("--job-name="))
    nonce = name.rpartition("-")[2]
    number = submission.folder.name
    return [
        word.replace(f"/{number}/", "/NUMBER/")
        .replace(f"-{number}.", "-NUMBER.")
        .replace(nonce, "NONCE")
        .removesuffix(f"/{number}")
        + ("/NUMBER" if word.endswith(f"/{number}") else "")
        for word in argv
    ]
