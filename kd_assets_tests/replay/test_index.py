"""The index finds every beginning of every document, whatever they have in common, and holds none of their tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kd_assets.replay.index import PrefixIndex, Uint32Array


def ids(*numbers: int) -> Uint32Array:
    return np.array(numbers, dtype=np.uint32)


def documents_of(rng: np.random.Generator, n: int) -> list[Uint32Array]:
    """Documents of few different ids, many of which begin alike, or are the beginning of others."""
    found: list[Uint32Array] = []
    preambles = [rng.integers(0, 3, size, dtype=np.uint32) for size in (1, 3, 8, 17, 70)]
    for _ in range(n):
        start = preambles[rng.integers(len(preambles))]
        rest = rng.integers(0, 3, rng.integers(0, 12), dtype=np.uint32)
        found.append(np.concatenate([start[: rng.integers(1, len(start) + 1)], rest]))
    return found


def begins(document: Uint32Array, sequence: Uint32Array) -> bool:
    return len(document) >= len(sequence) and bool(np.array_equal(document[: len(sequence)], sequence))


@pytest.mark.parametrize("seed", range(8))
def test_every_beginning_of_every_document_is_found_and_nothing_else(seed: int) -> None:
    rng = np.random.default_rng(seed)
    documents = documents_of(rng, 60)
    index = PrefixIndex(documents)
    assert len(index) == 60
    assert index.longest == max(map(len, documents))
    asked = [document[:n] for document in documents for n in range(1, len(document) + 1)]
    asked += [np.concatenate([document, ids(7)]) for document in documents]
    asked += [rng.integers(0, 3, rng.integers(1, 90), dtype=np.uint32) for _ in range(300)]
    for sequence in asked:
        beginning = index.beginning_with(sequence)
        there = [number for number, document in enumerate(documents) if begins(document, sequence)]
        proposed = [number for number in beginning.documents if begins(documents[number], sequence)]
        assert set(proposed) <= set(there)
        assert bool(proposed) == bool(there)
        # All that are proposed share what is known, of which there is no more among the powers of 2.
        known = beginning.known_length
        assert all(np.array_equal(documents[n][:known], sequence[:known]) for n in beginning.documents)
        longest = max(
            (
                length
                for length in (0, *(2**j for j in range(8)))
                if any(begins(d, sequence[:length]) for d in documents) and length <= len(sequence)
            ),
        )
        assert known == longest
        exact = [number for number, document in enumerate(documents) if np.array_equal(document, sequence)]
        assert index.exact(sequence).tolist() == exact


def test_a_preamble_that_all_documents_share_leaves_few_to_compare() -> None:
    rng = np.random.default_rng(0)
    preamble = rng.integers(0, 1000, 300, dtype=np.uint32)
    documents = [np.concatenate([preamble, rng.integers(0, 1000, 400, dtype=np.uint32)]) for _ in range(500)]
    index = PrefixIndex(documents)
    assert len(index.beginning_with(preamble[:100]).documents) == 1, "all are equal for twice as many ids"
    assert len(index.beginning_with(documents[3][:600]).documents) == 1, "their first 512 ids differ"
    assert len(index.beginning_with(documents[3][:305]).documents) == 500, "any of them may be it"


def test_documents_that_the_sequence_goes_on_from_are_named_the_longest_first() -> None:
    index = PrefixIndex([ids(1, 2, 3, 4), ids(1, 2, 3, 4, 5, 6), ids(1, 2, 9, 9, 9)])
    assert index.beginning_with(ids(1, 2, 3, 4, 5, 6, 7)).shorter.tolist() == [1, 0]
    assert index.beginning_with(ids(1, 2, 3, 4, 5, 6, 7)).documents.tolist() == []


def test_memory_grows_with_documents_and_not_with_their_tokens() -> None:
    rng = np.random.default_rng(0)
    sizes = {}
    for n, length in itertools.product((100, 200), (64, 4096)):
        documents = rng.integers(0, 1000, (n, length), dtype=np.uint32)
        sizes[n, length] = PrefixIndex(iter(documents)).n_bytes
    assert sizes[200, 64] == 2 * sizes[100, 64]
    assert sizes[100, 4096] < 2 * sizes[100, 64], "64 times as many tokens"


def test_a_cache_without_documents_has_an_index_in_which_nothing_is() -> None:
    index = PrefixIndex([])
    assert len(index) == index.longest == 0
    assert index.exact(ids(1)).tolist() == index.beginning_with(ids(1)).documents.tolist() == []
