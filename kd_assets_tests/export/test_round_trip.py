"""What every format reads back is what was put into the caches: random documents, masks, lengths, kept positions.

Formats are read by what their readers use (`datasets`, the safetensors library), and the original trainer by its way of
reading written anew (`original_reader`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from kd_assets.contract import Asset
from kd_assets.export.exporting import export_recipe, export_to_folder
from kd_assets.export.folder import read_export, verify_export
from kd_assets.export.format import ExportOptions
from kd_assets.store.schema import hidden_field
from kd_assets_tests.export import made_up
from kd_assets_tests.export.made_up import STATES, Truth, expected_positions
from kd_assets_tests.export.original_reader import read_embeddings, read_features, read_topk

CASES = [
    (0, 1, {}, False),
    (1, 5, {"learned_only": True}, False),
    (2, 30, {"max_length": 7}, False),
    (3, 5, {}, True),
    (4, 2, {"learned_only": True, "max_length": 9}, True),
]
"""Seed, k, options, and whether the caches keep some positions only."""


def made(store: Path, seed: int, *, k: int, positions: bool) -> dict[str, Truth]:
    """Two partitions whose caches have other parts each and other lengths; by document id."""
    known: dict[str, Truth] = {}
    for key in ("made-up-00000", "made-up-00001"):
        documents = made_up.truths(seed, key, k=k, kept=0.5 if positions else 1.0)
        made_up.commit(
            store,
            documents,
            positions=positions,
            max_lengths={"topk_cache": 18, "hidden_state_cache": 15},
            max_documents={"topk_cache": 4, "hidden_state_cache": 2, "embedding_cache": 100},
        )
        known |= {f"{key}/{document.document_id}": document for document in documents}
    return known


def length_of(truth: Truth, options: ExportOptions) -> int:
    """What all three caches have, and the option leaves."""
    return min(truth.length, 15, options.max_length or 15)


@pytest.mark.parametrize(("seed", "k", "options", "positions"), CASES)
def test_an_hf_export_opens_with_datasets_and_has_the_same_numbers(
    tmp_path: Path, seed: int, k: int, options: dict[str, Any], positions: bool
) -> None:
    known, chosen = made(tmp_path, seed, k=k, positions=positions), ExportOptions(**options)
    export_recipe("hf", tmp_path / made_up.RECIPE, tmp_path / "out", options=chosen)
    datasets = pytest.importorskip("datasets")  # which the planes' nodes do not have
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    seen = []
    for row in rows:
        truth = known[f"{row['partition_key']}/{row['document_id']}"]
        states = {
            state: torch.frombuffer(bytearray(row[hidden_field(state)]), dtype=torch.bfloat16).view(-1, 3)
            if row[hidden_field(state)]
            else torch.zeros(0, 3, dtype=torch.bfloat16)
            for state in STATES
        }
        require_equal(row, states, truth, chosen, positions=positions)
        seen.append(row["document_id"])
    assert sorted(seen) == sorted(truth.document_id for truth in known.values())


@pytest.mark.parametrize(("seed", "k", "options", "positions"), CASES)
def test_a_safetensors_export_reads_back_the_same_numbers_and_dtypes(
    tmp_path: Path, seed: int, k: int, options: dict[str, Any], positions: bool
) -> None:
    known, chosen = made(tmp_path, seed, k=k, positions=positions), ExportOptions(**options)
    export_recipe("safetensors", tmp_path / made_up.RECIPE, tmp_path / "out", options=chosen)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    numbers = []
    for listed in index["files"]:
        section = json.loads((tmp_path / "out" / listed["documents_in"]).read_text())
        with safe_open(tmp_path / "out" / section["file"], "pt") as file:
            for document in section["documents"]:
                truth = known[f"{section['partition_key']}/{document['document_id']}"]
                prefix = f"{document['number']}/"
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - it is no mapping
                row = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
                states = {state: row.pop(hidden_field(state)) for state in STATES}
                assert row["topk_logprobs"].dtype == torch.float16
                assert row["topk_ids"].dtype == row["input_ids"].dtype == torch.uint32
                plain = {name: tensor.numpy() for name, tensor in row.items()}
                require_equal(plain, states, truth, chosen, positions=positions)
                numbers.append(document["number"])
    assert numbers == list(range(len(known)))


@pytest.mark.parametrize(("seed", "k", "max_length"), [(0, 1, None), (1, 5, 7), (2, 30, None)])
def test_an_original_export_gives_that_trainer_the_same_numbers(
    tmp_path: Path, seed: int, k: int, max_length: int | None
) -> None:
    known, options = made(tmp_path, seed, k=k, positions=False), ExportOptions(max_length=max_length)
    exported = export_recipe("original", tmp_path / made_up.RECIPE, tmp_path / "out", options=options)
    held = [truth for truth in known.values() if truth.length > 1]
    left_out = exported.said["left_out"]["fewer than 2 tokens"]
    assert left_out["n_documents"] == len(known) - len(held)
    topk = list(read_topk(str(tmp_path / "out" / f"topk_k{k}" / "*.parquet")))
    features = list(read_features(str(tmp_path / "out" / "fb_hints_L4" / "*.parquet"), 4))
    embeddings = list(read_embeddings(str(tmp_path / "out" / "relb_embeds" / "*.parquet")))
    assert len(topk) == len(features) == len(embeddings) == len(held)
    for truth, by_topk, by_feature, by_embedding in zip(held, topk, features, embeddings, strict=True):
        n = length_of(truth, options)
        for row in (by_topk, by_feature, by_embedding):
            assert row["input_ids"].tolist() == truth.ids_L[:n].tolist()
            assert row["attn_mask"].tolist() == [1] * n
        assert by_topk["topk_ids"].tolist() == truth.topk_ids_Mk[: n - 1].tolist()
        assert np.array_equal(by_topk["topk_logprobs"].numpy(), truth.topk_logprobs_Mk[: n - 1].astype(np.float32))
        assert torch.equal(by_feature["teacher_feats"], as_bfloat16(truth.bits_LH[4][:n]).float())
        assert np.array_equal(by_embedding["teacher_embed"].numpy(), truth.embeddings_2H[0])


def test_the_validation_set_is_the_same_documents_in_every_format_and_each_half_is_complete(tmp_path: Path) -> None:
    known = made(tmp_path, 7, k=3, positions=False)
    halves: list[tuple[list[str], list[str]]] = []
    for name in ("hf", "safetensors"):
        out = tmp_path / name
        exported = export_recipe(
            name, tmp_path / made_up.RECIPE, out, options=ExportOptions(validation_share=0.4, seed=3)
        )
        verify_export(out)
        ids = [ids_in(name, out / split, tmp_path) for split in ("train", "validation")]
        assert sorted(ids[0] + ids[1]) == sorted(truth.document_id for truth in known.values())
        assert exported.said["splits"] == {"train": len(ids[0]), "validation": len(ids[1])}
        halves.append((ids[0], ids[1]))
    assert halves[0] == halves[1]
    assert all(halves[0])


def test_an_export_of_folders_is_that_of_the_recipe(tmp_path: Path) -> None:
    documents = made_up.truths(11)
    folders = made_up.commit(tmp_path, documents)
    of_recipe = export_recipe("hf", tmp_path / made_up.RECIPE, tmp_path / "a")
    given: dict[Asset, Sequence[Path]] = {asset: [folder] for asset, folder in folders.items()}
    assert export_to_folder("hf", given, tmp_path / "b").files == of_recipe.files


def test_datasets_keeps_exports_in_folders_of_one_name_apart(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for seed in (1, 2):
        documents = made_up.truths(seed)
        made_up.commit(tmp_path / str(seed), documents)
        for options in (ExportOptions(), ExportOptions(validation_share=0.4)):
            to = tmp_path / f"{seed} {options.validation_share}" / "hf"
            export_recipe("hf", tmp_path / str(seed) / made_up.RECIPE, to, options=options)
            folder = to / "train" if options.validation_share else to
            rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
            ids = [document.document_id for document in documents]
            assert list(rows["document_id"]) == [i for i in ids if i in set(rows["document_id"])]
            assert len(rows) == read_export(to).said["splits"].get("train", len(ids))


def ids_in(name: str, folder: Path, home: Path) -> list[str]:
    if name == "hf":
        datasets = pytest.importorskip("datasets")
        rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(home / "cache"))
        return list(rows["document_id"])
    index = json.loads((folder / "index.json").read_text())
    sections = [json.loads((folder / listed["documents_in"]).read_text()) for listed in index["files"]]
    return [document["document_id"] for section in sections for document in section["documents"]]


def as_bfloat16(bits: Any) -> torch.Tensor:
    return torch.from_numpy(bits.copy()).view(torch.bfloat16)


def require_equal(
    row: dict[str, Any], states: dict[Any, torch.Tensor], truth: Truth, options: ExportOptions, *, positions: bool
) -> None:
    n = length_of(truth, options)
    assert list(row["input_ids"]) == truth.ids_L[:n].tolist()
    assert list(row["loss_mask"]) == truth.mask_L[:n].tolist()
    of_topk = expected_positions(truth, n, topk=True, positions=positions, learned_only=options.learned_only)
    of_states = expected_positions(truth, n, topk=False, positions=positions, learned_only=options.learned_only)
    k = truth.topk_ids_Mk.shape[1]
    assert np.array_equal(np.asarray(row["topk_ids"]).reshape(-1, k), truth.topk_ids_Mk[of_topk])
    logprobs = np.asarray(row["topk_logprobs"], dtype=np.float16).reshape(-1, k)
    assert np.array_equal(logprobs, truth.topk_logprobs_Mk[of_topk])
    assert np.array_equal(np.asarray(row["logsumexp"], np.float32), truth.logsumexp_M[of_topk])
    assert np.array_equal(np.asarray(row["target_logprob"], np.float32), truth.target_logprob_M[of_topk])
    assert np.array_equal(np.asarray(row["mean_embedding"], np.float32), truth.embeddings_2H[0])
    assert np.array_equal(np.asarray(row["last_token_embedding"], np.float32), truth.embeddings_2H[1])
    for state in STATES:
        assert states[state].dtype == torch.bfloat16
        assert torch.equal(states[state], as_bfloat16(truth.bits_LH[state][of_states]))
    if positions or options.learned_only:
        assert list(row["topk_positions"]) == of_topk
        assert list(row["hidden_positions"]) == of_states
    else:
        assert "topk_positions" not in row
