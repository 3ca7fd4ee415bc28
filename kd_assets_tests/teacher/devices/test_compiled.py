"""Compiled decoder blocks: the same numbers, made by the same kernels whatever came first, or not compiled and why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_assets.contract import TeacherParams, WorkUnit
from kd_assets.errors import InterruptedTaskError
from kd_assets.teacher.batch.forward import run_forward
from kd_assets.teacher.devices import compiled
from kd_assets.teacher.devices.compiled import (
    Blocks,
    compile_blocks,
    largest_difference,
    spread_ids,
    warm_up_shapes,
    why_not,
)
from kd_assets.teacher.model.load import Teacher, as_teacher
from kd_assets.teacher.recompute import STATE_RTOL
from kd_assets.worker.stop_flag import StopFlag
from kd_assets_tests.teacher.test_runner import StopAfter
from kd_assets_tests.teacher.tiny import (
    Desk,
    part_bytes,
    save_teacher,
    tiny_config,
    tiny_documents,
    tiny_model,
    tiny_params,
)

# Of torch's own modules, when its compiler is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

LONGEST = 64
LENGTHS = [9, 30, 3, 22, 14, 64, 5, 17, 2, 40, 33, 8]
"""Of documents in three windows of five: batches of one and of several, of many widths."""


@pytest.fixture(autouse=True, scope="module")
def compiler_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was compiled in other runs of the tests is not used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def forgetful_compiler() -> Iterator[None]:
    """What was compiled in other tests is not used: in production one process has one teacher."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def teacher_of(architecture: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Teacher:
    return as_teacher(tiny_model(architecture, dtype=dtype, **changes), device=torch.device("cpu"))


def compiled_blocks(teacher: Teacher, warnings: list[str] | None = None) -> Blocks:
    return compile_blocks(
        teacher,
        "always",
        blocks=(1,),
        longest=LONGEST,
        is_shared=False,
        warn=(warnings if warnings is not None else []).append,
    )


# The numbers


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("mistral", torch.bfloat16), ("qwen3_moe", torch.float32)],  # with and without masks; with experts
)
def test_compiled_blocks_give_the_states_of_the_plain_ones_and_nothing_is_compiled_after_the_warm_up(
    architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_of(architecture, dtype)
    blocks = compiled_blocks(teacher)
    assert blocks.in_words == "blocks"
    assert blocks.warm_up_s > 0
    monkeypatch.setattr(compiled, "AFTER_WARM_UP", "fail_on_recompile")
    for n_documents, width in [(2, 64), (3, 7), (1, 9), (5, 30), (2, 13), (1, 64), (4, 64), (64, 8), (16, 2)]:
        ids_BT = spread_ids(n_documents, width, teacher.n_token_ids)
        whole = run_forward(teacher, ids_BT, blocks=(0, 1), needs_final=True)
        with blocks.plain():
            plain = run_forward(teacher, ids_BT, blocks=(0, 1), needs_final=True)
        assert largest_difference(whole, plain) <= STATE_RTOL[dtype]
        early = run_forward(teacher, ids_BT, blocks=(0, 1), needs_final=False)
        assert all(torch.equal(early.block_FH[n], whole.block_FH[n]) for n in (0, 1)), "the pass ended below"


@pytest.mark.compiler
@pytest.mark.slow
def test_another_process_goes_on_with_equal_bytes(tmp_path: Path) -> None:
    """An attempt that is stopped between two parts, and resumed by another process that compiles afresh and begins
    with other batches, leaves the bytes of one that was not."""
    params = tiny_params(save_teacher(tmp_path / "teacher"), compile="always", dtype="bfloat16")
    whole, stopped = Desk(tmp_path / "whole"), Desk(tmp_path / "stopped")
    unit = unit_of(whole, params)
    looks = CountsLooks()
    whole.run(params, unit, looks)
    (loaded,) = whole.events("teacher_loaded")
    assert loaded["compiled"] == "blocks"
    assert loaded["warm_up_s"] > 0

    with pytest.raises(InterruptedTaskError):
        stopped.run(params, unit_of(stopped, params), StopAfter(looks.n * 2 // 3))
    assert 0 < len(part_bytes(unit_of(stopped, params))) < len(part_bytes(unit))
    subprocess.run(
        [sys.executable, "-c", f"from {__name__} import resume; resume({str(tmp_path)!r})"],
        check=True,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "other")},
        timeout=1200,
    )
    assert part_bytes(unit_of(stopped, params)) == part_bytes(unit)


class CountsLooks(StopFlag):
    """Is never raised."""

    n = 0

    def __bool__(self) -> bool:
        self.n += 1
        return False


def unit_of(desk: Desk, params: TeacherParams) -> WorkUnit:
    return desk.unit(desk.commit_shard(tiny_documents(LENGTHS)), params)


def resume(folder: str) -> None:
    """In a process of its own: go on with what was stopped."""
    torch.set_num_threads(1)
    params = tiny_params(Path(folder) / "teacher", compile="always", dtype="bfloat16")
    desk = Desk(Path(folder) / "stopped")
    desk.run(params, unit_of(desk, params))
    assert desk.events("teacher_loaded")[-1]["compiled"] == "blocks"


# Not compiled, and why


def test_without_a_compiler_the_blocks_run_as_they_were_and_the_reason_is_told() -> None:
    from torch._inductor import config

    teacher, warnings = teacher_of("llama"), list[str]()
    with config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        blocks = compiled_blocks(teacher, warnings)
    assert blocks.off is not None
    assert "No working C++ compiler" in blocks.off
    assert warnings == [f"the decoder's blocks run uncompiled: {blocks.off}"]
    assert all("forward" not in vars(block) for block in teacher.blocks)


@pytest.mark.compiler
@pytest.mark.slow
def test_blocks_that_differ_by_more_than_the_recomputation_allows_run_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(STATE_RTOL, torch.float32, -1.0)  # a difference there never is
    teacher, warnings = teacher_of("llama"), list[str]()
    blocks = compiled_blocks(teacher, warnings)
    assert blocks.off is not None
    assert "above the bound of -1" in blocks.off
    assert len(warnings) == 1
    assert all("forward" not in vars(block) for block in teacher.blocks)


def decide_by_numbers(teacher: Teacher, monkeypatch: pytest.MonkeyPatch, *, in_batches_of: int) -> None:
    """Put into the teacher's blocks what no single graph can hold: a decision that needs the numbers."""
    kind: Any = type(teacher.blocks[0])
    plain = kind.forward

    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        if hidden_states.shape[0] <= in_batches_of and hidden_states.sum().item() == 0.5:
            return hidden_states
        return plain(self, hidden_states, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)


def test_a_block_that_is_no_single_graph_runs_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of("llama")
    decide_by_numbers(teacher, monkeypatch, in_batches_of=10**9)
    blocks = compiled_blocks(teacher)
    assert "data-dependent" in blocks.in_words
    run_forward(teacher, spread_ids(2, 9, teacher.n_token_ids), blocks=(), needs_final=True)


@pytest.mark.compiler
@pytest.mark.slow
def test_what_cannot_be_compiled_of_single_documents_leaves_batches_of_several_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As some kernels' glue in transformers does, which looks for packed documents in a batch of one."""
    teacher, warnings = teacher_of("llama"), list[str]()
    decide_by_numbers(teacher, monkeypatch, in_batches_of=1)
    blocks = compiled_blocks(teacher, warnings)
    assert blocks.in_words.startswith("blocks; except batches like 1 x 64 tokens: ")
    assert warnings == [f"the decoder's blocks run uncompiled in {blocks.exceptions[0]}"]
    for n_documents in (1, 3):
        ids_BT = spread_ids(n_documents, 40, teacher.n_token_ids)
        whole = run_forward(teacher, ids_BT, blocks=(1,), needs_final=True)
        with blocks.plain():
            plain = run_forward(teacher, ids_BT, blocks=(1,), needs_final=True)
        assert largest_difference(whole, plain) <= STATE_RTOL[torch.float32]
        assert torch.equal(whole.block_FH[1], plain.block_FH[1]) or n_documents > 1


def test_what_is_not_even_tried() -> None:
    teacher = teacher_of("llama")
    assert why_not(teacher, "always") is None
    assert why_not(teacher, "never") == "the recipe says so"
    assert why_not(teacher, "auto") == "auto compiles on a GPU only"

    handle = teacher.blocks[1].mlp.register_forward_pre_hook(lambda module, args: None)  # type: ignore[union-attr]
    assert "hooks inside" in str(why_not(teacher, "always"))
    handle.remove()
    handle = teacher.blocks[1].register_forward_hook(lambda module, args, output: None)
    assert why_not(teacher, "always") is None, "hooks on a block stay outside of its forward"
    handle.remove()

    teacher.blocks[2].forward = lambda *args, **kwargs: None
    assert "replaced the forward" in str(why_not(teacher, "always"))


def test_a_teacher_of_several_processes_is_not_compiled() -> None:
    warnings: list[str] = []
    cases: list[tuple[compiled.CompileChoice, int]] = [("auto", 0), ("always", 1)]
    for wanted, n_warnings in cases:
        blocks = compile_blocks(
            teacher_of("llama"), wanted, blocks=(), longest=LONGEST, is_shared=True, warn=warnings.append
        )
        assert blocks.in_words == "off: other processes take part in it"
        assert len(warnings) == n_warnings


def test_this_torch_has_the_settings_that_equal_bytes_rest_on_and_one_without_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import config
    from torch.fx.experimental import _config as shapes

    assert config.deterministic is False
    assert config.emulate_precision_casts is False
    assert shapes.use_duck_shape is True
    monkeypatch.setattr(compiled, "REQUIRED_MODE", "not_there")
    assert "no deterministic mode" in str(why_not(teacher_of("llama"), "always"))


# What it is warmed up with


@pytest.mark.parametrize(
    ("architecture", "changes", "longest", "shapes"),
    [
        ("llama", {}, 8192, [(2, 2048), (1, 2048)]),
        ("llama", {}, 512, [(8, 512), (1, 512)]),
        ("llama", {}, 9, [(64, 9), (1, 9)]),
        # on either side of the window
        ("mistral", {"sliding_window": 4096}, 8192, [(2, 2048), (1, 2048), (2, 4160), (1, 4160)]),
        ("mistral", {"sliding_window": 512}, 8192, [(2, 2048), (1, 2048), (16, 256), (1, 256), (7, 520), (1, 520)]),
        ("mistral", {"sliding_window": 4096}, 4096, [(2, 2048), (1, 2048)]),
        ("mistral", {"sliding_window": None}, 8192, [(2, 2048), (1, 2048)]),
    ],
)
def test_kernels_are_made_for_one_and_several_documents_on_either_side_of_a_window(
    architecture: str, changes: dict[str, Any], longest: int, shapes: list[tuple[int, int]]
) -> None:
    assert warm_up_shapes(tiny_config(architecture, **changes), longest=longest) == shapes


@pytest.mark.gpu
def test_on_a_gpu_blocks_are_compiled_by_themselves_and_equal_within_the_bound() -> None:
    device = torch.device("cuda")
    teacher = as_teacher(tiny_model("llama", dtype=torch.bfloat16).to(device), device=device)
    blocks = compile_blocks(teacher, "auto", blocks=(1,), longest=LONGEST, is_shared=False, warn=lambda message: None)
    assert blocks.in_words == "blocks"
    for n_documents, width in [(3, 7), (1, 9), (5, 30), (2, 64)]:
        ids_BT = spread_ids(n_documents, width, teacher.n_token_ids).to(device)
        first, again = (run_forward(teacher, ids_BT, blocks=(0, 1), needs_final=True) for _ in range(2))
        assert first.final_FH is not None
        assert again.final_FH is not None
        assert torch.equal(first.final_FH, again.final_FH)
        with blocks.plain():
            plain = run_forward(teacher, ids_BT, blocks=(0, 1), needs_final=True)
        assert largest_difference(first, plain) <= STATE_RTOL[torch.bfloat16]
