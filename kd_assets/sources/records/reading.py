"""The records of a shard in order, each valid or as the error that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from kd_assets.contract import RecordRange
from kd_assets.errors import BadRecordError, RecipeError
from kd_assets.sources.files.raw import RawRecord
from kd_assets.sources.files.read import check_identity, iter_raw
from kd_assets.sources.range_hash import RangeHash, ShardHash, hash_by_identity
from kd_assets.sources.records.beside import not_understood, refuse_not_used
from kd_assets.sources.records.given import Given, OwnNames
from kd_assets.sources.records.record import Content, Record, sample_id
from kd_assets.sources.records.shapes import content_of, order_of_shapes, shape_of
from kd_assets.sources.records.values import NoDocumentError, kind_of, parse_object, unicode_text


def read_records(ranges: Sequence[RecordRange], shard_hash: ShardHash) -> Iterator[Record | BadRecordError]:
    """The records of a shard in order, each valid or as the error that says file, line and reason.

    Document ids are unique within what is yielded: a repeated one is a bad record. `shard_hash` takes in every record
    that passes; it is complete once the iterator is exhausted. Raises MissingInputError and InputError for files that
    cannot be read as what they are said to be, FieldNotUnderstoodError and RecipeError as `RecordParser.parse` does.
    """
    seen: dict[str, str] = {}
    for records in ranges:
        parser = RecordParser(records)
        for raw in _hashed(records, shard_hash):
            try:
                record = parser.parse(raw)
            except BadRecordError as e:
                yield e
                continue
            if first := seen.get(record.document_id):
                yield BadRecordError(
                    f"{record.where}: id {record.document_id!r} is already that of {first}: give one of them another "
                    f"id, or name a field with id_field of source {records.source!r} (of one that no record has: "
                    "they are called after the source, the file and their number)",
                    kind="repeated id",
                )
                continue
            seen[record.document_id] = record.where
            yield record


def _hashed(records: RecordRange, shard_hash: ShardHash) -> Iterator[RawRecord]:
    """The records of a range but for those that are left out; the hash takes the range in as its plan did."""
    dropped = frozenset(records.dropped)
    if records.hashed == "file":
        check_identity(records)
    digest = RangeHash(records)
    for raw in iter_raw(records):
        digest.add(raw.content)
        if raw.number not in dropped:
            yield raw
    shard_hash.add(hash_by_identity(records) if records.hashed == "file" else digest.of(records))


class RecordParser:
    """Parses the records of one range; what it says of all of them is worked out once."""

    def __init__(self, records: RecordRange) -> None:
        self._records, self._names = records, OwnNames(records)
        self._order, self._file = order_of_shapes(records), file_of(records)

    def parse(self, raw: RawRecord) -> Record:
        """The record that `raw` holds.

        Raises BadRecordError with file, line and reason; FieldNotUnderstoodError where it has what a template or a loss
        would read and nothing here does; RecipeError where the recipe does not say which of two answers to take.
        """
        records = self._records
        where = f"{records.path}:{raw.line}" if raw.line is not None else f"{records.path}: row {raw.number + 1}"
        try:
            given = Given(parse_object(raw.content), raw, self._names)
            content = self._content(given, raw, where)
            return Record(
                where=where,
                source=records.source,
                number=raw.number,
                document_id=_document_id(given.fields.get(records.id_field), records, raw.number),
                text=content.text,
                messages=content.messages,
                passed_over=given.passed_over(is_chat=content.messages is not None),
                tools=content.tools,
                variables=content.variables,
                ignored=given.ignored,
                n_prompt_characters=content.n_prompt_characters,
                n_prompt_messages=content.n_prompt_messages,
                control_tokens=records.control_tokens,
                sample_id=sample_id(records.source, content),
                file=self._file,
            )
        except NoDocumentError as e:
            raise BadRecordError(f"{where}: {e}", kind=e.kind) from e

    def _content(self, given: Given, raw: RawRecord, where: str) -> Content:
        """What the document is made of, once nothing is left of the record that would have to be in it."""
        shape = shape_of(given, self._order)
        _refuse_not_read(given, raw, where)
        try:
            content = content_of(given, shape)
        except RecipeError as e:
            raise RecipeError(f"{where}: {e}") from e
        if content.messages is not None:
            refuse_not_used(given, where, is_chat=True)
        elif shape != "text":
            refuse_not_used(given, where, is_chat=False, but=())
        return content


def parse_record(raw: RawRecord, records: RecordRange) -> Record:
    """`RecordParser.parse` of one record."""
    return RecordParser(records).parse(raw)


def file_of(records: RecordRange) -> str:
    """The range's file by the name that manifests have it by: not where it lies, which may change."""
    return records.file_name or PurePosixPath(records.path).name


def _refuse_not_read(given: Given, raw: RawRecord, where: str) -> None:
    """Refuse what a row has and a plan of an earlier version did not read."""
    prefix = f"{given.own('messages')}."
    names = [name for name in raw.others if name.removeprefix(prefix) not in given.records.ignore_fields]
    if names:
        raise not_understood(names, where, given, remedy="Materialize shard_plan again, so that it is read")


def _document_id(value: Any, records: RecordRange, number: int) -> str:
    name = records.id_field
    if value is None:
        file = f"/{records.file_name}" if records.file_name else ""
        return f"{records.source}{file}-{number:09d}"
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise NoDocumentError(f"{name!r} is {kind_of(value)}; expected a string or an integer", kind="bad id")
    if value == "":
        raise NoDocumentError(f"{name!r} is an empty string", kind="bad id")
    return unicode_text(str(value), repr(name))
