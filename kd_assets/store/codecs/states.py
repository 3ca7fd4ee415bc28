"""Hidden states in fewer bytes: the numbers of the codecs `split`, `fp8` and `int8`, each encoded and decoded.

Pure functions of numpy arrays; nothing here knows of files. States are the bits of bfloat16 numbers, uint16 [N, H]; so
is what decoding gives. Shape suffixes: N states, H hidden size, G groups of a state.

- `split` loses nothing: the high bytes, sign and exponent, are few different numbers and are compressed; the low ones
  are noise and are not.
- `fp8` is OCP's e4m3 (Micikevicius et al. 2022, "FP8 formats for deep learning", without infinities) with a float32
  scale for each state: its largest magnitude over 448, the largest number of e4m3, so that none saturates.
- `int8` has whole numbers from -127 to 127, with a scale for each group of consecutive values: the group's largest
  magnitude over 127, rounded up to bfloat16.

Both of the last are rounded to nearest, ties to even, and so is what they decode to, to bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kd_assets.store.codecs.state_codec import group_of

Uint16Array = npt.NDArray[np.uint16]
Uint8Array = npt.NDArray[np.uint8]
Int8Array = npt.NDArray[np.int8]
Float32Array = npt.NDArray[np.float32]

LARGEST_E4M3 = 448.0
LARGEST_INT8 = 127
LARGEST_STATE, SMALLEST_STATE = 2.0**40, 2.0**-40
"""Of the largest magnitude of a state that `fp8` and `int8` take; 0 they take, too. Teachers' lie between 10⁻⁴ and 10⁶:
what is beyond is a fault of the teacher, and is not to be hidden by rounding."""

_CHUNK = 1 << 16
"""Values that are worked on together: what stays in a core's cache."""

_MAGNITUDE, _INFINITY = np.uint16(0x7FFF), np.uint16(0x7F80)
_E4M3_NAN = np.uint8(0x7F)
_ZSTD = pa.Codec("zstd", compression_level=1)
"""Neighbours say nothing of each other, only frequencies compress: level 3 looks for repetitions, and gives 2 % more
bytes. Exponents apart from the signs give 1 % more as well."""


class StateRangeError(ValueError):
    """A state that a codec cannot hold."""

    def __init__(self, message: str, *, row: int) -> None:
        super().__init__(message)
        self.row = row
        """Its index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodingError:
    """How far decoded states lie from the exact ones."""

    squares: float
    """Sum of the squared differences."""
    exact_squares: float
    """Sum of the squares of the exact values."""
    max_state: float
    """Largest over the states: norm of the difference over the norm of the exact state; 0 for states of zeros."""
    max_abs: float

    @property
    def relative_rms(self) -> float:
        """Root of the mean square of the difference over that of the exact values."""
        return math.sqrt(self.squares / self.exact_squares) if self.exact_squares else 0.0

    @staticmethod
    def of_all(errors: Sequence[CodingError]) -> CodingError:
        """Of all the states that these are of."""
        return CodingError(
            squares=sum(error.squares for error in errors),
            exact_squares=sum(error.exact_squares for error in errors),
            max_state=max((error.max_state for error in errors), default=0.0),
            max_abs=max((error.max_abs for error in errors), default=0.0),
        )


def split_planes(bits_NH: Uint16Array) -> tuple[Uint8Array, Uint8Array]:
    """The high bytes (sign, upper 7 bits of the exponent) and the low ones (its last bit, mantissa); uint8 [N, H]."""
    return (bits_NH >> 8).astype(np.uint8), bits_NH.astype(np.uint8)


def joined_planes(high_NH: Uint8Array, low_NH: Uint8Array) -> Uint16Array:
    """uint16 [N, H]: what `split_planes` took apart."""
    bits_NH = np.empty(low_NH.shape, dtype=np.uint16)
    for rows in _chunks(bits_NH):
        np.left_shift(high_NH[rows], 8, out=bits_NH[rows], dtype=np.uint16)
        bits_NH[rows] |= low_NH[rows]
    return bits_NH


def compressed(plane: Uint8Array) -> bytes:
    """The bytes of a plane as one zstd frame; empty for an empty plane."""
    return bytes(_ZSTD.compress(np.ascontiguousarray(plane).reshape(-1), asbytes=True)) if plane.size else b""


def decompressed(data: Any, n_bytes: int) -> Uint8Array:
    """uint8 [n_bytes]: the plane that was compressed. Raises ValueError for what is no such frame, or one of
    another length."""
    if not n_bytes:
        if len(data):
            raise ValueError(f"high bytes of no state take {len(data)} bytes")
        return np.zeros(0, dtype=np.uint8)
    try:
        buffer = _ZSTD.decompress(data, decompressed_size=n_bytes)
    except (OSError, pa.ArrowException, ValueError) as e:
        raise ValueError(f"compressed high bytes are not {n_bytes} bytes: {e}") from e
    if len(buffer) != n_bytes:
        raise ValueError(f"compressed high bytes are {len(buffer)} bytes, expected {n_bytes}")
    return np.frombuffer(buffer, dtype=np.uint8)


def encode_fp8(bits_NH: Uint16Array) -> tuple[Uint8Array, Float32Array]:
    """Bits of e4m3, uint8 [N, H], and the scales, float32 [N]: state = number · scale.

    Raises StateRangeError, which names the state, for NaN, infinity and what no teacher gives.
    """
    magnitude_N = _largest(bits_NH, codec="fp8")
    scale_N = magnitude_N / np.float32(LARGEST_E4M3)
    divisor_N: Float32Array = np.where(magnitude_N > 0, scale_N, np.float32(1))
    codes_NH = np.empty(bits_NH.shape, dtype=np.uint8)
    for rows in _chunks(bits_NH):
        codes_NH[rows] = _to_e4m3(bfloat16_to_float32(bits_NH[rows]) / divisor_N[rows, None])
    return codes_NH, scale_N


def decode_fp8(codes_NH: Uint8Array, scale_N: Float32Array) -> Uint16Array:
    """uint16 [N, H]. Raises ValueError for bits and scales that are no finite numbers."""
    if not (scale_N >= 0).all() or not (scale_N <= np.float32(LARGEST_STATE)).all():
        raise ValueError("a scale of fp8 states is no number that a state can have")
    if ((codes_NH & 0x7F) == _E4M3_NAN).any():
        raise ValueError("an fp8 state holds NaN, which is never written")
    bits_NH = np.empty(codes_NH.shape, dtype=np.uint16)
    for rows in _chunks(bits_NH):
        # what each of the 256 bytes is in this state: one look-up a value in the place of a product and a rounding
        bits_C256 = float32_to_bfloat16(_E4M3 * scale_N[rows, None])
        at = codes_NH[rows].astype(np.intp)
        at += np.arange(len(at))[:, None] * len(_E4M3)
        np.take(bits_C256.reshape(-1), at, out=bits_NH[rows], mode="clip")
    return bits_NH


def encode_int8(bits_NH: Uint16Array, group: int) -> tuple[Int8Array, Uint16Array]:
    """Whole numbers, int8 [N, H], and the scales of groups, bits of bfloat16, uint16 [N, G]: state = number · scale.

    Raises StateRangeError as `encode_fp8` does, ValueError for a group that does not divide H.
    """
    n_groups = _groups(bits_NH.shape[1], group)
    _largest(bits_NH, codec="int8")
    codes_NH = np.empty(bits_NH.shape, dtype=np.int8)
    scale_NG = np.empty((len(bits_NH), n_groups), dtype=np.uint16)
    for rows in _chunks(bits_NH):
        values = bfloat16_to_float32(bits_NH[rows]).reshape(-1, n_groups, group)
        least = np.abs(values).max(axis=2) / np.float32(LARGEST_INT8)
        # up, so that no number is above 127; 2^-126 keeps the division out of subnormal numbers
        scale = (least.view(np.uint32) + np.uint32(0xFFFF)) >> 16
        scale_NG[rows] = np.where(least >= np.float32(2.0**-126), scale, 0)
        divisor = bfloat16_to_float32(scale_NG[rows])
        divisor[divisor == 0] = np.inf
        codes_NH[rows] = np.rint(values / divisor[:, :, None]).reshape(-1, bits_NH.shape[1])
    return codes_NH, scale_NG


def decode_int8(codes_NH: Int8Array, scale_NG: Uint16Array) -> Uint16Array:
    """uint16 [N, H]. Raises ValueError for numbers and scales that are never written."""
    n_groups = scale_NG.shape[1]
    group = codes_NH.shape[1] // n_groups if n_groups else 0
    if not n_groups or group * n_groups != codes_NH.shape[1]:
        raise ValueError(f"{n_groups} groups do not divide states of {codes_NH.shape[1]} values")
    if (bfloat16_to_float32(scale_NG.reshape(-1)) > np.float32(LARGEST_STATE)).any() or (scale_NG >= _INFINITY).any():
        raise ValueError("a scale of int8 states is no number that a state can have")
    bits_NH = np.empty(codes_NH.shape, dtype=np.uint16)
    for rows in _chunks(bits_NH):
        codes = codes_NH[rows]
        if codes.size and codes.min() < -LARGEST_INT8:
            raise ValueError("an int8 state holds -128, which is never written")
        values = codes.astype(np.float32).reshape(-1, n_groups, group)
        values *= bfloat16_to_float32(scale_NG[rows])[:, :, None]
        bits_NH[rows] = float32_to_bfloat16(values).reshape(-1, codes.shape[1])
    return bits_NH


def coding_error(exact_NH: Uint16Array, decoded_NH: Uint16Array) -> CodingError:
    """What coding did to these states. `exact_squares` are 0 where nothing was done to any."""
    squares = exact_squares = max_state = max_abs = 0.0
    if np.array_equal(exact_NH, decoded_NH):
        return CodingError(squares=0.0, exact_squares=0.0, max_state=0.0, max_abs=0.0)
    for rows in _chunks(exact_NH):
        exact = bfloat16_to_float32(exact_NH[rows])
        difference = bfloat16_to_float32(decoded_NH[rows])
        difference -= exact
        # float32 holds the squares: codecs that round refuse states beyond `LARGEST_STATE`
        of_states, of_exact = (np.einsum("nh,nh->n", x, x, dtype=np.float32) for x in (difference, exact))
        ratio_N = of_states / np.where(of_exact > 0, of_exact, 1)
        squares += float(of_states.sum(dtype=np.float64))
        exact_squares += float(of_exact.sum(dtype=np.float64))
        max_state = max(max_state, math.sqrt(float(ratio_N.max())))
        max_abs = max(max_abs, float(difference.max()), -float(difference.min()))
    return CodingError(squares=squares, exact_squares=exact_squares, max_state=max_state, max_abs=max_abs)


def rounding_steps(decoded_NH: Uint16Array, codec: str) -> Float32Array:
    """float32 [N, H]: the distance between neighbours of a decoded number among those that its codec has; a little more
    where only the scale that was stored would tell it. Of `fp8` and `int8_<group>`."""
    magnitude_NH = np.abs(bfloat16_to_float32(decoded_NH))
    if codec == "fp8":  # 4 significant bits; below 2^-6 scales, multiples of 2^-9
        scale_N1 = magnitude_NH.max(axis=1, initial=0, keepdims=True) / np.float32(LARGEST_E4M3)
        steps_NH: Float32Array = np.maximum(magnitude_NH / 8, scale_N1 * np.float32(2.0**-9))
        return steps_NH
    group = group_of(codec)
    assert group is not None
    largest_NG = magnitude_NH.reshape(len(magnitude_NH), -1, group).max(axis=2)
    return np.repeat(largest_NG / np.float32(LARGEST_INT8 - 1), group, axis=1)  # rounded up, a scale makes 126 of 127


def bfloat16_to_float32(bits: Uint16Array) -> Float32Array:
    """The numbers whose bfloat16 bits these are; exact."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def float32_to_bfloat16(values: Float32Array) -> Uint16Array:
    """uint16: bits of the nearest bfloat16, ties to even. Finite numbers only."""
    wide = values.view(np.uint32)
    return ((wide + np.uint32(0x7FFF) + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


def _to_e4m3(values: Float32Array) -> Uint8Array:
    """uint8: bits of the nearest e4m3, ties to even, of numbers from -448 to 448."""
    wide = values.view(np.uint32)
    magnitude = wide & np.uint32(0x7FFFFFFF)
    # e4m3 keeps 3 of float32's 23 bits of mantissa, and its exponent has a bias of 7 and not of 127
    rounded = magnitude >> 20
    rounded &= 1
    rounded += np.uint32((0x7FFFF - (120 << 23)) % 2**32)
    rounded += magnitude
    rounded >>= 20
    codes = rounded.astype(np.uint8)
    # below 2^-6 its numbers are multiples of 2^-9, which is what the last bit of a float32 near 2^14 is worth
    multiples = (magnitude.view(np.float32) + np.float32(2.0**14)).view(np.uint32).astype(np.uint8)
    np.copyto(codes, multiples, where=magnitude < np.float32(2.0**-6).view(np.uint32))
    codes |= (wide >> 24).astype(np.uint8) & np.uint8(0x80)
    return codes


def _e4m3_numbers() -> Float32Array:
    """float32 [256]: the number of each byte; 0 in the place of the two NaN."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 0xF, codes & 7
    numbers = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    numbers[(codes & 0x7F) == _E4M3_NAN] = 0
    return np.where(codes < 128, numbers, -numbers).astype(np.float32)


_E4M3 = _e4m3_numbers()


def _largest(bits_NH: Uint16Array, *, codec: str) -> Float32Array:
    """float32 [N]: the largest magnitude of each state. Raises StateRangeError where that is none of a state."""
    magnitude_N = np.zeros(len(bits_NH), dtype=np.uint16)
    for rows in _chunks(bits_NH):
        (bits_NH[rows] & _MAGNITUDE).max(axis=1, out=magnitude_N[rows])
    largest_N = bfloat16_to_float32(magnitude_N)
    is_odd_N = (
        (magnitude_N >= _INFINITY) | (largest_N > LARGEST_STATE) | ((largest_N < SMALLEST_STATE) & (largest_N > 0))
    )
    if is_odd_N.any():
        row = int(is_odd_N.argmax())
        found = "NaN or infinity" if magnitude_N[row] >= _INFINITY else f"{largest_N[row]:.3g} as its largest value"
        raise StateRangeError(
            f"a state has {found}, and codec {codec} holds states of {SMALLEST_STATE:.0e} to {LARGEST_STATE:.0e}: look "
            "at the teacher, or use the codec raw or split, which hold every number",
            row=row,
        )
    return largest_N


def _groups(hidden_size: int, group: int) -> int:
    if group < 1 or hidden_size % group:
        raise ValueError(f"groups of {group} do not divide a hidden size of {hidden_size}")
    return hidden_size // group


def _chunks(array_NH: npt.NDArray[Any]) -> list[slice]:
    rows = max(1, _CHUNK // max(1, array_NH.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(array_NH), rows)]
