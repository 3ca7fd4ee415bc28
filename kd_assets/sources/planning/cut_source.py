"""One source, cut: its files found and scanned, what the plan before had of them, and new shares after it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_assets.contract import RecordRange
from kd_assets.errors import BadRecordError, InputError, MissingInputError
from kd_assets.model_files.digests import DigestCache, cached_sha256, known_sha256, remember_sha256
from kd_assets.sources.fields import fields_read
from kd_assets.sources.files.find import find_source
from kd_assets.sources.files.found import FoundSource, SourceFile
from kd_assets.sources.files.raw import RawRecord
from kd_assets.sources.files.read import iter_raw
from kd_assets.sources.files.scan import ColumnScan, TextScan, scan_columns
from kd_assets.sources.files.storage import is_url, local_path
from kd_assets.sources.licences import decide_licence
from kd_assets.sources.planning.before import HASHED_WHOLE, Before, key_of
from kd_assets.sources.planning.cutting import Cutter, Share, Stretch, cut_records, cut_rows, group_with
from kd_assets.sources.planning.duplicates import SeenRecords
from kd_assets.sources.planning.plan import PinnedFile, PinnedSource
from kd_assets.sources.planning.token_rate import ASSUMED_BYTES_PER_TOKEN, MEASURED_RECORDS, CountTokens, measured_rate
from kd_assets.sources.range_hash import RangeHash, hash_by_identity, header_of
from kd_assets.sources.records import parse_record
from kd_assets.sources.spec import Sharding, SourceSpec, absolute_path, with_variables
from kd_assets.store.fingerprint import fingerprint

ROWS_READ_BYTES = 64 << 20
"""Columns of a source that are read while it is planned, so that its shards are named by their rows, and stay what they
are when a file is written anew. Of more only the footers are read: shards are named by their file then."""
VALUES_READ_BYTES = 1 << 30
"""The same limit for their values, which may be far more than a file that compresses well."""
PROBED_ROWS = 20
"""Of columns: what none of so many rows fits, none will."""
REMEMBERED_BYTES = 16 << 20
"""Files whose hash is kept, so that they are not read again while they do not change; smaller ones are read faster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CutSource:
    """A source, cut."""

    spec: SourceSpec
    pinned: PinnedSource
    said: tuple[str, ...]
    kept: tuple[Stretch, ...]
    """What the plan before had of it, as it is now."""
    shares: tuple[Share, ...]
    """What is new."""
    amount: float
    """Of a whole share, in bytes or documents."""
    n_copies_alone: int
    """Records that are copies and of no share."""
    column_scans: Mapping[str, ColumnScan]
    """By the name of a file."""

    def n_tokens(self, stretch: Stretch) -> float:
        return stretch.n_bytes / (self.pinned.bytes_per_token or ASSUMED_BYTES_PER_TOKEN)

    def placed(self, records: RecordRange) -> RecordRange:
        """A range with what a reader needs to enter its file where it begins."""
        scan = self.column_scans.get(records.file_name)
        if scan is not None and records.file_identity is not None:
            group = scan.groups[group_with(scan.groups, records.first_record)]
            if group.batch_offset is not None:
                return dataclasses.replace(
                    records, batch_offset=group.batch_offset, batch_first_record=group.first_record
                )
        copy = next((f.seekable_path for f in self.pinned.files if f.name == records.file_name), None)
        return records if copy is None else dataclasses.replace(records, seekable_path=copy)

    def shorten(self, stretch: Stretch, n_documents: int) -> Stretch | None:
        """A stretch without what follows its first so many documents; None where that is nothing."""
        records = stretch.records
        if records.hashed == "file":
            cut = dataclasses.replace(records, n_records=n_documents)
            n_bytes = round(stretch.n_bytes * n_documents / max(records.n_records, 1))
            return Stretch(records=dataclasses.replace(cut, records_hash=hash_by_identity(cut)), n_bytes=n_bytes)
        digest, n_records, n_bytes, left, dropped = RangeHash(records), 0, 0, n_documents, set(records.dropped)
        for raw in iter_raw(self.placed(records)):
            digest.add(raw.content)
            n_records, n_bytes = n_records + 1, n_bytes + len(raw.content)
            left -= raw.number not in dropped
            if left <= 0:
                break
        cut = dataclasses.replace(
            records,
            n_records=n_records,
            dropped=tuple(n for n in records.dropped if n < records.first_record + n_records),
        )
        return Stretch(records=dataclasses.replace(cut, records_hash=digest.of(cut)), n_bytes=n_bytes)


@dataclass(frozen=True, kw_only=True)
class SourceCutter:
    """Cuts sources by the settings of a recipe and the plan before."""

    sharding: Sharding
    base_folder: Path
    environment: Mapping[str, str]
    before: Before
    seekable_folder: Path | None
    digests: DigestCache | None
    count_tokens: CountTokens | None
    allowed_licences: Sequence[str] | None
    known_sources: Collection[str]
    """Those that the plan before had, whatever else was different then."""
    total_weight: float

    def see_again(self, spec: SourceSpec, seen: SeenRecords) -> None:
        """Let the records of the plan before be seen first: what is new is the copy, whichever source it is of."""
        for (source, _), ranges in self.before.ranges.items():
            for records in ranges if source == spec.name else ():
                with contextlib.suppress(InputError):  # that it changed is found when it is cut
                    for raw in iter_raw(records):
                        seen.is_copy(raw)

    def cut(self, spec: SourceSpec, seen: SeenRecords | None) -> CutSource:
        """Raises what is wrong with a source, naming it. `seen`: leave out exact copies of records that it saw."""
        try:
            found = find_source(spec, base_folder=self.base_folder, environment=self.environment)
            self._refuse_vanished(spec, found)
            return self._cut(spec, found, seen)
        except InputError as e:
            named = f"source {spec.name!r}: "
            raise type(e)(named + str(e).removeprefix(named)) from e

    def _cut(self, spec: SourceSpec, found: FoundSource, seen: SeenRecords | None) -> CutSource:
        said = list(found.said)
        licence = decide_licence(
            spec, found.licence, self.allowed_licences, known=spec.name in self.known_sources, warn=said.append
        )
        scans = {
            file.name: scan_columns(file, columns_read=fields_read(spec))
            for file in found.files
            if file.file_format in ("parquet", "arrow")
        }
        n_column_bytes = sum(file.n_bytes for file in found.files if file.name in scans)
        n_value_bytes = sum(scan.n_bytes for scan in scans.values())
        is_small = n_column_bytes <= ROWS_READ_BYTES and n_value_bytes <= VALUES_READ_BYTES
        reads_rows = is_small or seen is not None
        rate = self._rate(spec, found, scans)
        cutter = self._cutter(spec, found, scans, rate or ASSUMED_BYTES_PER_TOKEN)
        kept, files = list[Stretch](), list[PinnedFile]()
        for file in found.files:
            base = self._base(spec, file, scans.get(file.name), reads_rows=reads_rows)
            stretches, pinned = self._cut_file(base, file, scans.get(file.name), cutter, seen)
            kept += stretches
            files.append(pinned)
        place = self.place(spec)
        if not any(file.n_records for file in files):
            raise MissingInputError(f"{place} holds no records: write some, or take the source out of the recipe")
        is_one_file = len(files) == 1 and not files[0].name
        identity = fingerprint({"files": [[f.name, f.identity] for f in files]})
        return CutSource(
            spec=spec,
            pinned=PinnedSource(
                name=spec.name,
                path=place,
                sha256=files[0].identity if is_one_file else identity,
                n_records=sum(f.n_records for f in files),
                n_bytes=sum(f.n_bytes for f in files),
                licence=licence,
                revision=found.revision or spec.revision,
                bytes_per_token=rate,
                files=tuple(files),
            ),
            said=tuple(f"source {spec.name!r}: {line.removeprefix(f'source {spec.name!r}: ')}" for line in said),
            kept=tuple(kept),
            shares=tuple(cutter.finish()),
            amount=cutter.amount,
            n_copies_alone=cutter.n_copies_alone,
            column_scans=scans,
        )

    def place(self, spec: SourceSpec) -> str:
        """Where a source is: an absolute path or pattern, a URL, or a data set's name."""
        if spec.path is None:
            assert spec.dataset is not None
            return "/".join(filter(None, (spec.dataset.name, spec.dataset.config, spec.dataset.split)))
        what = f"source {spec.name!r}"
        path = with_variables(spec.path, what=what, environment=self.environment)
        return path if is_url(path) else str(absolute_path(local_path(path), self.base_folder, what=what))

    def _refuse_vanished(self, spec: SourceSpec, found: FoundSource) -> None:
        """A file of the plan before that is not there: not to see it is no reason to forget it."""
        before = self.before.sources.get(spec.name)
        there = {file.name for file in found.files}
        gone = [f for f in (() if before is None else before.files) if f.name not in there]
        is_the_same = before is not None and before.path == self.place(spec)
        if before is not None and gone and is_the_same and before.revision == (found.revision or spec.revision):
            more = f" (and {len(gone) - 1} more)" if len(gone) > 1 else ""
            raise MissingInputError(
                f"{gone[0].path}{more}, of which the current plan has {sum(f.n_records for f in gone):,} records, is "
                "not there any more: bring it back, or name what is left by another path (a pattern without it), which "
                "takes its shards out of the plan"
            )

    def _rate(self, spec: SourceSpec, found: FoundSource, scans: Mapping[str, ColumnScan]) -> float | None:
        """Bytes of a token: as they were measured first, so that a share stays what it is."""
        file = found.files[0]
        base = self._base(spec, file, scans.get(file.name), reads_rows=True)
        if file.name in scans:
            refuse_misfit_columns(_first_records(file, base, scans), base)
        before = self.before.sources.get(spec.name)
        if before is not None and before.bytes_per_token is not None:
            return before.bytes_per_token
        if self.count_tokens is None:
            return None
        return measured_rate(_first_records(file, base, scans), base, self.count_tokens)

    def _base(self, spec: SourceSpec, file: SourceFile, scan: ColumnScan | None, *, reads_rows: bool) -> RecordRange:
        """How the records of a file are read; of none of them."""
        return RecordRange(
            source=spec.name,
            path=file.path,
            file_format=file.file_format,
            first_record=0,
            n_records=0,
            text_field=spec.text_field,
            messages_field=spec.messages_field,
            id_field=spec.id_field,
            ignore_fields=spec.ignore_fields,
            file_name=file.name,
            compression=file.compression,
            file_identity=None if scan is None else scan.identity,
            hashed="records" if scan is None or reads_rows else "file",
            shape=spec.shape,
            fields=dict(spec.fields),
            prefer=spec.prefer,
            roles=dict(spec.roles),
            control_tokens=spec.control_tokens or self.before.control_tokens.get(spec.name, "text"),
        )

    def _cutter(self, spec: SourceSpec, found: FoundSource, scans: Mapping[str, ColumnScan], rate: float) -> Cutter:
        share = 1.0 if spec.weight is None else spec.weight / self.total_weight
        if self.sharding.tokens_per_shard is None:
            return Cutter(amount=self.sharding.documents_per_shard * share, by_bytes=False)
        amount = self.sharding.tokens_per_shard * share * rate
        is_new = spec.weight is None and spec.name not in self.before.sources
        if is_new and not any(file.compression for file in found.files):
            # Rather all of them a little smaller than one with a small rest.
            n_bytes = sum(scans[file.name].n_bytes if file.name in scans else file.n_bytes for file in found.files)
            amount = n_bytes / max(1, round(n_bytes / amount)) or amount
        return Cutter(amount=max(amount, 1.0), by_bytes=True)

    def _cut_file(
        self, base: RecordRange, file: SourceFile, scan: ColumnScan | None, cutter: Cutter, seen: SeenRecords | None
    ) -> tuple[Sequence[Stretch], PinnedFile]:
        """What the plan before had of a file, as it is now, and the file; the others go to `cutter`."""
        before = self.before.ranges.get((base.source, base.file_name), ())
        pinned = self.before.file(base.source, base.file_name)
        if seen is None and pinned is not None and self._is_unchanged(file, scan, pinned):
            kept = _as_they_were(self.before, base, pinned.n_records)
            if kept is not None:
                changed = HASHED_WHOLE if pinned.changed == HASHED_WHOLE else file.changed
                return kept, dataclasses.replace(pinned, path=file.path, changed=changed)
        if scan is not None and base.hashed == "file":
            return list(cut_rows(scan.groups, base, before, cutter)), _pinned(file, _plain(scan), scan.n_records)
        counted, is_copy = _Counted(), None if seen is None else seen.is_copy
        if scan is not None:
            rows = iter_raw(dataclasses.replace(base, n_records=scan.n_records))
            kept_rows = list(cut_records(counted.of(rows), base, before, cutter, is_copy))
            return kept_rows, _pinned(file, _plain(scan), counted.n_records)
        text = TextScan(file, seekable_folder=self.seekable_folder)
        kept_text = list(cut_records(counted.of(text), base, before, cutter, is_copy))
        if self.digests is not None and "://" not in file.path and file.n_bytes >= REMEMBERED_BYTES:
            remember_sha256(Path(file.path), self.digests, text.sha256)
        of_text = _pinned(file, text.sha256, counted.n_records)
        copy = None if text.seekable_path is None else str(text.seekable_path)
        return kept_text, dataclasses.replace(of_text, seekable_path=copy)

    def _is_unchanged(self, file: SourceFile, scan: ColumnScan | None, pinned: PinnedFile) -> bool:
        """Whether a file is what it was, where that is known without reading it."""
        if scan is not None and _plain(scan) == pinned.identity:
            return True
        if scan is not None:
            # Of a large file the identity is not the hash of all of it, which is what an earlier version has.
            is_comparable = pinned.changed == HASHED_WHOLE and file.n_bytes == pinned.n_bytes
            return is_comparable and cached_sha256(Path(file.path), self.digests) == pinned.identity
        if pinned.seekable_path is not None and not Path(pinned.seekable_path).is_file():
            return False
        if "://" in file.path:
            return bool(file.changed) and (file.changed, file.n_bytes) == (pinned.changed, pinned.n_bytes)
        return self.digests is not None and known_sha256(Path(file.path), self.digests) == pinned.identity


def _first_records(file: SourceFile, base: RecordRange, scans: Mapping[str, ColumnScan]) -> Iterator[RawRecord]:
    """At least `MEASURED_RECORDS` of a file, or all that it has."""
    if (scan := scans.get(file.name)) is None:
        return iter(TextScan(file, seekable_folder=None))
    return iter_raw(dataclasses.replace(base, n_records=min(scan.n_records, MEASURED_RECORDS)))


def refuse_misfit_columns(raws: Iterable[RawRecord], base: RecordRange) -> None:
    """Raise the first error of rows none of which can be a document for what its columns are: so would all others be,
    and the job would say so of each."""
    first: BadRecordError | None = None
    for raw in itertools.islice(raws, PROBED_ROWS):
        try:
            parse_record(raw, base)
        except BadRecordError as e:
            if e.kind not in ("no shape fits", "not of its shape", "bad id"):
                return
            first = first or e
        else:
            return
    if first is not None:
        raise first


class _Counted:
    """Counts what passes."""

    n_records = 0

    def of(self, raws: Iterable[RawRecord]) -> Iterator[RawRecord]:
        for raw in raws:
            self.n_records += 1
            yield raw


def _plain(scan: ColumnScan) -> str:
    """The identity of a file of columns as a plan has it: where it is the hash of the whole file, just that."""
    return scan.identity.removeprefix("sha256:")


def _pinned(file: SourceFile, identity: str, n_records: int) -> PinnedFile:
    return PinnedFile(
        name=file.name,
        path=file.path,
        identity=identity,
        n_records=n_records,
        n_bytes=file.n_bytes,
        changed=file.changed,
    )


def _as_they_were(before: Before, base: RecordRange, n_records: int) -> list[Stretch] | None:
    """The ranges of a file that has not changed; None where it has to be read: records are read otherwise now, or some
    were in no shard."""
    ranges = before.ranges.get((base.source, base.file_name), ())
    if sum(r.n_records for r in ranges) != n_records:
        return None
    if any(header_of(r) != header_of(dataclasses.replace(base, first_record=r.first_record)) for r in ranges):
        return None
    return [
        Stretch(
            records=dataclasses.replace(r, path=base.path, control_tokens=base.control_tokens),
            n_bytes=before.sizes[key_of(r)],
        )
        for r in ranges
    ]
