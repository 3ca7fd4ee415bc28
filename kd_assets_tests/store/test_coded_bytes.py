"""The bytes of coded top-k are what they were: a faster encoder writes the same, a faster decoder gives the same.

Rows are made of whole numbers, so that they are the same everywhere; those are left out whose tail byte hangs on how a
sum in float32 is rounded, which is for the processor's BLAS to say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kd_assets.store import Documents, coded, encode_topk
from kd_assets.store.codecs import topk_compact
from kd_assets.store.writing.documents import offsets_of

ROUNDING = 1e-5
"""More than the order of summation changes in a mass."""


def whole_numbers(name: str, *shape: int) -> npt.NDArray[np.int64]:
    """From 0 to 2³¹ - 1; numpy promises the stream of Philox for ever."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(int(np.prod(shape)))
    return (np.asarray(words, np.uint64) >> np.uint64(33)).astype(np.int64).reshape(shape)


def rows(m: int, k: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float16]]:
    """Ids and log-probabilities of flat, steep and peaked rows, some of whose masses are 1 and a little more."""
    first, steepness = whole_numbers(f"first {k}", 3 * m, 1) % 1600, 1 + whole_numbers(f"steep {k}", 3 * m, 1) % 400
    falls = whole_numbers(f"falls {k}", 3 * m, k) % steepness
    falls[:, 0] = 0
    logprobs = (-(first + falls.cumsum(axis=1)) / 256).astype(np.float16)
    codes = topk_compact.CODES[logprobs.view(np.uint16)]
    mass, raw = np.exp(logprobs.astype(np.float64)).sum(axis=1), topk_compact.RAW[codes].sum(axis=1)
    tail = 1 - np.minimum(mass, 1)
    bounds = (topk_compact.TAIL[:-2] + topk_compact.TAIL[1:-1]) / 2
    byte = np.searchsorted(bounds, tail)
    near = np.minimum(*(np.abs(tail - bounds[(byte - below).clip(0, len(bounds) - 1)]) for below in (0, 1)))
    of_tail = topk_compact.TAIL[byte]
    hangs = (
        (near < ROUNDING) & (mass < 1.001)
        | (np.abs(np.abs(raw - mass) - np.abs(1 - of_tail - mass)) < ROUNDING)
        | (np.abs(raw - 1) < k * ROUNDING)
        | (np.abs(mass - 1) < ROUNDING)
    )
    chosen = np.flatnonzero((mass < 1.003) & ~hangs)[:m]
    assert len(chosen) == m
    start, step = whole_numbers(f"ids {k}", 2, m, 1)
    ids = (start + (2 * step + 1) * np.arange(k)) % (topk_compact.MAX_ID + 1)  # an odd step: all different
    return ids.astype(np.uint32), logprobs[chosen]


def digest(arrays: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(array if isinstance(array, bytes) else np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize(
    ("k", "m", "stored", "decoded"),
    [
        (1, 500, "88c9ab5ab6e2ee64", "755fa0851c2fee71"),
        (2, 501, "41786230c0eeb913", "3d1e0678987213ef"),
        (5, 502, "831cf644a54db2a8", "22ac3ef60c13eb77"),
        (16, 9_001, "5c7c4fab219d05c4", "56ae8f58a43011e2"),
        (50, 1_000, "64ea7f37a959a141", "4f0f011e6f4987f8"),
        (64, 8_200, "1947446c0c17261f", "d4a6aa5384ba9f10"),
    ],
)
def test_coded_rows_have_the_bytes_that_they_always_had(k: int, m: int, stored: str, decoded: str) -> None:
    made = topk_compact.encode(*rows(m, k))
    assert digest([*made.ids, *made.codes, made.tails_M]) == stored
    logprobs_Mk, masses_M = topk_compact.decode_logprobs(made.codes, made.tails_M)
    assert digest([logprobs_Mk, topk_compact.decode_ids(made.ids), masses_M.astype(np.float32)]) == decoded


def test_the_columns_of_a_coded_part_have_the_bytes_that_they_always_had() -> None:
    ids_Mk, logprobs_Mk = rows(2_000, 16)
    n_tokens = np.array([1, 1_001, 1, 1_001], np.int64)
    input_ids = (whole_numbers("input", int(n_tokens.sum())) % 4096).astype(np.uint32)
    is_next = np.ones(len(input_ids), np.bool_)
    is_next[offsets_of(n_tokens)[:-1]] = False
    slot = whole_numbers("slots", 2_000) % 20
    input_ids[is_next] = np.where(slot < 16, ids_Mk[np.arange(2_000), slot % 16], input_ids[is_next])
    table = encode_topk(
        Documents(
            document_ids=["a", "b", "c", "d"],
            offsets=offsets_of(n_tokens),
            input_ids=input_ids,
            loss_mask=input_ids % 3 > 0,
        ),
        topk_ids_Mk=ids_Mk,
        topk_logprobs_Mk=logprobs_Mk,
        logsumexp_M=(whole_numbers("sums", 2_000) % 4096 / 128).astype(np.float32),
        target_logprob_M=(-whole_numbers("targets", 2_000) % 4096 / 128).astype(np.float32) - 40,
    )
    made = coded(table, "compact")
    assert (
        digest(repr(made.stored[name].to_pylist()).encode() for name in made.stored.schema.names) == "331779978efeffbb"
    )
    assert (
        digest(repr(made.decoded[name].to_pylist()).encode() for name in made.decoded.schema.names)
        == "66cdfb80dd90dbb1"
    )


def test_the_error_that_is_measured_on_the_way_is_that_of_what_is_decoded() -> None:
    ids_Mk, logprobs_Mk = rows(3 * 2_048 + 1, 16)  # a row that is alone after three runs
    made, decoded_Mk, kl_M = topk_compact.encode_measured(ids_Mk, logprobs_Mk)
    found_Mk, tails_M = topk_compact.decode_logprobs(made.codes, made.tails_M)
    np.testing.assert_array_equal(decoded_Mk.view(np.uint16), found_Mk.view(np.uint16))
    np.testing.assert_array_equal(kl_M, topk_compact.divergence(logprobs_Mk, found_Mk, tails_M))
    alone = topk_compact.encode(ids_Mk, logprobs_Mk)
    assert digest([*made.ids, *made.codes, made.tails_M]) == digest([*alone.ids, *alone.codes, alone.tails_M])


def test_a_mass_is_given_the_tail_byte_between_whose_boundaries_it_lies() -> None:
    bounds = (topk_compact.TAIL[:-2] + topk_compact.TAIL[1:-1]) / 2
    nearby = [np.nextafter(bounds, to) for to in (0, 1)]
    mass_M = 1 - np.concatenate([bounds, *nearby, np.linspace(0, 1, 10_001)])
    expected = np.searchsorted(bounds, 1 - mass_M)
    expected[(expected == 0) & (mass_M < 1)] = 1  # nothing is impossible that was possible
    codes_that_say_no_mass = np.ones_like(mass_M)
    np.testing.assert_array_equal(topk_compact._tails_of(mass_M, codes_that_say_no_mass, 1), expected)
