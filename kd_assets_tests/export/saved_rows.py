"""The rows of a folder of `save_to_disk`, read by pyarrow alone: in the order that its state names the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa


def saved_rows(folder: Path) -> list[dict[str, Any]]:
    state = json.loads((folder / "state.json").read_text())
    rows: list[dict[str, Any]] = []
    for file in state["_data_files"]:
        with pa.ipc.open_stream(folder / file["filename"]) as stream:
            rows += stream.read_all().to_pylist()
    return rows
