"""What the smoke of the worker would notice. The smoke itself runs in CI, as a step of `.ci/gpu`."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from kd_assets.contract import CONTRACT_VERSION, HiddenStateParams, JobFile
from kd_assets_tests.benchmarks.figures import Figures
from kd_assets_tests.benchmarks.first_minutes.worker_smoke import (
    Worker,
    cpu_problems,
    device_problems,
    difference_problems,
    recomputed_problems,
    verify_problems,
)
from kd_assets_tests.teacher.tiny import Desk, save_teacher, tiny_documents, tiny_params


@pytest.fixture
def job(tmp_path: Path) -> JobFile:
    """Three caches of a tiny teacher in bfloat16, committed."""
    desk = Desk(tmp_path / "desk")
    params = tiny_params(
        save_teacher(tmp_path / "teacher"),
        dtype="bfloat16",
        hidden_states=HiddenStateParams(blocks=(0, 2), max_length=64),
    )
    unit = desk.unit(desk.commit_shard(tiny_documents([30, 12, 64, 5, 40, 33])), params)
    desk.run(params, unit)
    return desk.job(params, [unit])


def test_numbers_of_the_same_weights_in_float32_are_near(job: JobFile, tmp_path: Path) -> None:
    figures = Figures(None)
    assert recomputed_problems(job, figures) == cpu_problems(job, tmp_path / "teacher", figures) == []
    for name in ("recomputed_over_tolerance", "cpu_over_tolerance"):
        assert figures.known[name].keys() == {"topk_cache", "hidden_state_cache", "embedding_cache"}
    assert 0 < figures.known["cpu_over_tolerance"]["hidden_state_cache"] < 3


def test_numbers_of_other_weights_are_noticed_in_every_cache(job: JobFile, tmp_path: Path) -> None:
    other = save_teacher(tmp_path / "other", initializer_range=0.2)
    problems = cpu_problems(job, other, Figures(None))
    assert [problem.partition(":")[0] for problem in problems] == [
        "topk_cache",
        "hidden_state_cache",
        "embedding_cache",
    ]


def test_a_part_with_another_byte_and_one_that_is_missing_are_noticed(job: JobFile, tmp_path: Path) -> None:
    (unit,) = job.units
    copied = []
    for n, output in enumerate(unit.outputs):
        folder = tmp_path / "copy" / str(n)
        folder.mkdir(parents=True)
        for part in Path(output.path).glob("part-*"):
            (folder / part.name).write_bytes(part.read_bytes())
        copied.append(dataclasses.replace(output, path=str(folder)))
    copy = dataclasses.replace(job, units=(dataclasses.replace(unit, outputs=tuple(copied)),))
    assert difference_problems(job, copy) == []
    changed = tmp_path / "copy" / "0" / "part-00001.parquet"
    changed.write_bytes(changed.read_bytes()[:-1] + b"?")
    (tmp_path / "copy" / "2" / "part-00000.parquet").unlink()
    assert difference_problems(job, copy) == [
        "after the stop these parts have other bytes: embedding_cache/part-00000.parquet, topk_cache/part-00001.parquet"
    ]


def test_a_teacher_that_ran_elsewhere_is_noticed(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    job = desk.job(tiny_params(save_teacher(tmp_path / "teacher")), [])
    events = Path(job.events_folder)
    events.mkdir()
    on_cpu = {"data": {"device": "cpu"}}
    (events / "task-00000.jsonl").write_text(
        json.dumps({"v": CONTRACT_VERSION, "type": "teacher_loaded", "time": 1.0, "task": 0, "attempt": 0} | on_cpu)
        + "\n"
    )
    assert device_problems(job, "cpu") == []
    assert device_problems(job, "cuda") == ["the teacher ran on cpu, expected cuda"]


def test_a_damaged_result_is_noticed(job: JobFile) -> None:
    part = Path(job.units[0].outputs[0].path) / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    assert any("part-00000.parquet" in problem for problem in verify_problems(job))


def test_a_worker_that_ends_with_another_status_is_noticed_with_its_words(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    job = dataclasses.replace(desk.job(tiny_params(save_teacher(tmp_path / "teacher")), []), tasks=())
    (problem,) = Worker(job, deadline=time.monotonic() + 120).wait(expected=0)
    assert problem.startswith("the worker of tiny-teacher ended with 2, not 0: ")
    assert "check SLURM_ARRAY_TASK_ID" in problem


def test_a_worker_that_does_not_end_in_time_is_ended(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    job = desk.job(tiny_params(save_teacher(tmp_path / "teacher")), [])
    (problem,) = Worker(job, deadline=time.monotonic()).wait(expected=0)
    assert problem.startswith("the worker of tiny-teacher did not end in time")
