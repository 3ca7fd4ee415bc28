"""What speculators' trainer reads is what was put into the caches, and what it cannot read is refused.

Files are opened by pyarrow and the safetensors library; that their own code takes them is in `consumers`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kd_assets.errors import KdAssetsError, NotCommittedError, RecipeError, UnknownFieldError
from kd_assets.export.exporting import ExportProgress, export_recipe, export_to_folder
from kd_assets.export.folder import verify_export
from kd_assets.export.format import ExportOptions, Source
from kd_assets.export.formats import speculators
from kd_assets.export.formats.speculators import Speculators
from kd_assets.store.schema import HiddenState
from kd_assets_tests.export import made_up
from kd_assets_tests.export.made_up import Truth
from kd_assets_tests.export.saved_rows import saved_rows

BLOCKS: tuple[HiddenState, ...] = (1, 2, 4)


def made(store: Path, seed: int, *, shards: bool = False) -> list[Truth]:
    """Two partitions; those documents in order that a trainer can learn from."""
    known: list[Truth] = []
    for key in ("made-up-00000", "made-up-00001"):
        documents = made_up.truths(seed, key, n=12)
        assets: Any = ("shards_manifest", "hidden_state_cache") if shards else ("hidden_state_cache",)
        made_up.commit(store, documents, assets=assets, max_documents={"hidden_state_cache": 4})
        known += [document for document in documents if document.length > 1]
    return known


def as_bfloat16(bits: Any) -> torch.Tensor:
    return torch.from_numpy(bits.copy()).view(torch.bfloat16)


def require_same(folder: Path, held: list[Truth], states: tuple[HiddenState, ...], max_length: int | None) -> None:
    """Row by row, and the file of the row's number."""
    rows = saved_rows(folder)
    assert len(rows) == len(held) == len(list((folder / "hidden_states").iterdir()))
    for number, (row, truth) in enumerate(zip(rows, held, strict=True)):
        n = min(truth.length, max_length or truth.length)
        assert row == {
            "input_ids": truth.ids_L[:n].tolist(),
            "loss_mask": truth.mask_L[:n].astype(int).tolist(),
            "seq_len": n,
        }
        tensors = load_file(folder / "hidden_states" / f"hs_{number}.safetensors")
        assert tensors.keys() == {"token_ids", "hidden_states"}
        assert tensors["token_ids"].dtype == torch.int64
        assert tensors["token_ids"].tolist() == row["input_ids"]
        expected = torch.stack([as_bfloat16(truth.bits_LH[state][:n]) for state in (*states, "before_norm")], dim=1)
        assert tensors["hidden_states"].dtype == torch.bfloat16
        assert torch.equal(tensors["hidden_states"], expected)


@pytest.mark.parametrize(
    ("seed", "states", "max_length", "bytes_at_a_time"),
    [(0, BLOCKS, None, 8 << 20), (1, (2,), 7, 1), (2, (1, 4), 2, 60), (3, (0, 1, 2, 4), None, 100)],
)
def test_a_speculators_export_reads_back_the_same_numbers_with_the_state_before_the_norm_last(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    states: tuple[HiddenState, ...],
    max_length: int | None,
    bytes_at_a_time: int,
) -> None:
    monkeypatch.setattr(speculators, "_TOKENS_AT_A_TIME_BYTES", bytes_at_a_time)
    monkeypatch.setattr(made_up, "STATES", (0, *made_up.STATES))
    held, out = made(tmp_path, seed), tmp_path / "out"
    options = ExportOptions(states=states, max_length=max_length)
    exported = export_recipe("speculators", tmp_path / made_up.RECIPE, out, options=options)
    verify_export(out)
    assert exported.n_documents == len(held)
    require_same(out, held, states, max_length)
    layers = json.loads((out / "layers.json").read_text())
    assert layers == {"target_layer_ids": [state + 1 for state in states if isinstance(state, int)]}


def test_each_split_numbers_its_files_by_its_own_rows(tmp_path: Path) -> None:
    held, out = made(tmp_path, 4), tmp_path / "out"
    options = ExportOptions(states=BLOCKS, validation_share=0.4)
    exported = export_recipe("speculators", tmp_path / made_up.RECIPE, out, options=options)
    in_split = {
        split: [tuple(row["input_ids"]) for row in saved_rows(out / split)] for split in exported.said["splits"]
    }
    assert set(in_split) == {"train", "validation"}
    for split, tokens in in_split.items():
        require_same(out / split, [truth for truth in held if tuple(truth.ids_L.tolist()) in tokens], BLOCKS, None)
    assert sum(map(len, in_split.values())) == len(held)


def test_the_counts_and_maps_are_of_the_learned_tokens_of_the_shards(tmp_path: Path) -> None:
    made(tmp_path, 5, shards=True)
    documents = [d for key in ("made-up-00000", "made-up-00001") for d in made_up.truths(5, key, n=12)]
    out = tmp_path / "out"
    options = ExportOptions(states=BLOCKS, draft_vocabulary=12)
    export_recipe("speculators", tmp_path / made_up.RECIPE, out, options=options)
    counts = Counter(np.concatenate([document.ids_L[document.mask_L] for document in documents]).tolist())
    assert torch.load(out / "token_freq.pt", weights_only=True) == dict(counts)
    frequent = sorted(sorted(range(made_up.VOCABULARY), key=lambda i: (-counts[i], i))[:12])
    d2t, t2d = np.load(out / "d2t-12.npy"), np.load(out / "t2d-12.npy")
    assert (d2t + np.arange(12)).tolist() == frequent == np.flatnonzero(t2d).tolist()
    assert (d2t.dtype, t2d.dtype) == (np.int64, np.bool_)


def test_an_export_that_is_cut_off_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    class PowerCutError(Exception):
        pass

    def cut(progress: ExportProgress) -> None:
        if progress.n_sections == 3:
            raise PowerCutError

    made(tmp_path, 3, shards=True)
    options, recipe = ExportOptions(states=BLOCKS, validation_share=0.3, draft_vocabulary=5), tmp_path / made_up.RECIPE
    whole = export_recipe("speculators", recipe, tmp_path / "whole", options=options)
    with pytest.raises(PowerCutError):
        export_recipe("speculators", recipe, tmp_path / "out", options=options, on_progress=cut)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("hs_*")}
    assert finished
    gone_on = export_recipe("speculators", recipe, tmp_path / "out", options=options)
    verify_export(tmp_path / "out")
    assert gone_on.files == whole.files
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished sections are not written again"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, RecipeError, "how many decoder blocks"),
        ({"states": (4, 1)}, RecipeError, "not in ascending order"),
        ({"states": (1, 3)}, UnknownFieldError, "no block 3"),
        ({"states": (1, "after_norm")}, RecipeError, "reads before_norm, never after_norm"),
        ({"states": BLOCKS, "learned_only": True}, RecipeError, "learned_only is not for it"),
        ({"states": BLOCKS, "pack_to": 64}, RecipeError, "pack_to is not for it"),
        ({"states": BLOCKS, "draft_vocabulary": 41}, RecipeError, "the teacher's has 40"),
        ({"states": BLOCKS, "draft_vocabulary": 3}, NotCommittedError, "shards_manifest"),
    ],
)
def test_what_the_trainer_cannot_have_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], error: type[KdAssetsError], says: str
) -> None:
    made(tmp_path, 0)
    with pytest.raises(error, match=says):
        export_recipe("speculators", tmp_path / made_up.RECIPE, tmp_path / "out", options=ExportOptions(**options))
    assert not (tmp_path / "out").exists()


def test_a_cache_without_the_state_before_the_norm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made_up, "STATES", (*BLOCKS, "after_norm"))
    made(tmp_path, 0)
    with pytest.raises(UnknownFieldError, match="no final state 'before_norm'"):
        export_recipe("speculators", tmp_path / made_up.RECIPE, tmp_path / "out", options=ExportOptions(states=BLOCKS))
    assert not (tmp_path / "out").exists()


def test_a_cache_of_some_positions_is_refused(tmp_path: Path) -> None:
    documents = made_up.truths(0, kept=0.5)
    folders = made_up.commit(tmp_path, documents, assets=("hidden_state_cache",), positions=True)
    with pytest.raises(RecipeError, match="keeps some positions only"):
        export_to_folder(
            "speculators",
            {"hidden_state_cache": [folders["hidden_state_cache"]]},
            tmp_path / "out",
            options=ExportOptions(states=BLOCKS),
        )
    assert not (tmp_path / "out").exists()


def test_the_default_blocks_are_the_trainers() -> None:
    source = Source(
        recipe="made-up",
        manifests={},
        n_blocks=32,
        hidden_size=3,
        vocabulary_size=40,
        teacher_folder=None,
        tokenizer_folder=None,
    )
    assert Speculators().needs(source, ExportOptions()).states == (1, 15, 28, "before_norm")  # its ids 2, 16 and 29
