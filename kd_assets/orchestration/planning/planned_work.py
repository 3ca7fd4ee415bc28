"""Results that must exist, and what is there of them: what a run goes on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kd_assets.contract import JobKind, Output, WorkUnit
from kd_assets.errors import NO_ANSWER, StoreError
from kd_assets.store import Manifest, committed

OnCommitted = Callable[[WorkUnit, Output, Manifest], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedWork:
    """What one job of a kind has to do, and the partitions that cannot be asked for, each with its reason."""

    kind: JobKind
    units: tuple[WorkUnit, ...]
    impossible: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unreachable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Partitions of which nobody can tell at the moment, since the files of their inputs cannot be reached."""

    def only(self, wanted: Callable[[Output], bool]) -> PlannedWork:
        """The units with the outputs that are `wanted`; without the units that have none left."""
        kept = [dataclasses.replace(u, outputs=tuple(o for o in u.outputs if wanted(o))) for u in self.units]
        return dataclasses.replace(self, units=tuple(u for u in kept if u.outputs))

    def with_more(self, more: PlannedWork) -> PlannedWork:
        """This and what was found out since of the partitions that could not be reached."""
        return dataclasses.replace(
            self,
            units=self.units + more.units,
            impossible={**self.impossible, **more.impossible},
            unreachable=more.unreachable,
        )

    def without_unreachable(self) -> PlannedWork:
        """Give up on the partitions that cannot be reached."""
        return dataclasses.replace(self, impossible={**self.impossible, **self.unreachable}, unreachable={})

    def survey(self, on_committed: OnCommitted = lambda unit, output, manifest: None) -> Survey:
        """What is committed already and what is missing, each result looked at once.

        A damaged manifest makes its partition impossible: it must not stop the others. `on_committed` is called with
        each result that is there, of partitions without a damaged one; so nobody has to read its manifest again, or to
        hold all of them. Where it cannot reach a file, the result counts as one that cannot be reached.
        """
        committed_outputs: list[tuple[WorkUnit, Output]] = []
        missing: set[str] = set()
        damaged: dict[str, str] = {}
        unreachable: dict[str, str] = {}
        for unit in self.units:
            found: list[tuple[Output, Manifest]] = []
            for output in unit.outputs:
                try:
                    manifest = committed(Path(output.path), output.fingerprint)
                except NO_ANSWER as e:
                    unreachable[output.path] = str(e)
                except StoreError as e:
                    damaged[unit.partition_key] = damaged_in_words(output, e)
                    break
                else:
                    if manifest is None:
                        missing.add(output.path)
                    else:
                        found.append((output, manifest))
            for output, manifest in found if unit.partition_key not in damaged else ():
                try:
                    on_committed(unit, output, manifest)
                except NO_ANSWER as e:
                    unreachable[output.path] = str(e)
                else:
                    committed_outputs.append((unit, output))
        whole = tuple(u for u in self.units if u.partition_key not in damaged)
        return Survey(
            committed=tuple(committed_outputs),
            missing=dataclasses.replace(self, units=whole, impossible={}).only(
                lambda o: o.path in missing or o.path in unreachable
            ),
            unreachable=unreachable,
            impossible={**self.impossible, **damaged},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """Planned work, sorted by what is there of it."""

    committed: tuple[tuple[WorkUnit, Output], ...]
    missing: PlannedWork
    """With what cannot be reached: who goes on to make it looks again."""
    unreachable: Mapping[str, str]
    """Folder of a result of which nobody can tell at the moment → why."""
    impossible: Mapping[str, str]
    """Partition → why it cannot be asked for."""


def damaged_in_words(output: Output, error: StoreError) -> str:
    """Why a result cannot be asked for whose manifest is damaged, and what to do about it."""
    return f"{error}. Move {output.path} away and materialize again"
