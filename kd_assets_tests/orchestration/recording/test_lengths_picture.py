"""The picture of a recipe's lengths and learned shares: what it counts, of which shards, and that it can be seen."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from kd_assets.orchestration.recording import lengths_picture as module
from kd_assets.orchestration.recording.lengths_picture import (
    Lengths,
    evenly,
    lengths_of,
    lengths_picture,
    lengths_picture_markdown,
    merged,
)
from kd_assets.store import Manifest
from kd_assets.store.layout import MANIFEST_NAME
from kd_assets_tests.store import examples

FACTS: dict[str, Any] = {
    "n_documents": 4,
    "n_tokens": 20,
    "n_loss_tokens": 5,
    "length_histogram": [0, 1, 3],
    "learned_histogram": [2, 0, 0, 0, 0, 0, 0, 0, 0, 2],
}
LENGTHS = Lengths(
    n_shards=2,
    n_shards_there=2,
    n_documents=8,
    n_tokens=1_040,
    n_loss_tokens=520,
    length_histogram=(0, 2, 5, 1),
    learned_histogram=(2, 0, 0, 0, 0, 0, 0, 0, 0, 6),
)


def pixels(markdown: str) -> Any:
    found = re.fullmatch(r"!\[lengths and learned shares\]\(data:image/png;base64,(.+)\)", markdown)
    assert found is not None
    return imread(io.BytesIO(base64.b64decode(found[1])))


def commit(store: Path, n: int, **facts: Any) -> Manifest:
    """A shard with these facts of its documents."""
    folder, manifest = examples.commit(store, "shards_manifest", partition_key=f"tiny-{n:05d}")
    manifest = dataclasses.replace(manifest, facts=facts)
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return manifest


def test_histograms_of_shards_are_added_whatever_their_lengths() -> None:
    found = merged([FACTS, FACTS | {"length_histogram": [1, 2, 0, 1]}, {"n_documents": 9}], n_shards_there=3)
    assert found is not None
    assert (found.n_shards, found.n_documents, found.length_histogram) == (2, 8, (1, 3, 3, 1))
    assert (found.learned_histogram[0], found.learned_histogram[9], found.learned_share) == (4, 4, 0.25)
    assert found.in_words == "2 of 3 shards, 8 documents, 40 tokens, 25 % of them learned"


def test_shards_without_documents_or_of_an_earlier_version_make_no_picture(tmp_path: Path) -> None:
    empty = FACTS | {"n_documents": 0, "length_histogram": [], "learned_histogram": [0] * 10}
    assert merged([empty], n_shards_there=1) is None
    manifest = commit(tmp_path, 0)
    assert lengths_picture(tmp_path / "tiny", manifest.variant) is None


def test_the_current_shards_of_one_variant_are_counted(tmp_path: Path) -> None:
    manifests = [commit(tmp_path, n, **FACTS) for n in range(3)]
    (tmp_path / "tiny" / "shards_manifest" / manifests[0].variant / "tiny-00003").mkdir()
    found = lengths_of(tmp_path / "tiny", manifests[0].variant)
    assert found is not None
    assert (found.n_shards, found.n_shards_there, found.n_documents) == (3, 3, 12)
    assert lengths_picture(tmp_path / "tiny", manifests[0].variant) is not None


def test_of_many_shards_a_few_are_read_and_the_picture_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SHARDS", 2)
    manifests = [commit(tmp_path, n, **FACTS) for n in range(5)]
    found = lengths_of(tmp_path / "tiny", manifests[0].variant)
    assert found is not None
    assert found.in_words.startswith("2 of 5 shards, 8 documents")
    assert evenly("abcdef", 3) == ["a", "c", "e"]


def test_the_picture_has_a_transparent_ground_and_ink_that_is_neither_black_nor_white() -> None:
    picture = pixels(lengths_picture_markdown(LENGTHS))
    assert picture[0, 0, 3] == 0
    opaque = picture[picture[..., 3] == 1][:, :3]
    assert len(opaque) > 1_000
    brightness = opaque.mean(axis=1)
    assert 0.3 < brightness.min() <= brightness.max() < 0.75


def test_the_picture_shows_the_counts() -> None:
    one = pixels(lengths_picture_markdown(LENGTHS))
    other = pixels(lengths_picture_markdown(dataclasses.replace(LENGTHS, length_histogram=(0, 5, 2, 1))))
    assert not np.array_equal(one, other)
    assert np.array_equal(one, pixels(lengths_picture_markdown(LENGTHS)))


def test_one_document_and_very_long_ones_can_be_drawn() -> None:
    for lengths in ((1,), (0,) * 20 + (1,)):
        lengths_picture_markdown(dataclasses.replace(LENGTHS, length_histogram=lengths))
