"""Random draws through the whole pass: what is on disk depends on the seed, the document and the teacher only."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_assets.contract import TeacherParams, TopkParams
from kd_assets.store import CacheReader, Documents, encode_topk, plan_output, read_manifest, verify
from kd_assets.store.params_in_identity import params_in_identity
from kd_assets.teacher.batch.sampling import uniforms
from kd_assets.teacher.model.load import load_teacher
from kd_assets.teacher.recompute import reference
from kd_assets_tests.teacher.tiny import VOCABULARY, Desk, save_teacher, tiny_documents, tiny_params

LENGTHS = (3, 1, 20, 64, 37, 5, 70, 30)
DRAWS = 30


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("drawing teacher"))


def with_draws(teacher_folder: Path, **changes: Any) -> TeacherParams:
    params = tiny_params(
        teacher_folder,
        **{"topk": TopkParams(k=4, max_length=64, draws=DRAWS), "recompute_documents": len(LENGTHS), **changes},
    )
    return dataclasses.replace(params, hidden_states=None, embeddings=None)


def run(folder: Path, params: TeacherParams, documents: Documents) -> Path:
    """The committed top-k cache of these documents."""
    desk = Desk(folder)
    unit = desk.unit(desk.commit_shard(documents), params, ("topk_cache",))
    assert params.topk is not None
    identity = {**unit.outputs[0].identity, "params": params_in_identity(params.topk, seed=params.seed)}
    output = plan_output("topk_cache", identity, recipe_folder=desk.recipe_folder, partition_key=unit.partition_key)
    desk.run(params, dataclasses.replace(unit, outputs=(output,)))
    return Path(output.path)


def draws_of(folder: Path) -> dict[str, list[list[int]]]:
    """Document id → the sorted draws of each position."""
    reader = CacheReader.from_folders([folder])
    found = {}
    for document in (reader[i] for i in range(len(reader))):
        pairs = zip(document["sampled_ids"], document["sampled_counts"], strict=True)
        found[document["document_id"]] = [np.repeat(ids, counts).tolist() for ids, counts in pairs]
    return found


def test_stored_draws_are_the_inverse_of_what_the_teacher_says(teacher_folder: Path, tmp_path: Path) -> None:
    """Here in float64, from the document alone; the teacher is float32, so that all but a few must be the same."""
    documents = tiny_documents(LENGTHS)
    params = with_draws(teacher_folder, seed=7)
    folder = run(tmp_path, params, documents)
    teacher = load_teacher(params, digests=None, warn=print)
    stored = draws_of(folder)
    n_different = 0
    for i, document_id in enumerate(documents.document_ids):
        ids_L = documents.slice(i, 1, 64).input_ids
        n = len(ids_L) - 1
        assert len(stored[document_id]) == n
        cumulative_LV = reference(teacher, ids_L, ()).logits_PV[:n].double().softmax(dim=1).cumsum(dim=1)
        u_Ld = torch.from_numpy(uniforms(7, document_id, n, DRAWS)).double()
        expected_Ld = torch.searchsorted(cumulative_LV, u_Ld, right=True).clamp_max(VOCABULARY - 1).sort(dim=1).values
        n_different += int((expected_Ld != torch.tensor(stored[document_id]).reshape(n, DRAWS)).sum())
    assert n_different <= 3
    assert verify(folder).problems == ()


def test_draws_do_not_depend_on_batches_other_documents_or_length(teacher_folder: Path, tmp_path: Path) -> None:
    documents = tiny_documents(LENGTHS)
    expected = draws_of(run(tmp_path / "usual", with_draws(teacher_folder), documents))
    in_one_batch = with_draws(teacher_folder, token_budget=10_000)
    assert alike(draws_of(run(tmp_path / "one batch", in_one_batch, documents)), expected)
    alone = draws_of(run(tmp_path / "alone", with_draws(teacher_folder), documents.slice(4, 1)))
    assert alike(alone, {"doc-004": expected["doc-004"]})
    short = with_draws(teacher_folder, topk=TopkParams(k=1, max_length=16, draws=DRAWS))
    cut = {document_id: positions[:15] for document_id, positions in expected.items()}
    assert alike(draws_of(run(tmp_path / "short", short, documents)), cut)
    assert not alike(draws_of(run(tmp_path / "seed", with_draws(teacher_folder, seed=1), documents)), expected)


def test_recomputation_checks_every_draw(teacher_folder: Path, tmp_path: Path) -> None:
    folder = run(tmp_path, with_draws(teacher_folder), tiny_documents(LENGTHS))
    record = read_manifest(folder).checks["recomputed"]
    assert record["passed"]
    assert 0 <= record["max_draw_cdf_distance"] < 1e-4


def test_recomputation_of_a_cache_without_draws_says_nothing_of_them(teacher_folder: Path, tmp_path: Path) -> None:
    folder = run(tmp_path, with_draws(teacher_folder, topk=TopkParams(k=4, max_length=64)), tiny_documents(LENGTHS))
    assert "max_draw_cdf_distance" not in read_manifest(folder).checks["recomputed"]
    assert "sampled_ids" not in CacheReader.from_folders([folder]).fields


def test_draw_that_is_another_teachers_is_found(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One draw of one position, moved by one id."""

    def wrong(documents: Documents, **arrays: Any) -> Any:
        sampled = arrays["sampled_ids_Md"]
        sampled[0, 0] = (sampled[0, 0] + 7) % VOCABULARY
        return encode_topk(documents, **arrays)

    monkeypatch.setattr("kd_assets.teacher.partition.window.encode_topk", wrong)
    record = read_manifest(run(tmp_path, with_draws(teacher_folder), tiny_documents(LENGTHS))).checks["recomputed"]
    assert not record["passed"]
    assert record["max_draw_cdf_distance"] > 1e-3


def test_draws_of_a_bfloat16_teacher_stay_within_the_stated_bound(teacher_folder: Path, tmp_path: Path) -> None:
    folder = run(tmp_path, with_draws(teacher_folder, dtype="bfloat16"), tiny_documents(LENGTHS))
    record = read_manifest(folder).checks["recomputed"]
    assert record["passed"], record
    assert record["max_draw_cdf_distance"] < 0.1


def alike(found: dict[str, list[list[int]]], expected: dict[str, list[list[int]]]) -> bool:
    """Equal but for the odd draw beside a boundary: another batch shape rounds differently."""
    if {name: len(rows) for name, rows in found.items()} != {name: len(rows) for name, rows in expected.items()}:
        return False
    one, other = (np.array([u for name in expected for row in draws[name] for u in row]) for draws in (found, expected))
    return int((one != other).sum()) <= len(one) // 1000
