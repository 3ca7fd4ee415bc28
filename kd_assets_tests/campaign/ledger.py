"""What a campaign has done so far, in one file of JSON lines, and the summary of it.

A campaign that was killed goes on: rounds are numbered, each does what its number says, and one that is in the file is
done. Numbers that a kill left out are done by whoever goes on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""`campaign`, `round`, `class`, `what`, `wall_s`, the counts of `COUNTS` that are not 0, and of a bad round `bad`:
what is wrong, in words."""

COUNTS = (
    "rounds",
    "kills",
    "faults",
    "bytes_differing",
    "made_twice",
    "lost",
    "litter",
    "stuck",
    "damages",
    "found",
    "harmless",
    "believed",
    "silent",
    "bare",
    "crashed",
)
"""What is counted. `believed`: other numbers behind hashes that were made anew, which the format allows."""
BAD = ("bytes_differing", "made_twice", "lost", "litter", "stuck", "silent", "bare", "crashed")
"""Those that must be 0."""


class Ledger:
    """The rounds of one folder and one seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.seed = folder, seed
        self._file = folder / "rounds.jsonl"
        seed_file = folder / "seed"
        if seed_file.exists() and int(seed_file.read_text()) != seed:
            raise ValueError(
                f"{folder} has a campaign of seed {seed_file.read_text().strip()}: name it, or another folder"
            )
        seed_file.write_text(f"{seed}\n")
        self.records = list(_read(self._file))

    def add(self, record: Record) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(record, sort_keys=True) + "\n")
        self.records.append(record)

    def next_rounds(self, campaign: str) -> Iterator[int]:
        """Numbers that have no record, ascending, without end."""
        done = {r["round"] for r in self.records if r["campaign"] == campaign}
        number = 0
        while True:
            if number not in done:
                yield number
            number += 1

    def used_s(self, campaign: str) -> float:
        """Time that the rounds took."""
        return sum(float(r["wall_s"]) for r in self.records if r["campaign"] == campaign)

    def summary(self) -> dict[str, Any]:
        return summarise(self.records, self.folder, self.seed)


def summarise(records: Iterable[Record], folder: Path, seed: int) -> dict[str, Any]:
    """Totals, a table by class, and every bad round with the command that repeats it."""
    totals: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    table: dict[str, Counter[str]] = {}
    bad = []
    for record in records:
        counts = {name: record[name] for name in COUNTS if record.get(name)}
        totals.update(counts)
        table.setdefault(f"{record['campaign']}: {record['class']}", Counter()).update(counts)
        if record.get("bad"):
            bad.append(
                {
                    "campaign": record["campaign"],
                    "class": record["class"],
                    "what": record["what"],
                    "bad": record["bad"],
                    "repeat": f"python -m kd_assets_tests.campaign --folder {folder}-again --seed {seed} "
                    f"--only {record['campaign']} --round {record['round']}",
                }
            )
    return {
        **{name: totals[name] for name in COUNTS},
        "ok": not any(totals[name] for name in BAD),
        "by_class": {name: dict(sorted(counts.items())) for name, counts in sorted(table.items())},
        "bad": bad,
    }


def _read(path: Path) -> Iterator[Record]:
    """Whole lines only: a kill may leave half of the last one."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    for line in whole.splitlines():
        yield json.loads(line)
