"""The names of a job's files: jobs that exist are found by them, and one module alone knows them."""

from __future__ import annotations

import ast
from pathlib import Path

import kd_assets
from kd_assets.contract import event_file, lease_file
from kd_assets.scheduler.folder import Submission, key_folder

JOB = Submission(folder=Path("/jobs/demo/teacher-01/0002"))
NAMES = {
    "job.json": JOB.job_file,
    "spec.json": JOB.spec_file,
    "events": JOB.events_folder,
    "logs": JOB.log_folder,
    "cancelled": JOB.cancelled_mark,
    "followers": JOB.followers_folder,
    "start.json": JOB.start_file,
    "state.json": JOB.state_file,
    "group": JOB.process_group_file,
    "job.lock": JOB.job_lock,
    "logs/supervisor.log": JOB.supervisor_log,
    "logs/task-00003.log": JOB.local_log(3),
    "arrays": JOB.arrays_folder,
    "arrays/0004.json": JOB.intent_file(4),
    "arrays/0004.answer.json": JOB.answer_file(4),
    "endings.json": JOB.endings_file,
    "unseen.json": JOB.unseen_file,
    "environment.sh": JOB.environment_file,
    "submit.lock": JOB.submit_lock,
    "released-3": JOB.released_mark(3),
    "logs/slurm-14_3.log": JOB.slurm_log(14, 3),
}


def test_the_files_of_a_job_have_the_names_that_they_always_had() -> None:
    assert {name: str(path.relative_to(JOB.folder)) for name, path in NAMES.items()} == {n: n for n in NAMES}
    assert key_folder(Path("/jobs"), recipe="demo", kind="teacher", key="01") == JOB.folder.parent
    assert event_file(JOB.events_folder, 3, 1) == JOB.folder / "events" / "task-00003.process-1.jsonl"
    assert lease_file(JOB.events_folder, 3) == JOB.folder / "leases" / "task-00003.lease"


def joined(module: Path) -> set[str]:
    """Words that a module joins to a path: of `folder / "job.json"`, `job.json`."""
    divisions = (n for n in ast.walk(ast.parse(module.read_text())) if isinstance(n, ast.BinOp))
    words = (n.right for n in divisions if isinstance(n.op, ast.Div))
    return {word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)}


def test_no_other_module_joins_a_path_to_one_of_them() -> None:
    package = Path(kd_assets.__file__).parent
    modules = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    owner = modules.pop("scheduler/folder.py")
    assert {"job.json", "arrays", "cancelled"} <= joined(owner), "the test sees what it looks for"
    found = {name: words for name, path in modules.items() if (words := joined(path) & set(NAMES))}
    assert found == {}
