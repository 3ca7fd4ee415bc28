"""Checks of a committed result that need only its files. The control plane runs them; each gives its numbers.

A check never raises for what is wrong with a result: it fails, and its description names the file or the number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kd_assets.errors import CorruptPartError, StoreError
from kd_assets.store import schema as schemas
from kd_assets.store.manifest import Manifest, PartRecord, read_manifest
from kd_assets.store.partfile import PartFile
from kd_assets.store.reading.columns import Ragged, column_of
from kd_assets.store.writing.documents import Int64Array

PROBABILITY_TOLERANCE = 4e-3
"""Σp of the kept tokens may exceed 1 by this: float16 rounds a logprob between -8 and -16 by up to 2⁻⁸, and all of the
mass may lie there (uniform logits over 3,000 tokens and more, all kept). Below -16 there is too little of it."""

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


class _Result:
    """The files of a result, read once for all checks of it. What cannot be read is a StoreError every time."""

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        self.folder = folder
        if manifest is not None:
            self.manifest = manifest
        self._schemas: dict[str, pa.Schema] = {}

    @cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self.folder)

    def schema_of(self, record: PartRecord) -> pa.Schema:
        """The schema of a part file; opens it unless `documents` has."""
        if record.name not in self._schemas:
            with PartFile(self.folder / record.name) as part:
                self._schemas[record.name] = part.schema
        return self._schemas[record.name]

    def documents(self) -> tuple[list[str], Int64Array]:
        """Ids and token counts of the rows of all part files."""
        ids: list[str] = []
        lengths = [np.zeros(0, np.int64)]
        for record in self.manifest.parts:
            with PartFile(self.folder / record.name) as part:
                self._schemas[record.name] = part.schema
                part_ids, part_lengths = part_documents(part)
            ids += part_ids
            lengths.append(part_lengths)
        return ids, np.concatenate(lengths)


def check_all(folder: Path, shard_folder: Path, *, manifest: Manifest | None = None) -> list[CheckResult]:
    """The four checks of a cache's partition: complete, schema, finite, recomputed. Each file is read once for all.

    `manifest` is that of `folder`, where the caller has just read it.
    """
    result = _Result(folder, manifest)
    return [_complete(result, _Result(shard_folder)), _schema(result), _finite(result), _recomputed(result)]


def expected_schema(manifest: Manifest, hidden_size: int | None) -> pa.Schema | None:
    """The schema that the part files of a result must have; None for an asset whose files are no tables.

    `hidden_size` is the teacher's, which no parameter tells. Raises StoreError where the identity lacks a parameter.
    """
    try:
        match manifest.asset:
            case "shards_manifest":
                return schemas.shard_schema()
            case "topk_cache":
                return schemas.topk_schema(int(manifest.params["k"]), draws_of(manifest))
            case "hidden_state_cache":
                return schemas.hidden_state_schema([int(b) for b in manifest.params["blocks"]], hidden_size or 0)
            case "embedding_cache":
                return schemas.embedding_schema(hidden_size or 0)
            case _:
                return None
    except KeyError as e:
        raise _FailedError(f"the identity of {manifest.asset} lacks params[{e}]") from e


def draws_of(manifest: Manifest) -> int:
    """Token ids that a cache holds of each position as random draws: 0 for one without, and for other assets."""
    return int(manifest.params.get("draws", 0))


def check_schema(folder: Path) -> CheckResult:
    """Every part file has exactly the columns, types and metadata of FORMAT.md for the result's parameters."""
    return _schema(_Result(folder))


def _schema(result: _Result) -> CheckResult:
    def check(numbers: dict[str, Number]) -> str:
        manifest = result.manifest
        numbers |= {"n_parts": len(manifest.parts), "n_columns": 0}
        expected = expected_schema(manifest, None)
        if expected is None:
            return "the files of this asset are no tables"
        for record in manifest.parts:
            found = result.schema_of(record)
            if record.index == 0:
                expected = expected_schema(manifest, schemas.hidden_size_of(found))
                assert expected is not None
                numbers["n_columns"] = len(expected)
            if difference := schema_difference(expected, found):
                raise _FailedError(f"{result.folder / record.name}: {difference}")
        return f"all parts have the {numbers['n_columns']} columns of {manifest.asset}"

    return _run("schema", check)


def check_complete(folder: Path, shard_folder: Path) -> CheckResult:
    """The result has every document of its shard, in order, with all its tokens up to the cache's `max_length`.

    Counted from the columns of the part files on both sides, not from what manifests say; for a shard itself give
    its folder twice, and the files are compared with its manifest.
    """
    return _complete(_Result(folder), _Result(shard_folder))


def _complete(result: _Result, shard: _Result) -> CheckResult:
    def check(numbers: dict[str, Number]) -> str:
        folder, manifest = result.folder, result.manifest
        ids, lengths = result.documents()
        expected_ids, expected_lengths = shard.documents()
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


def check_finite(folder: Path) -> CheckResult:
    """No number is NaN or infinite, and no position's kept probabilities add up to more than 1.

    Asks the statistics that were taken while the parts were encoded.
    """
    return _finite(_Result(folder))


def _finite(result: _Result) -> CheckResult:
    def check(numbers: dict[str, Number]) -> str:
        manifest = result.manifest
        numbers |= manifest.stats
        if manifest.asset == "shards_manifest":
            return "tokens are integers"
        for record in manifest.parts:
            path = result.folder / record.name
            if record.stats.get("n_non_finite", math.nan) != 0:
                found = record.stats.get("n_non_finite", "an unknown number of")
                raise _FailedError(f"{path} has {found} values that are NaN or infinite")
            if manifest.asset == "topk_cache" and not record.stats["max_probability_sum"] <= 1 + PROBABILITY_TOLERANCE:
                raise _FailedError(f"{path}: probabilities add up to {record.stats['max_probability_sum']:.6f}")
            if draws := draws_of(manifest):
                n_draws, expected = record.stats.get("n_draws", 0), draws * record.stats["n_positions"]
                if n_draws != expected:
                    raise _FailedError(f"{path} has {n_draws:.0f} draws, expected {draws} a position: {expected:.0f}")
        return "all numbers are finite"

    return _run("finite", check)


def check_recomputed(folder: Path) -> CheckResult:
    """A sample of documents, computed again one at a time by the plain reference path, gave the same numbers.

    The task that made the result did it and recorded the differences; without a record the check fails.
    """
    return _recomputed(_Result(folder))


def _recomputed(result: _Result) -> CheckResult:
    def check(numbers: dict[str, Number]) -> str:
        folder, manifest = result.folder, result.manifest
        record = manifest.checks.get("recomputed")
        if not isinstance(record, dict):
            raise _FailedError(f"{folder} has no record of a recomputation")
        numbers |= {k: v for k, v in record.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        tolerance = record.get("tolerance")
        if isinstance(tolerance, dict):
            numbers |= {f"tolerance_{name}": value for name, value in tolerance.items()}
        if manifest.n_documents and not numbers.get("n_documents"):
            raise _FailedError(f"{folder}: no document was recomputed")
        for name, value in record.items():
            if name.startswith("max_") and not isinstance(value, (int, float)):
                raise _FailedError(f"{folder}: {name} is {value}")
            limit = tolerance.get(name) if isinstance(tolerance, dict) else None
            if limit is not None and not value <= limit:
                raise _FailedError(f"{folder}: {name} is {value:.3g}, allowed is {limit:.3g}")
        if record.get("passed") is not True:
            raise _FailedError(f"{folder}: the recomputation was recorded as failed")
        return f"{numbers.get('n_documents', 0)} documents recomputed"

    return _run("recomputed", check)


def schema_difference(expected: pa.Schema, found: pa.Schema) -> str | None:
    """The first difference in words; None for equal schemas, metadata included."""
    if expected.equals(found, check_metadata=True):
        return None
    for name in expected.names:
        if name not in found.names:
            return f"column {name} is missing"
        if not expected.field(name).equals(found.field(name), check_metadata=True):
            return f"column {name}: expected {_in_words(expected.field(name))}, found {_in_words(found.field(name))}"
    if extra := [name for name in found.names if name not in expected.names]:
        return f"column {extra[0]} is not of this format"
    if expected.names != found.names:
        return f"columns are in the order {', '.join(found.names)}, expected {', '.join(expected.names)}"
    return f"schema metadata: expected {expected.metadata}, found {found.metadata}"


def part_documents(part: PartFile) -> tuple[list[str], Int64Array]:
    """Ids and token counts of a part's rows. Raises CorruptPartError where `input_ids` has another length."""
    ids: list[str] = []
    lengths = [np.zeros(0, np.int64)]
    for group in range(part.n_groups):
        table = part.read_group(group, ["document_id", "n_tokens", "input_ids"])
        n_tokens = table["n_tokens"].to_numpy().astype(np.int64)
        counted = column_of(table["input_ids"]).lengths
        if counted is None or (counted != n_tokens).any():
            raise CorruptPartError(f"{part.path}: n_tokens differs from the length of input_ids")
        ids += table["document_id"].to_pylist()
        lengths.append(n_tokens)
    return ids, np.concatenate(lengths)


def draws_difference(part: PartFile, draws: int, vocabulary: int | None) -> str | None:
    """What is wrong with the random draws of a part's documents, in words; None when all is well.

    `vocabulary` is the number of ids the teacher has, where it is known.
    """
    columns = ["n_tokens", "sampled_ids", "sampled_counts"]
    for group in range(part.n_groups):
        table = part.read_group(group, columns)
        n_positions = table["n_tokens"].to_numpy() - 1
        ids, counts = (column_of(table[name]) for name in columns[1:])
        for column in (ids, counts):
            if column.lengths is None or (column.lengths != n_positions).any():
                return "a document has not one list of sampled_ids and of sampled_counts for each of its positions"
        assert isinstance(ids.values, Ragged)
        assert isinstance(counts.values, Ragged)
        if difference := _lists_difference(ids.values, counts.values, draws, vocabulary):
            return difference
    return None


def _lists_difference(ids: Ragged, counts: Ragged, draws: int, vocabulary: int | None) -> str | None:
    if not np.array_equal(ids.offsets, counts.offsets):
        return "sampled_ids and sampled_counts have lists of different lengths"
    summed = np.concatenate([[0], np.cumsum(counts.values, dtype=np.int64)])
    n_draws = np.diff(summed[counts.offsets])
    if counts.values.min(initial=1) < 1 or (n_draws != draws).any():
        return f"sampled_counts of a position are below 1, or add up to something else than {draws}"
    goes_on = np.ones(len(ids.values), dtype=np.bool_)
    goes_on[ids.offsets[:-1]] = False  # the first of a list; none is empty, as its counts add up to something
    if (np.diff(ids.values.astype(np.int64)) <= 0)[goes_on[1:]].any():
        return "sampled_ids of a position are not in ascending order, each once"
    largest = int(ids.values.max(initial=0))
    if vocabulary is not None and largest >= vocabulary:
        return f"a sampled id is {largest}, the teacher knows ids 0 to {vocabulary - 1}"
    return None


def _run(name: str, check: Callable[[dict[str, Number]], str]) -> CheckResult:
    numbers: dict[str, Number] = {}
    try:
        return CheckResult(name=name, description=check(numbers), passed=True, numbers=numbers)
    except StoreError as e:
        return CheckResult(name=name, description=str(e), passed=False, numbers=numbers)


def _in_words(field: pa.Field) -> str:
    null = " null" if field.nullable else ""
    metadata: dict[Any, Any] = field.metadata or {}
    return f"{field.type}{null} {({k.decode(): v.decode() for k, v in metadata.items()}) or ''}".strip()
