"""Files that are written in pieces and hashed beside are the bytes that were given."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from kd_assets.durable import atomic_file


def test_large_and_small_writes_give_one_file_and_its_hash_and_whole_pages_are_begun_before_the_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, n, __: begun.append((start, n)), raising=False)
    data = np.arange((40 << 20) // 4, dtype=np.uint32).tobytes() + b"end"
    pieces = [data[:10], data[10 : (20 << 20) + 7], data[(20 << 20) + 7 : (20 << 20) + 5000], data[(20 << 20) + 5000 :]]
    with atomic_file(tmp_path / "file") as file:
        for piece in pieces:
            assert file.write(memoryview(piece)) == len(piece)
    assert file.n_bytes == file.tell() == len(data)
    assert (tmp_path / "file").read_bytes() == data
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    ends = [start + n for start, n in begun]
    assert len(begun) >= 4
    assert ends[-1] > len(data) - (10 << 20)
    assert [start for start, _ in begun] == [0, *ends[:-1]]
    assert all(end % 4096 == 0 for end in ends)
