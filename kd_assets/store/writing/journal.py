"""The journal of a result that is being made: one line for each part that is whole on disk (FORMAT.md, F17 to F19)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kd_assets.contract import decode
from kd_assets.durable import append_line, atomic_write, read_if_there
from kd_assets.errors import ContractError, CorruptManifestError
from kd_assets.store.manifest import PartRecord


class Journal:
    """The file `path`, of the result with this fingerprint."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path, self._fingerprint = path, fingerprint

    def read(self) -> tuple[list[PartRecord], bool]:
        """Its records, the last one of each part, and whether every line is a record: a kill leaves half a line.

        Raises CorruptManifestError for records of another result.
        """
        records: dict[int, PartRecord] = {}
        is_whole = True
        for line in (read_if_there(self._path) or b"").splitlines(keepends=True):
            try:
                raw = json.loads(line)
                record = decode(PartRecord, raw["part"], where=str(self._path))
                if not line.endswith(b"\n"):
                    raise ValueError("no newline")
            except (ValueError, KeyError, TypeError, ContractError):
                is_whole = False
                continue
            if raw.get("fingerprint") != self._fingerprint:
                raise occupied(self._path, str(raw.get("fingerprint")), self._fingerprint)
            records[record.index] = record
        return list(records.values()), is_whole

    def append(self, record: PartRecord) -> None:
        append_line(self._path, self._line(record))

    def rewrite(self, records: Iterable[PartRecord]) -> None:
        """Make it hold these records and nothing else."""
        lines = [json.dumps(self._line(record), sort_keys=True) for record in records]
        atomic_write(self._path, "".join(f"{line}\n" for line in lines).encode())

    def _line(self, record: PartRecord) -> dict[str, Any]:
        part = {name: getattr(record, name) for name in PartRecord.__dataclass_fields__}
        return {"fingerprint": self._fingerprint, "part": part}


def occupied(path: Path, found: str, expected: str) -> CorruptManifestError:
    """The error for a folder that holds another result."""
    return CorruptManifestError(
        f"{path} is of fingerprint {found}, expected {expected}: something else is in this folder, and it is not "
        "overwritten; move it away"
    )
