"""Folders that `datasets` loads as its own, although it did not write them."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_assets.durable import atomic_file
from kd_assets.errors import RecipeError
from kd_assets.export import saved_dataset
from kd_assets.export.format import SectionFiles
from kd_assets.export.saved_dataset import Rows, finish_saved_dataset, numbers, section_name, section_rows
from kd_assets_tests.export.saved_rows import saved_rows

SCHEMA = pa.schema(
    {
        "ids": numbers(pa.int64()),
        "pairs": numbers(numbers(pa.float32())),
        "bytes": numbers(numbers(pa.uint8())),
        "halves": numbers(pa.float16()),
        "n": pa.int64(),
    }
)


def rows_of(seed: int, n: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    lengths = [0, 1, *rng.integers(2, 9, n - 2).tolist()]
    return [
        {
            "ids": rng.integers(-100, 2**40, length),
            "pairs": rng.normal(0, 1, (length, 2)).astype(np.float32),
            "bytes": rng.integers(0, 256, (length, 3), dtype=np.uint8),
            "halves": rng.normal(0, 1, length).astype(np.float16),
            "n": length,
        }
        for length in lengths
    ]


def written(folder: Path, sections: list[list[dict[str, Any]]], *, as_torch: bool = False) -> list[SectionFiles]:
    folder.mkdir()
    files = []
    for index, of_section in enumerate(sections):
        with section_rows(folder, index, SCHEMA) as (rows, file):
            for row in of_section:
                rows.add(row)
        name = section_name(index)
        files.append(
            SectionFiles(
                index=index,
                partition_key="p",
                n_documents=len(of_section),
                n_tokens=0,
                names=(name,),
                sha256={name: file.sha256},
            )
        )
    finish_saved_dataset(folder, SCHEMA, files, as_torch=as_torch)
    return files


def plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}


def test_rows_come_back_in_their_order_whatever_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = [rows_of(0, 7), rows_of(1, 3)]
    expected = [plain(row) for of_section in sections for row in of_section]
    for batch_bytes in (1, 200, 1 << 20):
        monkeypatch.setattr(saved_dataset, "_BATCH_BYTES", batch_bytes)
        written(tmp_path / str(batch_bytes), sections)
        assert saved_rows(tmp_path / str(batch_bytes)) == expected


def test_datasets_loads_the_folder_with_its_types_and_tells_contents_apart(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")  # which the planes' nodes do not have
    sections = [rows_of(0, 7), rows_of(1, 3)]
    written(tmp_path / "a", sections)
    written(tmp_path / "b", [rows_of(2, 7), rows_of(1, 3)])
    loaded = datasets.load_from_disk(str(tmp_path / "a"))
    assert [loaded[i] for i in range(10)] == [plain(row) for of_section in sections for row in of_section]
    assert loaded.features.arrow_schema.types == SCHEMA.types
    other = datasets.load_from_disk(str(tmp_path / "b"))
    assert loaded._fingerprint != other._fingerprint, "datasets takes what it computed of equal fingerprints for equal"
    assert loaded.select(range(3)).map(lambda row: {"m": row["n"] + 1})["m"][:] == [1, 2, sections[0][2]["n"] + 1]


def test_a_folder_of_tensors_gives_tensors(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    torch = pytest.importorskip("torch")
    written(tmp_path / "a", [rows_of(0, 4)], as_torch=True)
    row = datasets.load_from_disk(str(tmp_path / "a"))[3]
    assert torch.equal(row["ids"], torch.from_numpy(rows_of(0, 4)[3]["ids"]))
    assert row["pairs"].shape == (rows_of(0, 4)[3]["n"], 2)


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        written(tmp_path / name, [rows_of(0, 7), rows_of(1, 3)])
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()
    }


@pytest.mark.parametrize("sink_of", [pa.ipc.new_stream, pq.ParquetWriter])
def test_a_file_that_fails_half_way_leaves_nothing_and_no_writer_that_fails_later(tmp_path: Path, sink_of: Any) -> None:
    class PowerCutError(Exception):
        pass

    def write() -> None:
        with atomic_file(tmp_path / "file") as file, Rows(sink_of(file, SCHEMA), SCHEMA) as rows:
            for row in rows_of(0, 3):
                rows.add(row)
            raise PowerCutError

    with pytest.raises(PowerCutError):
        write()
    gc.collect()  # pytest makes an error of what goes wrong in this
    assert not list(tmp_path.iterdir())


def test_a_value_of_more_numbers_than_a_list_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_dataset, "_LARGEST_OFFSET", 10)
    with pytest.raises(RecipeError, match="give --max-length"):
        written(tmp_path / "a", [[{**rows_of(0, 3)[2], "ids": np.zeros(11, dtype=np.int64)}]])
    assert not list((tmp_path / "a").iterdir())
