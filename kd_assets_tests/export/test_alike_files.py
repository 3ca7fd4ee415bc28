"""Files of states made of an outline are those that pyarrow writes; what it cannot be made of is left to pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_assets.export.aside import export_file
from kd_assets.export.exporting import export_recipe
from kd_assets.export.formats.alike_files import FileOutline, NotedFile
from kd_assets_tests.export import made_up

Lists = list[npt.NDArray[np.float32]]


def table_of(ids: Lists, states: Lists, name: str) -> pa.Table:
    kind = pa.list_(pa.list_(pa.float32()))
    return pa.table({"input_ids": [i.tolist() for i in ids], name: pa.array([s.tolist() for s in states], kind)})


def noted(path: Path, ids: Lists, states: Lists, **options: Any) -> FileOutline | None:
    """Write a file of these, two rows a group, by pyarrow; returns its outline."""
    table = table_of(ids, states, "hidden_L9")
    chosen = {"compression": "none", "use_dictionary": False, "write_statistics": False} | options
    with export_file(path) as file:
        passed_on = NotedFile(file)
        for array in states:
            passed_on.expect(array)
        with pq.ParquetWriter(passed_on, table.schema, **chosen) as writer:
            writer.write_table(table, row_group_size=2)
        return passed_on.outline(writer.schema, writer.writer.metadata)


def random_lists(seed: int, lengths: list[int], width: int) -> Lists:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, width)).astype(np.float32) for n in lengths]


SHAPES = [([1], 1), ([3, 1, 2, 7, 5], 3), ([1, 1, 4, 1], 2), ([300, 700, 90], 1000)]
"""Tokens of each document, and numbers of each."""


@pytest.mark.parametrize("name", ["hidden_L9", "hidden_L10", "hidden_L" + "1" * 150])
@pytest.mark.parametrize(("lengths", "width"), SHAPES)
def test_a_file_made_of_an_outline_is_the_one_that_pyarrow_writes(
    tmp_path: Path, name: str, lengths: list[int], width: int
) -> None:
    ids, states = random_lists(0, lengths, 1), random_lists(1, lengths, width)
    ids = [array.reshape(-1) for array in ids]
    outline = noted(tmp_path / "first", ids, random_lists(2, lengths, width))
    assert outline is not None
    with export_file(tmp_path / "outlined") as file:
        outline.write(file, name, in_pieces(states))
    pq.write_table(
        table_of(ids, states, name),
        tmp_path / "plain",
        row_group_size=2,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    assert (tmp_path / "outlined").read_bytes() == (tmp_path / "plain").read_bytes()


def in_pieces(states: Lists) -> Iterator[npt.NDArray[np.float32]]:
    """Pieces whose borders are not those of rows, in memory that is used again."""
    memory = np.empty((2, states[0].shape[1]), dtype=np.float32)
    for array in states:
        for first in range(0, len(array), 2):
            part = array[first : first + 2]
            memory[: len(part)] = part
            yield memory[: len(part)]


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "snappy"},
        {"use_dictionary": True},
        {"use_byte_stream_split": True},
        {"data_page_version": "2.0"},
        {"store_schema": False},
    ],
)
def test_pages_and_footers_of_another_form_have_no_outline(tmp_path: Path, options: dict[str, Any]) -> None:
    states = random_lists(3, [5, 2, 4], 6)
    assert noted(tmp_path / "file", [array[:, 0] for array in states], states, **options) is None


def test_numbers_that_another_column_has_too_are_told_apart_or_have_no_outline(tmp_path: Path) -> None:
    zeros: Lists = [np.zeros((n, 2), np.float32) for n in (3, 8)]
    outline = noted(tmp_path / "zeros", [array[:, 0] for array in zeros], zeros)
    if outline is not None:
        with export_file(tmp_path / "outlined") as file:
            outline.write(file, "hidden_L9", iter(zeros))
        assert (tmp_path / "outlined").read_bytes() == (tmp_path / "zeros").read_bytes()


def test_an_original_export_is_the_same_with_and_without_an_outline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = made_up.truths(5, n=260, hidden=1024)  # 12 MB a block: two groups of rows, and pages of several rows
    made_up.commit(tmp_path, documents, assets=["hidden_state_cache"], max_documents={"hidden_state_cache": 200})
    outlined: list[str] = []
    write = FileOutline.write

    def seen(self: FileOutline, file: Any, name: str, numbers: Any) -> None:
        outlined.append(name)
        write(self, file, name, numbers)

    monkeypatch.setattr(FileOutline, "write", seen)
    made = export_recipe("original", tmp_path / made_up.RECIPE, tmp_path / "out")
    assert outlined == ["hidden_L2", "hidden_L4"] * 2
    monkeypatch.setattr(NotedFile, "outline", lambda *_: None)
    by_pyarrow = export_recipe("original", tmp_path / made_up.RECIPE, tmp_path / "by pyarrow")
    assert made.files == by_pyarrow.files
    assert made.said == by_pyarrow.said
    assert pq.ParquetFile(tmp_path / "out" / "fb_hints_L2" / "fb_hints_000000.parquet").num_row_groups > 1
