"""The journal of a result that is being made: one line for each part that is whole on disk (FORMAT.md, F17 to F19)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kd_assets.contract import decode, parse_json
from kd_assets.durable import append_line, atomic_write, read_if_there
from kd_assets.errors import ContractError, CorruptManifestError
from kd_assets.store.fingerprint import fingerprint
from kd_assets.store.manifest import PartRecord

_SELF_HASH = "line_sha256"
MAKER = "recoded_from"
"""In a line: the fingerprint of the result that the part was made of. Lines of the teacher's pass have none."""


class Journal:
    """The file `path`, of the result with the fingerprint `result`, which is made of the result `recoded_from`; None
    where the teacher's pass makes it, or nobody could but one."""

    def __init__(self, path: Path, result: str, *, recoded_from: str | None = None) -> None:
        self._path, self._fingerprint, self._recoded_from = path, result, recoded_from

    def read(self) -> tuple[list[PartRecord], bool, list[PartRecord]]:
        """Its records, the last one of each part; whether every line is a record: a kill leaves half a line, and a line
        that is not as it was written would hand wrong statistics on to the manifest; and of all parts those that
        another has made, which are none of the first.

        Raises CorruptManifestError for records of another result.
        """
        records: dict[int, PartRecord] = {}
        makers: dict[int, object] = {}
        is_whole = True
        for line in (read_if_there(self._path) or b"").splitlines(keepends=True):
            try:
                raw = parse_json(line)
                claimed = raw.pop(_SELF_HASH, None)  # journals of earlier versions have none
                if claimed is not None and claimed != fingerprint(raw):
                    raise ValueError("it was changed after it was written")
                record = decode(PartRecord, raw["part"], where=str(self._path))
                if not line.endswith(b"\n"):
                    raise ValueError("no newline")
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ContractError):
                is_whole = False
                continue
            if raw.get("fingerprint") != self._fingerprint:
                raise occupied(self._path, str(raw.get("fingerprint")), self._fingerprint)
            if claimed is None:
                is_whole = False
                continue
            records[record.index], makers[record.index] = record, raw.get(MAKER)
        own = [record for index, record in records.items() if makers[index] == self._recoded_from]
        others = [record for index, record in records.items() if makers[index] != self._recoded_from]
        return own, is_whole, others

    def append(self, record: PartRecord) -> None:
        append_line(self._path, self._line(record))

    def rewrite(self, records: Iterable[PartRecord]) -> None:
        """Make it hold these records and nothing else."""
        lines = [json.dumps(self._line(record), sort_keys=True) for record in records]
        atomic_write(self._path, "".join(f"{line}\n" for line in lines).encode())

    def _line(self, record: PartRecord) -> dict[str, Any]:
        part = {name: getattr(record, name) for name in PartRecord.__dataclass_fields__}
        line: dict[str, Any] = {"fingerprint": self._fingerprint, "part": part}
        if self._recoded_from is not None:
            line[MAKER] = self._recoded_from
        return line | {_SELF_HASH: fingerprint(line)}


def occupied(path: Path, found: str, expected: str) -> CorruptManifestError:
    """The error for a folder that holds another result."""
    return CorruptManifestError(
        f"{path} is of fingerprint {found}, expected {expected}: something else is in this folder, and it is not "
        "overwritten; move it away"
    )
