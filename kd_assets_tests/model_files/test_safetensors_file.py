"""Headers of safetensors files: what stands in them, and that nothing but them is read."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from kd_assets.errors import InputError, MissingInputError
from kd_assets.model_files.safetensors_file import StoredTensor, stored_tensors


def test_tensors_are_told_as_they_are_stored(tmp_path: Path) -> None:
    save_file({"a": np.zeros((2, 3), np.float16), "b": np.zeros((), np.int64)}, tmp_path / "x", metadata={"by": "me"})
    found = {tensor.name: tensor for tensor in stored_tensors(tmp_path / "x")}
    assert found == {
        "a": StoredTensor(name="a", dtype="F16", shape=(2, 3)),
        "b": StoredTensor(name="b", dtype="I64", shape=()),
    }


@pytest.mark.parametrize(
    "whole", [b"", b"version https://git-lfs.github.com/spec/v1\n", struct.pack("<Q", 4) + b"{jun"]
)
def test_what_is_none_of_this_format_is_refused(tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "x").write_bytes(whole)
    with pytest.raises(InputError, match="no whole safetensors file"):
        stored_tensors(tmp_path / "x")


@pytest.mark.parametrize("n_bytes", [-5, 5])
def test_a_file_of_another_length_than_its_header_says_is_refused(tmp_path: Path, n_bytes: int) -> None:
    save_file({"a": np.zeros(100, np.float32)}, tmp_path / "x")
    with (tmp_path / "x").open("r+b") as file:
        file.truncate((tmp_path / "x").stat().st_size + n_bytes)
    with pytest.raises(InputError, match="no whole safetensors file"):
        stored_tensors(tmp_path / "x")


def test_what_is_not_there_is_missing(tmp_path: Path) -> None:
    for name in ("absent", "."):
        with pytest.raises(MissingInputError, match="cannot be read"):
            stored_tensors(tmp_path / name)


def test_of_a_large_file_the_weights_are_not_read(tmp_path: Path) -> None:
    """64 GiB that take no room on the disk, and would not fit into the memory that the process may have."""
    n_bytes = 64 * 2**30
    head = json.dumps({"w": {"dtype": "BF16", "shape": [n_bytes // 2], "data_offsets": [0, n_bytes]}}).encode()
    with (tmp_path / "x").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + n_bytes)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from kd_assets.model_files.safetensors_file import stored_tensors\n"
        "import numpy, safetensors\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "(tensor,) = stored_tensors(Path(sys.argv[1]))\n"
        "grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(tensor.n_numbers, grown_kib)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, check=True)
    n_numbers, grown_kib = map(int, done.stdout.split())
    assert n_numbers == n_bytes // 2
    assert grown_kib < 64 * 1024
