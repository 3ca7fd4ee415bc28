"""One picture across shards: a panel each figure that is known."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from kd_assets.cards.contents import Measured
from kd_assets.orchestration.recording.loss_picture import loss_picture_markdown
from kd_assets.orchestration.recording.shards_picture import shards_picture_markdown

RNG = np.random.default_rng(0)
MEASURED = [
    Measured(
        partition_key=f"s{i}",
        tokens_per_s=float(4800 + 60 * RNG.standard_normal()),
        largest_difference=float(RNG.uniform(0.3, 0.6)),
        kept_mass=float(RNG.uniform(0.985, 0.99)),
    )
    for i in range(40)
]
CURVE = {"steps": [1.0, 2.0, 3.0], "total": [4.0, 2.0, 1.0], "response": [3.0, 1.5, 0.5]}


def pixels(markdown: str | None) -> Any:
    """float [height, width, RGBA]."""
    found = re.fullmatch(r"!\[[^\]]+\]\(data:image/png;base64,(.+)\)", str(markdown))
    assert found is not None
    return np.asarray(matplotlib.image.imread(io.BytesIO(base64.b64decode(found[1]))))


def test_the_picture_names_its_panels() -> None:
    assert str(shards_picture_markdown(MEASURED)).startswith("![tokens/s, largest difference, kept probability of each")
    without = [
        Measured(partition_key=m.partition_key, tokens_per_s=None, largest_difference=1.0, kept_mass=None)
        for m in MEASURED
    ]
    assert str(shards_picture_markdown(without)).startswith("![largest difference of each shard]")
    assert pixels(shards_picture_markdown(without)).shape[0] < pixels(shards_picture_markdown(MEASURED)).shape[0]


@pytest.mark.parametrize("known", [[], MEASURED[:1]])
def test_of_one_shard_there_is_no_picture_across_them(known: list[Measured]) -> None:
    assert shards_picture_markdown(known) is None
    nothing = Measured(partition_key="s", tokens_per_s=None, largest_difference=None, kept_mass=None)
    assert shards_picture_markdown([nothing, nothing]) is None


@pytest.mark.parametrize("draw", [lambda: shards_picture_markdown(MEASURED), lambda: loss_picture_markdown(CURVE)])
def test_pictures_are_readable_on_white_and_on_black(draw: Callable[[], str | None]) -> None:
    found = pixels(draw())
    assert found[0, 0, 3] == 0, "the ground is the page's"
    opaque = found[found[..., 3] == 1][:, :3]
    brightness = opaque @ np.array([0.2126, 0.7152, 0.0722])
    assert len(opaque) > 1_000
    assert 0.3 < brightness.min() <= brightness.max() < 0.75
