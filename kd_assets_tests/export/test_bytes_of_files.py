"""The files of every format have the bytes that they had: what is made faster changes none of them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from kd_assets.export.exporting import export_recipe
from kd_assets.export.folder import Exported
from kd_assets.export.format import ExportOptions
from kd_assets.export.formats import FORMATS
from kd_assets_tests.export import made_up

VERSIONS = {"pyarrow": "26.0.1"}
"""Parquet has the writer's version in its files."""

OPTIONS: dict[str, dict[str, Any]] = {
    "modelopt": {"states": (1, 2, 4)},
    "specforge": {"states": (1, 2, 4)},
    "specforge_dflash": {"states": (1, 4, "after_norm")},
    "speculators": {"states": (1, 2, 4)},
}
EXPECTED = {
    "axolotl": "19422c8ecf8177fd",
    "distillkit": "ecf10d46128edb1c",
    "hf": "c28d8fb0d71e4da7",
    "modelopt": "afaea42edfda70ad",
    "original": "0fe227c9ad9de0e7",
    "safetensors": "b37a428f36931679",
    "specforge": "dd2733de8f0e637a",
    "specforge_dflash": "05587be14bec29c0",
    "speculators": "9cbe036d63ed99b2",
}


def digest_of(exported: Exported) -> str:
    """Of names and hashes of all files."""
    files = {name: file.sha256 for name, file in exported.files.items()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def test_every_format_is_among_those_whose_bytes_are_known() -> None:
    assert set(EXPECTED) == set(FORMATS)


@pytest.mark.parametrize("format_name", EXPECTED)
def test_files_of_a_format_have_the_bytes_that_they_had(tmp_path: Path, format_name: str) -> None:
    versions = {package: importlib.metadata.version(package).partition("+")[0] for package in VERSIONS}
    if versions != VERSIONS:
        pytest.skip(f"the bytes that are known were written by {VERSIONS}, and these are {versions}")
    for key in ("made-up-00000", "made-up-00001"):
        made_up.commit(tmp_path, made_up.truths(7, key), max_documents={"hidden_state_cache": 4, "topk_cache": 5})
    options = ExportOptions(**OPTIONS.get(format_name, {}))
    exported = export_recipe(format_name, tmp_path / made_up.RECIPE, tmp_path / "out", options=options)
    assert digest_of(exported) == EXPECTED[format_name]
