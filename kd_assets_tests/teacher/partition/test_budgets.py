"""Windows and their token budgets, also where the device runs out of memory on the way.

The memory of the device is a fake: `Room` raises torch's own error, in the middle of a step, for a batch of too many
tokens. Everything else is real. (What a GPU itself raises is in test_gpu.py.)
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_assets.contract import Reporter, TeacherParams, WorkUnit
from kd_assets.errors import InterruptedTaskError, OutOfDeviceMemoryError
from kd_assets.store import read_manifest
from kd_assets.store.manifest import PartRecord
from kd_assets.teacher.batch.forward import States, run_forward
from kd_assets.teacher.model.load import Teacher
from kd_assets.teacher.partition.batching import Batch
from kd_assets.teacher.partition.budgets import BudgetRules, Budgets, recorded_budgets
from kd_assets.teacher.runner import TeacherRunner
from kd_assets.worker.stop_flag import StopFlag
from kd_assets_tests.teacher.test_runner import StopAfter
from kd_assets_tests.teacher.tiny import Desk, part_bytes, save_teacher, tiny_documents, tiny_params

PARTS = ((30, 9, 5, 12, 2), (3, 64, 1, 64, 20), (40, 33, 33, 8, 5), (50, 40, 2))
"""Lengths of documents. With a budget of 128 tokens the largest batches take 90, 128, 120 and 100."""
LENGTHS = tuple(length for part in PARTS for length in part)
ROOM_TOKENS = 95


class Room:
    """A device with room for a batch of so many tokens; it counts how often that was too little."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.n_failed = 0

    def run_forward(self, teacher: Teacher, ids_BT: Tensor, **options: Any) -> States:
        states = run_forward(teacher, ids_BT, **options)
        if ids_BT.numel() > self.n_tokens:
            self.n_failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has none of it.")
        return states


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    fake = Room(ROOM_TOKENS)
    monkeypatch.setattr("kd_assets.teacher.batch.engine.run_forward", fake.run_forward)
    return fake


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> TeacherParams:
    return tiny_params(save_teacher(tmp_path_factory.mktemp("teacher")))


@dataclasses.dataclass(frozen=True)
class Run:
    """All caches of one shard on a device with little room, in one go."""

    desk: Desk
    unit: WorkUnit
    facts: dict[str, Any]
    n_failed: int


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, params: TeacherParams) -> Run:
    room = Room(ROOM_TOKENS)
    desk, unit = prepared(tmp_path_factory.mktemp("uninterrupted"), params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kd_assets.teacher.batch.engine.run_forward", room.run_forward)
        facts = desk.run(params, unit)
    return Run(desk=desk, unit=unit, facts=facts, n_failed=room.n_failed)


def prepared(folder: Path, params: TeacherParams, lengths: tuple[int, ...] = LENGTHS) -> tuple[Desk, WorkUnit]:
    desk = Desk(folder)
    return desk, desk.unit(desk.commit_shard(tiny_documents(lengths)), params)


def budgets_on_disk(unit: WorkUnit) -> list[list[float]]:
    """Of the parts of each cache."""
    return [[p.stats["min_token_budget"] for p in read_manifest(Path(o.path)).parts] for o in unit.outputs]


def test_out_of_memory_halves_the_budget_and_goes_on_from_the_window_in_hand(uninterrupted: Run) -> None:
    assert uninterrupted.n_failed == 1
    assert budgets_on_disk(uninterrupted.unit) == [[128, 64, 64, 64]] * 3
    assert (uninterrupted.facts["token_budget"], uninterrupted.facts["n_budget_halvings"]) == (64, 1)
    (warning,) = uninterrupted.desk.events("warning")
    assert warning["token_budget"] == 64
    assert warning["partition_key"] == "shard-00000"
    assert "a batch of 2 x 64 tokens failed with a token budget of 128" in warning["message"]
    assert "It goes on from part 1 with a token budget of 64" in warning["message"]

    progress = uninterrupted.desk.events("progress")[-1]
    assert progress["done_tokens"] == progress["n_tokens"] == sum(LENGTHS), "what was begun again counts once"
    assert uninterrupted.facts["computed_tokens"] == sum(LENGTHS)
    for output in uninterrupted.unit.outputs:
        manifest = read_manifest(Path(output.path))
        assert manifest.stats["min_token_budget"] == 64
        assert manifest.checks["recomputed"]["passed"]


def test_windows_have_the_bytes_of_their_budget_whatever_happened(
    tmp_path: Path, params: TeacherParams, uninterrupted: Run
) -> None:
    of_budget = {}
    for budget in (128, 64):
        plain = dataclasses.replace(params, token_budget=budget)
        plain_desk, plain_unit = prepared(tmp_path / f"budget {budget}", plain)
        plain_desk.run(plain, plain_unit)
        of_budget[budget] = part_bytes(plain_unit)
    for name, found in part_bytes(uninterrupted.unit).items():
        assert found == of_budget[128 if "part-00000" in name else 64][name]


@pytest.mark.parametrize("n_batches", [1, 3, 4, 6, 8, 10, 12])
def test_interrupted_before_or_after_a_halving_it_resumes_to_the_same_bytes(
    n_batches: int, tmp_path: Path, params: TeacherParams, room: Room, uninterrupted: Run
) -> None:
    desk, unit = prepared(tmp_path / "stopped", params)
    with pytest.raises(InterruptedTaskError):
        desk.run(params, unit, StopAfter(n_batches))
    desk.run(params, unit)
    assert part_bytes(unit) == part_bytes(uninterrupted.unit)
    assert budgets_on_disk(unit) == budgets_on_disk(uninterrupted.unit)


def test_an_attempt_with_more_memory_goes_on_with_the_budget_of_the_part_before(
    tmp_path: Path, params: TeacherParams, room: Room, uninterrupted: Run
) -> None:
    desk, unit = prepared(tmp_path / "stopped", params)
    with pytest.raises(InterruptedTaskError):
        desk.run(params, unit, StopAfter(9))
    assert [len(list(Path(o.path).glob("part-*"))) for o in unit.outputs] == [2, 2, 2], "after the halving"
    room.n_tokens = 10_000
    assert desk.run(params, unit)["n_budget_halvings"] == 0
    assert part_bytes(unit) == part_bytes(uninterrupted.unit)


def test_a_part_that_one_cache_lost_is_made_with_the_budget_of_the_others(
    tmp_path: Path, params: TeacherParams, room: Room, uninterrupted: Run
) -> None:
    desk, unit = prepared(tmp_path / "damaged", params)
    with pytest.raises(InterruptedTaskError):
        desk.run(params, unit, StopAfter(9))
    (hidden,) = (Path(o.path) for o in unit.outputs if o.asset == "hidden_state_cache")
    (hidden / "part-00001.arrow").unlink()
    room.n_tokens = 10_000
    desk.run(params, unit)
    assert part_bytes(unit) == part_bytes(uninterrupted.unit)


def test_every_partition_begins_with_the_budget_of_the_recipe(
    tmp_path: Path, params: TeacherParams, room: Room
) -> None:
    """Else its bytes would depend on which partitions the attempt ran before it."""
    desk = Desk(tmp_path)
    units = [
        desk.unit(desk.commit_shard(tiny_documents(LENGTHS), key), params, key=key) for key in ("shard-00000", "other")
    ]
    with Reporter(desk.events_file, stream=io.StringIO()) as report:
        runner = TeacherRunner(desk.job(params, units), report, StopFlag())
        for unit in units:
            runner.run(unit)
        runner.close()
    assert part_bytes(units[0]) == part_bytes(units[1])
    assert room.n_failed == 2


def test_the_budget_is_halved_as_often_as_it_takes(tmp_path: Path, params: TeacherParams, room: Room) -> None:
    room.n_tokens = 64
    generous = dataclasses.replace(params, token_budget=1000)
    desk, unit = prepared(tmp_path, generous)
    facts = desk.run(generous, unit)
    budgets = [warning["token_budget"] for warning in desk.events("warning")]
    assert budgets == sorted(budgets, reverse=True)
    assert facts["token_budget"] == budgets[-1]
    assert 1000 // 2 ** facts["n_budget_halvings"] == facts["token_budget"]
    assert all(read_manifest(Path(o.path)).checks["recomputed"]["passed"] for o in unit.outputs)


def test_a_document_that_does_not_fit_alone_fails_the_partition_and_says_what_helps(
    tmp_path: Path, params: TeacherParams, room: Room
) -> None:
    room.n_tokens = 63
    desk, unit = prepared(tmp_path, params)
    with pytest.raises(
        OutOfDeviceMemoryError,
        match=r"shard-00000: a batch of 1 x 64 tokens failed with a token budget of 64: .* lower max_length",
    ):
        desk.run(params, unit)
    room.n_tokens = 64
    desk.run(params, unit)


def test_a_single_document_is_tried_again_once_the_device_is_empty(
    tmp_path: Path, params: TeacherParams, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results of earlier batches that wait to be copied take memory, too."""
    narrow = dataclasses.replace(params, token_budget=64)

    def emptied() -> None:
        room.n_tokens = 64

    monkeypatch.setattr("kd_assets.teacher.partition.partition_pass.free_cached_memory", emptied)
    room.n_tokens = 63
    desk, unit = prepared(tmp_path, narrow)
    assert desk.run(narrow, unit)["n_budget_halvings"] == 0
    assert room.n_failed == 1
    assert desk.events("warning") == []


def test_where_other_processes_take_part_in_a_step_its_error_goes_out(
    tmp_path: Path, params: TeacherParams, room: Room
) -> None:
    desk, unit = prepared(tmp_path, params)
    with Reporter(desk.events_file, stream=io.StringIO()) as report:
        runner = TeacherRunner(desk.job(params, [unit]), report, StopFlag())
        runner._budget_rules = dataclasses.replace(runner._budget_rules, can_halve=False)
        with pytest.raises(OutOfDeviceMemoryError, match=r"a batch of 2 x 64 tokens .* lower teacher.token_budget"):
            runner.run(unit)
        runner.close()
    assert desk.events("warning") == []


def batch_of(*lengths: int) -> Batch:
    lengths_B = np.array(lengths, dtype=np.int64)
    return Batch(documents_B=np.arange(len(lengths)), lengths_B=lengths_B, width=int(lengths_B[0]))


def rules(first: int, limit: int | None) -> BudgetRules:
    return BudgetRules(first=first, limit=limit, can_halve=True)


def test_a_window_has_the_budget_of_its_part_or_of_the_last_part_before_it() -> None:
    budgets = Budgets(rules=rules(1024, None), recorded={2: 512, 5: 256})
    assert [budgets.of(i) for i in range(7)] == [1024, 1024, 512, 512, 512, 256, 256]


def test_a_recipe_that_names_a_lower_budget_than_a_part_was_made_with_is_obeyed() -> None:
    """Or nothing would help where the error says that the budget has to be lowered."""
    budgets = Budgets(rules=rules(300, 300), recorded={0: 512, 3: 256})
    assert [budgets.of(i) for i in range(5)] == [300, 300, 300, 256, 256]


def test_halving_holds_from_its_window_to_the_next_part_that_is_there() -> None:
    budgets = Budgets(rules=rules(1024, None), recorded={4: 1024})
    assert budgets.halve(2, batch_of(300, 300)) == 512
    assert [budgets.of(i) for i in range(6)] == [1024, 1024, 512, 512, 1024, 1024]
    assert budgets.n_halvings == 1


def test_the_batch_that_failed_does_not_occur_again() -> None:
    budgets = Budgets(rules=rules(1024, None), recorded={})
    assert budgets.halve(0, batch_of(100, 90)) == 128
    assert budgets.n_halvings == 3


def test_parts_of_before_budgets_were_kept_say_nothing() -> None:
    def record(**stats: float) -> PartRecord:
        return PartRecord(index=0, name="p", n_documents=1, n_tokens=1, n_bytes=1, sha256="", stats=stats)

    one = {0: record(min_token_budget=512.0), 1: record()}
    other = {0: record(min_token_budget=256.0)}
    assert recorded_budgets([one, other]) == {0: 256}
