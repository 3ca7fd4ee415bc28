"""Checks of a committed result that need only its files. The control plane runs them; each gives its numbers.

A check is of the bytes that were committed: whatever it asks, the part files are hashed first, and one that was changed
fails it. A check never raises for what is wrong with a result: it fails, and its description names the file or the
number. Where the file system does not let it look, it raises StorageUnavailableError: then nothing is known of the
result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from kd_assets.errors import StorageUnavailableError, StoreError
from kd_assets.store import schema as schemas
from kd_assets.store.checking.rows import expected_schema, part_documents, schema_difference
from kd_assets.store.codecs.codec import PLAIN, plain_schema
from kd_assets.store.manifest import Manifest, PartRecord, read_manifest
from kd_assets.store.reading.chosen import require_place
from kd_assets.store.reading.parts import damage_named, open_part, require_unchanged
from kd_assets.store.recorded_checks import (
    codec_failure,
    codec_name,
    finite_failure,
    is_rebuilt_with,
    measured_on,
    not_made_of,
    rebuilt_failure,
    recoded_failure,
    recomputed_failure,
    require_readable,
)
from kd_assets.store.writing.documents import Int64Array

Number = float | int | str


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """What a check found. `numbers` are for people and for plots over time."""

    name: str
    passed: bool
    description: str
    numbers: dict[str, Number]


class _FailedError(StoreError):
    """Ends a check early."""


class ResultFiles:
    """The files of a result, read when they are first asked for and once for all checks of it, and for those of every
    cache of a shard. What cannot be read is a StoreError every time."""

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        """`manifest` is that of `folder`, where the caller has just read it."""
        self.folder = folder
        if manifest is not None:
            self.manifest = manifest
        self._schemas: dict[str, pa.Schema] = {}
        self._unchanged: set[str] = set()

    @cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self.folder)

    def require_committed(self) -> Manifest:
        """The manifest, of a result that lies where it belongs and all of whose parts are what was committed. Raises
        StoreError."""
        require_place(self.folder, self.manifest)
        for record in self.manifest.parts:
            if record.name not in self._unchanged:
                require_unchanged(self.folder / record.name, record)
                self._unchanged.add(record.name)
        return self.manifest

    def schema_of(self, record: PartRecord) -> pa.Schema:
        """The schema of a part file; opens it unless `documents` has."""
        if record.name not in self._schemas:
            with open_part(self.folder / record.name, record) as part:
                self._schemas[record.name] = part.stored_schema
        return self._schemas[record.name]

    @cached_property
    def documents(self) -> tuple[list[str], Int64Array]:
        """Ids and token counts of the rows of all part files."""
        ids: list[str] = []
        lengths = [np.zeros(0, np.int64)]
        for record in self.require_committed().parts:
            with open_part(self.folder / record.name, record) as part:
                self._schemas[record.name] = part.stored_schema
                part_ids, part_lengths = part_documents(part)
            ids += part_ids
            lengths.append(part_lengths)
        return ids, np.concatenate(lengths)


def check_all(cache: ResultFiles, shard: ResultFiles) -> list[CheckResult]:
    """The checks of a cache's partition: complete, schema, finite, recomputed; codec where it has one, rebuilt where
    that was made, and recoded where it was made of another result. Each file is read once for all, and the shard's once
    for all the caches that are checked with the same `shard`."""
    results = [check_complete(cache, shard), check_schema(cache), check_finite(cache), check_recomputed(cache)]
    others = (check_codec, check_rebuilt, check_recoded)
    results += [found for check in others if (found := check(cache)) is not None]
    return results


def check_files(result: ResultFiles) -> CheckResult:
    """Every file of the result is there, with the size and the hash that its manifest names; for results that are no
    tables."""

    def check(numbers: dict[str, Number]) -> str:
        manifest = result.require_committed()
        numbers |= {"n_files": len(manifest.parts), "n_bytes": manifest.n_bytes}
        return f"all {len(manifest.parts)} files are those that were written"

    return _run("files", check)


def check_schema(result: ResultFiles) -> CheckResult:
    """Every part file has exactly the columns, types and metadata of FORMAT.md for the result's parameters."""

    def check(numbers: dict[str, Number]) -> str:
        manifest = result.require_committed()
        numbers |= {"n_parts": len(manifest.parts), "n_columns": 0}
        expected = expected_schema(manifest, None)
        if expected is None:
            return "the files of this asset are no tables"
        for record in manifest.parts:
            found, path = result.schema_of(record), result.folder / record.name
            with damage_named(path):  # names and metadata that are no text
                if record.index == 0:
                    expected = expected_schema(manifest, schemas.hidden_size_of(plain_schema(found)))
                    assert expected is not None
                    numbers["n_columns"] = len(expected)
                if difference := schema_difference(expected, found):
                    raise _FailedError(f"{path}: {difference}")
        return f"all parts have the {numbers['n_columns']} columns of {manifest.asset}"

    return _run("schema", check)


def check_complete(result: ResultFiles, shard: ResultFiles) -> CheckResult:
    """The result has every document of its shard, in order, with all its tokens up to the cache's `max_length`.

    Counted from the columns of the part files on both sides, not from what manifests say; a shard is checked
    against itself, and its files are compared with its manifest.
    """

    def check(numbers: dict[str, Number]) -> str:
        folder, manifest = result.folder, result.require_committed()
        ids, lengths = result.documents
        expected_ids, expected_lengths = shard.documents
        max_length = manifest.params.get("max_length")
        if isinstance(max_length, int):
            expected_lengths = np.minimum(expected_lengths, max_length)
        numbers |= {
            "n_documents": len(ids),
            "expected_documents": len(expected_ids),
            "n_tokens": int(lengths.sum()),
            "expected_tokens": int(expected_lengths.sum()),
        }
        if len(ids) != len(expected_ids):
            raise _FailedError(f"{folder} has {len(ids)} documents, its shard has {len(expected_ids)}")
        differing = [i for i, pair in enumerate(zip(ids, expected_ids, strict=True)) if pair[0] != pair[1]]
        if differing:
            i = differing[0]
            raise _FailedError(f"{folder}: document {i} is {ids[i]!r}, in its shard {expected_ids[i]!r}")
        if (shorter := np.flatnonzero(lengths != expected_lengths)).size:
            i = int(shorter[0])
            raise _FailedError(f"{folder}: {ids[i]!r} has {lengths[i]} tokens, expected {expected_lengths[i]}")
        if (manifest.n_documents, manifest.n_tokens) != (len(ids), int(lengths.sum())):
            raise _FailedError(
                f"{folder} says {manifest.n_documents} documents and {manifest.n_tokens} tokens, its files have "
                f"{len(ids)} and {int(lengths.sum())}"
            )
        return f"{len(ids)} documents and {int(lengths.sum())} tokens, as in the shard"

    return _run("complete", check)


def check_finite(result: ResultFiles) -> CheckResult:
    """No number is NaN or infinite, and no position's kept probabilities add up to more than 1.

    Asks the statistics that were taken of the encoded parts, after every conversion.
    """

    def check(numbers: dict[str, Number]) -> str:
        manifest = result.require_committed()
        numbers |= manifest.stats
        if manifest.asset == "shards_manifest":
            return "tokens are integers"
        if why := finite_failure(manifest):
            raise _FailedError(f"{result.folder}/{why}")
        return "all numbers are finite"

    return _run("finite", check)


def check_recomputed(result: ResultFiles) -> CheckResult:
    """A sample of documents, computed again one at a time by the plain reference path, gave the same numbers.

    The task that made the result did it and recorded the differences; without a record the check fails.
    """

    def check(numbers: dict[str, Number]) -> str:
        manifest = result.require_committed()
        record = manifest.checks.get("recomputed")
        if isinstance(record, dict):
            numbers |= {k: v for k, v in record.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        if why := recomputed_failure(manifest):
            raise _FailedError(f"{result.folder}: {why}")
        return f"{numbers.get('n_documents', 0)} documents recomputed{_of_source(manifest, 'recomputed')}"

    return _run("recomputed", check)


def check_codec(result: ResultFiles) -> CheckResult | None:
    """Coding has changed no position by more than it may, by what was measured when the parts were written; None for a
    result without a codec."""
    try:
        if codec_name(result.manifest) == PLAIN:
            return None
    except StoreError:  # of which every other check tells
        return None

    def check(numbers: dict[str, Number]) -> str:
        manifest = result.require_committed()
        require_readable(manifest)
        numbers |= {name: value for name, value in manifest.stats.items() if name.startswith("max_codec_")}
        if why := codec_failure(manifest):
            raise _FailedError(f"{result.folder}/{why}")
        return f"{codec_name(manifest)}, within what coding can cost"

    return _run("codec", check)


def check_rebuilt(result: ResultFiles) -> CheckResult | None:
    """Log-probabilities that were rebuilt from a sample of the final states equal those of the top-k cache; None where
    the task that made the result could not compare them, or recorded that with the other of the two."""
    try:
        record = result.manifest.checks.get("rebuilt")
    except StoreError:  # of which every other check tells
        return None
    if record is None or not_made_of(record) is not None:
        return None

    def check(numbers: dict[str, Number]) -> str:
        manifest = result.require_committed()
        said = _rebuilt_in_words(manifest, numbers)
        if why := rebuilt_failure(manifest):
            raise _FailedError(f"{result.folder}: {why}")
        return said

    return _run("rebuilt", check)


def check_rebuilt_with(result: ResultFiles, other: ResultFiles) -> CheckResult | None:
    """`check_rebuilt` of a result without a record of it, by that of the `other` cache of the two; None where that has
    none, none that passed, or one of another result than this. Of the other cache its manifest is read, and no more."""
    try:
        manifest = other.manifest
        if result.manifest.checks.get("rebuilt") is not None or not is_rebuilt_with(result.manifest, manifest):
            return None
    except StorageUnavailableError:
        raise  # says nothing about the result
    except StoreError:  # of which every other check tells
        return None

    def check(numbers: dict[str, Number]) -> str:
        result.require_committed()
        return f"{_rebuilt_in_words(manifest, numbers)}, recorded with {manifest.asset}"

    return _run("rebuilt", check)


def _rebuilt_in_words(manifest: Manifest, numbers: dict[str, Number]) -> str:
    """What was compared, by the record in this manifest; adds its numbers."""
    record = manifest.checks["rebuilt"]
    if isinstance(record, dict):
        numbers |= {k: v for k, v in record.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    n_documents, of_source = numbers.get("n_documents", 0), _of_source(manifest, "rebuilt")
    return f"{numbers.get('n_positions', 0)} positions of {n_documents} documents rebuilt{of_source}"


def _of_source(manifest: Manifest, name: str) -> str:
    form = measured_on(manifest, name)
    return "" if form is None else f", measured on {form}, of which this was made"


def check_recoded(result: ResultFiles) -> CheckResult | None:
    """Every part of a result that was made of another one was decoded from the disk again, and is what its source says;
    None for a result of the teacher's pass."""
    try:
        record = result.manifest.checks.get("recoded")
    except StoreError:  # of which every other check tells
        return None
    if record is None:
        return None

    def check(numbers: dict[str, Number]) -> str:
        manifest = result.require_committed()
        if isinstance(record, dict):
            numbers |= {k: v for k, v in record.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        if why := recoded_failure(manifest):
            raise _FailedError(f"{result.folder}: {why}")
        how = "exactly" if record.get("is_exact") else "within what coding can cost"
        return f"{manifest.n_documents} documents as in the result that they were recoded from, {how}"

    return _run("recoded", check)


def _run(name: str, check: Callable[[dict[str, Number]], str]) -> CheckResult:
    numbers: dict[str, Number] = {}
    try:
        return CheckResult(name=name, description=check(numbers), passed=True, numbers=numbers)
    except StorageUnavailableError:
        raise  # says nothing about the result
    except StoreError as e:
        return CheckResult(name=name, description=str(e), passed=False, numbers=numbers)
