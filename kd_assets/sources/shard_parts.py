"""The records of one shard become its part files, with what became of them.

The invariant: a part holds the documents of the records that follow those of the part before, up to the record with
which it has `part_documents` or more, so every attempt cuts alike, and one that resumes goes on after the last whole
part with the same result, facts included.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_assets.contract import Reporter, WorkUnit
from kd_assets.errors import BadRecordError, InputError, InterruptedTaskError
from kd_assets.sources.chats.messages import texts_in
from kd_assets.sources.records import Record
from kd_assets.sources.tokenise import DocumentTokeniser
from kd_assets.sources.tokenised import Outcome, TokenisedDocument
from kd_assets.store import Documents, PartRecord, ResultWriter, encode_shard
from kd_assets.store.partfile import PartFile
from kd_assets.worker.stop_flag import StopFlag

BATCH_RECORDS = 512
BATCH_CHARACTERS = 2_000_000
"""Records tokenised at a time, and their characters: a tokenizer keeps about 100 bytes for each token meanwhile."""
PROGRESS_EVERY_S = 1.0
REASONS_KEPT = 10
"""Bad records whose file, line and reason stand in the manifest."""


@dataclass(kw_only=True, slots=True)
class RecordCounts:
    """What became of records. A part keeps its own in its stats, a manifest's facts hold the sum."""

    n_records: int = 0
    n_bad_records: int = 0
    n_empty_documents: int = 0
    n_truncated_documents: int = 0
    n_control_token_documents: int = 0
    n_own_ends_documents: int = 0
    n_documents_without_loss: int = 0
    n_loss_tokens: int = 0
    # What follows came later: it is said where there is any.
    n_fanned_out_turns: int = 0
    """Documents beyond the first of chats that became one a turn."""
    n_unlearned_turns: int = 0
    """Assistant turns that are learned in no document: the recipe asks for the last of each chat alone."""
    n_split_documents: int = 0
    n_windows: int = 0
    """That split documents became."""
    n_dropped_documents: int = 0
    """Longer than `max_length`, and left out."""
    n_control_tokens_as_text_documents: int = 0
    """Of `n_control_token_documents`: those whose control tokens were taken as text."""
    n_documents_without_bos: int = 0
    """Chats whose template writes no BOS, though the tokenizer begins each text with one."""
    n_emptied_null_contents: int = 0
    """Documents with a message whose content is null, given as an empty text to a template that takes no null."""
    n_documents_with_unrendered_messages: int = 0
    """The template writes nothing of one of their messages."""

    def add(self, other: RecordCounts) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def as_dict(self) -> dict[str, int]:
        """Those that came later only where they are not zero: manifests that were made before do not have them."""
        first = self.__slots__[: self.__slots__.index("n_fanned_out_turns")]
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) or name in first}

    @classmethod
    def of_part(cls, part: PartRecord) -> RecordCounts:
        # An attempt of an earlier version left parts that lack what was not counted then.
        return cls(**{name: int(part.stats.get(name, 0)) for name in cls.__slots__})


@dataclass(kw_only=True, slots=True)
class ShardProgress:
    """What a task says while it works, about once a second."""

    report: Reporter
    partition_key: str
    n_records: int
    n_done: int = 0
    n_tokens: int = 0
    n_tokens_made: int = 0
    """By this attempt, so without those of parts that an earlier one left."""
    _started: float = field(default_factory=time.monotonic)
    _last: float = field(default_factory=time.monotonic)

    def advance(self, *, n_records: int, n_tokens: int, made: bool) -> None:
        self.n_done += n_records
        self.n_tokens += n_tokens
        self.n_tokens_made += n_tokens if made else 0
        now = time.monotonic()
        if now - self._last < PROGRESS_EVERY_S:
            return
        self._last = now
        self.report.emit(
            "progress",
            partition_key=self.partition_key,
            n_documents=self.n_records,
            done_documents=self.n_done,
            n_tokens=None,  # known once all is tokenised
            done_tokens=self.n_tokens,
            tokens_per_s=round(self.n_tokens_made / (now - self._started), 1),
        )


@dataclass(kw_only=True, slots=True)
class Part:
    """The documents of one part, and what became of the records they come from."""

    documents: list[TokenisedDocument]
    counts: RecordCounts
    bad: list[BadRecordError]


@dataclass(kw_only=True, slots=True)
class ShardInProgress:
    """One attempt at one shard: its records, part by part."""

    unit: WorkUnit
    records: Sequence[Record | BadRecordError]
    """Of the whole shard."""
    writer: ResultWriter
    tokenise: DocumentTokeniser
    report: Reporter
    stop: StopFlag
    part_documents: int
    fail_on_bad_record: bool
    n_parts: int = 0
    counts: RecordCounts = field(default_factory=RecordCounts)
    bad: list[BadRecordError] = field(default_factory=list)
    lengths: list[npt.NDArray[np.int64]] = field(default_factory=list)
    """Tokens of each document, part by part."""
    _tokenised: deque[tuple[Record | BadRecordError, Outcome]] = field(default_factory=deque)
    """Of the batch in hand: records that no part has taken yet."""
    _record_ids: frozenset[str] | None = None
    progress: ShardProgress = field(init=False)

    def __post_init__(self) -> None:
        self.progress = ShardProgress(
            report=self.report, partition_key=self.unit.partition_key, n_records=len(self.records)
        )

    def make(self) -> dict[str, Any]:
        """Write every part that is missing; returns the facts for the manifest."""
        items = iter(self.records)
        while True:
            finished = self.writer.finished.get(self.n_parts)
            # A part with bad records is made again, though not written: their reasons are not in its file.
            if finished is not None and not finished.stats["n_bad_records"]:
                self._pass_over(items, finished)
                continue
            if self.stop and self.progress.n_done < self.progress.n_records:
                raise InterruptedTaskError(
                    f"stopped by {self.stop.signal_name}: {self.n_parts} parts of {self.unit.partition_key} are on disk"
                )
            part = self._take_part(items)
            self.counts.add(part.counts)
            self.bad += part.bad
            if not part.documents:
                break
            self._write(part, finished)
        if not self.n_parts and self.fail_on_bad_record:
            raise no_documents(self.unit, self.counts, self.bad)
        return self._facts()

    def _pass_over(self, items: Iterator[Record | BadRecordError], part: PartRecord) -> None:
        counts = RecordCounts.of_part(part)
        n_taken = min(len(self._tokenised), counts.n_records)
        for _ in range(n_taken):
            self._tokenised.popleft()
        for _ in itertools.islice(items, counts.n_records - n_taken):
            pass
        with PartFile(self.writer.folder / part.name) as file:
            lengths = file.read(["n_tokens"])["n_tokens"].to_numpy().astype(np.int64)
        self.counts.add(counts)
        self.lengths.append(lengths)
        self.n_parts += 1
        self.progress.advance(n_records=counts.n_records, n_tokens=part.n_tokens, made=False)

    def _take_part(self, items: Iterator[Record | BadRecordError]) -> Part:
        """Tokenise records until the part is full or none are left."""
        part = Part(documents=[], counts=RecordCounts(), bad=[])
        while self._tokenised or self._tokenise_batch(items, self.part_documents - len(part.documents)):
            n_records = n_tokens = 0
            while self._tokenised and len(part.documents) < self.part_documents:
                _, outcome = self._tokenised.popleft()
                n_records += 1
                n_tokens += self._take(outcome, part)
            part.counts.n_records += n_records
            self.progress.advance(n_records=n_records, n_tokens=n_tokens, made=True)
            if len(part.documents) >= self.part_documents:
                break
        return part

    def _tokenise_batch(self, items: Iterator[Record | BadRecordError], n_most: int) -> bool:
        """Tokenise the next records; False where there are none."""
        batch = take_batch(items, n_most)
        outcomes = iter(self.tokenise([item for item in batch if isinstance(item, Record)]))
        self._tokenised.extend((item, next(outcomes) if isinstance(item, Record) else item) for item in batch)
        return bool(batch)

    def _take(self, outcome: Outcome, part: Part) -> int:
        """Put one record's outcome into the part; returns the tokens it brings."""
        bad = outcome if isinstance(outcome, BadRecordError) else self._repeated_id(outcome)
        if bad is not None:
            if self.fail_on_bad_record:
                raise BadRecordError(f"{bad}; mend it, or set on_bad_record: skip") from bad
            part.counts.n_bad_records += 1
            part.bad.append(bad)
            return 0
        assert not isinstance(outcome, BadRecordError)
        taken = [document for document in outcome if len(document.input_ids)]
        count(outcome, part.counts)
        part.documents += taken
        return sum(len(document.input_ids) for document in taken)

    def _repeated_id(self, documents: Sequence[TokenisedDocument]) -> BadRecordError | None:
        """What is wrong where a document of a turn or a window would be called as another record, or as what may be
        made of that."""
        for document in documents:
            if not document.name_in_record:
                continue
            if self._record_ids is None:
                self._record_ids = frozenset(r.document_id for r in self.records if isinstance(r, Record))
            turn = document.name_in_record.partition("/")[0]
            for name in filter(None, (turn, document.name_in_record)):
                if (taken := document.record.document_id + name) in self._record_ids:
                    return BadRecordError(
                        f"{document.record.where}: it becomes several documents, and the name of one of them, "
                        f"{taken!r}, is the id of another record: give one of the two another id"
                    )
        return None

    def _write(self, part: Part, finished: PartRecord | None) -> None:
        lengths = np.array([len(document.input_ids) for document in part.documents], dtype=np.int64)
        if finished is None:
            table = encode_shard(
                as_documents(part.documents, lengths),
                [document.record.source for document in part.documents],
                np.array([document.record.number for document in part.documents], dtype=np.int64),
            )
            stats = {
                **{name: float(value) for name, value in part.counts.as_dict().items()},
                "min_document_tokens": float(lengths.min()),
                "max_document_tokens": float(lengths.max()),
            }
            self.writer.write_part(self.n_parts, table, n_tokens=int(lengths.sum()), stats=stats)
        self.lengths.append(lengths)
        self.n_parts += 1

    def _facts(self) -> dict[str, Any]:
        # Without a document: every record was skipped, as the recipe says.
        lengths = np.concatenate(self.lengths) if self.lengths else np.zeros(0, dtype=np.int64)
        return {
            **self.counts.as_dict(),
            "n_documents": len(lengths),
            "n_tokens": int(lengths.sum()),
            "min_document_tokens": int(lengths.min(initial=lengths.max(initial=0))),
            "median_document_tokens": float(np.median(lengths)) if len(lengths) else 0.0,
            "max_document_tokens": int(lengths.max(initial=0)),
            "bad_records": [str(e) for e in self.bad[:REASONS_KEPT]],
        }


def count(documents: Sequence[TokenisedDocument], counts: RecordCounts) -> None:
    """Count what became of one record that is not bad."""
    for document in documents:
        if document.dropped:
            counts.n_dropped_documents += 1
        elif not len(document.input_ids):
            counts.n_empty_documents += 1
        else:
            count_document(document, counts)
    if len(documents) > 1:
        turns = {document.name_in_record.partition("/")[0] for document in documents}
        counts.n_fanned_out_turns += len(turns) - 1
    if documents and (chat := documents[0].chat) is not None:
        counts.n_unlearned_turns += chat.unlearned_turns


def count_document(document: TokenisedDocument, counts: RecordCounts) -> None:
    n_loss_tokens = int(np.count_nonzero(document.loss_mask))
    counts.n_truncated_documents += document.truncated
    counts.n_control_token_documents += document.spells_control_tokens
    counts.n_own_ends_documents += document.has_own_ends
    counts.n_documents_without_loss += n_loss_tokens == 0
    counts.n_loss_tokens += n_loss_tokens
    counts.n_split_documents += document.window == 1
    counts.n_windows += document.window > 0
    counts.n_control_tokens_as_text_documents += document.control_tokens_as_text
    counts.n_documents_without_bos += document.lacks_bos
    if (chat := document.chat) is not None:
        counts.n_emptied_null_contents += chat.emptied_null_content
        counts.n_documents_with_unrendered_messages += chat.unrendered_messages > 0


def take_batch(items: Iterator[Record | BadRecordError], n_most: int) -> list[Record | BadRecordError]:
    """The next records, as many as are tokenised at once: at most `n_most`, and one at least while there are any."""
    batch: list[Record | BadRecordError] = []
    n_characters = 0
    while len(batch) < min(n_most, BATCH_RECORDS) and n_characters < BATCH_CHARACTERS:
        item = next(items, None)
        if item is None:
            break
        batch.append(item)
        if isinstance(item, Record):
            n_characters += len(item.text or "") + sum(map(len, texts_in(item.messages)))
    return batch


def as_documents(documents: Sequence[TokenisedDocument], lengths: npt.NDArray[np.int64]) -> Documents:
    """The documents as flat arrays; `lengths` int64 [D]."""
    return Documents(
        document_ids=[document.document_id for document in documents],
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        input_ids=np.concatenate([document.input_ids for document in documents]),
        loss_mask=np.concatenate([document.loss_mask for document in documents]),
    )


def no_documents(unit: WorkUnit, counts: RecordCounts, bad: Sequence[BadRecordError]) -> InputError:
    """What to raise when not one record of a shard became a document."""
    paths = ", ".join(sorted({records.path for records in unit.records}))
    first = f"; the first: {bad[0]}" if bad else ""
    dropped = f", {counts.n_dropped_documents:,} too long" if counts.n_dropped_documents else ""
    return BadRecordError(
        f"none of the {counts.n_records:,} records of {unit.partition_key} in {paths} became a document "
        f"({counts.n_bad_records:,} bad, {counts.n_empty_documents:,} without tokens{dropped}){first}; mend them, or "
        "set on_bad_record: skip, with which a shard may be empty"
    )
