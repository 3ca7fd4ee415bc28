"""Running out of memory: the class that says of which kind, the budget that was too large, and a runner that goes on.

The errors are torch's own classes and texts, raised where the forward pass would; a real one on a GPU is marked so.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from kd_assets.contract import Reporter
from kd_assets.errors import MissingInputError, OutOfDeviceMemoryError, OutOfHostMemoryError, StorageUnavailableError
from kd_assets.teacher.devices.memory import within_memory
from kd_assets.teacher.runner import TeacherRunner
from kd_assets.worker.stop_flag import StopFlag
from kd_assets_tests.teacher.partition.test_budgets import Room
from kd_assets_tests.teacher.tiny import Desk, part_bytes, save_teacher, tiny_documents, tiny_params

CUDA_TEXT = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB."
CPU_TEXT = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "99999999999 bytes. Error code 12 (Cannot allocate memory)"
)


def failing(error: Exception) -> Callable[[None], None]:
    def work(argument: None) -> None:
        raise error

    return work


def run(error: Exception) -> None:
    within_memory(failing(error), None, doing="partition p", device_remedy="lower it")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA_TEXT),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_gpu_without_room_is_an_error_of_its_memory(error: Exception) -> None:
    with pytest.raises(OutOfDeviceMemoryError, match=r"partition p: the GPU's memory did not suffice \(.*\); lower it"):
        run(error)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(CPU_TEXT),
        OSError(12, "Cannot allocate memory"),
        pa.ArrowMemoryError("malloc of size 64 failed"),
    ],
)
def test_a_node_without_room_is_an_error_of_its_memory(error: Exception) -> None:
    with pytest.raises(OutOfHostMemoryError, match=r"partition p: the node's memory did not suffice .* more memory"):
        run(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: illegal memory access"),
        MissingInputError("no model"),
        StorageUnavailableError("No space left on device"),
    ],
)
def test_any_other_error_is_left_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as e:
        run(error)
    assert e.value is error


def test_the_error_keeps_none_of_the_arrays_of_the_work() -> None:
    class Tensors:
        pass

    kept: list[weakref.ref[Tensors]] = []

    def work(argument: None) -> None:
        tensors = Tensors()
        kept.append(weakref.ref(tensors))
        raise torch.OutOfMemoryError(CUDA_TEXT)

    with pytest.raises(OutOfDeviceMemoryError) as e:
        within_memory(work, None, doing="p", device_remedy="x")
    gc.collect()
    assert kept[0]() is None
    assert e.value.__context__ is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="what the CPU's allocator says is tested where there is no GPU")
def test_the_real_allocator_of_the_cpu_is_understood() -> None:
    with pytest.raises(OutOfHostMemoryError, match="you tried to allocate"):
        within_memory(torch.empty, 2**60, doing="p", device_remedy="x")


def test_one_partition_without_room_leaves_the_runner_as_good_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path)
    params = tiny_params(save_teacher(tmp_path / "teacher"))
    lengths = (30, 20, 64, 9, 5, 33, 12)
    units = [
        desk.unit(desk.commit_shard(tiny_documents(lengths), key), params, key=key) for key in ("shard-00000", "other")
    ]
    undisturbed = Desk(tmp_path / "undisturbed")
    expected = undisturbed.unit(undisturbed.commit_shard(tiny_documents(lengths)), params)
    undisturbed.run(params, expected)

    room = Room(60)
    monkeypatch.setattr("kd_assets.teacher.batch.engine.run_forward", room.run_forward)
    with Reporter(desk.events_file) as report:
        runner = TeacherRunner(desk.job(params, units), report, StopFlag())
        with pytest.raises(OutOfDeviceMemoryError, match=r"shard-00000: a batch of 1 x 64 tokens .* lower max_length"):
            runner.run(units[0])
        room.n_tokens = 128
        runner.run(units[1])
        runner.run(units[0])
        runner.close()
    assert part_bytes(units[0]) == part_bytes(expected)


def test_a_teacher_that_does_not_fit_says_that_no_budget_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path)
    params = tiny_params(save_teacher(tmp_path / "teacher"))

    def too_large(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError(CUDA_TEXT)

    monkeypatch.setattr("kd_assets.teacher.model.load.read_model", too_large)
    with pytest.raises(OutOfDeviceMemoryError, match=r"could not be loaded: .* use GPUs with more memory"):
        desk.run(params, desk.unit(desk.folder, params))


@pytest.mark.gpu
def test_a_gpu_that_is_full_is_free_again_afterwards() -> None:
    free_bytes, _ = torch.cuda.mem_get_info()

    def fill(argument: None) -> None:
        thirds = [torch.empty(free_bytes // 3, dtype=torch.uint8, device="cuda") for _ in range(4)]
        raise AssertionError(f"{len(thirds)} thirds found room")

    with pytest.raises(OutOfDeviceMemoryError, match="Tried to allocate"):
        within_memory(fill, None, doing="p", device_remedy="x")
    assert torch.cuda.mem_get_info()[0] > 0.9 * free_bytes
