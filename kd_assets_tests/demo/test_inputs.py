"""The demo's inputs as assets: the teacher's page has the curve of its training, also where it is reused."""

from __future__ import annotations

from pathlib import Path

from kd_assets.demo.inputs import training_curve

SAID = [{"event": "progress", "step": 8 * i, "loss": 8.0 - i} for i in range(1, 4)]
FINISHED = {"event": "finished", "held_out_loss": 4.3}


def test_a_training_has_a_picture_that_a_reused_teacher_keeps(tmp_path: Path) -> None:
    file = tmp_path / "teacher_curve.json"
    assert training_curve([FINISHED], file) is None, "a teacher of an earlier version"
    made = training_curve([*SAID, FINISHED], file)
    assert str(made).startswith("![loss of the teacher](data:image/png;base64,")
    assert training_curve([FINISHED], file) == made
    assert training_curve([SAID[0], FINISHED], file) is None, "one point is no line"
