"""What each format says that its records have is what is written: names, types and shapes, whatever the options."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from kd_assets.contract import CACHES, Asset, FinalState
from kd_assets.export.columns import CachesOfRecipe, Column
from kd_assets.export.documents import JoinedDocument, StatesOfDocument, TopkOfDocument
from kd_assets.export.exporting import export_recipe
from kd_assets.export.fields import field_columns, fields_of
from kd_assets.export.format import ExportOptions
from kd_assets.export.formats import FORMATS
from kd_assets.store import Ragged
from kd_assets.store.column_words import type_in_words
from kd_assets.store.schema import embedding_schema, hidden_state_schema, topk_schema
from kd_assets_tests.export import made_up
from kd_assets_tests.export.made_up import STATES, Truth

K, H, N_BLOCKS = 5, 3, 8
BLOCKS = (1, 2, 4)
"""All that the made-up caches have; of a teacher of 8 blocks 1, 3 and 4 would be asked for."""


def caches(*assets: Asset, positions: bool = False, is_known: bool = True) -> CachesOfRecipe:
    final: tuple[FinalState, ...] = ("before_norm", "after_norm")
    schemas: dict[Asset, pa.Schema] = {
        "topk_cache": topk_schema(K, positions=positions),
        "hidden_state_cache": hidden_state_schema(BLOCKS, H if is_known else 0, final=final, positions=positions),
        "embedding_cache": embedding_schema(H if is_known else 0),
    }
    return CachesOfRecipe(
        schemas={asset: schemas[asset] for asset in assets or CACHES},
        hidden_size=H if is_known else None,
        vocabulary_size=made_up.VOCABULARY if is_known else None,
        n_blocks=N_BLOCKS if is_known else None,
    )


def export(
    tmp_path: Path, name: str, options: ExportOptions, *, positions: bool = False, assets: Sequence[Asset] = CACHES
) -> tuple[Path, list[Truth]]:
    """The folder, and its documents in order: those of two tokens and more, which every format can hold."""
    documents = [truth for truth in made_up.truths(3, n=14, k=K) if truth.length > 2]
    made_up.commit(tmp_path, documents, positions=positions, assets=assets)
    export_recipe(name, tmp_path / made_up.RECIPE, tmp_path / "out", options=options)
    return tmp_path / "out", documents


def said(name: str, of: CachesOfRecipe, options: ExportOptions) -> dict[str, Column]:
    columns = FORMATS[name].columns(of, options)
    assert len({column.name for column in columns}) == len(columns)
    assert all(column.type and column.meaning for column in columns)
    assert not [column for column in columns if "<" in column.name + column.meaning], "the web UI takes it for HTML"
    return {column.name: column for column in columns}


def types(columns: Mapping[str, Column]) -> dict[str, str]:
    return {name: column.type for name, column in columns.items()}


def shape(words: str, **names: int) -> list[int]:
    """`[L - 1, 10] …` or `bfloat16[L, 3]` with numbers in the place of names."""
    found = re.match(r"\w*\[([^\]]+)\]", words)
    assert found is not None, words
    return [int(eval(word, {}, names)) for word in found[1].split(",")]


def tables(folder: Path) -> Iterator[pa.Table]:
    for file in json.loads((folder / "state.json").read_text())["_data_files"]:
        with pa.ipc.open_stream(folder / file["filename"]) as stream:
            yield stream.read_all()


@pytest.mark.parametrize("positions", [False, True])
def test_rows_for_axolotl_have_the_columns_that_are_said(tmp_path: Path, positions: bool) -> None:
    options = ExportOptions()
    folder, _ = export(tmp_path, "axolotl", options, positions=positions)
    columns = said("axolotl", caches("topk_cache", positions=positions), options)
    for table in tables(folder):
        require_table(table, columns)


@pytest.mark.parametrize("pack_to", [None, 64])
def test_rows_for_distillkit_have_the_columns_that_are_said_packed_or_not(tmp_path: Path, pack_to: int | None) -> None:
    options = ExportOptions(pack_to=pack_to)
    folder, _ = export(tmp_path, "distillkit", options)
    columns = said("distillkit", caches("topk_cache"), options)
    found = tables(folder) if pack_to else map(pq.read_table, sorted(folder.glob("data_*.parquet")))
    for table in found:
        require_table(table, columns, more=1)


def require_table(table: pa.Table, columns: Mapping[str, Column], *, more: int = 0) -> None:
    """Names and types of all columns, and the shape of every value. `more`: tokens of a document than in its row."""
    assert {field.name: type_in_words(field) for field in table.schema} == types(columns)
    assert table.num_rows
    for row in table.to_pylist():
        n_tokens = len(row["input_ids"]) + more
        for name, value in row.items():
            expected = shape(columns[name].meaning, L=n_tokens)
            assert list(np.array(value).shape) == expected, (name, columns[name])


@pytest.mark.parametrize("options", [ExportOptions(), ExportOptions(learned_only=True, states=(4, "after_norm"))])
@pytest.mark.parametrize("positions", [False, True])
def test_an_hf_table_has_the_columns_that_are_said(tmp_path: Path, positions: bool, options: ExportOptions) -> None:
    folder, _ = export(tmp_path, "hf", options, positions=positions)
    columns = said("hf", caches(positions=positions), options)
    for path in folder.glob("data/*.parquet"):
        schema = pq.read_schema(path)
        assert {field.name: type_in_words(field) for field in schema} == types(columns)


@pytest.mark.parametrize(
    "assets", [("topk_cache",), ("hidden_state_cache",), ("embedding_cache",), ("topk_cache", "embedding_cache")]
)
@pytest.mark.parametrize("name", ["hf", "original", "safetensors"])
def test_an_export_of_some_caches_has_their_columns_alone(tmp_path: Path, name: str, assets: tuple[Asset, ...]) -> None:
    options = ExportOptions(assets=assets)
    folder, _ = export(tmp_path, name, options)
    columns = said(name, caches(*assets), options)
    found: set[str] = set()
    for path in folder.rglob("*.parquet"):
        found |= set(pq.read_schema(path).names)
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {re.sub(r"^\d+", "NUMBER", key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    assert found == set(columns)


@pytest.mark.parametrize("options", [ExportOptions(), ExportOptions(states=(2,))])
def test_files_for_the_original_trainer_have_the_columns_that_are_said(tmp_path: Path, options: ExportOptions) -> None:
    folder, _ = export(tmp_path, "original", options)
    columns = said("original", caches(), options)
    found: dict[str, str] = {}
    for path in folder.rglob("*.parquet"):
        table = pq.read_table(path)
        found |= {field.name: type_in_words(field) for field in table.schema}
        for field in table.schema:
            stem = path.relative_to(folder).as_posix().rpartition("_")[0]
            in_every_file = field.name in ("input_ids", "attn_mask")
            assert f"; in {'every file' if in_every_file else f'{stem}_NUMBER.parquet'}" in columns[field.name].meaning
        for row in table.to_pylist():
            for name, value in row.items():
                if name != "length":
                    expected = shape(columns[name].meaning, L=len(row["input_ids"]))
                    assert list(np.array(value).shape) == expected, (name, columns[name])
    assert found == types(columns)


@pytest.mark.parametrize("options", [ExportOptions(), ExportOptions(learned_only=True, states=(4, "after_norm"))])
@pytest.mark.parametrize("positions", [False, True])
def test_a_safetensors_file_has_the_tensors_that_are_said(
    tmp_path: Path, positions: bool, options: ExportOptions
) -> None:
    folder, documents = export(tmp_path, "safetensors", options, positions=positions)
    columns = said("safetensors", caches(positions=positions), options)
    seen = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        for number in {key.partition("/")[0] for key in tensors}:
            of_document = {key.partition("/")[2]: t for key, t in tensors.items() if key.startswith(f"{number}/")}
            names = {"L": documents[int(number)].length, "N": len(of_document[f"hidden_{'final_after_norm'}"])}
            names["M"] = len(of_document["topk_ids"])
            require_tensors({f"NUMBER/{name}": t for name, t in of_document.items()}, columns, **names)
            seen += 1
    assert seen == len(documents)


def require_tensors(found: Mapping[str, Any], columns: Mapping[str, Column], **names: int) -> None:
    """Names, dtypes and shapes of all."""
    assert set(found) == set(columns)
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            assert columns[name].type == {bool: "bool", str: "string"}[type(value)]
            continue
        assert columns[name].type.partition("[")[0] == str(value.dtype).removeprefix("torch."), name
        assert shape(columns[name].type, **names) == list(value.shape), (name, columns[name])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("modelopt", ExportOptions(states=(1, 4))),
        ("modelopt", ExportOptions(states=(2, "before_norm"))),
        ("specforge", ExportOptions(states=(1, 2, 4))),
        ("specforge_dflash", ExportOptions()),
        ("specforge_dflash", ExportOptions(states=(2, 4, "after_norm"))),
    ],
)
def test_files_for_trainers_of_draft_heads_have_the_keys_that_are_said(
    tmp_path: Path, name: str, options: ExportOptions
) -> None:
    folder, _ = export(tmp_path, name, options, assets=("hidden_state_cache",))
    columns = said(name, caches("hidden_state_cache"), options)
    files = [*folder.rglob("*.pt"), *folder.rglob("*.ckpt")]
    assert files
    for path in files:
        content = torch.load(path)
        require_tensors(content, columns, L=len(content["input_ids"]))
    named = [state for state in options.states or BLOCKS if isinstance(state, int)]
    (of_blocks,) = (c for c in columns.values() if "the outputs of blocks" in c.meaning)
    assert f"blocks {', '.join(map(str, named))}, counted from 0" in of_blocks.meaning


def test_rows_and_files_for_speculators_have_what_is_said(tmp_path: Path) -> None:
    options = ExportOptions(states=(1, 4))
    folder, documents = export(tmp_path, "speculators", options, assets=("hidden_state_cache",))
    columns = said("speculators", caches("hidden_state_cache"), options)
    beside = "hidden_states/hs_ROW.safetensors: "
    rows = {name: column for name, column in columns.items() if not name.startswith(beside)}
    for table in tables(folder):
        assert {field.name: type_in_words(field) for field in table.schema} == types(rows)
    files = {name.removeprefix(beside): c for name, c in columns.items() if name.startswith(beside)}
    for number, document in enumerate(documents):
        with safe_open(folder / f"hidden_states/hs_{number}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        require_tensors(tensors, files, L=document.length)


@pytest.mark.parametrize("learned_only", [False, True])
@pytest.mark.parametrize("has", [True, False])
def test_draws_and_what_is_outside_of_a_cut_vocabulary_are_fields_too(has: bool, learned_only: bool) -> None:
    lists = Ragged(values=np.array([3, 5, 6, 9], np.uint32), offsets=np.array([0, 2, 3, 4], np.int32))
    document = JoinedDocument(
        number=0,
        partition_key="p",
        document_id="d",
        input_ids_L=np.arange(4, dtype=np.uint32),
        loss_mask_L=np.ones(4, bool),
        topk=TopkOfDocument(
            positions_M=np.arange(3),
            ids_Mk=np.zeros((3, K), np.uint32),
            logprobs_Mk=np.zeros((3, K), np.float16),
            logsumexp_M=np.zeros(3, np.float32) if has else None,
            target_logprob_M=np.zeros(3, np.float32),
            sampled_ids=lists if has else None,
            sampled_counts=lists if has else None,
            outside_mass_M=np.zeros(3, np.float32) if has else None,
        ),
        states=StatesOfDocument(
            positions_N=np.arange(4), bits_NH={state: np.zeros((4, H), np.uint16) for state in STATES}
        ),
    )
    schemas: dict[Asset, pa.Schema] = {
        "topk_cache": topk_schema(K, 2 if has else 0, is_cut=has, logsumexp=has),
        "hidden_state_cache": hidden_state_schema(BLOCKS, H, final=("before_norm", "after_norm")),
    }
    declared = field_columns(CachesOfRecipe(schemas=schemas, hidden_size=H), STATES, learned_only=learned_only)
    written = list(fields_of(document, learned_only=learned_only))
    assert [(field.name, field.dtype) for field in declared] == [(field.name, field.dtype) for field in written]
    assert [len(field.shape) for field in declared] == [field.values.ndim for field in written]


@pytest.mark.parametrize("name", list(FORMATS))
def test_what_hangs_on_a_teacher_that_is_not_at_hand_is_said_in_words(name: str) -> None:
    takes: dict[str, tuple[Asset, ...]] = {"axolotl": ("topk_cache",), "distillkit": ("topk_cache",)}
    drafts = ("modelopt", "specforge", "specforge_dflash", "speculators")
    takes |= dict.fromkeys(drafts, ("hidden_state_cache",))
    options = ExportOptions()
    unknown = said(name, caches(*takes.get(name, ()), is_known=False), options)
    known = said(name, caches(*takes.get(name, ())), options)
    assert list(unknown) == list(known)
    words = " ".join(f"{column.type} {column.meaning}" for column in unknown.values())
    if name == "axolotl":
        assert unknown == known
    else:
        assert ("⌈5 · bits / 8⌉" if name == "distillkit" else "hidden_size") in words
    if name in ("modelopt", "specforge", "speculators"):
        assert "blocks 1, n // 2 - 1 and n - 4" in words
        assert "blocks 1, 3, 4, counted from 0" in " ".join(column.meaning for column in known.values())
