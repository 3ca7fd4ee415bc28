"""Rounding to float16 by whole numbers is numpy's."""

from __future__ import annotations

import numpy as np

from kd_assets.store.codecs.half_floats import round_to_halves


def test_every_float16_every_tie_between_two_and_their_neighbours_are_rounded_as_numpy_does() -> None:
    bits = np.arange(0x8000, 0xFC00, dtype=np.uint16)  # -0 to the largest below infinity
    exact = bits.view(np.float16).astype(np.float64)
    ties = ((exact[1:] + exact[:-1]) / 2).astype(np.float32)
    numbers = [exact.astype(np.float32), ties, *(np.nextafter(ties, np.float32(to)) for to in (0, -np.inf))]
    logprobs = np.concatenate([*numbers, np.zeros(1, np.float32)]).reshape(1, -1)
    expected = logprobs.astype(np.float16)
    np.testing.assert_array_equal(round_to_halves(logprobs), expected.view(np.uint16))
    np.testing.assert_array_equal(logprobs, expected.astype(np.float32), err_msg="the numbers become what they are")
