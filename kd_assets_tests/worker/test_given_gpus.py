"""GPUs that a task was given and does not see: a fault of the node, never a teacher on the CPU."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import torch

from kd_assets.contract import JobKind, Reporter, event_file
from kd_assets.errors import NodeFaultError
from kd_assets.worker.given_gpus import given_gpus, require_given_gpus
from kd_assets.worker.stop_flag import StopFlag
from kd_assets.worker.task import runner_for
from kd_assets_tests.worker.test_task import Harness


@pytest.mark.parametrize(
    ("environment", "n_processes", "n_given"),
    [
        ({}, 1, 0),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1, 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 1, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 1, 0),
        ({"SLURM_GPUS_ON_NODE": "0"}, 1, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 1, 2),
        ({"SLURM_JOB_GPUS": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}, 1, 4),
        ({"SLURM_GPUS_ON_NODE": "4"}, 1, 4),
        ({"KD_GPUS_PER_NODE": "4"}, 1, 4),
        ({"KD_GPUS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": ""}, 1, 4),
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "2,3"}, 2, 2),
        ({"SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "0"}, 2, 1),
        ({"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2"}, 1, 1),
    ],
)
def test_how_many_gpus_a_process_must_see(environment: dict[str, str], n_processes: int, n_given: int) -> None:
    assert given_gpus(environment, n_processes=n_processes)[0] == n_given


@pytest.mark.parametrize("n_seen", [0, 1])
def test_fewer_gpus_than_were_given_is_a_fault_of_the_node(monkeypatch: pytest.MonkeyPatch, n_seen: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_seen)
    with pytest.raises(NodeFaultError, match=rf"given 2 GPUs on .* \(SLURM_GPUS_ON_NODE=2\) .* sees {n_seen}, so noth"):
        require_given_gpus({"SLURM_GPUS_ON_NODE": "2"})


def test_the_gpus_that_were_given_and_are_seen_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    require_given_gpus({"SLURM_GPUS_ON_NODE": "2"})


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_model_is_not_loaded_on_the_cpu_of_a_task_with_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: JobKind
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    job = dataclasses.replace(Harness(tmp_path, ["p0"]).job, kind=kind)
    with Reporter(event_file(tmp_path, 0), stream=io.StringIO()) as report, pytest.raises(NodeFaultError):
        runner_for(job, report, StopFlag(), environment={"SLURM_JOB_GPUS": "3"})
