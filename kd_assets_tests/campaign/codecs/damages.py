"""The damages of a part or an index: to its bytes, to the table in it, to what an index says; by kind, from a seed.

A damage changes a file's bytes and says in words what it did. `SparedError`: not this file, or not this time.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from kd_assets.store.partfile import ARROW_SUFFIX
from kd_assets.store.schema import split_columns
from kd_assets_tests.campaign.codecs.stores import GROUP_TOKENS, index_hashed_anew
from kd_assets_tests.campaign.damages import SparedError, change_byte, flip_bit, truncate

Others = Sequence[bytes]
Damage = Callable[[random.Random, Path, Others], tuple[bytes, str]]
"""What the file becomes, and what was done. `Others`: whole files of other results."""


def damaged(kind: str, rng: random.Random, file: Path, others: Others) -> tuple[bytes, str]:
    """The bytes of the file after a damage of this kind. Raises SparedError where that would change nothing."""
    data, words = KINDS[kind](rng, file, others)
    if data == file.read_bytes():
        raise SparedError("nothing is changed by it")
    return data, f"{file.name}: {words}"


# ------------------------------------------------------------------------------------------------------------- bytes


def _of_bytes(change: Callable[[random.Random, bytes], tuple[bytes, str]]) -> Damage:
    return lambda rng, file, others: change(rng, file.read_bytes())


def _run_zeroed(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    at, n = _run(rng, data)
    return data[:at] + bytes(n) + data[at + n :], f"{n} bytes from {at} of {len(data)} zeroed"


def _block_doubled(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    at, n = _run(rng, data)
    to, moves = rng.randrange(len(data)), rng.random() < 0.5
    block = data[at : at + n]
    rest = data[to:] if moves else data[to + n :]
    return data[:to] + block + rest, f"{n} bytes from {at} of {len(data)} once more {'before' if moves else 'at'} {to}"


def _run(rng: random.Random, data: bytes) -> tuple[int, int]:
    at = rng.randrange(len(data))
    return at, min(rng.choice([2, 8, 64, 512, 4096]), len(data) - at)


def _of_another_result(rng: random.Random, file: Path, others: Others) -> tuple[bytes, str]:
    number = rng.randrange(len(others))
    return others[number], f"the file {number} of other results in its place"


def _block_of_another(rng: random.Random, file: Path, others: Others) -> tuple[bytes, str]:
    data, number = file.read_bytes(), rng.randrange(len(others))
    at = rng.randrange(len(data))
    n = min(rng.choice([64, 512, 4096]), len(data) - at)
    block = others[number][at : at + n]
    return data[:at] + block + data[at + len(block) :], f"{len(block)} bytes from {at} of the file {number} of others"


# ------------------------------------------------------------------------------------------------------------- table

Change = Callable[[random.Random, pa.Table], tuple[pa.Table, str]]


def _of_table(change: Change) -> Damage:
    """The file still opens: it is read by pyarrow, changed, and written as it was."""

    def damage(rng: random.Random, file: Path, others: Others) -> tuple[bytes, str]:
        table, words = change(rng, read_plainly(file))
        return written(table, file.suffix), words

    return damage


def read_plainly(file: Path) -> pa.Table:
    """The table in a part file, by pyarrow alone."""
    if file.suffix == ARROW_SUFFIX:
        with pa.OSFile(str(file)) as source:
            return pa.ipc.open_file(source).read_all()
    return pq.read_table(file)


def written(table: pa.Table, suffix: str) -> bytes:
    """The table as a file of about as many groups of rows as it was made with."""
    sink, n_rows = io.BytesIO(), max(1, GROUP_TOKENS // 20)
    try:
        if suffix == ARROW_SUFFIX:
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table.combine_chunks(), max_chunksize=n_rows)
        else:
            split = [name for name in split_columns(table.schema) if table.schema.names.count(name.split(".")[0]) == 1]
            with pq.ParquetWriter(
                sink, table.schema, compression="zstd", use_dictionary=False, use_byte_stream_split=split
            ) as writer:
                writer.write_table(table, row_group_size=n_rows)
    except (pa.ArrowException, ValueError, KeyError, OSError) as e:
        raise SparedError(f"no such table can be written: {e}") from e
    return sink.getvalue()


_WORDS = (
    *(
        "",
        "plain",
        "compact",
        "compact_2",
        "split",
        "fp8",
        "int8_32",
        "int8_128",
        "nvfp4",
        "bfloat16",
        "before_norm",
        "after_norm",
    ),
    *("0", "1", "2", "9", "16", "0.7", "0.9", "-1", "1e9", "9" * 30, "topk_cache", "hidden_state_cache", "\N{SNOWMAN}"),
)


def _metadata_changed(rng: random.Random, table: pa.Table) -> tuple[pa.Table, str]:
    schema, of = table.schema, rng.randrange(-6, len(table.schema))
    metadata = dict((schema.metadata if of < 0 else schema.field(of).metadata) or {})
    key = rng.choice([*metadata, b"kd_assets.codec", b"codec", b"k"])
    if key in metadata and rng.random() < 0.3:
        del metadata[key]
        words = f"{key!r} dropped"
    else:
        metadata[key] = rng.choice([*(word.encode() for word in _WORDS), b"\xff\xfe", metadata.get(key, b"") + b" "])
        words = f"{key!r} is {metadata[key]!r}"
    if of < 0:
        return table.replace_schema_metadata(metadata), f"metadata: {words}"
    fields = list(schema)
    fields[of] = fields[of].with_metadata(metadata)
    schema = pa.schema(fields, metadata=schema.metadata)
    return pa.Table.from_arrays(table.columns, schema=schema), f"metadata of {fields[of].name}: {words}"


def _columns_swapped(rng: random.Random, table: pa.Table) -> tuple[pa.Table, str]:
    """Values of two columns of a type in each other's place, or whole columns."""
    pairs = [(a, b) for a in range(table.num_columns) for b in range(a) if table.column(a).type == table.column(b).type]
    names, columns = table.schema.names, list(table.columns)
    if pairs and rng.random() < 0.7:
        a, b = rng.choice(pairs)
        columns[a], columns[b] = columns[b], columns[a]
        return pa.Table.from_arrays(columns, schema=table.schema), f"values of {names[a]} and {names[b]} swapped"
    a, b = rng.sample(range(table.num_columns), 2)
    order = list(range(table.num_columns))
    order[a], order[b] = b, a
    return table.select(order), f"columns {names[a]} and {names[b]} swapped"


def _columns_changed(rng: random.Random, table: pa.Table) -> tuple[pa.Table, str]:
    at, names = rng.randrange(table.num_columns), table.schema.names
    match rng.choice(["dropped", "renamed", "twice", "nullable", "retyped"]):
        case "dropped":
            return table.remove_column(at), f"column {names[at]} dropped"
        case "renamed":
            new = rng.choice([*names, names[at] + "_", names[at][:-1], "hidden_block_1", "topk_ids", "positions"])
            return table.rename_columns([*names[:at], new, *names[at + 1 :]]), f"column {names[at]} renamed to {new}"
        case "twice":
            to = rng.randrange(table.num_columns)
            return table.add_column(to, table.schema.field(at), table.column(at)), f"column {names[at]} twice"
        case "nullable":
            field = table.schema.field(at).with_nullable(True)
            return table.set_column(at, field, table.column(at)), f"column {names[at]} nullable"
    to_type = rng.choice([pa.int64(), pa.float64(), pa.large_string(), pa.list_(pa.int64()), pa.large_binary()])
    try:
        column = table.column(at).cast(to_type)
    except (pa.ArrowException, ValueError) as e:
        raise SparedError(str(e)) from e
    return table.set_column(at, table.schema.field(at).with_type(to_type), column), f"column {names[at]} is {to_type}"


def _rows_changed(rng: random.Random, table: pa.Table) -> tuple[pa.Table, str]:
    rows, at = list(range(table.num_rows)), rng.randrange(table.num_rows)
    match rng.choice(["swapped", "dropped", "twice", "another's"]):
        case "swapped":
            other = rng.choice([row for row in rows if row != at])
            rows[at], rows[other] = other, at
            words = f"rows {at} and {other} swapped"
        case "dropped":
            del rows[at]
            words = f"row {at} dropped"
        case "twice":
            rows.insert(at, at)
            words = f"row {at} twice"
        case _:
            other = rng.choice([row for row in rows if row != at])
            rows[at] = other
            words = f"row {other} in the place of row {at}"
    column = rng.choice([None, None, *table.schema.names])  # of all columns alike, or of one
    taken = table.take(rows)
    if column is None or taken.num_rows != table.num_rows:
        return taken, words
    return table.set_column(
        table.schema.get_field_index(column), table.schema.field(column), taken[column]
    ), f"{words}, of {column} alone"


_FLOATS = (float("nan"), float("inf"), float("-inf"), 1e30, -1e30, -0.0, 0.5, 5.0, -70000.0, 2.0**60, 1e-40)


def _values_changed(rng: random.Random, table: pa.Table) -> tuple[pa.Table, str]:
    """One value in a column into another of its type, or a list into a shorter or longer one."""
    at, row = rng.randrange(table.num_columns), rng.randrange(table.num_rows)
    field, values = table.schema.field(at), table.column(at).to_pylist()
    values[row], words = _changed(rng, values[row], field.type)
    try:
        column = pa.array(values, type=field.type)
    except (pa.ArrowException, ValueError, OverflowError, TypeError) as e:
        raise SparedError(str(e)) from e
    return table.set_column(at, field, column), f"row {row} of {field.name}: {words}"


def _changed(rng: random.Random, value: Any, of: pa.DataType) -> tuple[Any, str]:
    if pa.types.is_list(of) or pa.types.is_fixed_size_list(of):
        how = rng.choice(["within", "within", "shorter", "longer", "swapped", "empty"])
        if how == "within" and value:
            at = rng.randrange(len(value))
            changed, words = _changed(rng, value[at], of.value_type)
            return [*value[:at], changed, *value[at + 1 :]], f"{at}: {words}"
        if how == "swapped" and len(value) > 1:
            a, b = rng.sample(range(len(value)), 2)
            return [
                value[b] if i == a else value[a] if i == b else v for i, v in enumerate(value)
            ], f"{a} and {b} swapped"
        if how == "empty":
            return [], "emptied"
        return (value + value[-1:], "longer by one") if how == "longer" else (value[:-1], "shorter by one")
    if pa.types.is_floating(of):
        new = rng.choice([*_FLOATS, rng.uniform(-20, 1)])
        with np.errstate(over="ignore"):
            return (np.float16(new) if pa.types.is_float16(of) else new), f"{new}"
    if pa.types.is_boolean(of):
        return not value, f"{not value}"
    if pa.types.is_integer(of):
        signed = pa.types.is_signed_integer(of)
        low, high = (-(1 << of.bit_width - 1), (1 << of.bit_width - 1) - 1) if signed else (0, (1 << of.bit_width) - 1)
        new = rng.choice([low, high, 0, value ^ 1 << rng.randrange(of.bit_width - 1), rng.randint(low, high)])
        return new, f"{value} → {new}"
    data = value.encode() if isinstance(value, str) else value
    if isinstance(value, str):
        return rng.choice(["", value + "x", value[:-1]]), "another text"
    match rng.choice(["byte", "byte", "byte", "shorter", "longer", "random"]):
        case "byte" if data:
            at, byte = rng.randrange(len(data)), rng.choice([0, 1, 127, 255, rng.randrange(256)])
            return data[:at] + bytes([byte]) + data[at + 1 :], f"byte {at} of {len(data)} is {byte}"
        case "longer":
            return data + bytes([rng.randrange(256)]), "longer by a byte"
        case "random":
            return rng.randbytes(len(data)), "random bytes"
    return data[:-1], "shorter by a byte"


def _written_otherwise(rng: random.Random, file: Path, others: Others) -> tuple[bytes, str]:
    """The same rows by another writer: nothing is wrong with them, and their bytes are others."""
    table, sink = read_plainly(file), io.BytesIO()
    if file.suffix == ARROW_SUFFIX:
        compression = rng.choice(["lz4", "zstd", None])
        with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
            writer.write_table(table.combine_chunks(), max_chunksize=rng.choice([1, 3, 100]))
    else:
        compression = rng.choice(["NONE", "snappy", "gzip"])
        pq.write_table(table, sink, compression=compression, row_group_size=rng.choice([1, 3, 100]))
    return sink.getvalue(), f"written otherwise, {compression}"


# ------------------------------------------------------------------------------------------------------------- index


def _header_changed(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Another number or word in an index's first line, hashed anew."""
    line, _, rest = data.partition(b"\n")
    header = json.loads(line)
    section = rng.choice([*header["sections"], None])
    of = header if section is None else header["sections"][section]
    name = rng.choice(list(of))
    of[name] = rng.choice(
        [None, 0, 1, -1, 2, 1 << 40, 1 << 62, "", "0" * 64, [], {}, 1.5, True, header["n_documents"] - 1]
    )
    words = f"{name} of {section or 'the first line'} is {of[name]!r}"
    said = json.dumps(header, sort_keys=True, separators=(",", ":")).encode() + b"\n" + rest
    try:
        return index_hashed_anew(said), words
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        return said, f"{words}, and the hash is of before"


BYTES: dict[str, Damage] = {
    "bit flipped": _of_bytes(flip_bit),
    "byte changed": _of_bytes(change_byte),
    "run zeroed": _of_bytes(_run_zeroed),
    "cut": _of_bytes(truncate),
    "block doubled": _of_bytes(_block_doubled),
    "of another result": _of_another_result,
    "block of another result": _block_of_another,
}
TABLES: dict[str, Damage] = {
    "metadata changed": _of_table(_metadata_changed),
    "columns swapped": _of_table(_columns_swapped),
    "columns changed": _of_table(_columns_changed),
    "rows changed": _of_table(_rows_changed),
    "values changed": _of_table(_values_changed),
    "written otherwise": _written_otherwise,
}
INDEXES: dict[str, Damage] = {"first line changed": _of_bytes(_header_changed)}
KINDS: Mapping[str, Damage] = BYTES | TABLES | INDEXES


def kinds_of(is_index: bool) -> list[str]:
    """What can be done to an index, or to a part."""
    return [*BYTES, *(INDEXES if is_index else TABLES)]
