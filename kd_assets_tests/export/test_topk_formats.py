"""What axolotl's and DistillKit's trainers read is what was put into the caches, and what they cannot have is refused.

That axolotl's own code takes the files is in `consumers`; here they are read by pyarrow, and DistillKit's bytes by its
way of reading written anew (`distillkit_reader`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_assets.errors import KdAssetsError, NotCommittedError, NothingToExportError, RecipeError
from kd_assets.export.exporting import ExportProgress, export_recipe
from kd_assets.export.folder import verify_export
from kd_assets.export.format import ExportOptions, Source
from kd_assets.export.formats.axolotl import Axolotl
from kd_assets.export.formats.distillkit import DistillKit, packed_ids
from kd_assets.export.planning import in_validation
from kd_assets_tests.export import made_up
from kd_assets_tests.export.distillkit_reader import read_config, read_position
from kd_assets_tests.export.made_up import Truth, expected_positions
from kd_assets_tests.export.saved_rows import saved_rows

KEYS = ("made-up-00000", "made-up-00001")
IGNORED = -100


def made(store: Path, seed: int, *, k: int = 5, positions: bool = False) -> list[Truth]:
    """Two partitions; those documents in order that a trainer can learn from."""
    known: list[Truth] = []
    for key in KEYS:
        documents = made_up.truths(seed, key, n=12, k=k, kept=0.5 if positions else 1.0)
        made_up.commit(
            store,
            documents,
            assets=("topk_cache", "hidden_state_cache"),
            positions=positions,
            max_documents={"topk_cache": 4},
        )
        known += [document for document in documents if document.length > 1]
    return known


def expected_labels(truth: Truth, n: int) -> list[int]:
    """Of n tokens: nothing comes before the first, so that it is never learned."""
    return [int(truth.ids_L[i]) if i and truth.mask_L[i] else IGNORED for i in range(n)]


@pytest.mark.parametrize(
    ("seed", "k", "max_length", "positions"),
    [(0, 5, None, False), (1, 1, 7, False), (2, made_up.VOCABULARY, 2, False), (3, 30, None, True), (4, 2, 9, True)],
)
def test_an_axolotl_export_has_the_same_numbers_and_asks_for_learned_tokens_alone(
    tmp_path: Path, seed: int, k: int, max_length: int | None, positions: bool
) -> None:
    held, out = made(tmp_path, seed, k=k, positions=positions), tmp_path / "out"
    exported = export_recipe("axolotl", tmp_path / made_up.RECIPE, out, options=ExportOptions(max_length=max_length))
    rows = saved_rows(out)
    assert len(rows) == len(held) == exported.n_documents
    for row, truth in zip(rows, held, strict=True):
        n = min(truth.length, max_length or truth.length)
        assert row["input_ids"] == truth.ids_L[:n].tolist()
        assert row["attention_mask"] == [1] * n
        assert row["labels"] == expected_labels(truth, n)
        kept = expected_positions(truth, n, topk=True, positions=positions)
        for i in range(n):
            learned = i in kept and row["labels"][i + 1] != IGNORED
            assert row["target_mask"][i] == [int(learned)] * k
            if i in kept:
                assert row["target_token_ids"][i] == truth.topk_ids_Mk[i].tolist()
                assert row["target_logprobs"][i] == truth.topk_logprobs_Mk[i].astype(np.float32).tolist()
            else:
                assert row["target_token_ids"][i] == [0] * k
                assert row["target_logprobs"][i] == [-1e9] * k
        assert not any(row["target_mask"][-1])


def has_learned(truth: Truth, max_length: int | None) -> bool:
    """Whether a row of DistillKit's has a label: the last token is not in it."""
    n = min(truth.length, max_length or truth.length)
    return any(label != IGNORED for label in expected_labels(truth, n)[:-1])


def named_left_out(out: Path) -> list[str]:
    files = sorted((out / "left_out").glob("*.json"))
    return [document_id for path in files for document_id in json.loads(path.read_text())["document_ids"]]


@pytest.mark.parametrize(
    ("seed", "k", "max_length"), [(0, 5, None), (1, 1, 7), (2, made_up.VOCABULARY, 3), (3, 30, None)]
)
def test_a_distillkit_export_has_the_same_numbers_to_the_last_bit(
    tmp_path: Path, seed: int, k: int, max_length: int | None
) -> None:
    known, out = made(tmp_path, seed, k=k), tmp_path / "out"
    options = ExportOptions(max_length=max_length)
    exported = export_recipe("distillkit", tmp_path / made_up.RECIPE, out, options=options)
    held = [truth for truth in known if has_learned(truth, max_length)]
    assert exported.n_documents == len(held)
    assert named_left_out(out) == [truth.document_id for truth in known if truth not in held]
    said = exported.said["left_out"].get("nothing of them is learned", {"n_documents": 0, "first": []})
    assert said["n_documents"] == len(known) - len(held)
    named = [f"{truth.partition_key}/{truth.document_id}" for truth in known if truth not in held]
    assert said["first"] == named[:10]
    config = read_config(out / "compression_config.yaml")
    assert (config["d"], config["k"]) == (made_up.VOCABULARY, k)
    files = sorted(out.glob("data_*.parquet"), key=lambda path: int(path.stem.removeprefix("data_")))
    rows = [row for path in files for row in pq.read_table(path).to_pylist()]
    assert len(rows) == len(held)
    for row, truth in zip(rows, held, strict=True):
        n = min(truth.length, max_length or truth.length)
        assert row["input_ids"] == truth.ids_L[: n - 1].tolist()
        assert row["labels"] == expected_labels(truth, n)[: n - 1]
        require_positions(row, truth, config, range(n - 1))
    assert pq.read_schema(files[0]).field("input_ids").type.value_type == pa.uint64()


def test_datasets_loads_a_distillkit_export_and_keeps_folders_of_one_name_apart(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")  # which the planes' nodes do not have
    for seed in (1, 2):
        held = [truth for truth in made(tmp_path / str(seed), seed) if has_learned(truth, None)]
        out = tmp_path / f"of {seed}" / "out"
        export_recipe("distillkit", tmp_path / str(seed) / made_up.RECIPE, out)
        rows = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
        assert rows["input_ids"][:] == [truth.ids_L[:-1].tolist() for truth in held]


def require_positions(row: dict[str, Any], truth: Truth, config: dict[str, Any], at: range) -> None:
    """Row's positions `at` are those of the document from its first on, and there are as many of all as of tokens."""
    assert len(row["compressed_logprobs"]) == len(row["bytepacked_indices"]) == len(row["input_ids"])
    for i, position in enumerate(at):
        ids, logprobs = read_position(row["compressed_logprobs"][position], row["bytepacked_indices"][position], config)
        assert ids == truth.topk_ids_Mk[i].tolist()
        assert logprobs == truth.topk_logprobs_Mk[i].tolist()
        assert logprobs == sorted(logprobs, reverse=True)


@pytest.mark.parametrize(("seed", "k", "pack_to"), [(0, 5, 24), (1, 1, 40), (2, made_up.VOCABULARY, 64), (3, 30, 25)])
def test_packed_rows_have_every_document_once_and_whole_and_never_predict_across_a_border(
    tmp_path: Path, seed: int, k: int, pack_to: int
) -> None:
    known, out = made(tmp_path, seed, k=k), tmp_path / "out"
    export_recipe("distillkit", tmp_path / made_up.RECIPE, out, options=ExportOptions(pack_to=pack_to))
    held = [truth for truth in known if has_learned(truth, None)]
    assert named_left_out(out) == [truth.document_id for truth in known if truth not in held]
    config = read_config(out / "compression_config.yaml")
    waiting = list(held)
    rows = saved_rows(out)
    assert len(rows) < len(held), "some rows hold several documents"
    for row in rows:
        assert {len(values) for values in row.values()} == {pack_to}
        numbers = row["attention_mask"]
        n_tokens = sum(number > 0 for number in numbers)
        assert numbers == [*sorted(numbers[:n_tokens]), *[0] * (pack_to - n_tokens)]
        assert set(numbers) - {0} == set(range(1, max(numbers) + 1))
        assert row["labels"][n_tokens:] == [IGNORED] * (pack_to - n_tokens)
        for name in ("compressed_logprobs", "bytepacked_indices"):  # a distribution, so that no loss makes NaN of it
            assert row[name][n_tokens:] == [row[name][n_tokens - 1]] * (pack_to - n_tokens)
        for number in range(1, max(numbers) + 1):
            first = numbers.index(number)
            at = range(first, first + numbers.count(number))
            tokens = row["input_ids"][at.start : at.stop]
            ids, _ = read_position(row["compressed_logprobs"][first], row["bytepacked_indices"][first], config)
            (truth,) = [t for t in waiting if t.ids_L[:-1].tolist() == tokens and t.topk_ids_Mk[0].tolist() == ids]
            waiting.remove(truth)
            assert row["labels"][at.start] == IGNORED, "what is before it is of another document"
            assert row["labels"][at.start : at.stop] == expected_labels(truth, truth.length)[:-1]
            require_positions(row, truth, config, at)
    assert not waiting


@pytest.mark.parametrize(("vocabulary", "bits"), [(2, 1), (3, 2), (40, 6), (256, 8), (257, 9), (128_256, 17)])
def test_ids_are_packed_in_as_few_bits_as_the_vocabulary_takes(vocabulary: int, bits: int) -> None:
    rng = np.random.default_rng(vocabulary)
    config = {**dict.fromkeys(("polynomial_terms", "residual_bins", "delta_encoding")), "exact_dtype": "float16"}
    for k in (1, 2, 7, 16):
        ids_Mk = rng.integers(0, vocabulary, (5, k), dtype=np.uint32)
        packed_MB = packed_ids(ids_Mk, bits)
        assert packed_MB.shape == (5, -(-k * bits // 8))
        for row, of_row in zip(packed_MB, ids_Mk, strict=True):
            assert read_position([0] * (2 * k), row.tolist(), {**config, "d": vocabulary, "k": k, "exact_k": k})[0] == [
                *of_row
            ]


CASES: list[tuple[str, dict[str, Any]]] = [("axolotl", {}), ("distillkit", {}), ("distillkit", {"pack_to": 22})]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_an_export_that_is_cut_off_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    class PowerCutError(Exception):
        pass

    def cut(progress: ExportProgress) -> None:
        if progress.n_sections == 4:
            raise PowerCutError

    made(tmp_path, 3)
    chosen, recipe, out = ExportOptions(validation_share=0.5, **options), tmp_path / made_up.RECIPE, tmp_path / "out"
    whole = export_recipe(name, recipe, tmp_path / "whole", options=chosen)
    assert set(whole.said["splits"]) == {"train", "validation"}
    with pytest.raises(PowerCutError):
        export_recipe(name, recipe, out, options=chosen, on_progress=cut)
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("data*")}
    assert len(finished) == 4
    gone_on = export_recipe(name, recipe, out, options=chosen)
    verify_export(out)
    assert gone_on.files == whole.files
    assert gone_on.said == whole.said
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished sections are not written again"


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        ("axolotl", {"learned_only": True}, RecipeError, "leaves out by labels: learned_only"),
        ("distillkit", {"learned_only": True}, RecipeError, "leaves out by labels: learned_only"),
        ("axolotl", {"draft_vocabulary": 3}, RecipeError, "no draft head"),
        ("distillkit", {"draft_vocabulary": 3}, RecipeError, "no draft head"),
        ("axolotl", {"states": (1,)}, RecipeError, "leave states and other caches out"),
        ("distillkit", {"assets": ("hidden_state_cache",)}, RecipeError, "leave states and other caches out"),
        ("axolotl", {"pack_to": 64}, RecipeError, "axolotl packs documents itself"),
        ("axolotl", {"max_length": 1}, NotCommittedError, "no document to export"),
        ("distillkit", {"pack_to": 4}, RecipeError, r"have more tokens than a row \(pack_to: 4\)"),
        ("distillkit", {"pack_to": 0}, RecipeError, "pack_to is 0"),
        ("hf", {"pack_to": 64}, RecipeError, "hf: a row of it is one document"),
        ("original", {"pack_to": 64}, RecipeError, "original: a row of it is one document"),
        ("specforge_dflash", {"pack_to": 64}, RecipeError, "specforge_dflash: a row of it is one document"),
    ],
)
def test_what_the_trainer_cannot_have_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, options: dict[str, Any], error: type[KdAssetsError], says: str
) -> None:
    made(tmp_path, 0)
    with pytest.raises(error, match=says):
        export_recipe(name, tmp_path / made_up.RECIPE, tmp_path / "out", options=ExportOptions(**options))
    assert not (tmp_path / "out").exists()


def test_distillkit_refuses_a_cache_of_some_positions_since_its_rows_are_all_of_a_document(tmp_path: Path) -> None:
    made(tmp_path, 0, positions=True)
    with pytest.raises(RecipeError, match="keeps some positions only"):
        export_recipe("distillkit", tmp_path / made_up.RECIPE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_documents_of_which_nothing_is_learned_are_no_export_alone(tmp_path: Path) -> None:
    documents = made_up.truths(0)
    for document in documents:
        document.mask_L[:] = False
    made_up.commit(tmp_path, documents, assets=("topk_cache",))
    with pytest.raises(NotCommittedError, match="no document with a learned token"):
        export_recipe("distillkit", tmp_path / made_up.RECIPE, tmp_path / "out")


def test_one_packed_row_alone_is_refused_since_the_loader_takes_two_or_more(tmp_path: Path) -> None:
    made_up.commit(tmp_path, made_up.truths(0, n=3), assets=("topk_cache",))
    with pytest.raises(NotCommittedError, match="all documents fit into one row"):
        export_recipe("distillkit", tmp_path / made_up.RECIPE, tmp_path / "out", options=ExportOptions(pack_to=900))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.0, 0.15])
def test_rows_are_counted_as_they_are_written_without_the_documents_that_are_left_out(
    tmp_path: Path, share: float
) -> None:
    documents, options = made_up.truths(1, n=200), ExportOptions(pack_to=128, validation_share=share)
    validation = in_validation([document.document_id for document in documents], options)
    for i, (document, is_validation) in enumerate(zip(documents, validation, strict=True)):
        document.mask_L[:] = (
            i < 3 if not share else not is_validation or document is documents[int(validation.argmax())]
        )
    made_up.commit(tmp_path, documents, assets=("topk_cache",), max_documents={"topk_cache": 1000})
    with pytest.raises(NothingToExportError, match=r"fit into 1 row of 128 tokens .* takes 2 or more"):
        export_recipe("distillkit", tmp_path / made_up.RECIPE, tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("vocabulary_size", "says"),
    [(None, "is not known here"), (1, "takes 2 to 1048576"), (1 << 21, "takes 2 to 1048576")],
)
def test_distillkit_refuses_a_vocabulary_that_its_reader_could_not_be_told(
    vocabulary_size: int | None, says: str
) -> None:
    source = Source(
        recipe="made-up",
        manifests={},
        n_blocks=None,
        hidden_size=None,
        vocabulary_size=vocabulary_size,
        teacher_folder=None,
        tokenizer_folder=None,
    )
    with pytest.raises(RecipeError, match=says):
        DistillKit().needs(source, ExportOptions())
    assert not Axolotl().needs(source, ExportOptions()).all_positions
