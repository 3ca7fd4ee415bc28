"""Caches whose positions keep as many tokens as have a mass: from a job's parameters to checks, replies and exports."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_assets import cli
from kd_assets.contract import HiddenStateParams, TeacherParams, TopkParams
from kd_assets.errors import RecipeError, RefusedRequestError
from kd_assets.export.exporting import export_to_folder
from kd_assets.replay.cache import ReplayCache
from kd_assets.store import CacheReader, Ragged, check_all, choose, plan_output, read_manifest, verify
from kd_assets.store.checking.checks import ResultFiles
from kd_assets.store.computing_versions import computing_versions
from kd_assets.store.params_in_identity import params_in_identity
from kd_assets.store.ragged_topk import mass_difference
from kd_assets.teacher.model.load import load_teacher
from kd_assets.teacher.recompute import Comparison, reference, stored_row
from kd_assets_tests.teacher.tiny import Desk, save_teacher, tiny_documents, tiny_params

LENGTHS = (3, 1, 20, 64, 90, 5, 2, 30, 12)
K, VOCABULARY, TOP_P = 16, 60, 0.7
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "compact": {"codec": "compact"}}


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), vocab_size=VOCABULARY, initializer_range=0.4)


def params_of(folder: Path, top_p: float | None = TOP_P, **topk: Any) -> TeacherParams:
    hidden = HiddenStateParams(blocks=(), max_length=64, final=("after_norm",))
    of_topk = TopkParams(k=K, max_length=64, draws=6, top_p=top_p, **topk)
    return tiny_params(folder, topk=of_topk, hidden_states=hidden, embeddings=None, recompute_documents=9)


def run(folder: Path, params: TeacherParams) -> tuple[Desk, Path]:
    """The folder of the top-k cache, with its parameters in the identity as the planner has them."""
    desk = Desk(folder)
    documents = tiny_documents(LENGTHS, vocabulary=VOCABULARY)
    unit = desk.unit(desk.commit_shard(documents), params, assets=("topk_cache", "hidden_state_cache"))
    outputs = []
    for output, of_cache in zip(unit.outputs, (params.topk, params.hidden_states), strict=True):
        assert of_cache is not None
        words = params_in_identity(of_cache, seed=params.seed)
        identity = {**output.identity, "weights_fingerprint": params.weights_fingerprint, "dtype": params.dtype}
        identity |= {"params": words, **computing_versions(output.asset, words)}
        outputs.append(
            plan_output(output.asset, identity, recipe_folder=desk.recipe_folder, partition_key=unit.partition_key)
        )
    unit = dataclasses.replace(unit, outputs=tuple(outputs))
    desk.run(params, unit)
    return desk, Path(unit.outputs[0].path)


@pytest.fixture(scope="module")
def made(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Desk, Path]]:
    folder = tmp_path_factory.mktemp("ragged")
    kinds = {name: run(folder / name, params_of(teacher_folder, **options)) for name, options in KINDS.items()}
    return kinds | {"whole": run(folder / "whole", params_of(teacher_folder, None))}


@pytest.mark.parametrize("kind", KINDS)
def test_positions_keep_the_first_of_k_tokens_up_to_the_mass_and_every_check_passes(
    made: dict[str, tuple[Desk, Path]], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk, folder), (_, whole) = made[kind], made["whole"]
    reader, every = CacheReader.from_folders([folder]), CacheReader.from_folders([whole])
    lengths: list[int] = []
    for i in range(len(reader)):
        ids, plain = reader[i]["topk_ids"], every[i]["topk_logprobs"].astype(np.float64)
        assert isinstance(ids, Ragged)
        lengths += ids.lengths.tolist()
        for at in range(len(ids)):
            assert ids[at].tolist() == every[i]["topk_ids"][at][: len(ids[at])].tolist()
        mass = np.exp(plain).cumsum(axis=1)
        assert ids.lengths.tolist() == np.minimum((mass < TOP_P).sum(axis=1) + 1, K).tolist()
        if kind == "plain":
            assert mass_difference(reader[i]["topk_logprobs"], K, TOP_P) is None
    assert {1, K} <= set(lengths)
    assert len(set(lengths)) > 5
    manifest = read_manifest(folder)
    assert manifest.stats["n_kept_ids"] == sum(lengths)
    recomputed = manifest.checks["recomputed"]
    assert recomputed["passed"] is True
    assert recomputed["max_kept_mass_difference"] < 1e-3
    (hidden,) = desk.recipe_folder.glob("hidden_state_cache/*/*/*/manifest.json")
    rebuilt = read_manifest(hidden.parent).checks["rebuilt"]
    assert rebuilt["passed"] is True
    assert rebuilt["n_positions"]
    shard = ResultFiles(next(desk.recipe_folder.glob("shards_manifest/*/*/*/manifest.json")).parent)
    assert all(check.passed for check in check_all(ResultFiles(folder), shard))
    assert verify(desk.recipe_folder).ok
    assert cli.main(["verify", str(desk.recipe_folder), "--recompute", "2", "--device", "cpu"]) == 0
    assert "0 differ" in capsys.readouterr().out
    assert cli.main(["inspect", str(desk.recipe_folder), "--documents", "1"]) == 0
    said = capsys.readouterr().out
    assert f"top_p={TOP_P}" in said
    assert f"{sum(lengths) / len(lengths):.2f} of a position on average" in said


def test_recomputation_finds_positions_that_keep_too_few_or_too_many(
    made: dict[str, tuple[Desk, Path]], teacher_folder: Path
) -> None:
    _, folder = made["plain"]
    teacher = load_teacher(params_of(teacher_folder), digests=None, warn=print)
    row = stored_row(folder / "part-00000.parquet", 3)
    expected = reference(teacher, row["input_ids"], ())
    for top_p, passes in ((TOP_P, True), (TOP_P + 0.1, False), (TOP_P - 0.1, False)):
        comparison = Comparison(asset="topk_cache", dtype=torch.float32, seed=0, top_p=top_p)
        comparison.add(row, expected)
        assert (comparison.worst <= 1) is passes, top_p


@pytest.mark.parametrize("kind", KINDS)
def test_the_replay_server_gives_no_more_tokens_than_a_position_keeps(
    made: dict[str, tuple[Desk, Path]], kind: str
) -> None:
    desk, folder = made[kind]
    cache = ReplayCache(choose(desk.recipe_folder, "topk_cache"))
    reader = CacheReader.from_folders([folder])
    assert f"k = {K} at most, as many as have a mass of {TOP_P}" in cache.description
    for i in (2, 3):
        document = reader[i]
        ids, n_M = document["input_ids"], document["topk_ids"].lengths
        rows = cache.rows(ids, first=1, k=1, name="the sequence")
        assert rows.n_kept_M.tolist() == n_M.tolist()
        for at, n in enumerate(n_M.tolist()):
            kept = document["topk_ids"][at].tolist()
            assert rows.topk_ids_Mk[at, :n].tolist() == kept
            target = int(ids[at + 1])
            assert rows.target_rank_M[at] == (kept.index(target) + 1 if target in kept else n + 1)
            assert rows.target_in_topk_M[at] == (target in kept)
        with pytest.raises(RefusedRequestError, match=r"keeps as many as have a mass of 0\.7 \(top_p\): of token"):
            cache.rows(ids, first=1, k=K, name="the sequence")
        with pytest.raises(RefusedRequestError, match="ask for 0 to 16"):
            cache.rows(ids, first=1, k=K + 1, name="the sequence")


@pytest.mark.parametrize("name", ["distillkit", "hf", "safetensors", "original"])
def test_a_format_that_needs_k_tokens_everywhere_refuses_before_anything_is_written(
    made: dict[str, tuple[Desk, Path]], name: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"as have a mass of 0\.7 \(top_p\), and this format needs k of each"):
        export_to_folder(name, {"topk_cache": [made["plain"][1]]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_axolotl_is_told_by_its_mask_which_tokens_there_are(
    made: dict[str, tuple[Desk, Path]], kind: str, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    folder = made[kind][1]
    export_to_folder("axolotl", {"topk_cache": [folder]}, tmp_path / "out")
    rows = datasets.load_from_disk(str(next(tmp_path.glob("out/**/state.json")).parent))
    reader = CacheReader.from_folders([folder])
    lists = {tuple(reader[i]["input_ids"].tolist()): reader[i] for i in range(len(reader))}
    for row in rows:
        document = lists[tuple(row["input_ids"])]
        mask = np.array(row["target_mask"])
        n_M = document["topk_ids"].lengths
        assert mask.sum(axis=1)[: len(n_M)].tolist() == n_M.tolist()
        logprobs = np.array(row["target_logprobs"])[: len(n_M)]
        assert np.isfinite(logprobs).all()
        np.testing.assert_array_equal(logprobs[mask[: len(n_M)] > 0], document["topk_logprobs"].values)
