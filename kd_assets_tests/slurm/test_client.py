"""The client on a real SLURM: what it asks is understood, and what it reads is so."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_assets.errors import SchedulerError, SchedulerUnreachableError
from kd_assets.scheduler.job import Ending, JobSpec, Resources
from kd_assets.scheduler.slurm.commands.client import Slurm, sbatch_argv
from kd_assets.scheduler.slurm.commands.parsing import Accepted, QueueRow, Refused, Unknown
from kd_assets.scheduler.slurm.commands.runners import CommandRunner, LocalRunner, SshRunner
from kd_assets.scheduler.slurm.commands.states import ending_of, is_held_launch, is_impossible_wait
from kd_assets.scheduler.slurm.profile import Profile
from kd_assets_tests.patience import PATIENCE_S
from kd_assets_tests.slurm.cluster import SlurmCluster, wait_until
from kd_assets_tests.slurm.conftest import SshLogin

MakeCluster = Callable[..., SlurmCluster]


def local_runner(cluster: SlurmCluster) -> LocalRunner:
    return LocalRunner({**os.environ, **cluster.env})


def client(cluster: SlurmCluster, runner: CommandRunner | None = None, timeout_s: float = PATIENCE_S) -> Slurm:
    return Slurm(runner or local_runner(cluster), timeout_s=timeout_s)


def argv(folder: Path, body: str, *, array: str = "0-0", name: str = "kd-demo-teacher-0", **wanted: Any) -> list[str]:
    """The command line of a job whose tasks run `body`, a text of Bash, with their logs under `folder`."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    script = folder / "task.sbatch"
    script.write_text(f"#!/bin/bash\n{body}\n")
    spec = JobSpec(
        key="0" * 32,
        recipe="demo",
        kind="teacher",
        n_tasks=1,
        concurrency=1,
        resources=Resources(**wanted),
    )
    return sbatch_argv(
        profile=Profile(name="test"),
        spec=spec,
        name=name,
        comment="kd_assets 0123",
        array=array,
        log_folder=folder / "logs",
        script=str(script),
        arguments=["an argument", "$HOME"],
        folder=folder,
    )


def submit(slurm: Slurm, words: list[str]) -> int:
    answer = slurm.submit(words)
    assert isinstance(answer, Accepted), answer
    return answer.job_id


def rows_of(slurm: Slurm, job_id: int) -> dict[int | None, QueueRow]:
    return {r.index: r for r in slurm.queue() if r.job_id == job_id}


def wait_for_end(slurm: Slurm, job_id: int) -> dict[int | None, QueueRow]:
    rows: dict[int | None, QueueRow] = {}

    def over() -> bool:
        nonlocal rows
        rows = rows_of(slurm, job_id)
        return bool(rows) and all(ending_of(r.state, r.reason, r.exit_code) for r in rows.values())

    wait_until(f"job {job_id} is over", over)
    return rows


def test_the_tasks_of_an_array_are_seen_one_by_one(slurm: SlurmCluster, tmp_path: Path) -> None:
    ours = client(slurm)
    began = int(time.time())
    job = submit(ours, argv(tmp_path, "exit $((SLURM_ARRAY_TASK_ID * 3))", array="0-6:2%3"))
    rows = wait_for_end(ours, job)
    assert {i: r.exit_code for i, r in rows.items()} == {0: 0, 2: 6, 4: 12, 6: 18}
    row = rows[2]
    assert (row.state, row.reason, row.restarts, row.comment) == ("FAILED", "NonZeroExitCode", 0, "kd_assets 0123")
    assert row.node in slurm.nodes
    assert row.submitted_at is not None
    assert row.started_at is not None
    assert row.ended_at is not None
    assert began <= row.submitted_at <= row.started_at <= row.ended_at <= time.time() + 1


def test_a_requeued_task_is_told_from_those_that_never_started(slurm: SlurmCluster, tmp_path: Path) -> None:
    # By itself squeue folds it into the row of the others, with their restart count.
    ours = client(slurm)
    job = submit(ours, argv(tmp_path, "sleep 600", array="0-3%1"))
    slurm.wait_for(f"{job}_0", "RUNNING")
    slurm.scontrol("requeue", f"{job}_0")
    wait_until("it waits again", lambda: rows_of(ours, job)[0].state == "PENDING")
    assert {i: r.restarts for i, r in rows_of(ours, job).items()} == {0: 1, 1: 0, 2: 0, 3: 0}


def test_hostile_jobs_of_others_break_nothing(slurm: SlurmCluster, tmp_path: Path) -> None:
    ours = client(slurm)
    before = {r.job_id for r in ours.queue()}  # of other tests
    for name in ("evil|name\nkd-demo|1|RUNNING", "kd-ü→中", "x" * 200, "$(touch pwned)"):
        slurm.sbatch("-J", name, "--comment", "a|b\nc\x1f", "-o", "/dev/null", "--wrap", "true")
    job = submit(ours, argv(tmp_path, "true"))
    assert list(wait_for_end(ours, job)) == [0]
    assert {r.name for r in ours.queue() if r.job_id not in before} == {"kd-demo-teacher-0", "kd-ü→中"}


@pytest.mark.parametrize("array", ["0-999", "0-1998:2", "1,3,5-700,704,1000-1200%4"])
def test_all_pending_tasks_are_seen(array: str, slurm: SlurmCluster, tmp_path: Path) -> None:
    # `squeue --array` forgets the last one of 0-1998:2; and lists are cut after 64 characters, unless told otherwise.
    ours = client(slurm)
    job = submit(ours, argv(tmp_path, "true", array=array, sbatch_options=("--begin=now+1hour",)))
    expected = {
        "0-999": range(1000),
        "0-1998:2": range(0, 1999, 2),
        "1,3,5-700,704,1000-1200%4": [1, 3, *range(5, 701), 704, *range(1000, 1201)],
    }[array]
    assert set(rows_of(ours, job)) == set(expected)


def test_a_job_has_a_home_a_path_and_none_of_our_secrets(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SLURM_JOB_NAME", "of the job that we run in")
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    ours = client(slurm)
    job = submit(ours, argv(tmp_path, "env; srun env | sed 's/^/srun /'"))
    assert wait_for_end(ours, job)[0].exit_code == 0
    seen = (tmp_path / f"logs/slurm-{job}_0.log").read_text()
    names = {line.partition("=")[0] for line in seen.splitlines()}
    assert {"HOME", "PATH", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID"} <= names
    assert "srun HOME" in names  # a list in --export would have been handed on to srun
    assert "SLURM_GET_USER_ENV" not in names  # it would have made the node run `su - user`, which may stall
    # The MPI settings are 24.11's own.
    slurms = ("SLURM", "srun ", "OMPI_MCA_", "PRTE_MCA_", "HYDRA_", "I_MPI_HYDRA_")
    ours_alone = {n for n in names if not n.startswith(slurms)}
    assert ours_alone <= {
        "ENVIRONMENT", "HOME", "HOSTNAME", "LANG", "LC_ALL", "LOGNAME", "OLDPWD", "PATH", "PWD", "SHELL", "SHLVL",
        "TMPDIR", "TZ", "USER", "_", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES",
        "ZE_AFFINITY_MASK",
    }  # fmt: skip
    assert "hf_secret" not in seen + slurm.scontrol("show", "job", str(job))


@pytest.mark.parametrize("folder", ["plain", "50%A off %%x %", "q'uo\"te $(touch pwned)", "né → 中", "a;b&c|d"])
def test_logs_reach_folders_with_odd_names(folder: str, slurm: SlurmCluster, tmp_path: Path) -> None:
    ours = client(slurm)
    job = submit(ours, argv(tmp_path / folder, 'pwd; echo "$1|$2"', array="0-1"))
    wait_for_end(ours, job)
    for index in (0, 1):
        log = tmp_path / folder / f"logs/slurm-{job}_{index}.log"
        assert log.read_text() == f"{tmp_path / folder}\nan argument|$HOME\n"
    assert {p.name for p in tmp_path.iterdir()} == {folder}


def test_endings_as_slurm_tells_them(slurm: SlurmCluster, tmp_path: Path) -> None:
    ours = client(slurm)
    killed = submit(ours, argv(tmp_path / "a", "kill -9 $$"))
    exited = submit(ours, argv(tmp_path / "b", "exit 137"))
    words = argv(tmp_path / "c", "true")
    (tmp_path / "c/logs").rmdir()
    (tmp_path / "c/logs").touch()  # 24.11 would make a folder that is missing
    no_log = submit(ours, words)
    cancelled = submit(ours, argv(tmp_path / "d", "sleep 600"))
    slurm.wait_for(f"{cancelled}_0", "RUNNING")
    ours.cancel([f"{cancelled}_0", "999999", "999999_1"])
    endings = {}
    for job in (killed, exited, no_log, cancelled):
        row = wait_for_end(ours, job)[0]
        endings[job] = (ending_of(row.state, row.reason, row.exit_code), row.exit_code)
    # slurmd sends SIGTERM and at once, where the step was still starting, SIGKILL: either may be what ended it.
    assert endings.pop(cancelled) in [(Ending.CANCELLED, -15), (Ending.CANCELLED, -9)]
    assert endings == {
        killed: (Ending.KILLED, -9),
        exited: (Ending.EXITED, 137),
        no_log: (Ending.LAUNCH_FAILURE, -53),
    }


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"slurm_partition": "nowhere"}, "Invalid partition name"),
        ({"memory_gib": 100_000.0}, "Memory specification can not be satisfied"),
        ({"gpus_per_node": 99}, "Requested node configuration is not available"),
        ({"constraint": "gold"}, "Invalid feature specification"),
        ({"sbatch_options": ("--bogus",)}, "unrecognized option"),  # exit status 255
        ({"sbatch_options": ("--array=0-999999",)}, "Invalid job array specification"),
    ],
)
def test_an_impossible_request_is_refused_in_slurms_words(
    wanted: dict[str, Any], words: str, slurm: SlurmCluster, tmp_path: Path
) -> None:
    answer = client(slurm).submit(argv(tmp_path, "true", **wanted))
    assert isinstance(answer, Refused)
    assert answer.kind == "impossible"
    assert words in answer.text


def test_a_request_that_can_never_be_granted_is_told_from_a_busy_site(slurm: SlurmCluster, tmp_path: Path) -> None:
    ours = client(slurm)
    slurm.set_node(3, "down")
    down = submit(ours, argv(tmp_path / "a", "true", sbatch_options=(f"--nodelist={slurm.nodes[3]}",)))
    busy = submit(ours, argv(tmp_path / "b", "sleep 600", array="0-5", exclusive=True))
    impossible = ours.submit(argv(tmp_path / "c", "true", cpus=1000))

    def waits(job: int) -> set[str]:
        return {r.reason for r in rows_of(ours, job).values() if r.state == "PENDING"}

    if isinstance(impossible, Accepted):  # by 22.05
        job = impossible.job_id
        wait_until("SLURM knows why", lambda: waits(job) == {"PartitionConfig"})
        assert is_impossible_wait("PartitionConfig")
    else:
        assert isinstance(impossible, Refused)
        assert impossible.kind == "impossible"
    assert waits(down)
    assert waits(busy)
    assert not [reason for reason in waits(down) | waits(busy) if is_impossible_wait(reason)]


def test_the_site_is_described(slurm: SlurmCluster) -> None:
    ours = client(slurm)
    assert ours.max_array_size() == 10001
    partitions = {p.name: p for p in ours.partitions()}
    assert set(partitions) == {"batch", "high"}
    batch = partitions["batch"]
    assert (batch.state, batch.n_nodes, batch.max_time_minutes, batch.cpus) == ("up", 4, None, 8)
    assert batch.gres.startswith("gpu:4")


def test_a_waiting_task_is_kept_from_more_nodes(slurm: SlurmCluster, tmp_path: Path) -> None:
    ours = client(slurm)
    words = argv(tmp_path, "true", array="0-1", sbatch_options=(f"--exclude={slurm.nodes[0]}", "--begin=now+1hour"))
    job = submit(ours, words)
    slurm.set_node(1, "down")
    assert ours.node_states(slurm.nodes[:2]) == {slurm.nodes[0]: "idle", slurm.nodes[1]: "down"}
    ours.exclude(f"{job}_1", [slurm.nodes[1]])
    slurm.scontrol("update", f"JobId={job}", "StartTime=now")
    rows = wait_for_end(ours, job)
    assert [rows[i].node for i in (0, 1)] == [slurm.nodes[2], slurm.nodes[2]]
    assert f" ExcNodeList={slurm.nodes[0]} " in slurm.scontrol("--oneliner", "show", "job", f"{job}_0")
    assert f" ExcNodeList={slurm.nodes[0]},{slurm.nodes[1]} " in slurm.scontrol("-o", "show", "job", f"{job}_1")
    with pytest.raises(SchedulerError):
        ours.exclude(f"{job}_1", [slurm.nodes[2]])


def test_waiting_tasks_of_an_array_are_kept_from_a_node_with_one_command(slurm: SlurmCluster, tmp_path: Path) -> None:
    ours = client(slurm)
    job = submit(ours, argv(tmp_path, "sleep 600", array="0-4", sbatch_options=("--begin=now+1hour",)))
    slurm.scontrol("update", f"JobId={job}_1", "StartTime=now")
    wait_until("one runs", lambda: rows_of(ours, job)[1].state == "RUNNING")
    first = slurm.nodes[0]
    ours.exclude(f"{job}_0", [first], of=f"{job}_[0,2-4]")
    shown = slurm.scontrol("-o", "show", "job", str(job)).splitlines()
    assert {f"ExcNodeList={first}" in line for line in shown if "JobState=PENDING" in line} == {True}
    with pytest.raises(SchedulerError):  # one of them is not waiting: SLURM says so, and keeps the rest all the same
        ours.exclude(f"{job}_0", [slurm.nodes[1]], of=f"{job}_[0-4]")
    shown = slurm.scontrol("-o", "show", "job", str(job)).splitlines()
    waiting = [line for line in shown if "JobState=PENDING" in line]
    assert waiting
    assert all(slurm.nodes[1] in line or "[" in line.partition("ExcNodeList=")[2].split()[0] for line in waiting)


def test_what_lives_is_found_by_its_id_and_folder_whatever_it_is_called(slurm: SlurmCluster, tmp_path: Path) -> None:
    ours, folder = client(slurm), tmp_path / "a folder"
    folder.mkdir()
    job = submit(ours, argv(folder, "sleep 600", array="0-2", sbatch_options=("--begin=now+1hour",)))
    slurm.scontrol("update", f"JobId={job}_1", "StartTime=now")
    wait_until("one runs", lambda: rows_of(ours, job)[1].state == "RUNNING")
    slurm.scontrol("update", f"JobId={job}", "JobName=somebody's own", "Comment=ask Jo")
    assert [row for row in ours.queue() if row.job_id == job] == []
    assert ours.live_indices(job, folder) == {0, 1, 2}
    assert ours.live_indices(job, tmp_path) == set()
    assert ours.live_indices(999999, folder) == set()
    ours.cancel([str(job)])
    wait_until("it is gone", lambda: ours.live_indices(job, folder) == set())


def test_without_slurmdbd_there_is_no_accounting(slurm: SlurmCluster) -> None:
    assert client(slurm).accounting(["kd-demo-teacher-0"], since=time.time() - 60) is None


def test_accounting_has_every_attempt_and_what_it_used(slurm_accounting: SlurmCluster, tmp_path: Path) -> None:
    ours = client(slurm_accounting)
    began = time.time()
    body = '[ -n "$SLURM_RESTART_COUNT" ] || { scontrol requeue $SLURM_JOB_ID; sleep 600; }; srun sleep 2.5'
    name = "kd-demo-teacher-attempts"
    job = submit(ours, argv(tmp_path, body, name=name, array="3"))
    wait_for_end(ours, job)

    def states() -> list[str]:
        return [r.state for r in ours.accounting(["kd-other", name], since=began) or []]

    wait_until("sacct shows both attempts", lambda: states() == ["REQUEUED", "COMPLETED"])
    first, second = ours.accounting([name], since=began) or []
    assert (first.task_id, first.restarts, first.exit_code) == (f"{job}_3", 0, None)
    assert (second.task_id, second.restarts, second.exit_code) == (f"{job}_3", 1, 0)
    assert second.elapsed_s >= 2
    assert second.cpu_s > 0
    assert second.max_rss_gib is not None
    assert 0 < second.max_rss_gib < 1
    assert ours.accounting(["kd-nobody"], since=began) == []
    assert ours.accounting([name], since=0.0) == [first, second]


def test_limits_on_the_number_of_jobs_are_a_matter_of_pace(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(nodes=1, accounting=True, enforce_limits=True)
    cluster.limit_submitted_jobs(3)
    ours = client(cluster)
    answer = ours.submit(argv(tmp_path, "sleep 600", array="0-3"))
    assert isinstance(answer, Refused)
    assert answer.is_submit_limit
    assert "QOSMaxSubmitJobPerUserLimit" in answer.text
    submit(ours, argv(tmp_path, "sleep 600", array="0-2"))
    impossible = ours.submit(argv(tmp_path, "true", account="nobody"))
    assert isinstance(impossible, Refused)
    assert impossible.kind == "impossible"


def test_a_launch_that_failed_is_held_until_it_is_released(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(nodes=1, prolog=True, slurm_conf="PartitionName=short Nodes=ALL MaxTime=1 State=UP")
    ours = client(cluster)
    too_long = submit(ours, argv(tmp_path, "true", slurm_partition="short", time_minutes=2))
    cluster.fail_prolog(True)
    job = submit(ours, argv(tmp_path, "true"))
    wait_until("it is held", lambda: is_held_launch(rows_of(ours, job)[0].reason))
    assert rows_of(ours, job)[0].restarts == 1
    cluster.fail_prolog(False)
    cluster.resume_nodes()
    ours.release(rows_of(ours, job)[0].task_id)
    assert wait_for_end(ours, job)[0].exit_code == 0
    # Where a site does not refuse it, a request that no end of other jobs would grant waits.
    assert is_impossible_wait(rows_of(ours, too_long)[0].reason)
    with pytest.raises(SchedulerError, match="Invalid job id"):
        ours.release("999999_1")


def test_a_controller_that_does_not_answer(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(nodes=1, message_timeout_s=5)
    ours, hasty = client(cluster), client(cluster, timeout_s=0.5)
    cluster.pause("slurmctld")
    with pytest.raises(SchedulerUnreachableError, match=r"squeue gave no answer within 0.5 s and was killed"):
        hasty.queue_texts()
    assert isinstance(hasty.submit(argv(tmp_path, "true", name="kd-hasty")), Unknown)
    assert isinstance(ours.submit(argv(tmp_path, "true", name="kd-patient")), Unknown)
    cluster.unpause("slurmctld")
    # Refused by nobody: sbatch said "Socket timed out", and the job runs.
    wait_until(
        "the job that nobody confirmed is there",
        lambda: "kd-patient" in {r.name for r in ours.queue()},
    )
    cluster.kill("slurmctld")
    with pytest.raises(SchedulerUnreachableError, match="Unable to contact slurm controller"):
        ours.queue_texts()
    assert isinstance(ours.submit(argv(tmp_path, "true")), Unknown)


def test_all_of_it_over_ssh(
    slurm: SlurmCluster, sshd: SshLogin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    ours = client(slurm, SshRunner(sshd.target, tuple(sshd.options)))
    folder = tmp_path / 'it\'s "50%A" $(touch pwned); né\t→'.replace("\t", " ")
    job = submit(ours, argv(folder, 'env; echo "$1|$2"', array="1-2"))
    assert {i: r.exit_code for i, r in wait_for_end(ours, job).items()} == {1: 0, 2: 0}
    seen = (folder / f"logs/slurm-{job}_1.log").read_text()
    assert "HOME=" in seen
    assert "hf_secret" not in seen
    assert seen.endswith("an argument|$HOME\n")
    assert ours.max_array_size() == 10001
    assert ours.accounting(["kd-demo"], since=0.0) is None
    refused = ours.submit(argv(tmp_path, "true", sbatch_options=("--bogus",)))
    assert isinstance(refused, Refused)  # sbatch's exit status is 255, as that of an ssh that failed
    ours.cancel([str(job), "999999"])


def test_ssh_that_reaches_nobody_is_unreachable(sshd: SshLogin, slurm: SlurmCluster) -> None:
    nobody = SshRunner(sshd.target, (*sshd.options, "-p", "1"))
    with pytest.raises(SchedulerUnreachableError, match="Connection refused"):
        client(slurm, nobody).queue_texts()
    stranger = SshRunner(sshd.target, (*sshd.options, "-i", "/dev/null", "-o", "IdentityAgent=none", "-l", "nobody"))
    with pytest.raises(SchedulerUnreachableError, match="gave no answer"):
        client(slurm, stranger).queue_texts()


def test_hostile_words_pass_a_real_sshd(sshd: SshLogin, slurm: SlurmCluster) -> None:
    words = ["it's", '"', "$(touch pwned)", "`x`", "a\nb", "\\", "!x", "~", "*", "né→", "", "#", "-n"]
    runner = SshRunner(sshd.target, tuple(sshd.options))
    answer = runner.run(["printf", "%s\\0", *words], timeout_s=PATIENCE_S)
    assert answer.stdout.split("\0")[:-1] == words
    assert runner.run(["sh", "-c", "exit 255"], timeout_s=PATIENCE_S).status == 255
    with pytest.raises(SchedulerUnreachableError, match=r"sleep on .* gave no answer within 0.5 s"):
        runner.run(["sleep", "600"], timeout_s=0.5)
