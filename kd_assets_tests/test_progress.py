"""Lines of progress of the command line."""

from __future__ import annotations

import pytest

from kd_assets.commands.progress import EVERY_S, Progress


def test_progress_is_shown_now_and_then_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    progress = Progress(clock=lambda: now[0])
    for at in range(1, 96):
        now[0] += EVERY_S / 10
        progress.tell(lambda elapsed_s, at=at: f"{at} in {elapsed_s:.1f} s", is_last=at == 95)  # type: ignore[misc]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) in (9, 10)
    assert lines[-1] == "95 in 19.0 s"


def test_words_that_are_not_shown_are_not_made(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(clock=lambda: 0.0).tell(lambda _: 1 / 0)  # type: ignore[arg-type,return-value]
    assert capsys.readouterr().err == ""
