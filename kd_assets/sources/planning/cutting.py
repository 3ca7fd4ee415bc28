"""A source's files as stretches: runs of records of about the same size, from which shards are made.

What the plan before had of a file is cut as it was, so that its shards stay what they are; what is new is cut after so
many documents, or bytes. Memory holds a stretch's place and hash, never its records.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kd_assets.contract import RecordRange
from kd_assets.sources.files.columns.batches import RowGroup
from kd_assets.sources.files.raw import RawRecord
from kd_assets.sources.range_hash import RangeHash, hash_by_identity

IsCopy = Callable[[RawRecord], bool]
"""Whether a record is an exact copy of one that was seen before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Consecutive records of one file."""

    records: RecordRange
    """With `records_hash`."""
    n_bytes: int

    @property
    def n_documents(self) -> int:
        return self.records.n_records - len(self.records.dropped)


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one source gives to one shard: stretches of one or more of its files."""

    stretches: tuple[Stretch, ...]

    @property
    def n_documents(self) -> int:
        return sum(s.n_documents for s in self.stretches)

    @property
    def n_bytes(self) -> int:
        return sum(s.n_bytes for s in self.stretches)


@dataclass(kw_only=True, slots=True)
class Cutter:
    """Cuts what is new of one source into shares, file after file.

    The i-th share ends where i times the amount is reached, so that the shares of several sources keep their
    proportions however many are taken.
    """

    amount: float
    """Of a share: documents, or bytes."""
    by_bytes: bool
    shares: list[Share] = field(default_factory=list)
    n_copies_alone: int = 0
    """Records in stretches that hold nothing but copies, which are of no share."""
    _open: list[Stretch] = field(default_factory=list)
    _n_closed: int = 0
    _reached: float = 0.0

    @property
    def left(self) -> float:
        """How much the open share still takes."""
        return self.amount * (self._n_closed + 1) - self._reached

    def add(self, n_documents: int, n_bytes: float) -> None:
        self._reached += n_bytes if self.by_bytes else n_documents

    def is_full(self, unit: float = 0.0) -> bool:
        """Whether the open share ends here: less than half a `unit` is left of it."""
        # Amounts are sums of fractions: a share of 10 documents in three parts ends at 9.999.
        return self.left <= max(1e-6 * self.amount, unit / 2)

    def take(self, stretch: Stretch, *, ends: bool) -> None:
        """Put a stretch into the open share, which ends with it or goes on."""
        if stretch.n_documents:
            self._open.append(stretch)
        else:
            self.n_copies_alone += stretch.records.n_records
        if ends:
            self._n_closed += 1
            self._close()

    def finish(self) -> list[Share]:
        """The shares, the last with what is left."""
        self._close()
        return self.shares

    def _close(self) -> None:
        if self._open:
            self.shares.append(Share(stretches=tuple(self._open)))
            self._open = []


def cut_records(
    raws: Iterable[RawRecord], base: RecordRange, before: Sequence[RecordRange], cutter: Cutter, is_copy: IsCopy | None
) -> Iterator[Stretch]:
    """Cut a file whose records are read: yields the stretches that the plan `before` had of it, in order, as they are
    now, and gives the others to `cutter`.

    `base`: how its records are read. Ranges of `before` do not overlap; one of which no record is left is not yielded.
    """
    known = {r.first_record: r for r in before}
    old: RecordRange | None = None
    run: _Run | None = None
    for raw in raws:
        if run is not None and run.ends_before(raw, known):
            if old is not None:
                yield run.stretch()
            else:
                cutter.take(run.stretch(), ends=run.is_full)
            run, old = None, None
        if run is None:
            old = known.get(raw.number)
            run = _Run(base, raw, n_most=None if old is None else old.n_records)
        copied = raw.number in old.dropped if old is not None else is_copy is not None and is_copy(raw)
        run.add(raw, copied=copied)
        if old is None:
            cutter.add(0 if copied else 1, 0 if copied else len(raw.content))
            run.is_full = cutter.is_full()
    if run is not None:
        if old is not None:
            yield run.stretch()
        else:
            cutter.take(run.stretch(), ends=run.is_full)


@dataclass(slots=True)
class _Run:
    """A stretch while its records pass."""

    base: RecordRange
    first: RawRecord
    n_most: int | None
    is_full: bool = False
    n_records: int = 0
    n_bytes: int = 0
    dropped: list[int] = field(default_factory=list)
    hash: RangeHash = field(init=False)

    def __post_init__(self) -> None:
        self.hash = RangeHash(self._range())

    def _range(self) -> RecordRange:
        return dataclasses.replace(
            self.base,
            first_record=self.first.number,
            n_records=self.n_records,
            byte_offset=self.first.byte_offset,
            first_line=self.first.line,
            dropped=tuple(self.dropped),
        )

    def add(self, raw: RawRecord, *, copied: bool) -> None:
        self.hash.add(raw.content)
        self.n_records += 1
        self.n_bytes += len(raw.content)
        if copied:
            self.dropped.append(raw.number)

    def ends_before(self, raw: RawRecord, known: dict[int, RecordRange]) -> bool:
        if self.n_most is not None:
            return self.n_records == self.n_most
        return self.is_full or raw.number in known

    def stretch(self) -> Stretch:
        records = self._range()
        return Stretch(records=dataclasses.replace(records, records_hash=self.hash.of(records)), n_bytes=self.n_bytes)


def cut_rows(
    groups: Sequence[RowGroup], base: RecordRange, before: Sequence[RecordRange], cutter: Cutter
) -> Iterator[Stretch]:
    """As `cut_records`, of a file of columns whose rows are not read: by its row groups, in each of which rows count
    as equally long."""
    n_records = groups[-1].first_record + groups[-1].n_records if groups else 0
    at = 0
    for old in [*sorted(before, key=lambda r: r.first_record), None]:
        end = n_records if old is None else min(old.first_record, n_records)
        if at < end:
            _cut_gap(groups, base, at, end, cutter)
        if old is None or old.first_record >= n_records:
            break
        at = min(old.first_record + old.n_records, n_records)
        dropped = tuple(number for number in old.dropped if number < at)
        yield rows(groups, base, old.first_record, at, dropped=dropped)


def _cut_gap(groups: Sequence[RowGroup], base: RecordRange, start: int, end: int, cutter: Cutter) -> None:
    """Give rows `start` to `end` - 1 to the cutter."""
    first = at = start
    for group in groups[group_with(groups, start) :]:
        stop = min(end, group.first_record + group.n_records)
        a_row = max(group.n_bytes / max(group.n_records, 1), 1e-9)
        unit = a_row if cutter.by_bytes else 1.0
        while at < stop:
            n = min(stop - at, max(1, round(cutter.left / unit)))
            cutter.add(n, n * a_row)
            at += n
            if cutter.is_full(unit):
                cutter.take(rows(groups, base, first, at), ends=True)
                first = at
        if at == end:
            break
    if first < at:
        cutter.take(rows(groups, base, first, at), ends=False)


def rows(
    groups: Sequence[RowGroup], base: RecordRange, first: int, stop: int, *, dropped: tuple[int, ...] = ()
) -> Stretch:
    """Rows `first` to `stop` - 1 of a file that is not read."""
    at = group_with(groups, first)
    entered = groups[at]
    records = dataclasses.replace(
        base,
        first_record=first,
        n_records=stop - first,
        batch_offset=entered.batch_offset,
        batch_first_record=None if entered.batch_offset is None else entered.first_record,
        dropped=dropped,
    )
    n_bytes = 0.0
    for group in groups[at:]:
        if group.first_record >= stop:
            break
        n_rows = min(stop, group.first_record + group.n_records) - max(first, group.first_record)
        n_bytes += group.n_bytes * n_rows / max(group.n_records, 1)
    return Stretch(records=dataclasses.replace(records, records_hash=hash_by_identity(records)), n_bytes=round(n_bytes))


def group_with(groups: Sequence[RowGroup], row: int) -> int:
    """The position of the row group that holds a row."""
    return bisect.bisect_right(groups, row, key=lambda group: group.first_record) - 1
