"""Files written without torch are byte for byte those of `torch.save`, and torch reads them."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kd_assets.export.aside import export_file
from kd_assets.export.torch_file import Tensor, tensor_of, write_torch_file
from kd_assets_tests.export import made_up

RELEASE = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])

Dtype = Literal["bfloat16", "bool", "int64"]

as_torch_writes = pytest.mark.skipif(
    not (2, 11) <= RELEASE <= (2, 14), reason=f"what torch {torch.__version__} writes is not known: 2.11 to 2.14 are"
)

OF_TORCH: dict[Dtype, torch.dtype] = {"bfloat16": torch.bfloat16, "bool": torch.bool, "int64": torch.int64}
OF_NUMPY: dict[Dtype, Any] = {"bfloat16": np.uint16, "bool": np.bool_, "int64": np.int64}
NAMES = ["input_ids", "x", "0", "1", "2", "cpu", "storage", "torch", "LongStorage", "größe", "名", "n" * 300, ""]


def random_values(rng: np.random.Generator, dtype: Dtype, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A bfloat16 as its bits."""
    return rng.integers(0, 2 if dtype == "bool" else 1 << 16, shape).astype(OF_NUMPY[dtype])


def in_torch(values: npt.NDArray[Any], dtype: Dtype) -> torch.Tensor:
    tensor = torch.empty(values.shape, dtype=OF_TORCH[dtype])
    bits = tensor.view(torch.int16) if dtype == "bfloat16" else tensor
    bits.copy_(torch.from_numpy(values.view(np.int16) if dtype == "bfloat16" else values))
    return tensor


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """What compares equal to itself, a NaN or not."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def in_pieces(values: npt.NDArray[Any], dtype: Dtype, sizes: Sequence[int]) -> Tensor:
    """The tensor of these values, made a few at a time, all in the same memory. `sizes`: of the pieces, repeated."""

    def pieces() -> Iterator[npt.NDArray[Any]]:
        flat, memory = values.reshape(-1), np.empty(max(sizes), dtype=values.dtype)
        at = n_made = 0
        while at < len(flat):
            piece = memory[: min(sizes[n_made % len(sizes)], len(flat) - at)]
            piece[:] = flat[at : at + len(piece)]
            yield piece
            at, n_made = at + len(piece), n_made + 1

    return Tensor(dtype=dtype, shape=values.shape, pieces=pieces)


def random_content(rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same dictionary for torch and for us."""
    theirs: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    n_tensors = int(rng.integers(0, 9))
    kinds = rng.permutation([True] * n_tensors + [False] * int(rng.integers(0, 5)))
    for name, is_tensor in zip(rng.permutation(NAMES).tolist(), kinds, strict=False):
        if is_tensor:
            dtype = list(OF_TORCH)[rng.integers(3)]
            shape = tuple(rng.integers(0 if rng.random() < 0.1 else 1, 9, rng.integers(0, 4)).tolist())
            if rng.random() < 0.1:
                shape = (1, int(rng.integers(1000, 3000)), 64)
            values = random_values(rng, dtype, shape)
            theirs[name] = in_torch(values, dtype)
            ours[name] = in_pieces(values, dtype, rng.integers(1, max(values.size, 2), 3).tolist())
        else:
            values_of_others = [True, False, 7, -1, 1 << 40, "a/b", "0", "cpu", "名" * 100]
            theirs[name] = ours[name] = values_of_others[rng.integers(len(values_of_others))]
    return theirs, ours


def saved(content: dict[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def written(content: dict[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    write_torch_file(buffer, content)
    return buffer.getvalue()


@as_torch_writes
@pytest.mark.parametrize("seed", range(60))
def test_a_file_is_byte_for_byte_what_torch_saves(seed: int) -> None:
    theirs, ours = random_content(np.random.default_rng(seed))
    assert written(ours) == saved(theirs)
    assert written(ours) == saved(theirs)  # once more, of pieces that were made before


@as_torch_writes
@pytest.mark.parametrize("n", range(9))
def test_a_file_of_any_number_of_tensors_has_the_id_that_torch_gives_it(n: int) -> None:
    values = [np.arange(at, dtype=np.int64) + at for at in range(1, n + 1)]
    theirs = {f"tensor {at}": torch.from_numpy(of_one) for at, of_one in enumerate(values)}
    assert written({name: tensor_of(tensor.numpy()) for name, tensor in theirs.items()}) == saved(theirs)


@as_torch_writes
@pytest.mark.parametrize("n", [0, 1, 2, 999, 1000, 1001, 2000, 70_000])
def test_a_dictionary_of_numbers_is_what_torch_saves_however_long_it_is(n: int) -> None:
    counted = {i * 3: i * i for i in range(n)}
    assert written(counted) == saved(counted)


@as_torch_writes
@pytest.mark.parametrize("values", [[0x08074B50, 5], [0x08074B50 | 7 << 32], [0x08074B50 + (1 << 40), 1, 2]])
def test_a_tensor_that_begins_like_a_descriptor_of_zip_is_what_torch_saves(values: list[int]) -> None:
    array = np.array(values)
    theirs = {"a": torch.from_numpy(array), "b": torch.arange(3)}
    assert written({"a": in_pieces(array.view(np.uint16), "bfloat16", [1]), "b": tensor_of(np.arange(3))}) == saved(
        {**theirs, "a": torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)}
    )
    assert written({"a": tensor_of(array), "b": tensor_of(np.arange(3))}) == saved(theirs)


@as_torch_writes
def test_a_tensor_that_stands_twice_in_a_dictionary_is_written_once() -> None:
    theirs, ours = torch.arange(5), tensor_of(np.arange(5))
    assert written({"a": ours, "b": ours}) == saved({"a": theirs, "b": theirs})


@as_torch_writes
def test_two_tensors_that_hold_one_and_the_same_shape_are_what_torch_saves() -> None:
    first = tensor_of(np.arange(6).reshape(2, 3))
    second = dataclasses.replace(first, shape=first.shape, pieces=lambda: [np.ones((2, 3), dtype=np.int64)])
    assert second.shape is first.shape
    theirs = {"a": torch.arange(6).reshape(2, 3), "b": torch.ones((2, 3), dtype=torch.int64)}
    assert written({"a": first, "b": second}) == saved(theirs)


class Outline(io.RawIOBase):
    """What is written, of which long stretches are only counted: their bytes are in the file's checksums."""

    def __init__(self) -> None:
        self.at, self.n_counted, self.small = 0, 0, bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        n = memoryview(data).nbytes
        if n < 1 << 20:
            self.small += data
        else:
            self.n_counted += n
        self.at += n
        return n


LONG = 0xFFFFFFFF
START = 832
"""Where the first tensor of the content below begins."""


@as_torch_writes
@pytest.mark.slow
@pytest.mark.parametrize(
    "n_bytes",
    [
        pytest.param(LONG - START - 16 - 1, id="the next header is the last that zip alone has words for"),
        pytest.param(LONG - START - 16, id="the next header is too far"),
        pytest.param(LONG - 1, id="the tensor is the largest that zip alone has words for"),
        pytest.param(LONG, id="the tensor is too large"),
    ],
)
def test_a_file_of_more_than_four_gigabytes_is_what_torch_saves(n_bytes: int) -> None:
    piece = np.zeros(64 << 20, dtype=np.bool_)
    n_whole, n_rest = divmod(n_bytes, len(piece))
    rest = np.arange(n_rest) % 7 == 3
    whole = np.zeros(n_bytes, dtype=np.bool_)  # memory that nobody has written to is one page
    whole[n_bytes - n_rest :] = rest
    theirs, ours = Outline(), Outline()
    torch.save(
        {"a": torch.from_numpy(whole), "b": torch.arange(3), "c": torch.empty(0, dtype=torch.bool)},
        cast(IO[bytes], theirs),
    )
    large = Tensor(dtype="bool", shape=(n_bytes,), pieces=lambda: [*[piece] * n_whole, rest])
    write_torch_file(ours, {"a": large, "b": tensor_of(np.arange(3)), "c": tensor_of(np.zeros(0, dtype=np.bool_))})
    assert (ours.at, ours.n_counted) == (theirs.at, theirs.n_counted)
    assert ours.small == theirs.small
    assert ours.small.index(b"archive/data/1") - 30 == START + 16 + (8 if n_bytes >= LONG else 0)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_torch_reads_what_was_written(tmp_path: Path, seed: int, mapped: bool) -> None:
    theirs, ours = random_content(np.random.default_rng(seed))
    with export_file(tmp_path / "file.pt") as file:
        write_torch_file(file, ours)
    read = torch.load(tmp_path / "file.pt", weights_only=True, mmap=mapped)
    assert list(read) == list(theirs)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert read[name].dtype == value.dtype
            assert read[name].shape == value.shape
            assert torch.equal(bits_of(read[name]), bits_of(value))
            assert read[name].data_ptr() % 64 == 0 or not (mapped and value.numel())
        else:
            assert type(read[name]) is type(value)
            assert read[name] == value


def test_an_array_that_is_not_in_one_piece_is_written_in_its_order() -> None:
    array = np.arange(24).reshape(4, 6)[:, ::2].T
    read = torch.load(io.BytesIO(written({"a": tensor_of(array)})), weights_only=True)
    assert read["a"].tolist() == array.tolist()


def test_pieces_that_are_more_or_less_than_the_tensor_are_an_error() -> None:
    for values in (np.ones(2, dtype=np.bool_), np.ones(4, dtype=np.bool_)):
        tensor = dataclasses.replace(tensor_of(values), shape=(3,))
        with pytest.raises(AssertionError, match=f"{len(values)} bytes of a record of 3"):
            written({"a": tensor})


@pytest.mark.parametrize("name", ["specforge", "specforge_dflash", "modelopt", "speculators"])
def test_an_export_for_a_trainer_of_draft_heads_imports_no_torch(tmp_path: Path, name: str) -> None:
    made_up.commit(tmp_path, made_up.truths(5), assets=("shards_manifest", "hidden_state_cache"))
    command = ["export", name, str(tmp_path / made_up.RECIPE), "--to", str(tmp_path / "out"), "--states", "1", "2", "4"]
    if name in ("specforge", "speculators"):
        command += ["--draft-vocabulary", "12"]
    script = f"""
import sys
from kd_assets.cli import main
assert main({command!r}) == 0
print(*(name for name in ("torch", "transformers") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""
    assert list((tmp_path / "out").rglob("*.ckpt" if name.startswith("specforge") else "*.pt"))
