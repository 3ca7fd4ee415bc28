"""`dg … --help` says what can be given: typer lays the pages out, and not every version of it knows options of dg."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

DG = "from dagster_dg_cli.cli import main; main()"
"""In a process of its own: what typer does as it is imported warns, and here that is an error."""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([], {"--version", "launch", "scaffold"}),
        (["launch"], {"--assets", "--partition-range", "--config"}),
        (["scaffold", "defs", "kd_assets.TeacherCaches"], {"--model-id", "--source"}),
    ],
)
def test_the_help_of_dg_lists_options_and_commands(command: list[str], said: set[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DG, *command, "--help"],
        env=os.environ | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert said <= set(done.stdout.split())
