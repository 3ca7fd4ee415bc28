"""The folder of a submission, and the name of every file in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A job that was handed to the scheduler once; its folder holds everything about it and is never deleted.

    The folder is `<jobs folder>/<recipe>/<kind>-<key>/<number>/`: the same work submitted again after an end is the
    next number.
    """

    folder: Path

    @property
    def job_file(self) -> Path:
        return self.folder / "job.json"

    @property
    def spec_file(self) -> Path:
        return self.folder / "spec.json"

    @property
    def events_folder(self) -> Path:
        return self.folder / "events"

    @property
    def log_folder(self) -> Path:
        return self.folder / "logs"
