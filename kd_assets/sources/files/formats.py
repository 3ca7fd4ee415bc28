"""What a file is, by its name and by its first bytes; and what a data set's card says of its licence."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from kd_assets.contract import Compression, FileFormat
from kd_assets.errors import InputError
from kd_assets.sources.files.storage import open_source
from kd_assets.sources.files.text.compressed import decompressed
from kd_assets.sources.files.text.lines import BLANK, BOM, refuse_other_magic

_FORMATS: dict[str, FileFormat] = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "json",
    "csv": "csv",
    "tsv": "tsv",
    "parquet": "parquet",
    "arrow": "arrow",
}
KNOWN_SUFFIXES = tuple(f".{suffix}" for suffix in _FORMATS)
_COMPRESSIONS: dict[str, Compression] = {"gz": "gzip", "gzip": "gzip", "zst": "zstd", "zstd": "zstd"}

SAVED_STATE, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Of a folder that `datasets.save_to_disk` wrote: which files it has, and which splits (each in a folder)."""

_PEEK_BYTES = 1 << 20


def _suffixes(path: str) -> list[str]:
    name = path.rpartition("/")[2].partition("?")[0] if path.startswith("http") else path.rpartition("/")[2]
    return [suffix.lower() for suffix in name.split(".")[1:]]


def compression_of(path: str) -> Compression | None:
    return _COMPRESSIONS.get((_suffixes(path) or [""])[-1])


def format_of_name(path: str) -> FileFormat | None:
    """By its suffix, before that of a compression; None where that says nothing."""
    suffixes = _suffixes(path)
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def format_of_content(path: str, compression: Compression | None) -> FileFormat:
    """Whether a file of JSON holds one array, or one object a line, as many that are named `.json` do.

    Raises InputError for one that is neither.
    """
    with contextlib.ExitStack() as stack:
        text = stack.enter_context(open_source(path))
        if compression is not None:
            text = stack.enter_context(decompressed(text, path, compression))
        start = text.read(_PEEK_BYTES)
    refuse_other_magic(start, path)
    start = start.removeprefix(BOM).lstrip(BLANK)
    if start[:1] == b"[" or not start:
        return "json"
    line, newline, _ = start.partition(b"\n")
    try:
        if newline or len(start) < _PEEK_BYTES // 2:
            json.loads(line.decode("utf-8", "surrogateescape"))
    except ValueError as e:
        raise InputError(
            f"{path} holds neither an array of objects nor one object a line ({e} in its first line): write it as one "
            "of them (`jq -c '.[]'` writes lines)"
        ) from e
    return "jsonl"


_FRONT_MATTER = re.compile(r"\A\ufeff?---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


def licence_of_card(card: str) -> str | None:
    """What the front matter of a README.md says: https://huggingface.co/docs/hub/datasets-cards."""
    import yaml  # type: ignore[import-untyped]

    found = _FRONT_MATTER.match(card)
    if found is None:
        return None
    try:
        metadata: Any = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return None
    if not isinstance(metadata, dict):
        return None
    return licence_named(metadata.get("license"), metadata.get("license_name"))


def licence_named(licence: Any, name: Any) -> str | None:
    """`other` is a licence by its name; a list is all of them."""
    if licence == "other" and name:
        return str(name)
    if isinstance(licence, list):
        return ", ".join(map(str, licence)) or None
    return str(licence) if licence else None
