"""Where a teacher's layers lie does not change what it gives; a process says when it uses fewer GPUs than it has."""

from __future__ import annotations

from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch

from kd_assets.errors import RecipeError
from kd_assets.model_files.placement import ONE_DEVICE, Placement
from kd_assets.teacher.batch.engine import Engine
from kd_assets.teacher.devices.teacher_on_devices import TeacherOnDevices, has_plan, placement_here, unused
from kd_assets.teacher.model.head import is_plain
from kd_assets.teacher.model.load import as_teacher
from kd_assets.teacher.recompute import reference
from kd_assets_tests.teacher.split_teachers import a_step, difference
from kd_assets_tests.teacher.tiny import save_teacher, tiny_model, tiny_params

CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_a_teacher_laid_out_layer_by_layer_gives_the_same_bytes(architecture: str) -> None:
    """With accelerate's hooks on every module, as they are where layers lie on several GPUs."""
    whole = as_teacher(tiny_model(architecture), device=CPU)
    model = tiny_model(architecture)
    names = {name: "cpu" for name, module in model.named_modules() if not list(module.children())}
    spread = as_teacher(accelerate.dispatch_model(model, device_map=names, force_hooks=True), device=CPU)
    assert spread.head is not None
    assert is_plain(whole.head.linear) if whole.head is not None else False
    assert not is_plain(spread.head.linear)
    assert set(difference(Engine(spread).run(a_step()), Engine(whole).run(a_step())).values()) == {0.0}
    ids_L = np.arange(9, dtype=np.uint32)
    assert torch.equal(reference(spread, ids_L, (0,)).logits_PV, reference(whole, ids_L, (0,)).logits_PV)


def test_a_process_that_uses_fewer_gpus_than_it_has_says_what_to_set() -> None:
    message = unused(ONE_DEVICE, 4)
    assert message is not None
    assert "has 4 GPUs and uses 1" in message
    assert "processes_per_task to 4 times" in message
    assert unused(Placement(kind="tensor_parallel", n_devices=4, n_processes=1, reason=""), 4) is None
    assert unused(ONE_DEVICE, 0) is None


def test_a_plan_is_what_transformers_has_for_the_architecture(tmp_path: Path) -> None:
    llama, gpt2 = (save_teacher(tmp_path / name, name) for name in ("llama", "gpt2"))
    assert has_plan(tiny_params(llama), llama) is True
    assert has_plan(tiny_params(gpt2), gpt2) is False
    assert has_plan(tiny_params(llama, trust_remote_code=True), llama) is False, "its code has not been checked yet"
    with pytest.raises(RecipeError, match="no tensor-parallel plan for gpt2"):
        placement_here(tiny_params(gpt2, placement="tensor_parallel"))


def test_a_teacher_of_one_process_takes_no_other(tmp_path: Path) -> None:
    params = tiny_params(save_teacher(tmp_path / "teacher"))
    running = TeacherOnDevices(params, digests=tmp_path / "digests.json", warn=pytest.fail, report_fatal=print)
    assert (running.placement, running.is_shared) == (ONE_DEVICE, False)
    assert running.run_step(a_step()).topk is not None
    assert len(running.reference(np.arange(5, dtype=np.uint32), (0,)).logits_PV) == 5
    running.close()
