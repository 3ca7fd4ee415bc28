"""What only a CUDA device can show: 16-bit kernels against a float32 reference on the CPU, and resumption there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kd_assets.contract import HiddenStateParams
from kd_assets.errors import InterruptedTaskError
from kd_assets.store import read_manifest
from kd_assets.teacher.load import as_teacher, load_teacher
from kd_assets.teacher.reference import LOGIT_RTOL, reference
from kd_assets_tests.teacher.test_runner import StopAfter
from kd_assets_tests.teacher.tiny import (
    ARCHITECTURES,
    N_BLOCKS,
    Desk,
    part_bytes,
    save_teacher,
    tiny_documents,
    tiny_model,
    tiny_params,
)

pytestmark = pytest.mark.gpu

LENGTHS = (3, 1, 20, 64, 37, 5, 9, 30, 12, 2, 40)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pass_on_the_gpu_equals_its_plain_path(architecture: str, dtype: str, tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    folder = save_teacher(tmp_path / "teacher", architecture)
    params = tiny_params(
        folder,
        dtype=dtype,
        recompute_documents=len(LENGTHS),
        hidden_states=HiddenStateParams(blocks=tuple(range(N_BLOCKS)), max_length=64),
    )
    unit = desk.unit(desk.commit_shard(tiny_documents(LENGTHS)), params)
    desk.run(params, unit)
    (loaded,) = desk.events("teacher_loaded")
    assert loaded["device"] == "cuda"
    assert loaded["head"] == "proven"
    for output in unit.outputs:
        record = read_manifest(Path(output.path)).checks["recomputed"]
        assert record["passed"], (output.asset, record)


def test_float32_on_the_gpu_equals_float32_on_the_cpu(tmp_path: Path) -> None:
    params = tiny_params(save_teacher(tmp_path / "teacher"))
    on_gpu = load_teacher(params, digests=None, warn=print)
    on_cpu = as_teacher(tiny_model("llama"), device=torch.device("cpu"))
    ids_L = tiny_documents([64]).input_ids
    gpu_LV = reference(on_gpu, ids_L, ()).logits_LV.cpu().numpy()
    cpu_LV = reference(on_cpu, ids_L, ()).logits_LV.numpy()
    np.testing.assert_allclose(gpu_LV, cpu_LV, rtol=0, atol=LOGIT_RTOL[torch.float32] * np.abs(cpu_LV).max())


def test_interrupted_run_on_the_gpu_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole, stopped = Desk(tmp_path / "whole"), Desk(tmp_path / "stopped")
    params = tiny_params(save_teacher(tmp_path / "teacher"), dtype="bfloat16")
    units = [desk.unit(desk.commit_shard(tiny_documents(LENGTHS)), params) for desk in (whole, stopped)]
    whole.run(params, units[0])
    with pytest.raises(InterruptedTaskError):
        stopped.run(params, units[1], StopAfter(3))
    stopped.run(params, units[1])
    assert part_bytes(units[0]) == part_bytes(units[1])
