"""What SpecForge's and ModelOpt's trainers read is what was put into the caches, and what they cannot read is refused.

Files are opened with `torch.load`, as both readers do; that their own code takes them is in `consumers`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_assets.contract import Asset
from kd_assets.errors import FailedCheckError, KdAssetsError, NotCommittedError, RecipeError, UnknownFieldError
from kd_assets.export.documents import StatesOfDocument
from kd_assets.export.exporting import ExportProgress, export_recipe, export_to_folder
from kd_assets.export.folder import verify_export
from kd_assets.export.format import ExportOptions, Source
from kd_assets.export.formats import draft_states
from kd_assets.export.formats.draft_states import StatesBeside
from kd_assets.export.formats.modelopt import ModelOpt
from kd_assets.export.formats.specforge import SpecForge, file_name, has_learned_neighbours
from kd_assets.export.source import RecipeCaches, source_of
from kd_assets.store import Manifest
from kd_assets.store.schema import HiddenState
from kd_assets_tests.export import made_up
from kd_assets_tests.export.made_up import Truth

KEYS = ("made-up-00000", "made-up-00001")
BLOCKS: tuple[HiddenState, ...] = (1, 2, 4)
DRAFT_VOCABULARY = 12


def made(store: Path, seed: int, *, shards: bool = False) -> list[Truth]:
    """Two partitions; all of their documents in order."""
    known: list[Truth] = []
    for key in KEYS:
        documents = made_up.truths(seed, key, n=12)
        assets: Any = ("shards_manifest", "hidden_state_cache") if shards else ("hidden_state_cache",)
        made_up.commit(store, documents, assets=assets, max_documents={"hidden_state_cache": 4})
        known += documents
    return known


def as_bfloat16(bits: Any) -> torch.Tensor:
    return torch.from_numpy(bits.copy()).view(torch.bfloat16)


def beside_each_other(truth: Truth, states: Any, n: int) -> torch.Tensor:
    return torch.cat([as_bfloat16(truth.bits_LH[state][:n]) for state in states], dim=1)


def loaded(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
    return content


def require_tokens(row: dict[str, Any], truth: Truth, n: int) -> None:
    assert row["input_ids"].dtype == row["loss_mask"].dtype == torch.int64
    assert row["input_ids"].tolist() == truth.ids_L[:n].tolist()
    assert row["loss_mask"].tolist() == truth.mask_L[:n].astype(int).tolist()


@pytest.mark.parametrize(("seed", "max_length"), [(0, None), (1, 7), (2, 2)])
def test_a_specforge_export_reads_back_the_same_numbers_for_eagle3(
    tmp_path: Path, seed: int, max_length: int | None
) -> None:
    known = made(tmp_path, seed)
    options = ExportOptions(max_length=max_length, states=BLOCKS)
    exported = export_recipe("specforge", tmp_path / made_up.RECIPE, tmp_path / "out", options=options)
    verify_export(tmp_path / "out")
    held = [truth for truth in known if truth.length > 1]
    assert exported.said["left_out"]["fewer than 2 tokens"]["n_documents"] == len(known) - len(held)
    assert len(list((tmp_path / "out").rglob("*.ckpt"))) == len(held)
    for number, truth in enumerate(held):
        n = min(truth.length, max_length or truth.length)
        row = loaded(tmp_path / "out" / "rows_0-2000" / f"data_{number}.ckpt")
        require_tokens(row, truth, n)
        assert torch.equal(row["hidden_state"], as_bfloat16(truth.bits_LH["after_norm"][:n])[None])
        assert torch.equal(row["aux_hidden_state"], beside_each_other(truth, BLOCKS, n)[None])
    layers = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert layers == {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 4]}}


@pytest.mark.parametrize(("seed", "states"), [(0, None), (1, (2,)), (2, (1, 4, "after_norm"))])
def test_a_specforge_export_for_dflash_has_the_same_numbers_and_names_what_its_reader_would_fail_at(
    tmp_path: Path, seed: int, states: tuple[HiddenState, ...] | None
) -> None:
    known = made(tmp_path, seed)
    out = tmp_path / "out"
    options = ExportOptions(states=states)
    exported = export_recipe("specforge_dflash", tmp_path / made_up.RECIPE, out, options=options)
    blocks = [state for state in states or BLOCKS if isinstance(state, int)]
    longer = [truth for truth in known if truth.length > 1]
    kept = [truth for truth in longer if any(a and b for a, b in zip(truth.mask_L, truth.mask_L[1:], strict=False))]
    assert 0 < len(kept) < len(longer)
    assert exported.said["n_documents"] == len(kept)
    left_out = exported.said["left_out"]["no two tokens side by side are learned"]
    assert left_out["n_documents"] == len(longer) - len(kept)
    assert exported.said["n_tokens"] == sum(truth.length for truth in kept)
    for number, truth in enumerate(longer):
        path = out / "rows_0-2000" / f"data_{number}.ckpt"
        assert path.exists() == (truth in kept)
        if truth in kept:
            row = loaded(path)
            require_tokens(row, truth, truth.length)
            assert torch.equal(row["hidden_states"], beside_each_other(truth, blocks, truth.length)[None])
            assert ("target_last_hidden_states" in row) == (states is not None and "after_norm" in states)
            if "target_last_hidden_states" in row:
                assert torch.equal(row["target_last_hidden_states"][0], as_bfloat16(truth.bits_LH["after_norm"]))
    named = [
        (said["partition_key"], document_id)
        for said in (json.loads(path.read_text()) for path in sorted((out / "left_out").iterdir()))
        for document_id in said["document_ids"]
    ]
    assert named == [(truth.partition_key, truth.document_id) for truth in longer if truth not in kept]
    assert json.loads((out / "layers.json").read_text()) == {"dflash_config": {"target_layer_ids": blocks}}


@pytest.mark.parametrize(("seed", "states", "prenorm"), [(0, (1, 2, 4), False), (1, (1, 4, "before_norm"), True)])
def test_a_modelopt_export_reads_back_the_same_numbers_and_says_which_side_of_the_norm_they_are_of(
    tmp_path: Path, seed: int, states: tuple[HiddenState, ...], prenorm: bool
) -> None:
    held = [truth for truth in made(tmp_path, seed) if truth.length > 1]
    out = tmp_path / "out"
    export_recipe("modelopt", tmp_path / made_up.RECIPE, out, options=ExportOptions(states=states))
    files = sorted(out.glob("*.pt"))
    assert len(files) == len(held)
    for path, truth in zip(files, held, strict=True):
        row = loaded(path)
        require_tokens(row, truth, truth.length)
        final = truth.bits_LH["before_norm" if prenorm else "after_norm"]
        assert row["hidden_states_prenorm"] is prenorm
        assert torch.equal(row["hidden_states"], as_bfloat16(final))
        blocks = [state for state in states if isinstance(state, int)]
        assert torch.equal(row["aux_hidden_states"], beside_each_other(truth, blocks, truth.length))
        assert row["conversation_id"] == f"{truth.partition_key}/{truth.document_id}"


def test_the_vocabulary_maps_are_of_the_learned_tokens_of_the_shards(tmp_path: Path) -> None:
    known = made(tmp_path, 5, shards=True)
    options = ExportOptions(states=BLOCKS, draft_vocabulary=DRAFT_VOCABULARY)
    export_recipe("specforge", tmp_path / made_up.RECIPE, tmp_path / "out", options=options)
    maps = loaded(tmp_path / "out" / "vocab_mapping" / "vocab_mapping.pt")
    counts = np.bincount(
        np.concatenate([truth.ids_L[truth.mask_L] for truth in known]), minlength=made_up.VOCABULARY
    ).tolist()
    frequent = sorted(sorted(range(made_up.VOCABULARY), key=lambda i: (-counts[i], i))[:DRAFT_VOCABULARY])
    assert maps["t2d"].nonzero().flatten().tolist() == frequent
    assert (maps["d2t"] + torch.arange(DRAFT_VOCABULARY)).tolist() == frequent
    assert maps["d2t"].dtype == torch.int64
    assert maps["t2d"].dtype == torch.bool


@pytest.mark.parametrize("name", ["specforge", "specforge_dflash", "modelopt"])
def test_equal_caches_give_equal_bytes(tmp_path: Path, name: str) -> None:
    made(tmp_path, 3)
    options = ExportOptions(states=BLOCKS)
    first = export_recipe(name, tmp_path / made_up.RECIPE, tmp_path / "a", options=options)
    assert export_recipe(name, tmp_path / made_up.RECIPE, tmp_path / "b", options=options).files == first.files


@pytest.mark.parametrize("name", ["specforge", "specforge_dflash", "modelopt"])
def test_an_export_that_is_cut_off_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, name: str) -> None:
    class PowerCutError(Exception):
        pass

    def cut(progress: ExportProgress) -> None:
        if progress.n_sections == 3:
            raise PowerCutError

    made(tmp_path, 3)
    options = ExportOptions(states=BLOCKS, validation_share=0.3)
    whole = export_recipe(name, tmp_path / made_up.RECIPE, tmp_path / "whole", options=options)
    assert set(whole.said["splits"]) == {"train", "validation"}
    with pytest.raises(PowerCutError):
        export_recipe(name, tmp_path / made_up.RECIPE, tmp_path / "out", options=options, on_progress=cut)
    gone_on = export_recipe(name, tmp_path / made_up.RECIPE, tmp_path / "out", options=options)
    verify_export(tmp_path / "out")
    assert gone_on.files == whole.files
    assert gone_on.said == whole.said


def test_files_are_two_thousand_in_a_folder() -> None:
    assert file_name(0) == "rows_0-2000/data_0.ckpt"
    assert file_name(1999) == "rows_0-2000/data_1999.ckpt"
    assert file_name(2000) == "rows_2000-4000/data_2000.ckpt"


@pytest.mark.parametrize(
    ("mask", "expected"), [([1], False), ([1, 0, 1], False), ([0, 0], False), ([0, 1, 1], True), ([1, 1, 0], True)]
)
def test_two_learned_tokens_side_by_side_are_found(mask: list[int], expected: bool) -> None:
    assert has_learned_neighbours(np.array(mask, dtype=np.bool_)) is expected


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        ("specforge", {}, RecipeError, "how many decoder blocks"),
        ("modelopt", {}, RecipeError, "how many decoder blocks"),
        ("specforge", {"states": (1, 4)}, RecipeError, "exactly three blocks"),
        ("specforge", {"states": (1, 4, 2)}, RecipeError, "not in ascending order"),
        ("specforge_dflash", {"states": (1, 1)}, RecipeError, "each once"),
        ("specforge", {"states": (1, 2, 3)}, UnknownFieldError, "no block 3"),
        ("modelopt", {"states": (1, 7)}, UnknownFieldError, "no block 7"),
        ("specforge", {"states": (1, 2, 4, "before_norm")}, RecipeError, "never before_norm"),
        ("modelopt", {"states": (1, "before_norm", "after_norm")}, RecipeError, "one state at the decoder's end"),
        ("specforge", {"states": BLOCKS, "learned_only": True}, RecipeError, "learned_only"),
        ("modelopt", {"states": BLOCKS, "learned_only": True}, RecipeError, "learned_only"),
        ("modelopt", {"states": BLOCKS, "draft_vocabulary": 3}, RecipeError, "draft_vocabulary"),
        ("specforge_dflash", {"states": BLOCKS, "draft_vocabulary": 3}, RecipeError, "draft_vocabulary"),
        ("specforge", {"states": BLOCKS, "draft_vocabulary": 41}, RecipeError, "the teacher's has 40"),
        ("specforge", {"states": BLOCKS, "draft_vocabulary": 3}, NotCommittedError, "shards_manifest"),
    ],
)
def test_what_the_trainer_cannot_have_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, options: dict[str, Any], error: type[KdAssetsError], says: str
) -> None:
    made(tmp_path, 0)
    with pytest.raises(error, match=says):
        export_recipe(name, tmp_path / made_up.RECIPE, tmp_path / "out", options=ExportOptions(**options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["specforge", "specforge_dflash", "modelopt"])
def test_a_cache_of_some_positions_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    documents = made_up.truths(0, kept=0.5)
    folders = made_up.commit(tmp_path, documents, assets=("hidden_state_cache",), positions=True)
    with pytest.raises(RecipeError, match="keeps some positions only"):
        export_to_folder(
            name,
            {"hidden_state_cache": [folders["hidden_state_cache"]]},
            tmp_path / "out",
            options=ExportOptions(states=BLOCKS),
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["specforge", "modelopt"])
def test_a_cache_without_the_final_state_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made_up, "STATES", BLOCKS)
    made(tmp_path, 0)
    with pytest.raises(UnknownFieldError, match="no final state 'after_norm'"):
        export_recipe(name, tmp_path / made_up.RECIPE, tmp_path / "out", options=ExportOptions(states=BLOCKS))
    assert not (tmp_path / "out").exists()


def a_source(n_blocks: int | None) -> Source:
    return Source(
        recipe="made-up",
        manifests={},
        n_blocks=n_blocks,
        hidden_size=3,
        vocabulary_size=40,
        teacher_folder=None,
        tokenizer_folder=None,
    )


@pytest.mark.parametrize("piece_bytes", [1, 24, 100, 8 << 20])
@pytest.mark.parametrize("let_go_bytes", [1, 300, 8 << 20])
def test_states_are_put_beside_each_other_whatever_was_in_their_memory(
    monkeypatch: pytest.MonkeyPatch, piece_bytes: int, let_go_bytes: int
) -> None:
    monkeypatch.setattr(draft_states, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(draft_states, "_LET_GO_BYTES", let_go_bytes)
    rng = np.random.default_rng(0)
    beside = StatesBeside([4, 1, "after_norm"])
    let_go: list[None] = []
    for n in (5, 1, 17, 2, 16):
        bits = {state: made_up.random_bits(rng, (n + 3, 6))[:n] for state in made_up.STATES}
        states = StatesOfDocument(positions_N=np.arange(n), bits_NH=bits, let_go=lambda: let_go.append(None))
        expected = torch.cat([as_bfloat16(bits[state]) for state in (4, 1, "after_norm")], dim=1)
        tensor = beside.tensor(states)
        assert (tensor.dtype, tensor.shape) == ("bfloat16", expected.shape)
        for _ in range(2):
            made = np.concatenate([piece.copy() for piece in tensor.pieces()])
            assert torch.equal(as_bfloat16(made), expected)
    assert bool(let_go) == (let_go_bytes < 8 << 20)


def test_a_single_state_is_written_from_where_it_is() -> None:
    bits_NH = made_up.random_bits(np.random.default_rng(0), (5, 6))
    states = StatesOfDocument(positions_N=np.arange(5), bits_NH={1: bits_NH})
    (piece,) = StatesBeside([1]).tensor(states).pieces()
    assert np.shares_memory(piece, bits_NH)


def test_the_default_blocks_are_those_of_the_trainers() -> None:
    plain = ExportOptions()
    assert SpecForge().needs(a_source(32), plain).states == (1, 15, 28, "after_norm")
    assert ModelOpt().needs(a_source(32), plain).states == (1, 15, 28, "after_norm")
    assert ModelOpt().needs(a_source(4), plain).states == (0, 1, "after_norm")


@pytest.mark.parametrize("n_blocks", [1, 3, 4, 6])
def test_a_teacher_with_too_few_blocks_for_three_is_refused(n_blocks: int) -> None:
    with pytest.raises(RecipeError, match=f"a teacher with {n_blocks} blocks"):
        SpecForge().needs(a_source(n_blocks), ExportOptions())
    with pytest.raises(RecipeError, match=f"has blocks 0 to {n_blocks - 1}"):
        ModelOpt().needs(a_source(n_blocks), ExportOptions(states=(0, n_blocks)))


def test_states_that_are_no_numbers_are_refused_by_their_part(tmp_path: Path) -> None:
    made(tmp_path, 0)
    source = source_of(RecipeCaches(recipe_folder=tmp_path / made_up.RECIPE).there())
    manifest = source.manifests["hidden_state_cache"][0]
    spoiled = dataclasses.replace(manifest.parts[0], stats={**manifest.parts[0].stats, "n_non_finite": 2.0})
    manifests: dict[Asset, tuple[Manifest, ...]] = {}
    manifests["hidden_state_cache"] = (dataclasses.replace(manifest, parts=(spoiled, *manifest.parts[1:])),)
    for export_format in (SpecForge(), SpecForge("dflash"), ModelOpt()):
        with pytest.raises(FailedCheckError, match="2 states that are NaN or infinite"):
            export_format.writer(
                tmp_path / "out", dataclasses.replace(source, manifests=manifests), ExportOptions(states=BLOCKS)
            )
    assert not (tmp_path / "out").exists()


def test_shards_of_another_tokenizer_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    documents = made_up.truths(0)
    made_up.commit(tmp_path, documents, assets=("shards_manifest", "hidden_state_cache"), facts={"vocab_size": 9})
    options = ExportOptions(states=BLOCKS, draft_vocabulary=4)
    with pytest.raises(RecipeError, match="shards are of another tokenizer"):
        export_recipe("specforge", tmp_path / made_up.RECIPE, tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_an_export_without_a_document_that_dflash_can_learn_from_is_refused(tmp_path: Path) -> None:
    documents = [dataclasses.replace(truth, mask_L=np.zeros_like(truth.mask_L)) for truth in made_up.truths(0)]
    made_up.commit(tmp_path, documents, assets=("hidden_state_cache",))
    with pytest.raises(NotCommittedError, match="no document"):
        export_recipe("specforge_dflash", tmp_path / made_up.RECIPE, tmp_path / "out")
