"""Making a result of another one: part by part, each decoded from the disk again and compared with its source.

Nothing is kept of a part but its record, so memory is bounded by one part. A killed recoding goes on after its last
whole part as every writer does (`store.writing.writer`), and ends with the same bytes. The source is only read.
"""

from __future__ import annotations

import datetime
import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from kd_assets.contract import Output
from kd_assets.durable import listing, read_if_there, storage_errors
from kd_assets.errors import (
    CodecRangeError,
    CorruptPartError,
    FailedCheckError,
    NoSourceError,
    StorageUnavailableError,
)
from kd_assets.store.codecs.codec import coded
from kd_assets.store.codecs.coded import Coded
from kd_assets.store.codecs.sizes import decoded_per_byte
from kd_assets.store.codecs.state_codec import require_groups
from kd_assets.store.codecs.topk_columns import with_coded_draws
from kd_assets.store.codecs.topk_schema import LOGSUMEXP_COLUMN
from kd_assets.store.layout import JOURNAL_NAME, recipe_folder_of
from kd_assets.store.manifest import FILES_FACT, Manifest, PartRecord, committed
from kd_assets.store.partfile import PartFile
from kd_assets.store.reading.parts import damage_named, open_part, part_in_memory
from kd_assets.store.recoding.measuring import measured
from kd_assets.store.recoding.sources import LOSES_NOTHING, Form, Source, candidates, ways_out, why_doubted
from kd_assets.store.recorded_checks import failed_check
from kd_assets.store.schema import hidden_size_of
from kd_assets.store.writing.encode import part_stats
from kd_assets.store.writing.journal import Journal
from kd_assets.store.writing.writer import ResultWriter, utc_now

_OF_CODING = "max_codec_"
"""Begins the names of the statistics that a codec gives."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecodingProgress:
    """A part is on disk and was compared."""

    n_parts: int
    of_parts: int
    n_documents: int
    of_documents: int
    n_tokens: int
    of_tokens: int
    n_bytes: int
    """Written so far, an earlier attempt's included."""


def source_in(folder: Path, wanted: Output) -> Source:
    """The result in a folder as the source of another. Raises NoSourceError unless it is committed, differs from it by
    its codec alone and holds all of the teacher's numbers, and FailedCheckError where it failed a check."""
    for candidate in candidates(wanted):
        if Path(candidate.output.path) != folder:
            continue
        manifest = committed(folder, candidate.output.fingerprint)
        if manifest is None:
            raise NoSourceError(f"{folder} is not (or no longer whole) there to be recoded: materialize the partition")
        if why := candidate.form.why_not(Form.of(wanted.asset, wanted.identity.get("params") or {})):
            raise NoSourceError(f"{folder} cannot be recoded: {why}")
        if why := failed_check(manifest):
            raise FailedCheckError(f"{folder} is not recoded: {why}")
        if why := why_doubted(manifest, wanted):
            raise NoSourceError(f"{folder} is not recoded: {why}")
        return Source(form=candidate.form, output=candidate.output, manifest=manifest)
    raise NoSourceError(f"{folder} is not the same as {wanted.path} but for its codec")


def bytes_after(source: Source, wanted: Output, *, hidden_size: int | None = None) -> int:
    """How many bytes the parts of a recoded result will take, about. Without the `hidden_size` of its states a part of
    the source is opened for it; raises what that does."""
    params = wanted.identity.get("params") or {}
    size = hidden_size or hidden_size_of_source(source)
    of_source = decoded_per_byte(wanted.asset, source.manifest.params, size)
    return round(source.manifest.n_bytes * of_source / decoded_per_byte(wanted.asset, params, size))


def recode(
    source: Source,
    wanted: Output,
    *,
    made_by: Mapping[str, Any],
    on_part: Callable[[RecodingProgress], None] = lambda progress: None,
    clock: Callable[[], datetime.datetime] = utc_now,
) -> Manifest:
    """Make and commit `wanted` from its source. `made_by`: host, versions and so on of this process; `on_part` may end
    the work by raising, and what is on disk by then is kept.

    A part that an earlier attempt has left is kept where it is what its source says, and written anew where not.
    Raises CorruptPartError for a source that was damaged, FailedCheckError, with nothing committed, where what is on
    disk is not what was made, CodecRangeError for numbers that the codec cannot hold,
    RecipeError where its groups do not divide a state, ResultBusyError while somebody else makes the result,
    StorageUnavailableError where the disk has no room.
    """
    started = time.monotonic()
    manifest, folder = source.manifest, Path(source.output.path)
    to = Form.of(wanted.asset, wanted.identity.get("params") or {})
    if (size := hidden_size_of_source(source)) is not None:
        require_groups(to.codec, size)
    comparison = _Comparison(to.codec, is_exact=to.codec in (*LOSES_NOTHING, source.form.codec))
    with ResultWriter(
        wanted,
        recipe=manifest.recipe,
        recipe_folder=recipe_folder_of(Path(wanted.path)),
        partition_key=manifest.partition_key,
        recoded_from=manifest.fingerprint,
        clock=clock,
    ) as writer:
        if writer.committed is not None:  # meanwhile, or before
            return writer.commit(parts=len(writer.committed.parts), checks={}, provenance={})
        needed = bytes_after(source, wanted, hidden_size=size)
        _require_room(Path(wanted.path), needed - sum(record.n_bytes for record in writer.finished.values()))
        kept: list[PartRecord] = []
        for record in manifest.parts:
            made = _made(folder / record.name, record, source.form, to)
            kept.append(_on_disk(writer, record, made, _stats(wanted, made.coded, record), comparison))
            del made  # before the next one is read
            on_part(_progress(manifest, kept))
        for name, data in _files_beside(folder, manifest):
            writer.write_beside(name, data)
        return writer.commit(
            parts=len(manifest.parts),
            checks=_checks(source) | {"recoded": comparison.record(manifest)},
            provenance={
                **manifest.provenance,
                "recoded_from": recoded_from(source),
                "recoded_by": {**made_by, "wall_s": round(time.monotonic() - started, 3)},
            },
            facts={name: value for name, value in manifest.facts.items() if name != FILES_FACT},
        )


def _on_disk(
    writer: ResultWriter, of_source: PartRecord, made: _Made, stats: Mapping[str, float], comparison: _Comparison
) -> PartRecord:
    """The part as it is to be committed: the one that is there where that is it, else a new one.

    Raises FailedCheckError where a new one, decoded again, is not its source.
    """
    index = of_source.index
    # Where nothing is lost, what the codec says it made is not asked.
    expected = made.plain if comparison.is_exact else made.coded.decoded
    if (there := writer.finished.get(index)) is not None:
        said = (there.n_documents, there.n_tokens, there.stats)
        is_said = said == (of_source.n_documents, of_source.n_tokens, dict(stats))
        if is_said and comparison.difference_left(writer.folder / there.name, made.plain, expected) is None:
            comparison.add(there)
            return there
        writer.forget(index)
    part = writer.write_part(index, made.coded.stored, n_tokens=of_source.n_tokens, stats=stats)
    difference = comparison.difference(writer.folder / part.name, made.plain, expected)
    if difference is not None:
        writer.forget(index)
        raise FailedCheckError(
            f"{writer.folder} is not committed: check recoded failed: decoded again from the disk, {difference}. Look "
            "at the disk and run again, or say recode: false in the recipe and ask the teacher"
        )
    comparison.add(part)
    return part


def _progress(source: Manifest, kept: Sequence[PartRecord]) -> RecodingProgress:
    return RecodingProgress(
        n_parts=len(kept),
        of_parts=len(source.parts),
        n_documents=sum(record.n_documents for record in kept),
        of_documents=source.n_documents,
        n_tokens=sum(record.n_tokens for record in kept),
        of_tokens=source.n_tokens,
        n_bytes=sum(record.n_bytes for record in kept),
    )


def recoded_from(source: Source) -> dict[str, Any]:
    """What the provenance of a recoded result says of its source, and that of a source that was recoded itself."""
    manifest, folder = source.manifest, Path(source.output.path)
    before = manifest.provenance.get("recoded_from")
    return {
        "codec": source.form.in_words,
        "fingerprint": manifest.fingerprint,
        "data_version": manifest.data_version,
        "folder": str(folder.relative_to(recipe_folder_of(folder))),
        "n_bytes": manifest.n_bytes,
        "created_at": manifest.created_at,
        **({} if before is None else {"recoded_from": before}),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Made:
    """A part on its way."""

    plain: pa.Table
    """The source's rows as readers get them, with the columns of the wanted result."""
    coded: Coded


def _made(path: Path, record: PartRecord, of_source: Form, to: Form) -> _Made:
    """A part of the source in its new form."""
    plain, stored = _read(path, record, with_stored=of_source.codec == to.codec)
    if of_source.logsumexp and not to.logsumexp:
        plain = plain.drop_columns(["logsumexp"])
    if stored is not None:  # the planes of codes stay: rounding once more would give other ones
        error = {name: value for name, value in record.stats.items() if name.startswith(_OF_CODING)}
        if LOGSUMEXP_COLUMN in stored.schema.names and not to.logsumexp:
            stored = stored.drop_columns([LOGSUMEXP_COLUMN])
        if not of_source.coded_draws:
            stored = with_coded_draws(stored, plain)
        return _Made(plain=plain, coded=Coded(stored=stored, decoded=plain, error=error))
    try:
        return _Made(plain=plain, coded=coded(plain, to.codec))
    except CodecRangeError as e:
        raise CodecRangeError(f"{path}: {e}") from e


def _read(path: Path, record: PartRecord, *, with_stored: bool) -> tuple[pa.Table, pa.Table | None]:
    """A part of the source as readers get it, and as it is in the file; its bytes are those that were committed. The
    file itself is not in memory any more when this returns."""
    try:
        with part_in_memory(path, record) as part, damage_named(path):
            stored = _in_one_piece(part.read_stored()) if with_stored else None
            return _in_one_piece(part.read(part.names)), stored
    except CorruptPartError as e:
        raise _damaged(path.parent, e) from e


def _damaged(folder: Path, error: object) -> CorruptPartError:
    return CorruptPartError(f"nothing can be recoded from a damaged source: {error}; {ways_out(folder)}")


def _in_one_piece(table: pa.Table) -> pa.Table:
    """Each column as one chunk, as an encoder gives it: of several, an Arrow file would have more batches."""
    # combine_chunks copies even a single chunk (pyarrow 26)
    columns = [column if column.num_chunks == 1 else column.combine_chunks() for column in table.columns]
    return pa.Table.from_arrays(columns, schema=table.schema)


def _stats(wanted: Output, made: Coded, record: PartRecord) -> dict[str, float]:
    """The statistics that the teacher's writer gives; of how the batches were made, those of the source."""
    found = part_stats(wanted.asset, made.decoded)
    of_pass = {n: v for n, v in record.stats.items() if n not in found and not n.startswith(_OF_CODING)}
    return of_pass | found | made.error


class _Comparison:
    """What was compared: of what is on disk, decoded again, with what it must be."""

    def __init__(self, codec: str, *, is_exact: bool) -> None:
        self._codec, self.is_exact = codec, is_exact
        self._largest: dict[str, float] = {}
        self._n_parts = self._n_documents = 0

    def difference(self, path: Path, plain: pa.Table, expected: pa.Table) -> str | None:
        """The first one of a part from the rows that it must decode to, or that it is further from the `plain` ones
        than coding can cost. Raises CorruptPartError for a part that cannot be read at all."""
        with PartFile(path) as part:
            if (why := _difference(part, expected)) is not None or self.is_exact:
                return why
            name, found, limit = measured(part, plain, self._codec)
        if not found <= limit:
            return f"{path.name}: {name} is {found:.2g}, and coding can cost {limit:.2g} at most"
        self._largest[name] = max(self._largest.get(name, 0.0), found)
        return None

    def difference_left(self, path: Path, plain: pa.Table, expected: pa.Table) -> str | None:
        """As `difference`, of a part that an earlier attempt has left: one that cannot be read is another, too."""
        try:
            return self.difference(path, plain, expected)
        except CorruptPartError as e:
            return str(e)

    def add(self, part: PartRecord) -> None:
        """A part that is what it must be."""
        self._n_parts, self._n_documents = self._n_parts + 1, self._n_documents + part.n_documents

    def record(self, source: Manifest) -> dict[str, Any]:
        """What `checks["recoded"]` keeps."""
        return {
            "passed": (self._n_parts, self._n_documents) == (len(source.parts), source.n_documents),
            "is_exact": self.is_exact,
            "n_parts": self._n_parts,
            "n_documents": self._n_documents,
            "source_data_version": source.data_version,
            **self._largest,
        }


def _difference(part: PartFile, expected: pa.Table) -> str | None:
    """The first one, a group of rows at a time. Raises CorruptPartError for a part that cannot be read at all."""
    name = part.path.name
    if part.n_rows != expected.num_rows or part.names != expected.schema.names:
        return f"{name} has {part.n_rows} documents and the columns {', '.join(part.names)}"
    for group in range(part.n_groups):
        first = int(part.first_rows[group])
        found = part.read_group(group, part.names)
        rows = expected.slice(first, found.num_rows)
        for column in part.names:
            if not found[column].equals(rows[column]):
                return (
                    f"{name}: {column} of documents {first} to {first + found.num_rows - 1} is not that of the source"
                )
    return None


def _checks(source: Source) -> dict[str, Any]:
    """The source's, each with the result that it was made of: its numbers are these but for the coding."""
    fingerprint = source.manifest.fingerprint
    return {
        name: {"of_result": fingerprint, **record} if isinstance(record, dict) else record
        for name, record in source.manifest.checks.items()
    }


def _files_beside(folder: Path, manifest: Manifest) -> list[tuple[str, bytes]]:
    """Raises CorruptPartError where one is not what was committed."""
    found = []
    for file in manifest.files_beside:
        data = read_if_there(folder / file.name, known=folder)
        if data is None or hashlib.sha256(data).hexdigest() != file.sha256:
            raise _damaged(folder, f"{folder / file.name} was changed after its commit")
        found.append((file.name, data))
    return found


def hidden_size_of_source(source: Source) -> int | None:
    """H of a cache of states, by its first part; None for others, and for one without parts.

    Raises CorruptPartError."""
    if source.output.asset != "hidden_state_cache" or not source.manifest.parts:
        return None
    record, folder = source.manifest.parts[0], Path(source.output.path)
    try:
        with open_part(folder / record.name, record) as part:
            return hidden_size_of(part.schema)
    except CorruptPartError as e:
        raise _damaged(folder, e) from e


def bytes_finished(source: Source, wanted: Output) -> int:
    """Of the parts that a recoding which was killed has left, as its journal says. Raises CorruptManifestError for a
    journal of another result."""
    if JOURNAL_NAME not in listing(Path(wanted.path)):
        return 0
    journal = Journal(Path(wanted.path) / JOURNAL_NAME, wanted.fingerprint, recoded_from=source.manifest.fingerprint)
    return sum(record.n_bytes for record in journal.read()[0])


def _require_room(folder: Path, needed: int) -> None:
    with storage_errors(folder, "look at"):
        free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageUnavailableError(
            f"{folder} will take about {needed:,} bytes more, and {free:,} are free on its disk: free some space or "
            "raise the quota, then run again: what is finished is kept"
        )
