"""A pass whose hidden states are coded: the states are those of a raw cache, there and back, and every check holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kd_assets.contract import HiddenStateParams, PositionChoice, StateCodec, TeacherParams, TopkParams, WorkUnit
from kd_assets.errors import InterruptedTaskError, RecipeError
from kd_assets.store import CacheReader, failed_check, plan_output, read_manifest, verify
from kd_assets.store.codecs import states
from kd_assets.store.codecs.state_codec import group_of
from kd_assets.store.schema import hidden_field
from kd_assets.teacher.rebuilt import RebuiltComparison
from kd_assets.teacher.recompute import Row
from kd_assets.teacher.verification import recompute_stored
from kd_assets_tests.teacher.test_rebuilt import Document, document, uneven_teacher
from kd_assets_tests.teacher.test_runner import StopAfter
from kd_assets_tests.teacher.tiny import HIDDEN_SIZE, Desk, part_bytes, save_teacher, tiny_documents, tiny_params

CODECS: tuple[StateCodec, ...] = ("split", "fp8", "int8_32")
LENGTHS = (3, 1, 20, 64, 90, 5, 2, 30, 12)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def params_of(folder: Path, codec: StateCodec, **changes: Any) -> TeacherParams:
    hidden = HiddenStateParams(blocks=(1,), max_length=50, final=("before_norm", "after_norm"), codec=codec)
    return tiny_params(
        folder,
        topk=TopkParams(k=4, max_length=64),
        hidden_states=dataclasses.replace(hidden, **changes),
    )


def unit_of(desk: Desk, params: TeacherParams) -> WorkUnit:
    """With the codec in its identity."""
    unit = desk.unit(desk.commit_shard(tiny_documents(LENGTHS)), params, assets=("topk_cache", "hidden_state_cache"))
    assert params.hidden_states is not None
    said: dict[str, Any] = {"blocks": [1], "final": ["before_norm", "after_norm"], "max_length": 50}
    if params.hidden_states.codec != "raw":
        said["codec"] = params.hidden_states.codec
    if params.hidden_states.positions.kept != "all":
        said["positions"] = "learned"
    topk, hidden = unit.outputs
    made_by = {"weights_fingerprint": params.weights_fingerprint, "dtype": params.dtype}
    identity = {**hidden.identity, **made_by, "params": said}
    hidden = plan_output(
        "hidden_state_cache", identity, recipe_folder=desk.recipe_folder, partition_key=unit.partition_key
    )
    return dataclasses.replace(unit, outputs=(topk, hidden))


def states_read(unit: WorkUnit) -> dict[str, npt.NDArray[np.uint16]]:
    reader = CacheReader.from_folders([Path(unit.outputs[1].path)])
    names = [name for name in reader.fields if name.startswith("hidden_")]
    return {name: np.concatenate([reader[i][name] for i in range(len(reader))]) for name in names}


def there_and_back(bits_NH: npt.NDArray[np.uint16], codec: str) -> npt.NDArray[np.uint16]:
    if codec == "fp8":
        return states.decode_fp8(*states.encode_fp8(bits_NH))
    if (group := group_of(codec)) is not None:
        return states.decode_int8(*states.encode_int8(bits_NH, group))
    return bits_NH


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> WorkUnit:
    desk, params = Desk(tmp_path_factory.mktemp("raw")), params_of(teacher_folder, "raw")
    unit = unit_of(desk, params)
    desk.run(params, unit)
    return unit


@pytest.mark.parametrize("codec", CODECS)
def test_the_states_are_those_of_a_raw_cache_there_and_back_and_every_check_holds(
    tmp_path: Path, teacher_folder: Path, raw: WorkUnit, codec: StateCodec
) -> None:
    desk, params = Desk(tmp_path), params_of(teacher_folder, codec)
    unit = unit_of(desk, params)
    desk.run(params, unit)
    exact, found = states_read(raw), states_read(unit)
    assert list(found) == list(exact) == ["hidden_block_1", "hidden_final_before_norm", "hidden_final_after_norm"]
    for name, bits in exact.items():
        np.testing.assert_array_equal(found[name], there_and_back(bits, codec))
    manifest = read_manifest(Path(unit.outputs[1].path))
    assert failed_check(manifest) is None
    assert manifest.checks["recomputed"]["passed"] is True
    assert manifest.checks["rebuilt"]["passed"] is True
    assert manifest.checks["rebuilt"]["n_positions"] > 0
    assert (manifest.stats["max_codec_state_error"] == 0) == (codec == "split")
    assert verify(Path(unit.outputs[1].path)).problems == ()
    ours, theirs = (
        {name: data for name, data in part_bytes(x).items() if name.startswith("topk")} for x in (unit, raw)
    )
    assert ours == theirs
    (again,) = recompute_stored([Path(unit.outputs[1].path)], n_documents=3, seed=1, teacher_folder=teacher_folder)
    assert again.passed


@pytest.mark.parametrize("codec", ["fp8", "split"])
def test_a_coded_cache_may_keep_some_positions(tmp_path: Path, teacher_folder: Path, codec: StateCodec) -> None:
    desk = Desk(tmp_path)
    params = params_of(teacher_folder, codec, positions=PositionChoice(kept="learned"))
    unit = unit_of(desk, params)
    desk.run(params, unit)
    assert verify(Path(unit.outputs[1].path)).problems == ()
    manifest = read_manifest(Path(unit.outputs[1].path))
    assert manifest.checks["recomputed"]["passed"] is True


@pytest.mark.parametrize("codec", CODECS)
def test_a_task_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, teacher_folder: Path, codec: StateCodec
) -> None:
    params, units = params_of(teacher_folder, codec), []
    for name, stop in (("whole", None), ("stopped", StopAfter(1))):
        desk = Desk(tmp_path / name)
        unit = unit_of(desk, params)
        if stop is not None:
            with pytest.raises(InterruptedTaskError):
                desk.run(params, unit, stop)
        desk.run(params, unit)
        units.append(unit)
    assert part_bytes(units[0]) == part_bytes(units[1])


def test_groups_that_do_not_divide_the_hidden_size_are_refused_before_anything_is_computed(
    tmp_path: Path, teacher_folder: Path
) -> None:
    desk, params = Desk(tmp_path), params_of(teacher_folder, "int8_128")
    unit = unit_of(desk, params)
    with pytest.raises(RecipeError, match=f"groups of 128 do not divide the teacher's hidden size {HIDDEN_SIZE}"):
        desk.run(params, unit)
    assert not Path(unit.outputs[1].path).exists()


# ------------------------------------------------------------------------------------------------- the check rebuilt


def coded_row(one: Document, states_LH: torch.Tensor, codec: str) -> Row:
    exact = one.hidden("after_norm", states_LH)
    name = hidden_field("after_norm")
    return exact | {name: there_and_back(exact[name], codec)}


def compared(one: Document, teacher: Any, states_LH: torch.Tensor, codec: str) -> dict[str, Any]:
    return rebuilt(one, teacher, coded_row(one, states_LH, codec), states_codec=codec)


def rebuilt(one: Document, teacher: Any, hidden: Row, *, states_codec: str) -> dict[str, Any]:
    comparison = RebuiltComparison(teacher=teacher, seed=0, states_codec=states_codec)
    comparison.add({"target_logprob": np.zeros_like(one.topk["logsumexp"])} | one.topk, hidden)
    return comparison.result()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite", "gpt2"])
def test_right_states_pass_and_wrong_ones_fail_within_what_the_codec_rounds(
    architecture: str, dtype: torch.dtype, codec: str
) -> None:
    teacher = uneven_teacher(architecture, dtype)
    one, other = document(teacher, 0), document(teacher, 2)
    right_LH = one.states["after_norm"]
    assert compared(one, teacher, right_LH, codec)["passed"]
    for wrong_LH in (
        right_LH.roll(1, dims=0),
        one.states["before_norm"],
        other.states["after_norm"][: len(right_LH)],
    ):
        assert not compared(one, teacher, wrong_LH, codec)["passed"]


def test_rounding_of_a_coarser_codec_than_the_recipes_fails() -> None:
    teacher = uneven_teacher("llama", torch.float32)
    one = document(teacher, 0)
    fp8 = coded_row(one, one.states["after_norm"], "fp8")
    assert not rebuilt(one, teacher, fp8, states_codec="plain")["passed"]
