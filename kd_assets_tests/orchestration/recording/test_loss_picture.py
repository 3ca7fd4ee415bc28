"""The picture of a student's losses: a PNG that a browser can read, with a line for each loss that there is."""

from __future__ import annotations

import base64
import re

from kd_assets.orchestration.recording.loss_picture import loss_picture_markdown

CURVE = {"steps": [1.0, 2.0, 3.0], "total": [4.0, 2.0, 1.0]}
RESPONSE = {"response": [3.0, 1.5, 0.5]}


def test_the_picture_is_a_png_in_markdown() -> None:
    found = re.fullmatch(r"!\[loss of the student\]\(data:image/png;base64,(.+)\)", loss_picture_markdown(CURVE))
    assert found is not None
    assert base64.b64decode(found[1]).startswith(b"\x89PNG")


def test_each_loss_that_was_trained_on_is_drawn_and_nothing_else() -> None:
    alone = loss_picture_markdown(CURVE)
    assert loss_picture_markdown(CURVE | RESPONSE) != alone
    assert loss_picture_markdown(CURVE | {"learning_rate": [1.0, 0.5, 0.1]}) == alone
