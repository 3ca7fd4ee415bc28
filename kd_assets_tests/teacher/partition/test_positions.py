"""A cache that keeps some positions has the rows that one of all positions has there: states bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_assets.contract import Asset, HiddenStateParams, PositionChoice, TeacherParams, TopkParams, WorkUnit
from kd_assets.errors import InterruptedTaskError
from kd_assets.store import CacheReader, Documents, plan_output, read_manifest, verify
from kd_assets.store.params_in_identity import params_in_identity
from kd_assets.store.positions import kept_positions
from kd_assets_tests.teacher.test_runner import StopAfter
from kd_assets_tests.teacher.tiny import Desk, part_bytes, save_teacher, tiny_documents, tiny_params

KEPT: tuple[Asset, ...] = ("topk_cache", "hidden_state_cache")
LEARNED = PositionChoice(kept="learned")
SHARE = PositionChoice(kept="share", share=0.3, seed=5)
LENGTHS = (3, 1, 20, 64, 90, 5, 2, 30, 12)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def documents(seed: int = 0) -> Documents:
    """With masks of their own: nothing is learned of the third, of others a third of the tokens."""
    docs = tiny_documents(LENGTHS, seed=seed)
    mask = np.random.default_rng(seed).random(docs.n_tokens) < 0.35
    mask[docs.offsets[2] : docs.offsets[3]] = False
    return dataclasses.replace(docs, loss_mask=mask)


def params_of(folder: Path, positions: PositionChoice, **changes: Any) -> TeacherParams:
    return tiny_params(
        folder,
        topk=TopkParams(k=4, max_length=64, draws=6, positions=positions),
        hidden_states=HiddenStateParams(blocks=(1,), max_length=50, final=("after_norm",), positions=positions),
        **changes,
    )


def unit_of(desk: Desk, docs: Documents, params: TeacherParams) -> WorkUnit:
    """With the parameters in its identities, which say what is kept."""
    unit = desk.unit(desk.commit_shard(docs), params, assets=KEPT)
    topk, hidden = params.topk, params.hidden_states
    assert topk is not None
    assert hidden is not None
    words = {
        "topk_cache": params_in_identity(topk, seed=params.seed),
        "hidden_state_cache": params_in_identity(hidden, seed=params.seed),
    }
    outputs = [
        plan_output(
            output.asset,
            {**output.identity, "params": words[output.asset]},
            recipe_folder=desk.recipe_folder,
            partition_key=unit.partition_key,
        )
        for output in unit.outputs
    ]
    return dataclasses.replace(unit, outputs=tuple(outputs))


def readers_of(unit: WorkUnit) -> dict[str, CacheReader]:
    return {output.asset: CacheReader.from_folders([Path(output.path)]) for output in unit.outputs}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> WorkUnit:
    desk = Desk(tmp_path_factory.mktemp("whole"))
    params = params_of(teacher_folder, PositionChoice())
    unit = unit_of(desk, documents(), params)
    desk.run(params, unit)
    return unit


@pytest.mark.parametrize("choice", [LEARNED, SHARE])
def test_rows_are_those_of_the_cache_of_all_positions(
    tmp_path: Path, teacher_folder: Path, whole: WorkUnit, choice: PositionChoice
) -> None:
    desk, params = Desk(tmp_path), params_of(teacher_folder, choice)
    unit = unit_of(desk, documents(), params)
    desk.run(params, unit)
    every, some = readers_of(whole), readers_of(unit)
    n_kept = 0
    for asset, reader in some.items():
        fields = [name for name in reader.fields if name not in ("document_id", "n_tokens", "input_ids", "loss_mask")]
        for i in range(len(reader)):
            found, expected = reader[i], every[asset][i]
            np.testing.assert_array_equal(found["input_ids"], expected["input_ids"])
            positions = found["positions"].astype(int)
            n_kept += len(positions)
            for name in fields:
                if name == "positions":
                    continue
                if name.startswith("sampled"):
                    assert [x.tolist() for x in found[name]] == [expected[name][int(p)].tolist() for p in positions]
                elif name.startswith("hidden") or name == "topk_ids":
                    np.testing.assert_array_equal(found[name], expected[name][positions])
                else:  # so many rows go through the head at once: another number of them moves the last bits
                    np.testing.assert_allclose(found[name], expected[name][positions], rtol=2**-11, atol=1e-5)
    assert n_kept > 60
    assert verify(desk.recipe_folder).ok
    for output in unit.outputs:
        record = read_manifest(Path(output.path)).checks["recomputed"]
        assert record["passed"] is True
        assert record["n_positions"] > 0
    rebuilt = read_manifest(Path(unit.outputs[1].path)).checks["rebuilt"]
    assert rebuilt["passed"] is True
    assert rebuilt["n_positions"] > 0


def test_learned_positions_are_those_before_a_learned_token(tmp_path: Path, teacher_folder: Path) -> None:
    desk, params = Desk(tmp_path), params_of(teacher_folder, LEARNED)
    unit = unit_of(desk, documents(), params)
    desk.run(params, unit)
    for reader in readers_of(unit).values():
        for i in range(len(reader)):
            document = reader[i]
            assert (document["positions"] + 1).tolist() == [
                t for t in range(1, len(document["input_ids"])) if document["loss_mask"][t]
            ]


def test_a_share_is_the_same_in_every_cache_whatever_their_lengths(tmp_path: Path, teacher_folder: Path) -> None:
    desk, params = Desk(tmp_path), params_of(teacher_folder, SHARE)
    unit = unit_of(desk, documents(), params)
    desk.run(params, unit)
    topk, hidden = readers_of(unit).values()
    total = n_positions = 0
    for i in range(len(topk)):
        of_topk, of_states = topk[i]["positions"], hidden[i]["positions"]
        n_tokens = len(hidden[i]["input_ids"])
        assert of_topk[of_topk < n_tokens].tolist() == of_states[of_states < len(topk[i]["input_ids"]) - 1].tolist()
        total, n_positions = total + len(of_topk), n_positions + len(topk[i]["input_ids"]) - 1
    assert 0.2 < total / n_positions < 0.4


def test_a_task_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path, teacher_folder: Path) -> None:
    params = params_of(teacher_folder, LEARNED)
    units = []
    for name, stop in (("whole", None), ("stopped", StopAfter(1))):
        desk = Desk(tmp_path / name)
        unit = unit_of(desk, documents(), params)
        if stop is not None:
            with pytest.raises(InterruptedTaskError):
                desk.run(params, unit, stop)
        desk.run(params, unit)
        units.append(unit)
    assert part_bytes(units[0]) == part_bytes(units[1])


def test_a_shard_of_which_nothing_is_learned_makes_empty_rows(tmp_path: Path, teacher_folder: Path) -> None:
    desk, params = Desk(tmp_path), params_of(teacher_folder, LEARNED)
    docs = dataclasses.replace(documents(), loss_mask=np.zeros(sum(LENGTHS), dtype=np.bool_))
    unit = unit_of(desk, docs, params)
    desk.run(params, unit)
    for output, reader in zip(unit.outputs, readers_of(unit).values(), strict=True):
        assert all(len(reader[i]["positions"]) == 0 for i in range(len(reader)))
        manifest = read_manifest(Path(output.path))
        assert manifest.n_tokens == sum(min(n, 64 if output.asset == "topk_cache" else 50) for n in LENGTHS)
        assert manifest.checks["recomputed"]["passed"] is True
    assert verify(desk.recipe_folder).ok


@pytest.mark.parametrize("choice", [LEARNED, SHARE])
@pytest.mark.parametrize("has_next", [True, False])
def test_what_is_kept_of_a_document_depends_on_no_other(choice: PositionChoice, has_next: bool) -> None:
    docs = documents()
    together = kept_positions(choice, docs, has_next=has_next)
    assert together is not None
    for i in range(docs.n_documents):
        alone = kept_positions(choice, docs.slice(i, 1), has_next=has_next)
        assert alone is not None
        start, stop = together.offsets[i], together.offsets[i + 1]
        np.testing.assert_array_equal(alone.positions_M, together.positions_M[start:stop])
        cut = kept_positions(choice, docs.slice(i, 1, 7), has_next=has_next)
        assert cut is not None
        most = min(LENGTHS[i], 7) - (has_next or choice.kept == "learned")
        np.testing.assert_array_equal(cut.positions_M, alone.positions_M[alone.positions_M < most])
