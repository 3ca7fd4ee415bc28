"""The numbers of the codecs of hidden states: what they give back, how far off, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kd_assets.errors import RecipeError
from kd_assets.store.codecs import states
from kd_assets.store.codecs.state_codec import CODED, bytes_a_state, group_of, largest_error, require_groups

Uint16Array = npt.NDArray[np.uint16]
ROUNDING = [name for name in CODED if name != "split"]


def bits_of(values: Any) -> Uint16Array:
    return states.float32_to_bfloat16(np.asarray(values, dtype=np.float32))


def there_and_back(bits_NH: Uint16Array, codec: str) -> Uint16Array:
    if codec == "split":
        high_NH, low_NH = states.split_planes(bits_NH)
        frame = states.compressed(high_NH)
        return states.joined_planes(states.decompressed(frame, high_NH.size).reshape(high_NH.shape), low_NH)
    if codec == "fp8":
        return states.decode_fp8(*states.encode_fp8(bits_NH))
    return states.decode_int8(*states.encode_int8(bits_NH, group_of(codec) or 0))


def gaussian(rng: np.random.Generator, n: int, size: int) -> Uint16Array:
    return bits_of(rng.normal(0, 1, (n, size)))


def one_outlier(rng: np.random.Generator, n: int, size: int) -> Uint16Array:
    """As deep blocks of large models have: a few values are thousands of times the others."""
    values = rng.normal(0, 1, (n, size))
    values[:, rng.integers(size)] = 3000
    return bits_of(values)


def of_all_sizes(rng: np.random.Generator, n: int, size: int) -> Uint16Array:
    return bits_of(rng.normal(0, 1, (n, size)) * 2.0 ** rng.uniform(-30, 30, (n, 1)))


def sparse(rng: np.random.Generator, n: int, size: int) -> Uint16Array:
    return bits_of(rng.normal(0, 1, (n, size)) * (rng.random((n, size)) < 0.02))


KINDS = (gaussian, one_outlier, of_all_sizes, sparse)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("size", [128, 384, 1024])
@pytest.mark.parametrize("codec", CODED)
def test_no_state_is_further_off_than_its_codec_can_be(
    codec: str, size: int, make: Callable[[np.random.Generator, int, int], Uint16Array]
) -> None:
    for seed in range(3):
        exact = make(np.random.default_rng(seed), 50, size)
        error = states.coding_error(exact, there_and_back(exact, codec))
        assert error.max_state <= largest_error(codec)


@pytest.mark.parametrize(("codec", "limit"), [("fp8", 0.03), ("int8_32", 0.01), ("int8_128", 0.01)])
def test_states_spread_like_a_teachers_are_off_by_little(codec: str, limit: float) -> None:
    exact = gaussian(np.random.default_rng(0), 200, 1024)
    error = states.coding_error(exact, there_and_back(exact, codec))
    values, decoded = (states.bfloat16_to_float32(x).astype(np.float64) for x in (exact, there_and_back(exact, codec)))
    assert error.relative_rms == pytest.approx(np.sqrt(((decoded - values) ** 2).sum() / (values**2).sum()), rel=1e-5)
    assert error.max_abs == pytest.approx(np.abs(decoded - values).max())
    assert limit / 5 < error.relative_rms <= limit


def test_split_gives_every_bit_pattern_back() -> None:
    everything = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 64)  # NaN, infinity and -0 among them
    assert np.array_equal(there_and_back(everything, "split"), everything)
    assert np.array_equal(there_and_back(everything[:0], "split"), everything[:0])


def test_fp8_is_bit_for_bit_torchs() -> None:
    torch = pytest.importorskip("torch")
    for make in KINDS:
        exact = make(np.random.default_rng(5), 40, 256)
        codes_NH, scale_N = states.encode_fp8(exact)
        divided = states.bfloat16_to_float32(exact) / np.where(scale_N > 0, scale_N, 1)[:, None].astype(np.float32)
        theirs = torch.from_numpy(divided).to(torch.float8_e4m3fn)
        assert np.array_equal(theirs.view(torch.uint8).numpy(), codes_NH)
        products = theirs.float() * torch.from_numpy(scale_N)[:, None]
        decoded = products.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(decoded, states.decode_fp8(codes_NH, scale_N))


def test_every_number_of_e4m3_and_every_tie_between_two_is_rounded_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    numbers = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy().astype(np.float64)
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = np.concatenate([np.nextafter(ties.astype(np.float32), np.float32(side)) for side in (0, 448)])
    values = np.concatenate([numbers, ties, beside]).astype(np.float32)
    values = np.concatenate([values, -values])
    theirs = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(states._to_e4m3(values[None])[0], theirs)


def test_fp8_of_what_was_decoded_from_fp8_is_the_same() -> None:
    for make in KINDS:
        once = there_and_back(make(np.random.default_rng(2), 60, 256), "fp8")
        assert np.array_equal(there_and_back(once, "fp8"), once)


def test_the_largest_value_of_a_state_is_the_largest_number() -> None:
    exact = gaussian(np.random.default_rng(3), 100, 128)
    codes_NH, scale_N = states.encode_fp8(exact)
    assert ((codes_NH & 0x7F).max(axis=1) == 0x7E).all()  # 448
    assert np.array_equal(scale_N, np.abs(states.bfloat16_to_float32(exact)).max(axis=1) / np.float32(448))
    numbers_NH, scales_NG = states.encode_int8(exact, 32)
    largest_NG = np.abs(numbers_NH.reshape(100, -1, 32)).max(axis=2)
    assert set(np.unique(largest_NG)) <= {126, 127}
    assert scales_NG.shape == (100, 4)


@pytest.mark.parametrize("codec", CODED)
def test_zeros_stay_zeros(codec: str) -> None:
    zeros = bits_of(np.zeros((3, 128)))
    mixed = bits_of(np.ones((3, 128)))
    mixed[1] = 0
    assert np.array_equal(there_and_back(zeros, codec), zeros)
    assert not there_and_back(mixed, codec)[1].any()
    assert states.coding_error(zeros, there_and_back(zeros, codec)).relative_rms == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, -1e30, 1e-30])
@pytest.mark.parametrize("codec", ROUNDING)
def test_numbers_that_no_teacher_gives_are_refused_by_their_state(codec: str, bad: float) -> None:
    values = np.ones((5, 128), dtype=np.float32)
    values[3] = 0
    values[3, 77] = bad
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    with pytest.raises(states.StateRangeError, match="raw or split") as refused:
        there_and_back(bits, codec)
    assert refused.value.row == 3
    assert np.array_equal(there_and_back(bits, "split"), bits)


@pytest.mark.parametrize("codec", ROUNDING)
def test_tiny_values_beside_ordinary_ones_become_zero(codec: str) -> None:
    values = np.full((1, 256), 1e-38)
    values[0, 0] = 1.0
    decoded = states.bfloat16_to_float32(there_and_back(bits_of(values), codec))
    assert decoded[0, 0] == pytest.approx(1.0, rel=2.0**-8)
    assert np.abs(decoded[0, 1:]).max() <= 1e-37


def test_groups_that_do_not_divide_a_state_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 32 do not divide a hidden size of 48"):
        states.encode_int8(bits_of(np.ones((1, 48))), 32)
    with pytest.raises(RecipeError, match="int8_128, whose groups of 128 do not divide the teacher's hidden size 96"):
        require_groups("int8_128", 96)
    for codec in ("raw", "split", "fp8", "int8_32"):
        require_groups(codec, 96)


def test_bytes_of_a_state_are_those_of_its_columns() -> None:
    exact = gaussian(np.random.default_rng(0), 1, 256)
    assert sum(array.nbytes for array in states.encode_fp8(exact)) == bytes_a_state("fp8", 256)
    for codec in ("int8_32", "int8_128"):
        assert sum(a.nbytes for a in states.encode_int8(exact, group_of(codec) or 0)) == bytes_a_state(codec, 256)
    assert bytes_a_state("raw", 256) == bytes_a_state("split", 256) == 512


def test_bytes_that_are_never_written_are_refused() -> None:
    codes_NH, scale_N = states.encode_fp8(bits_of(np.ones((2, 32))))
    with pytest.raises(ValueError, match="NaN"):
        states.decode_fp8(np.where(np.arange(32) == 5, 0xFF, codes_NH).astype(np.uint8), scale_N)
    for scale in (np.nan, np.inf, -1.0, 1e30):
        with pytest.raises(ValueError, match="scale of fp8"):
            states.decode_fp8(codes_NH, np.array([1.0, scale], dtype=np.float32))
    numbers_NH, scales_NG = states.encode_int8(bits_of(np.ones((2, 32))), 32)
    with pytest.raises(ValueError, match="-128"):
        states.decode_int8(np.where(np.arange(32) == 5, -128, numbers_NH).astype(np.int8), scales_NG)
    for bits in (0x7F80, 0x7FC0, 0x8001, 0xBF80, 0x7F00):
        with pytest.raises(ValueError, match="scale of int8"):
            states.decode_int8(numbers_NH, np.array([[0x3F80], [bits]], dtype=np.uint16))
    with pytest.raises(ValueError, match="groups"):
        states.decode_int8(numbers_NH, np.zeros((2, 3), dtype=np.uint16))


def test_a_cut_or_changed_frame_is_refused() -> None:
    high_NH, _ = states.split_planes(gaussian(np.random.default_rng(0), 20, 64))
    frame = states.compressed(high_NH)
    for damaged in (frame[:-1], frame[:5], b"", b"x" + frame[1:], frame + b"x"):
        with pytest.raises(ValueError, match="high bytes"):
            states.decompressed(damaged, high_NH.size)
    for n_bytes in (high_NH.size - 1, high_NH.size + 1):
        with pytest.raises(ValueError, match="high bytes"):
            states.decompressed(frame, n_bytes)
    with pytest.raises(ValueError, match="no state"):
        states.decompressed(frame, 0)


def test_two_thousand_damages_are_refused_or_change_no_length() -> None:
    """Readers compare the SHA-256 of a part before they decode; behind that, nothing crashes and nothing overruns."""
    rng = np.random.default_rng(0)
    high_NH, _ = states.split_planes(gaussian(rng, 20, 64))
    frame = states.compressed(high_NH)
    n_refused = 0
    for _ in range(2000):
        damaged = bytearray(frame)
        damaged[rng.integers(len(frame))] ^= 1 << int(rng.integers(8))
        try:
            assert states.decompressed(bytes(damaged), high_NH.size).size == high_NH.size
        except ValueError:
            n_refused += 1
    assert n_refused > 0


def test_bytes_are_what_they_were() -> None:
    """Golden: what is committed must be read, and written again, to the same bytes."""
    exact = bits_of([[0.0, 1.0, -2.5, 448.0], [0.001, -0.003, 0.0, 0.25]])
    codes_NH, scale_N = states.encode_fp8(exact)
    assert codes_NH.tolist() == [[0, 56, 194, 126], [62, 203, 0, 126]]
    assert scale_N.tobytes().hex() == "0000803f2549123a"  # 1 and 0.25 / 448
    assert states.decode_fp8(codes_NH, scale_N).tolist() == [[0, 16256, 49184, 17376], [14976, 47945, 0, 16000]]
    numbers_NH, scales_NG = states.encode_int8(exact, 2)
    assert numbers_NH.tolist() == [[0, 126, -1, 127], [42, -127, 0, 126]]
    assert scales_NG.tolist() == [[15362, 16482], [14279, 15106]]
    assert states.decode_int8(numbers_NH, scales_NG).tolist() == [[0, 16256, 49250, 17376], [14979, 47941, 0, 16000]]
    high_NH, low_NH = states.split_planes(exact)
    assert high_NH.tolist() == [[0, 63, 192, 67], [58, 187, 0, 62]]
    assert low_NH.tolist() == [[0, 128, 32, 224], [131, 69, 0, 128]]
    frame = bytes.fromhex("28b52ffd2008410000003fc0433abb003e")  # read whatever version of zstd writes now
    assert np.array_equal(states.decompressed(frame, 8).reshape(2, 4), high_NH)
