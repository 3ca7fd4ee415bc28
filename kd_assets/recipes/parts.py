"""The parts of a project's defs folder, each loaded without the others where not all can be loaded together.

Dagster loads all or nothing. A part is what it takes for one: a folder with a `defs.yaml`, or a Python file, at any
depth. The invariant: what is not left out is exactly what it is in a folder without the broken ones.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import dagster as dg

from kd_assets.dagster_internals import components_only

T = TypeVar("T")
YAML_NAMES = ("defs.yaml", "defs.yml", "component.yaml")


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded(Generic[T]):
    """What was made of a defs folder."""

    folder: Path
    """The defs folder."""
    found: T
    left_out: Mapping[Path, Exception]
    """Parts without which it was made, and why: what each raises by itself, or beside those before it."""
    as_a_whole: Exception | None = None
    """What Dagster says where all parts are loaded together."""


def load_parts(project: Path, make: Callable[[dg.ComponentTree], T]) -> Loaded[T]:
    """What `make` makes of the components of a dg project, without those parts with which it raises.

    `project`: a path in it. Raises whatever Dagster does where it cannot be imported.
    """
    with warnings.catch_warnings():
        # Backfill policies and partitioned checks are beta in Dagster 1.13; its version is pinned.
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        tree = dg.ComponentTree.for_project(project)
        folder = tree.defs_module_path
        try:
            return Loaded(folder=folder, found=make(tree), left_out={})
        except Exception as e:  # noqa: BLE001  # a component may raise anything, and takes down itself alone
            as_a_whole = e
        found, left_out = _without_the_broken(folder, lambda: make(dg.ComponentTree.for_project(project)))
        return Loaded(folder=folder, found=found, left_out=left_out, as_a_whole=as_a_whole)


def _without_the_broken(folder: Path, make: Callable[[], T]) -> tuple[T, dict[Path, Exception]]:
    left_out: dict[Path, Exception] = {}
    good: list[Path] = []
    for part in _parts(folder, make):
        if (error := _failure(make, [part])) is None:
            good.append(part)
        else:
            left_out[part] = error
    while True:
        try:
            with components_only(_leads_to(good)):
                return make(), left_out
        except Exception as e:
            # Parts that only together cannot be loaded: two with one asset, say, of which the first stays.
            n = bisect_left(range(len(good)), True, key=lambda n: _failure(make, good[: n + 1]) is not None)
            if n == len(good):
                raise
            left_out[good.pop(n)] = e


def _parts(path: Path, make: Callable[[], object]) -> Iterator[Path]:
    """All that can be left out of what is at `path`, in Dagster's order."""
    if path.is_dir() and _holds_parts(path, make):
        for child in sorted(path.iterdir()):
            if child.suffix == ".py" or (child.is_dir() and not child.name.startswith((".", "__"))):
                yield from _parts(child, make)
    else:
        yield path


def _holds_parts(folder: Path, make: Callable[[], object]) -> bool:
    """Whether a folder is no part itself: it has no YAML, or one that says something of the parts in it."""
    files = [folder / name for name in YAML_NAMES if (folder / name).exists()]
    if not files:
        return True
    try:
        is_of_folders = "DefsFolderComponent" in files[0].read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    if not is_of_folders:
        return False
    with components_only(folder.is_relative_to):
        try:
            make()
        except Exception:  # noqa: BLE001  # said of the folder, which is a part now
            return False
    return True


def _failure(make: Callable[[], object], parts: Sequence[Path]) -> Exception | None:
    with components_only(_leads_to(parts)):
        try:
            make()
        except Exception as e:  # noqa: BLE001  # as above
            return e
    return None


def _leads_to(parts: Sequence[Path]) -> Callable[[Path], bool]:
    """Whether a path is a part, is in one, or has one in it."""

    def leads(path: Path) -> bool:
        return any(path.is_relative_to(part) or part.is_relative_to(path) for part in parts)

    return leads
