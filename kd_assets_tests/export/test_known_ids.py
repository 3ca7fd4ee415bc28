"""No export has an id that no tokenizer has, and one that is cut to a vocabulary keeps what it knows of the rest."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from kd_assets.contract import TokenIds
from kd_assets.errors import RecipeError
from kd_assets.export.exporting import export_recipe, export_to_folder
from kd_assets.export.folder import EXPORT_NAME
from kd_assets.export.format import ExportOptions
from kd_assets.export.known_ids import first_outside, is_part_of
from kd_assets.model_files.fingerprints import tokenizer_fingerprint
from kd_assets.store import (
    FORMAT_VERSION,
    Documents,
    ResultWriter,
    encode_topk,
    part_stats,
    plan_output,
)
from kd_assets.store.writing.documents import offsets_of
from kd_assets_tests.export import made_up

KEYS = ("made-up-00000", "made-up-00001")
FORMATS = ("hf", "safetensors", "original")


def tokenizer(folder: Path, ids: list[int]) -> Path:
    folder.mkdir(parents=True)
    vocabulary = {f"t{token_id}": token_id for token_id in ids}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary}}))
    return folder


def store_of(folder: Path, tokens: Path, **changes: Any) -> Path:
    """Two partitions of every cache, made with this tokenizer by a head of `made_up.VOCABULARY` rows."""
    besides = {"tokenizer_fingerprint": tokenizer_fingerprint(tokens, None)}
    for key in KEYS:
        made_up.commit(
            folder,
            made_up.truths(1, key),
            provenance={"tokenizer": str(tokens)},
            identity_besides=besides,
            **changes,
        )
    return folder / made_up.RECIPE


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "kd_assets.export.known_ids"]


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_id_that_no_tokenizer_has_ends_the_export_with_document_id_and_remedy(
    tmp_path: Path, format_name: str
) -> None:
    recipe_folder = store_of(tmp_path, tokenizer(tmp_path / "tokens", list(range(30))))
    with pytest.raises(RecipeError) as e:
        export_recipe(format_name, recipe_folder, tmp_path / "out")
    found = str(e.value)
    assert "of partition 'made-up-00000' has the id 3" in found
    assert f"among its top-k, and the tokenizer in {tmp_path / 'tokens'} has no such token" in found
    assert "`vocabulary: tokenizer`" in found
    assert not (tmp_path / "out").exists()


def test_a_hole_is_no_tokens_id_either(tmp_path: Path) -> None:
    recipe_folder = store_of(tmp_path, tokenizer(tmp_path / "tokens", [i for i in range(40) if i != 17]))
    with pytest.raises(RecipeError, match="has the id 17 among its top-k"):
        export_recipe("hf", recipe_folder, tmp_path / "out")


@pytest.mark.parametrize("ids", [range(40), range(50)], ids=["as many", "more"])
def test_a_head_without_padding_is_exported_without_a_look(
    tmp_path: Path, ids: range, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    recipe_folder = store_of(tmp_path, tokenizer(tmp_path / "tokens", list(ids)))
    assert (export_recipe("hf", recipe_folder, tmp_path / "out").folder / EXPORT_NAME).exists()
    assert warnings_of(caplog) == []


def test_padding_that_is_in_no_top_k_is_no_reason_to_refuse(tmp_path: Path) -> None:
    known = tokenizer(tmp_path / "tokens", list(range(40)))
    recipe_folder = store_of(tmp_path, known, facts={"vocab_size": 64})
    assert (export_recipe("safetensors", recipe_folder, tmp_path / "out").folder / EXPORT_NAME).exists()


def test_only_what_is_exported_is_looked_at(tmp_path: Path) -> None:
    """Of a cache without top-k, and of the documents' first tokens."""
    recipe_folder = store_of(tmp_path, tokenizer(tmp_path / "tokens", list(range(3))))
    states = ExportOptions(assets=("hidden_state_cache",))
    assert (export_recipe("hf", recipe_folder, tmp_path / "states", options=states).folder / EXPORT_NAME).exists()
    first = ExportOptions(max_length=1)
    assert (export_recipe("hf", recipe_folder, tmp_path / "first", options=first).folder / EXPORT_NAME).exists()


def test_a_tokenizer_that_is_not_here_or_is_another_one_is_said_and_nothing_is_guessed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tokens = tokenizer(tmp_path / "tokens", list(range(30)))
    recipe_folder = store_of(tmp_path, tokens)
    (tokens / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    export_recipe("hf", recipe_folder, tmp_path / "another")
    tokens.rename(tmp_path / "away")
    export_recipe("hf", recipe_folder, tmp_path / "absent")
    another, absent = warnings_of(caplog)
    assert f"the tokenizer in {tokens} is another one than the cache was made with" in another
    assert "the tokenizer is not on this machine" in absent
    assert all((tmp_path / name / EXPORT_NAME).exists() for name in ("another", "absent"))


def commit_cut(
    store: Path, tokens: Path, token_ids: TokenIds, *, ids: list[int], drawn: int | None = None
) -> tuple[Path, np.ndarray[Any, Any]]:
    """A cut cache of two documents of 3 and 2 tokens; its folder, and the masses outside."""
    docs = Documents(
        document_ids=["a", "b"],
        offsets=offsets_of(np.array([3, 2])),
        input_ids=np.array([1, 2, 3, 4, 5], np.uint32),
        loss_mask=np.ones(5, np.bool_),
    )
    mass_M = np.array([0.5, 0.25, 1e-9], np.float32)
    table = encode_topk(
        docs,
        topk_ids_Mk=np.tile(np.array(ids, np.uint32), (3, 1)),
        topk_logprobs_Mk=np.tile(np.array([-1] * len(ids), np.float16), (3, 1)),
        logsumexp_M=np.ones(3, np.float32),
        target_logprob_M=np.full(3, -1, np.float32),
        sampled_ids_Md=None if drawn is None else np.full((3, 2), drawn, np.uint32),
        outside_mass_M=mass_M,
    )
    identity = {
        "asset": "topk_cache",
        "format_version": FORMAT_VERSION,
        "input": "shard",
        "tokenizer_fingerprint": tokenizer_fingerprint(tokens, None),
        "params": {"k": len(ids), "max_length": 9, "vocabulary": token_ids.in_identity()},
    }
    output = plan_output("topk_cache", identity, recipe_folder=store / "cut", partition_key="p")
    with ResultWriter(output, recipe="cut", recipe_folder=store / "cut", partition_key="p") as writer:
        writer.write_part(0, table, n_tokens=5, stats=part_stats("topk_cache", table))
        provenance = {"tokenizer": str(tokens)}
        writer.commit(parts=1, checks={}, provenance=provenance, facts={"vocab_size": made_up.VOCABULARY})
    return writer.folder, mass_M


@pytest.mark.parametrize(
    ("token_ids", "refused"),
    [(TokenIds.below(30), False), (TokenIds.below(35), True), (TokenIds.of([*range(29), 31]), False)],
    ids=["a number within", "a number beyond", "a set that was found in the tokenizer"],
)
def test_a_number_may_still_be_beyond_the_tokenizer(tmp_path: Path, token_ids: TokenIds, refused: bool) -> None:
    tokens = tokenizer(tmp_path / "tokens", list(range(30)))
    folder, _ = commit_cut(tmp_path, tokens, token_ids, ids=[2, 31 if refused else 7])
    if refused:
        with pytest.raises(RecipeError, match="document 'a' of partition 'p' has the id 31"):
            export_to_folder("hf", {"topk_cache": [folder]}, tmp_path / "out")
    else:
        export_to_folder("hf", {"topk_cache": [folder]}, tmp_path / "out")


def test_an_id_that_was_drawn_counts_as_one_of_the_top_k_does(tmp_path: Path) -> None:
    tokens = tokenizer(tmp_path / "tokens", list(range(30)))
    folder, _ = commit_cut(tmp_path, tokens, TokenIds.below(40), ids=[2, 7], drawn=32)
    with pytest.raises(RecipeError, match="has the id 32 among its random draws"):
        export_to_folder("hf", {"topk_cache": [folder]}, tmp_path / "out")


def test_the_mass_outside_goes_with_the_formats_that_keep_all_fields(tmp_path: Path) -> None:
    tokens = tokenizer(tmp_path / "tokens", list(range(30)))
    folder, mass_M = commit_cut(tmp_path, tokens, TokenIds.below(30), ids=[2, 7])
    export_to_folder("hf", {"topk_cache": [folder]}, tmp_path / "hf")
    rows = pq.read_table(tmp_path / "hf" / "data" / "part-00000.parquet")
    assert [len(row) for row in rows["outside_mass"].to_pylist()] == [2, 1]
    np.testing.assert_array_equal(np.concatenate(rows["outside_mass"].to_pylist()).astype(np.float32), mass_M)
    assert "| `outside_mass` | float[] | the teacher's probability" in (tmp_path / "hf" / "README.md").read_text()
    export_to_folder("safetensors", {"topk_cache": [folder]}, tmp_path / "st", options=ExportOptions(max_length=2))
    (file,) = (tmp_path / "st").glob("**/*.safetensors")
    found = load_file(file)
    assert [found[f"{n}/outside_mass"].tolist() for n in (0, 1)] == [mass_M[:1].tolist(), mass_M[2:].tolist()]


def test_sets_are_compared_as_sets() -> None:
    some, more = TokenIds.of([0, 1, 5, 6]), TokenIds.of([0, 1, 2, 4, 5, 6, 7])
    assert is_part_of(some, more)
    assert not is_part_of(more, some)
    assert is_part_of(some, some)
    assert first_outside(some, np.array([[0, 6], [3, 9]], np.uint32)) == 3
    assert first_outside(TokenIds.below(4), np.array([3, 4], np.uint32)) == 4
    assert first_outside(some, np.zeros((0, 4), np.uint32)) is None
