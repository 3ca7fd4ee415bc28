"""What it took to make a recipe's results: sums over the teacher's passes, each of which feeds all caches of a shard.

A pass counts once, when its first result was committed: what was recoded later, or made by it for another cache, is of
the same pass. Passes whose results were replaced or deleted stand in the audit log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_assets.contract import CACHES
from kd_assets.store import Manifest
from kd_assets.store.manifest import COMMIT_EVENT, audited


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What it took to make results."""

    n_passes: int = 0
    n_tokens: int = 0
    wall_s: float = 0.0
    gpu_hours: float | None = None
    joules: float | None = None
    """None where no pass had a meter; of those that had one."""

    @property
    def tokens_per_s(self) -> float | None:
        """Of one teacher."""
        return self.n_tokens / self.wall_s if self.wall_s else None


@dataclass(slots=True)
class Passes:
    """Passes over partitions, by what tells them apart: their job, attempt, partition and time."""

    by_key: dict[tuple[Any, ...], tuple[str, Work]] = field(default_factory=dict)
    """When the first result of each was committed, and its work."""
    newest: dict[tuple[str, str], str] = field(default_factory=dict)
    """Asset and variant → when something was committed of it last, as the log has it."""

    def add_log(self, recipe_folder: Path) -> None:
        """The commits of the audit log. Raises StorageUnavailableError."""
        audited(recipe_folder, self._add_line, mentioning=COMMIT_EVENT)

    def _add_line(self, line: Mapping[str, Any]) -> None:
        asset, variant, provenance = line.get("asset"), line.get("variant"), line.get("provenance")
        if line["event"] != COMMIT_EVENT or not isinstance(asset, str) or not isinstance(variant, str):
            return
        self.newest[asset, variant] = max(line["time"], self.newest.get((asset, variant), ""))
        if asset in CACHES and isinstance(provenance, Mapping):
            # The log has no facts: how many GPUs had a meter is not there, the devices of the teacher are.
            n_gpus = None if provenance.get("gpu") is None else provenance.get("n_devices", 1)
            facts = {name: provenance.get(name) for name in ("wall_s", "joules")} | {"n_gpus": n_gpus}
            n_tokens = _number(line.get("n_tokens")) or 0
            self._add(line.get("partition_key"), line["time"], provenance, facts, n_tokens=int(n_tokens))

    def add(self, manifest: Manifest) -> None:
        """Of a cache: after the log, since it knows more of the same pass."""
        self._add(
            manifest.partition_key,
            manifest.created_at,
            manifest.provenance,
            manifest.facts,
            n_tokens=manifest.n_tokens,
        )

    def _add(
        self, key: object, committed_at: str, provenance: Mapping[str, Any], facts: Mapping[str, Any], *, n_tokens: int
    ) -> None:
        wall_s, n_gpus, joules = (_number(facts.get(name)) for name in ("wall_s", "n_gpus", "joules"))
        if wall_s is None:
            return
        of_pass = (key, provenance.get("submission_key"), provenance.get("attempt"), wall_s)
        gpu_hours = None if n_gpus is None else wall_s * n_gpus / 3600
        at, known = self.by_key.get(of_pass, (committed_at, Work()))
        self.by_key[of_pass] = (
            min(at, _committed_first(committed_at, provenance)),
            Work(
                n_passes=1,
                n_tokens=max(n_tokens, known.n_tokens),  # caches of one pass may have different max_length
                wall_s=wall_s,
                gpu_hours=known.gpu_hours if gpu_hours is None else gpu_hours,
                joules=known.joules if joules is None else joules,
            ),
        )

    def work(self, since: str = "") -> Work:
        chosen = [work for committed_at, work in self.by_key.values() if committed_at >= since]
        return Work(
            n_passes=len(chosen),
            n_tokens=sum(w.n_tokens for w in chosen),
            wall_s=sum(w.wall_s for w in chosen),
            gpu_hours=_sum_of_known(w.gpu_hours for w in chosen),
            joules=_sum_of_known(w.joules for w in chosen),
        )


def _committed_first(committed_at: str, provenance: Mapping[str, Any]) -> str:
    """Of a recoded result: when the one that the teacher's pass made was, which may be gone."""
    source = provenance.get("recoded_from")
    while isinstance(source, Mapping):
        if isinstance(made_at := source.get("created_at"), str):
            committed_at = min(committed_at, made_at)
        source = source.get("recoded_from")
    return committed_at


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _sum_of_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
