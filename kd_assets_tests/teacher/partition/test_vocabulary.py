"""Caches that are cut to a student's ids, from a job's parameters to rows on disk and their checks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_assets import cli
from kd_assets.contract import Asset, HiddenStateParams, PositionChoice, TeacherParams, TokenIds, TopkParams, WorkUnit
from kd_assets.errors import InterruptedTaskError, MissingInputError, RecipeError
from kd_assets.store import CacheReader, Documents, check_all, encode_topk, plan_output, read_manifest, verify
from kd_assets.store.checking.checks import ResultFiles
from kd_assets.store.computing_versions import computing_versions
from kd_assets.store.params_in_identity import params_in_identity
from kd_assets.store.vocabulary import VOCABULARY_NAME, vocabulary_of
from kd_assets.teacher.model.load import load_teacher
from kd_assets.teacher.rebuilt import RebuiltComparison
from kd_assets.teacher.recompute import reference, stored_row
from kd_assets_tests.teacher.test_runner import StopAfter
from kd_assets_tests.teacher.tiny import VOCABULARY, Desk, part_bytes, save_teacher, tiny_documents, tiny_params

LENGTHS = (3, 1, 20, 64, 90, 5, 2, 30, 12)
KNOWN = 150
"""Documents have the ids below it; the teacher's head has `VOCABULARY` rows."""
HOLES = TokenIds.of([*range(KNOWN), *range(160, 170), 199])
CUT: tuple[Asset, ...] = ("topk_cache", "hidden_state_cache")


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def params_of(folder: Path, token_ids: TokenIds | None, *, k: int = 4, **changes: Any) -> TeacherParams:
    topk = TopkParams(k=k, max_length=64, draws=6, token_ids=token_ids)
    hidden = HiddenStateParams(blocks=(), max_length=64, final=("after_norm",))
    return tiny_params(folder, **{"topk": topk, "hidden_states": hidden, **changes})


def unit_of(desk: Desk, params: TeacherParams, docs: Documents | None = None) -> WorkUnit:
    """With the parameters in its identities, as the planner has them."""
    docs = tiny_documents(LENGTHS, vocabulary=KNOWN) if docs is None else docs
    unit = desk.unit(desk.commit_shard(docs), params, assets=CUT)
    topk = params.topk
    assert topk is not None
    assert params.hidden_states is not None
    words = {
        "topk_cache": params_in_identity(topk, seed=params.seed),
        "hidden_state_cache": params_in_identity(params.hidden_states, seed=params.seed),
    }
    common = {"weights_fingerprint": params.weights_fingerprint, "dtype": params.dtype}
    outputs = [
        plan_output(
            output.asset,
            {
                **output.identity,
                **common,
                **computing_versions(output.asset, words[output.asset]),
                "params": words[output.asset],
            },
            recipe_folder=desk.recipe_folder,
            partition_key=unit.partition_key,
        )
        for output in unit.outputs
    ]
    return dataclasses.replace(unit, outputs=tuple(outputs))


def run(folder: Path, params: TeacherParams, docs: Documents | None = None) -> tuple[Desk, Path]:
    """The folder of the top-k cache."""
    desk = Desk(folder)
    unit = unit_of(desk, params, docs)
    desk.run(params, unit)
    return desk, Path(unit.outputs[0].path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("token_ids", [TokenIds.below(KNOWN), HOLES], ids=["number", "holes"])
def test_stored_rows_are_those_of_the_dense_distribution_over_the_ids(
    tmp_path: Path, teacher_folder: Path, token_ids: TokenIds, dtype: str
) -> None:
    params = params_of(teacher_folder, token_ids, dtype=dtype)
    desk, folder = run(tmp_path, params)
    ids = torch.tensor([i for i in range(VOCABULARY) if i in token_ids])
    teacher, reader = load_teacher(params, digests=None, warn=print), CacheReader.from_folders([folder])
    largest_mass, n_positions = 0.0, 0
    rounded = 1e-4 if dtype == "float32" else 0.35  # another batch shape rounds to bfloat16 differently
    for i in range(len(reader)):
        found = reader[i]
        n = len(found["input_ids"]) - 1
        whole_LV = reference(teacher, found["input_ids"], ()).logits_PV[:n].double()
        dense_Lv = whole_LV[:, ids].log_softmax(dim=1)
        mass_L = 1 - whole_LV.softmax(dim=1)[:, ids].sum(dim=1)
        columns_Lk = torch.searchsorted(ids, torch.from_numpy(found["topk_ids"].astype(np.int64)))
        assert torch.equal(ids[columns_Lk], torch.from_numpy(found["topk_ids"].astype(np.int64)))
        for stored, expected in (
            (found["topk_logprobs"], dense_Lv.gather(1, columns_Lk)),
            (found["topk_logprobs"], dense_Lv.topk(4, dim=1).values),
            (found["logsumexp"], whole_LV[:, ids].logsumexp(dim=1)),
            (found["outside_mass"], mass_L),
        ):
            np.testing.assert_allclose(stored.astype(np.float64), expected.numpy(), rtol=2**-10, atol=rounded)
        targets_L = torch.searchsorted(ids, torch.from_numpy(found["input_ids"][1:].astype(np.int64)))
        at_targets_L = dense_Lv.gather(1, targets_L[:, None])[:, 0].numpy()
        np.testing.assert_allclose(found["target_logprob"], at_targets_L, rtol=1e-5, atol=rounded)
        assert all(int(drawn) in token_ids for row in found["sampled_ids"] for drawn in row)
        # logits can be had again of what is kept
        logits_Lk = found["topk_logprobs"].astype(np.float64) + found["logsumexp"][:, None]
        np.testing.assert_allclose(
            logits_Lk, whole_LV[:, ids].gather(1, columns_Lk).numpy(), rtol=2**-9, atol=max(rounded, 2e-2)
        )
        largest_mass, n_positions = max(largest_mass, float(found["outside_mass"].max(initial=0))), n_positions + n
    assert largest_mass > 0.3
    manifest = read_manifest(folder)
    assert manifest.stats["max_outside_mass"] == largest_mass
    assert 0 < manifest.stats["n_expected_outside"] < n_positions
    record = manifest.checks["recomputed"]
    assert record["passed"] is True
    assert record["max_abs_outside_mass_difference"] < rounded
    rebuilt = next(p for p in (tmp_path / "store").glob("tiny/hidden_state_cache/*/*/*/manifest.json"))
    assert read_manifest(rebuilt.parent).checks["rebuilt"]["passed"] is True
    assert verify(desk.recipe_folder).ok
    shard = ResultFiles(next((tmp_path / "store").glob("tiny/shards_manifest/*/*/*/manifest.json")).parent)
    assert all(check.passed for check in check_all(ResultFiles(folder), shard))


def test_a_compact_cache_is_cut_as_a_plain_one_is(tmp_path: Path, teacher_folder: Path) -> None:
    topk = TopkParams(k=4, max_length=64, draws=6, token_ids=HOLES, codec="compact")
    _, plain = run(tmp_path / "plain", params_of(teacher_folder, HOLES))
    desk, compact = run(tmp_path / "compact", params_of(teacher_folder, HOLES, topk=topk))
    one, other = CacheReader.from_folders([plain]), CacheReader.from_folders([compact])
    assert one.fields == other.fields
    for i in range(len(one)):
        for name in ("topk_ids", "outside_mass", "input_ids"):
            np.testing.assert_array_equal(one[i][name], other[i][name])
        np.testing.assert_allclose(other[i]["target_logprob"], one[i]["target_logprob"], rtol=0.02, atol=0.02)
    assert read_manifest(compact).checks["recomputed"]["passed"] is True
    report = verify(desk.recipe_folder)
    assert report.ok, report.problems


def test_a_cache_of_all_ids_has_the_numbers_of_one_that_is_not_cut_and_no_mass_outside(
    tmp_path: Path, teacher_folder: Path
) -> None:
    _, whole = run(tmp_path / "whole", params_of(teacher_folder, None))
    for name, n in (("as many", VOCABULARY), ("more", 2 * VOCABULARY)):
        _, folder = run(tmp_path / name, params_of(teacher_folder, TokenIds.below(n)))
        every, cut = CacheReader.from_folders([whole]), CacheReader.from_folders([folder])
        assert set(cut.fields) == {*every.fields, "outside_mass"}
        for i in range(len(cut)):
            one, other = every[i], cut[i]
            assert not other["outside_mass"].any()
            for field in ("topk_ids", "topk_logprobs", "logsumexp", "target_logprob"):
                np.testing.assert_array_equal(one[field], other[field])
        assert read_manifest(folder).stats["max_outside_mass"] == 0


def test_a_cache_that_is_not_cut_says_nothing_of_a_vocabulary(tmp_path: Path, teacher_folder: Path) -> None:
    """[F68]"""
    _, folder = run(tmp_path, params_of(teacher_folder, None))
    manifest = read_manifest(folder)
    assert "outside_mass" not in CacheReader.from_folders([folder]).fields
    assert not any("outside" in name for name in (*manifest.stats, *manifest.checks["recomputed"]))
    assert manifest.facts["convention"].count("full vocabulary") == 1
    assert not (folder / VOCABULARY_NAME).exists()


def test_every_id_may_be_kept_and_the_probabilities_add_up_to_1(tmp_path: Path, teacher_folder: Path) -> None:
    _, folder = run(tmp_path, params_of(teacher_folder, HOLES, k=len(HOLES)))
    reader = CacheReader.from_folders([folder])
    for i in range(len(reader)):
        sums_L = np.exp(reader[i]["topk_logprobs"].astype(np.float64)).sum(axis=1)
        np.testing.assert_allclose(sums_L, 1, atol=4e-3)


def test_more_ids_than_are_kept_are_refused_before_the_weights_are_read(tmp_path: Path, teacher_folder: Path) -> None:
    beyond = TokenIds.of([*range(5), *range(VOCABULARY, VOCABULARY + 50)])
    with pytest.raises(RecipeError, match=f"topk.k is 6: topk.vocabulary leaves 5 of the {VOCABULARY} token ids"):
        run(tmp_path, params_of(teacher_folder, beyond, k=6))


def test_a_set_with_holes_lies_beside_the_parts_and_a_number_does_not(tmp_path: Path, teacher_folder: Path) -> None:
    """[F68]"""
    desk, folder = run(tmp_path / "holes", params_of(teacher_folder, HOLES))
    manifest = read_manifest(folder)
    assert (folder / VOCABULARY_NAME).read_bytes() == b"[[0,150],[160,170],[199,200]]\n"
    assert manifest.params["vocabulary"]["sha256"] == manifest.facts["files"][VOCABULARY_NAME]["sha256"]
    assert vocabulary_of(manifest, folder) == HOLES
    (folder / VOCABULARY_NAME).write_bytes(b"[[0,150],[160,170],[198,199]]\n")
    with pytest.raises(MissingInputError, match="is not what was committed"):
        vocabulary_of(manifest, folder)
    (folder / VOCABULARY_NAME).unlink()
    with pytest.raises(MissingInputError, match="is not there"):
        vocabulary_of(manifest, folder)
    assert [problem.kind for problem in verify(desk.recipe_folder).problems] == ["missing_part"]
    _, numbered = run(tmp_path / "number", params_of(teacher_folder, TokenIds.below(KNOWN)))
    assert not (numbered / VOCABULARY_NAME).exists()
    assert vocabulary_of(read_manifest(numbered), numbered) == TokenIds.below(KNOWN)


@pytest.mark.parametrize("kept", [HOLES, TokenIds.below(KNOWN)], ids=["holes", "number"])
def test_a_task_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, teacher_folder: Path, kept: TokenIds
) -> None:
    params = params_of(teacher_folder, kept)
    found = []
    for name, stop in (("whole", None), ("stopped", StopAfter(1))):
        desk = Desk(tmp_path / name)
        unit = unit_of(desk, params)
        if stop is not None:
            with pytest.raises(InterruptedTaskError):
                desk.run(params, unit, stop)
        desk.run(params, unit)
        found.append((part_bytes(unit), read_manifest(Path(unit.outputs[0].path)).facts.get("files")))
    assert found[0] == found[1]


def test_a_result_without_its_vocabulary_beside_it_is_committed_again_with_it(
    tmp_path: Path, teacher_folder: Path
) -> None:
    params, desk = params_of(teacher_folder, HOLES), Desk(tmp_path)
    unit = unit_of(desk, params)
    desk.run(params, unit)
    beside = Path(unit.outputs[0].path) / VOCABULARY_NAME
    before = part_bytes(unit)
    beside.unlink()
    desk.run(params, unit)
    assert beside.read_bytes() == HOLES.to_json()
    assert part_bytes(unit) == before


def test_kept_positions_are_cut_as_all_are(tmp_path: Path, teacher_folder: Path) -> None:
    docs = tiny_documents(LENGTHS, vocabulary=KNOWN)
    docs = dataclasses.replace(docs, loss_mask=np.random.default_rng(3).random(docs.n_tokens) < 0.4)
    learned = PositionChoice(kept="learned")
    topk = TopkParams(k=4, max_length=64, draws=6, token_ids=HOLES)
    _, whole = run(tmp_path / "whole", params_of(teacher_folder, HOLES), docs)
    some_params = params_of(teacher_folder, HOLES, topk=dataclasses.replace(topk, positions=learned))
    desk, folder = run(tmp_path / "some", some_params, docs)
    every, some = CacheReader.from_folders([whole]), CacheReader.from_folders([folder])
    assert some.schema.names[-2:] == ["outside_mass", "positions"]
    for i in range(len(some)):
        at = some[i]["positions"].astype(int)
        np.testing.assert_array_equal(some[i]["topk_ids"], every[i]["topk_ids"][at])
        np.testing.assert_allclose(some[i]["outside_mass"], every[i]["outside_mass"][at], rtol=1e-4)
    assert verify(desk.recipe_folder).ok


@pytest.mark.parametrize("at", [0, 1, 63])
def test_a_document_with_a_token_that_a_student_cannot_have_is_refused_by_name(
    tmp_path: Path, teacher_folder: Path, at: int
) -> None:
    docs = tiny_documents(LENGTHS, vocabulary=KNOWN)
    input_ids = docs.input_ids.copy()
    input_ids[docs.offsets[3] + at] = 155
    docs = dataclasses.replace(docs, input_ids=input_ids)
    with pytest.raises(RecipeError) as e:
        run(tmp_path, params_of(teacher_folder, HOLES), docs)
    message = str(e.value)
    assert "document 'doc-003' (row 3 of the shard, record 3 of source 'tiny') has token id 155" in message
    assert f"at position {at}, which is not among the {len(HOLES)} ids of topk.vocabulary" in message
    assert "(1 of 9 documents have such tokens)" in message
    assert not list((tmp_path / "store").glob("tiny/topk_cache/**/part-*"))


def test_a_token_beyond_what_the_cache_has_of_a_document_is_no_reason_to_refuse_it(
    tmp_path: Path, teacher_folder: Path
) -> None:
    docs = tiny_documents(LENGTHS, vocabulary=KNOWN)
    input_ids = docs.input_ids.copy()
    input_ids[docs.offsets[4] + 64] = 155  # max_length is 64
    _, folder = run(tmp_path, params_of(teacher_folder, HOLES), dataclasses.replace(docs, input_ids=input_ids))
    assert read_manifest(folder).checks["recomputed"]["passed"] is True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", ["mass", "small mass", "not normalised", "an id outside", "a draw outside"])
def test_a_cache_that_is_cut_otherwise_fails(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, dtype: str
) -> None:
    def changed(documents: Documents, **arrays: Any) -> Any:
        mass_M = arrays["outside_mass_M"]
        if wrong == "mass":
            mass_M[:] = 1 - mass_M
        elif wrong == "small mass":
            mass_M[:] = 0
        elif wrong == "not normalised":  # over all ids
            arrays["logsumexp_M"] -= np.log1p(-mass_M)
        elif wrong == "an id outside":
            arrays["topk_ids_Mk"][:, -1] = 155
        else:
            arrays["sampled_ids_Md"][:, 0] = 155
        return encode_topk(documents, **arrays)

    monkeypatch.setattr("kd_assets.teacher.partition.window.encode_topk", changed)
    desk, folder = run(tmp_path, params_of(teacher_folder, HOLES, dtype=dtype))
    assert read_manifest(folder).checks["recomputed"]["passed"] is False
    kinds = {problem.kind for problem in verify(desk.recipe_folder).problems} - {"no_head"}
    assert kinds == ({"wrong_vocabulary"} if "outside" in wrong else set())


FEW = TokenIds.of([*range(20), 30, 31])
"""Most of the probability is outside: what rounding final states to bfloat16 costs a teacher in float32 hides less."""


@pytest.mark.parametrize("compared_with", [FEW, None, TokenIds.below(KNOWN)], ids=["its own", "all", "another"])
def test_states_give_the_distribution_over_the_same_ids_and_no_others(
    tmp_path: Path, teacher_folder: Path, compared_with: TokenIds | None
) -> None:
    params, desk = params_of(teacher_folder, FEW), Desk(tmp_path)
    unit = unit_of(desk, params, tiny_documents(LENGTHS, vocabulary=20))
    desk.run(params, unit)
    topk, hidden = (next(Path(output.path).glob("part-00000.*")) for output in unit.outputs)
    comparison = RebuiltComparison(
        teacher=load_teacher(params, digests=None, warn=print), seed=0, token_ids=compared_with
    )
    comparison.add(stored_row(topk, 3), stored_row(hidden, 3))
    result = comparison.result()
    assert result["n_positions"] == 63
    assert result["passed"] is (compared_with is FEW)
    assert (result["mean_kl"] < 1e-3) is (compared_with is FEW)


def test_a_cut_cache_is_recomputed_at_any_time(
    tmp_path: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = run(tmp_path, params_of(teacher_folder, HOLES))
    capsys.readouterr()
    command = ["verify", str(folder), "--recompute", "4", "--device", "cpu", "--teacher", str(teacher_folder)]
    assert cli.main([*command, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["recomputed"]
    assert found["passed"] is True
    assert "max_abs_outside_mass_difference" in found
    (folder / VOCABULARY_NAME).unlink()
    assert cli.main(command) != 0
    assert f"{VOCABULARY_NAME} is missing" in capsys.readouterr().out
