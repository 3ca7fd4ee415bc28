"""Names that shells, SLURM or its log patterns could take for something else, and secrets that nobody may see."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kd_assets.components import TeacherCaches
from kd_assets.contract import JobFile, WorkUnit
from kd_assets.errors import SchedulerError
from kd_assets.orchestration.materialize import planner_of
from kd_assets.scheduler import JobSpec, Resources, Submission, TaskPhase, submission_key
from kd_assets.store import committed, plan_output
from kd_assets_tests.orchestration.deployment import failure_text
from kd_assets_tests.slurm.background import Background
from kd_assets_tests.slurm.cluster import SlurmCluster, wait_until
from kd_assets_tests.slurm.conftest import SshLogin
from kd_assets_tests.slurm.deployment import KEYS, SlurmDeployment, log_of
from kd_assets_tests.slurm.fakes import COMMANDS, put_first

Deploy = Callable[..., SlurmDeployment]
TWO = (KEYS[0], KEYS[1])


@pytest.mark.parametrize("name", ["", "a b", "it's", '"', "$(x)", "a\nb", "a\n", "né", "-x", "a/b", "..", "a;b", "a%A"])
def test_a_hostile_recipe_name_is_refused(name: str) -> None:
    attributes: dict[str, Any] = {
        "sources": [{"name": "s", "path": "/s"}],
        "teacher": {"model_id": "m"},
        "caches": {"topk": {}},
    }
    with pytest.raises(ValidationError, match="String should match pattern"):
        TeacherCaches(recipe=name, **attributes)
    with pytest.raises(SchedulerError, match="cannot name a recipe's jobs"):
        JobSpec(key="0" * 32, recipe=name, kind="teacher", n_tasks=1, concurrency=1)


@pytest.mark.parametrize(
    "home",
    [
        'it\'s "50%A" $(touch pwned) `touch pwned` $HOME ${x}',
        "né → 中 ünï",
        "-rf --wrap=true/-n",
        "a;b&c|d>e<f *?[x] {1,2} #!~ %",
    ],
)
def test_a_home_with_any_printable_name_works(home: str, slurm: SlurmCluster, deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy(slurm, home=home)
    before = {p.name for p in Path.cwd().iterdir()}
    result = deployment.run("topk_cache", partition_range=TWO)
    assert result.success, failure_text(result)
    assert deployment.recorded(result.run_id) == list(TWO)
    made = deployment.materializations(result.run_id, "topk_cache")
    assert all(Path(log_of(m)).stat().st_size for (m,) in made.values())
    assert {p.name for p in tmp_path.iterdir()} == {"instance", Path(home).parts[0]}
    assert not list(tmp_path.rglob("pwned"))
    assert {p.name for p in Path.cwd().iterdir()} == before


@pytest.mark.parametrize("home", ["back\\slash", "line\nend", "tab\tulator"])
def test_a_home_under_which_slurm_cannot_write_logs_fails_the_run_with_the_remedy(
    home: str, slurm: SlurmCluster, deploy: Deploy
) -> None:
    deployment = deploy(slurm, home=home)
    result = deployment.run("topk_cache", partition_range=TWO)
    assert not result.success
    assert "choose a KD_HOME without backslashes and line ends" in failure_text(result)
    assert deployment.array_jobs() == []
    assert deployment.submissions() == []


HOSTILE_KEYS = ('it\'s "50%A"', "$(touch pwned)", "`touch pwned`", "-rf", "né → 中", "a b;c&d")


def test_partition_keys_are_words_of_the_job_file_and_of_nothing_else(
    slurm: SlurmCluster, deploy: Deploy, tmp_path: Path
) -> None:
    deployment = deploy(slurm)
    planner = planner_of(deployment.recipe, deployment.platform)
    (known,) = planner.teacher_work([KEYS[0]], ["topk_cache"]).units
    units = tuple(renamed(known, key, planner.recipe_folder) for key in HOSTILE_KEYS)
    spec = JobSpec(
        key=submission_key("teacher", "tiny", units),
        recipe="tiny",
        kind="teacher",
        n_tasks=2,
        concurrency=2,
        resources=Resources(memory_gib=0.5),
    )

    def write_job_file(new: Submission) -> None:
        job = JobFile(
            kind="teacher",
            recipe="tiny",
            key=spec.key,
            recipe_folder=str(planner.recipe_folder),
            events_folder=str(new.events_folder),
            tasks=(tuple(range(0, len(units), 2)), tuple(range(1, len(units), 2))),
            units=units,
            teacher=planner.teacher_params(),
            provenance=planner.provenance("teacher"),
        )
        new.job_file.write_text(job.to_json())

    scheduler = deployment.slurm
    with scheduler.deciding("tiny", "teacher"):
        submission = scheduler.submit(spec, write_job_file)
    wait_until(
        "both tasks have ended",
        lambda: all(t.phase is TaskPhase.ENDED for t in scheduler.poll([submission]).states[submission].values()),
    )
    assert deployment.n_made() == dict.fromkeys(sorted(HOSTILE_KEYS), 1)
    assert all(committed(Path(o.path), o.fingerprint) is not None for u in units for o in u.outputs)
    assert not list(tmp_path.rglob("pwned"))


def renamed(unit: WorkUnit, partition_key: str, recipe_folder: Path) -> WorkUnit:
    """The unit as one of another partition, with the same content."""
    (output,) = unit.outputs
    renamed_output = plan_output(
        output.asset, output.identity, recipe_folder=recipe_folder, partition_key=partition_key
    )
    return dataclasses.replace(unit, partition_key=partition_key, outputs=(renamed_output,))


def files_with(text: str, folders: Iterable[Path]) -> list[Path]:
    """Every file that holds a text; sqlite's journals come and go meanwhile."""
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    found = []
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            if text.encode() in path.read_bytes():
                found.append(path)
    return found


@pytest.mark.parametrize("over_ssh", [False, True], ids=["here", "over ssh"])
def test_a_secret_reaches_the_tasks_and_stands_nowhere_but_in_its_file(
    over_ssh: bool,
    slurm: SlurmCluster,
    sshd: SshLogin,
    deploy: Deploy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    token = f"hf_{secrets.token_hex(20)}"
    monkeypatch.setenv("HF_TOKEN", token)
    for command in COMMANDS:
        said = tmp_path / f"{command}.said"
        put_first(tmp_path / "fakes", command, f"{{ printf '%s\\n' \"$@\"; env; }} >> '{said}'", monkeypatch)
    ssh = {"ssh": sshd.target, "ssh_options": sshd.options} if over_ssh else {}
    gate = tmp_path / "gate"
    # What a careless site does: everything that is run is shown.
    told = {"gate": str(gate), "units": {KEYS[3]: "fail"}}
    deployment = deploy(slurm, told=told, profile={"setup": "set -x", **ssh})
    python, seen = deployment.home / "python", tmp_path / "seen"
    seen.mkdir()
    look = f'printf %s "${{HF_TOKEN-}}" | sha256sum > "{seen}/$SLURM_ARRAY_TASK_ID"'
    python.write_text(python.read_text().replace("#!/bin/bash\n", f"#!/bin/bash\n{look}\n"))

    with Background(deployment) as run:
        tasks = [run.task_id(task) for task in range(3)]
        for task in range(3):
            run.started(task)
        with monkeypatch.context() as patch:  # these calls are ours, and have the environment of this process
            patch.delenv("HF_TOKEN")
            shown = slurm.scontrol("show", "job", "--details", tasks[0].partition("_")[0])
            script = slurm.scontrol("write", "batch_script", tasks[0], "-")
        arguments = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
        while_running = files_with(token, [deployment.home, slurm.root, tmp_path])
        gate.touch()
        run.fails()
    monkeypatch.delenv("HF_TOKEN")

    expected = hashlib.sha256(token.encode()).hexdigest()
    assert [f.read_text().split()[0] for f in sorted(seen.iterdir())] == [expected] * 3
    (secret_file,) = (deployment.home / "secrets").iterdir()
    assert secret_file.stat().st_mode & 0o777 == 0o600
    assert secret_file.stat().st_uid == os.getuid()
    assert set(while_running) == {secret_file}
    assert set(files_with(token, [deployment.home, slurm.root, tmp_path])) == {secret_file}
    assert "task.sbatch" in script
    assert deployment.array_jobs()[0].split()[1] in shown
    assert (tmp_path / "sbatch.said").exists() is not over_ssh
    assert not [text for text in (shown, script, *capfd.readouterr()) if token in text]
    assert not [line for line in arguments if token.encode() in line]
    assert f"{KEYS[3]}: TeacherError" in run.log()
    assert token not in run.log()
