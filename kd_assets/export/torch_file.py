"""Files of `torch.save`, written from views and without torch, whose import takes a second and much memory.

A file is a zip archive (PKWARE's APPNOTE.TXT) in which nothing is compressed. Its records, all in a folder `archive`:

1. `data.pkl`, the content in protocol 2 of pickle. A tensor in it is a call of `torch._utils._rebuild_tensor_v2`, and
   its storage a persistent id: the storage's type and number, the device ("cpu"), and how many elements it has;
2. `.format_version`, `.storage_alignment` and `byteorder`: 1, 64 and little;
3. `data/<number>`, the bytes of a storage, for each tensor;
4. `version`: 3 and a newline;
5. `.data/serialization_id`: 40 digits, of which the first 20 hash the records' names and the others their checksums.

The bytes of a record begin at a multiple of 64, so that a file can be mapped: its header ends with an extra field `FB`
of as many Z as that takes. Checksum (CRC-32) and length follow the bytes, which are written as they are made.

The invariant: a file is byte for byte what torch 2.13.0 writes for the same content. Writing is the same in 2.11.0 and
2.14.1, by their sources.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 64
_FOLDER = "archive"

_MAX_ENTRIES = 1000
"""Of a dictionary: from here on Python's two picklers write other opcodes."""

_HASHES_OF_NAMES = (
    2908468677762923104,
    15728199511854643026,
    5611085236196705294,
    8494888479650487350,
    10778627297998541625,
    551901853203590787,
    12685673969646462611,
    6895295647852065578,
    8268647735604577700,
)
"""By the number of tensors, as torch wrote it: of the records' names, which depend on nothing else, the hashes that
libstdc++ gives them, combined in the order in which its hash table has them."""


class _Writable(Protocol):
    def write(self, data: Any, /) -> object: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tensor:
    """A tensor in C order with memory of its own, whose bytes are made while they are written."""

    dtype: Literal["bfloat16", "bool", "int64"]
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[npt.NDArray[Any]]]
    """Its bytes in their order. A piece is done with when the next is asked for."""


def tensor_of(values: npt.NDArray[Any]) -> Tensor:
    """The tensor of an array of bool or int64."""
    dtype: Any = values.dtype.name
    return Tensor(dtype=dtype, shape=values.shape, pieces=lambda: [np.ascontiguousarray(values)])


def write_torch_file(file: _Writable, content: Mapping[Any, Any]) -> None:
    """Write what `torch.save(dict(content), file)` does: of texts, numbers, truth values and eight tensors at most."""
    pickled, tensors = _pickled(dict(content))
    archive = _Archive(file)
    archive.write("data.pkl", [pickled], len(pickled))
    archive.write_text(".format_version", "1")
    archive.write_text(".storage_alignment", str(_ALIGNMENT))
    archive.write_text("byteorder", sys.byteorder)
    for number, tensor in enumerate(tensors):
        _, element_bytes = _STORAGES[tensor.dtype]
        archive.write(f"data/{number}", tensor.pieces(), _n_elements(tensor) * element_bytes)
    archive.write_text("version", "3\n")
    archive.write_text(".data/serialization_id", f"{_HASHES_OF_NAMES[len(tensors)]:020}{archive.checksums:020}")
    archive.close()


# ------------------------------------------------------------------------------------------------ the pickle


def _named(module: str, name: str) -> type:
    """What pickle takes for this global of a module, which is not imported."""
    return type(name, (), {"__module__": module})


_REBUILD_TENSOR = _named("torch._utils", "_rebuild_tensor_v2")
_STORAGES: dict[str, tuple[type, int]] = {
    "bfloat16": (_named("torch", "BFloat16Storage"), 2),
    "bool": (_named("torch", "BoolStorage"), 1),
    "int64": (_named("torch", "LongStorage"), 8),
}
"""By dtype, with the bytes of an element."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Storage:
    kind: type
    number: int
    n_elements: int


class _Pickler(pickle._Pickler):
    """Python's pickler in Python: the one in C looks a global up before it writes its name, and would import torch."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        return ("storage", value.kind, str(value.number), "cpu", value.n_elements)

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        kind, _ = _STORAGES[value.dtype]
        storage = _Storage(kind=kind, number=len(self.tensors), n_elements=_n_elements(value))
        self.tensors.append(value)
        shape = tuple(int(size) for size in value.shape)  # a new one: what occurs again becomes a reference
        return _REBUILD_TENSOR, (storage, 0, shape, _strides(value), False, OrderedDict())

    def save_global(self, value: Any, name: str | None = None) -> None:
        named = f"{value.__module__}\n{name or value.__qualname__}\n"
        self.write(pickle.GLOBAL + named.encode())  # type: ignore[attr-defined]  # of the class in Python alone
        self.memoize(value)  # type: ignore[attr-defined]


def _pickled(content: dict[Any, Any]) -> tuple[bytes, list[Tensor]]:
    """The content's pickle and its tensors in the order of their numbers."""
    if not any(isinstance(value, Tensor) for value in content.values()):
        return pickle.dumps(content, protocol=2), []
    assert len(content) < _MAX_ENTRIES
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(content)
    assert len(pickler.tensors) < len(_HASHES_OF_NAMES)
    return buffer.getvalue(), pickler.tensors


def _n_elements(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64))


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """In elements; a dimension without any counts as one, as in torch."""
    strides, n = [], 1
    for size in reversed(tensor.shape):
        strides.append(n)
        n *= max(size, 1)
    return tuple(reversed(strides))


# ------------------------------------------------------------------------------------------------ the archive

_LONG = 0xFFFFFFFF
"""Sizes and places from here on stand in fields of zip64."""

_HEADER = struct.Struct("<4sHHHHHIIIHH")
_ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
_DESCRIPTOR = b"PK\x07\x08"
_UTF8, _HAS_DESCRIPTOR = 0x0800, 0x0008


class _Archive:
    """The zip archive as torch's writer, miniz, has it: of no time, no version and no system."""

    def __init__(self, file: _Writable) -> None:
        self.checksums = 0
        """Those of the records so far, combined."""
        self._file, self._at = file, 0
        self._directory, self._n_records = bytearray(), 0

    def write_text(self, name: str, text: str) -> None:
        self.write(name, [text.encode()], len(text))

    def write(self, name: str, pieces: Iterable[Any], n_bytes: int) -> None:
        """A record of `n_bytes`, from buffers."""
        path, at = f"{_FOLDER}/{name}".encode(), self._at
        flags = _UTF8 | _HAS_DESCRIPTOR if n_bytes else _UTF8
        is_long, is_far = n_bytes >= _LONG, at >= _LONG
        extra = _zip64([n_bytes, 0] if is_long else [], [at] if is_far else [])
        extra += _padding(at + _HEADER.size + len(path) + len(extra))
        self._write(_HEADER.pack(b"PK\x03\x04", 0, flags, 0, 0, 0, 0, 0, 0, len(path), len(extra)) + path + extra)
        checksum = self._write_pieces(pieces, n_bytes)
        if n_bytes:
            lengths = struct.pack("<QQ" if is_long or is_far else "<II", n_bytes, n_bytes)
            descriptor = _DESCRIPTOR + struct.pack("<I", checksum) + lengths
            self._write(descriptor)
            self._combine(descriptor)
        extra = _zip64([n_bytes, n_bytes] if is_long else [], [at] if is_far else [])
        size, place = min(n_bytes, _LONG), min(at, _LONG)
        numbers = (0, 0, flags, 0, 0, 0, checksum, size, size, len(path), len(extra), 0, 0, 0, 0, place)
        self._directory += _ENTRY.pack(b"PK\x01\x02", *numbers) + path + extra
        self._n_records += 1

    def close(self) -> None:
        """Write the central directory, which ends in zip64's words and in zip's."""
        at, n, n_bytes = self._at, self._n_records, len(self._directory)
        self._write(self._directory)
        self._write(struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 0x031E, 0x002D, 0, 0, n, n, n_bytes, at))
        self._write(struct.pack("<4sIQI", b"PK\x06\x07", 0, at + n_bytes, 1))
        self._write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, n, n, n_bytes, min(at, _LONG), 0))

    def _write_pieces(self, pieces: Iterable[Any], n_bytes: int) -> int:
        """Returns their checksum."""
        checksum, n_written, beginning = 0, 0, b""
        for piece in pieces:
            if n := memoryview(piece).nbytes:  # a view without any has no bytes to be seen as
                view = memoryview(piece).cast("B")
                beginning += bytes(view[: 8 - len(beginning)])
                checksum = zlib.crc32(view, checksum)
                self._write(view)
                n_written += n
        assert n_written == n_bytes, f"{n_written} bytes of a record of {n_bytes}"
        self._combine(beginning)
        return checksum

    def _combine(self, data: bytes) -> None:
        """Combine a checksum with those before (hash_combine of c10 and boost).

        Torch takes it from all of its writes that begin like a descriptor, be it a tensor that happens to.
        """
        if len(data) >= 8 and data.startswith(_DESCRIPTOR):
            checksum, before = int.from_bytes(data[4:8], "little"), self.checksums
            self.checksums = before ^ ((checksum + 0x9E3779B9 + (before << 6) + (before >> 2)) % (1 << 64))

    def _write(self, data: Any) -> None:
        self._file.write(data)
        self._at += len(data)


def _zip64(sizes: list[int], place: list[int]) -> bytes:
    """The extra field of what a header has no room for; nothing where there is nothing."""
    numbers = [*sizes, *place]
    return struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


def _padding(at: int) -> bytes:
    """The extra field that begins at `at` and ends at a multiple of the alignment."""
    n = -(at + 4) % _ALIGNMENT
    return struct.pack("<2sH", b"FB", n) + b"Z" * n
