"""What readers give of a home, as digests that can be compared; and what lies there, told without the product."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_assets.store import CacheReader
from kd_assets.student.dataset import TeacherCacheDataset
from kd_assets_tests.campaign.production import Home
from kd_assets_tests.golden.facts import digest

Readings = list[str]
"""`<partition>/<document id> <digest of everything>` of each document, in the reader's order."""


def read_asset(home: Home, asset: str) -> Readings:
    reader = CacheReader(home.recipe_folder, asset)
    return [_line(reader[i]) for i in range(len(reader))]


def read_samples(home: Home) -> Readings:
    """Training samples, all caches joined."""
    dataset = TeacherCacheDataset.from_recipe(home.recipe_folder)
    return [_line(dataset[i]) for i in range(len(dataset))]


def _line(document: dict[str, Any]) -> str:
    return f"{document['partition_key']}/{document['document_id']} {digest(document)}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A committed result as plain files show it. Two are equal when all that a reader can be given of them is."""

    asset: str
    partition_key: str
    head: str
    """The fingerprint that head.json has."""
    manifest: str
    """Digest of what the JSON says."""
    parts: tuple[tuple[str, str], ...]
    """Name and SHA-256 of each file that the manifest names."""


def results_on_disk(home: Home) -> dict[str, Result]:
    """Path below the recipe's folder → result, of every result folder with all its files; links are followed.

    Plain files and `json` only: a fault of the product's own reading cannot hide here. What is not whole is left out.
    """
    found = {}
    for head_file in sorted(_glob(home.recipe_folder, 3, "head.json")):
        try:
            head = json.loads(_bytes(head_file))["fingerprint"]
            folder = head_file.parent / head[:16]
            manifest = json.loads(_bytes(folder / "manifest.json"))
            if manifest["fingerprint"] != head:
                continue
            parts = tuple(
                (p["name"], hashlib.sha256(_bytes(folder / p["name"])).hexdigest()) for p in manifest["parts"]
            )
            result = Result(
                asset=manifest["asset"],
                partition_key=manifest["partition_key"],
                head=head,
                manifest=hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest(),
                parts=parts,
            )
        except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError, AttributeError):
            continue
        found[str(folder.relative_to(home.recipe_folder))] = result
    return found


def _bytes(path: Path) -> bytes:
    """Of a regular file; OSError for anything else, at once."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no file")
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return file.read()
    finally:
        os.close(descriptor)


def _glob(folder: Path, depth: int, name: str) -> list[Path]:
    """Files of this name `depth` folders below, through links; what cannot be listed has none."""
    if depth == 0:
        return [folder / name] if (folder / name).exists() else []
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [path for child in names for path in _glob(folder / child, depth - 1, name)]
