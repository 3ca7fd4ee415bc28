"""A home after a round, compared with one that nothing disturbed."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_assets.cli import main as command_line
from kd_assets.errors import KdAssetsError
from kd_assets_tests.campaign.production import ASSETS, Home
from kd_assets_tests.campaign.readings import Readings, Result, read_asset, read_samples, results_on_disk

COMPARED = (
    *("asset", "data_version", "fingerprint", "identity", "n_bytes", "n_documents", "n_tokens"),
    *("partition_key", "parts", "recipe", "stats", "variant"),
)
"""Of a manifest: all but when, where and by which attempts it was made."""


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    results: dict[str, Result]
    manifests: dict[str, dict[str, Any]]
    readings: dict[str, Readings]
    samples: Readings


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Each in words; all empty when everything is as it should be."""

    bytes_differing: list[str]
    made_twice: list[str]
    lost: list[str]
    litter: list[str]
    """Files that a kill left behind and nobody took away."""


def undisturbed_facts(home: Home) -> Undisturbed:
    results = results_on_disk(home)
    return Undisturbed(
        results=results,
        manifests={path: _manifest(home, path) for path in results},
        readings={asset: read_asset(home, asset) for asset in ASSETS},
        samples=read_samples(home),
    )


def compare(home: Home, undisturbed: Undisturbed, computed: Path | None = None) -> Comparison:
    """`computed`: the lines `begun <part>` and `finished <part>` of all attempts, in order."""
    found = results_on_disk(home)
    differing, twice, lost = [], [], []
    for path, expected in undisturbed.results.items():
        if path not in found:
            lost.append(f"{path} is not there, not whole or not current")
            continue
        if found[path].parts != expected.parts:
            differing.append(f"{path}: {found[path].parts} instead of {expected.parts}")
        of_now, of_then = _manifest(home, path), undisturbed.manifests[path]
        others = [name for name in COMPARED if not _agrees(of_now.get(name), of_then[name])]
        differing += [f"{path}: {name} is {of_now.get(name)!r:.200}, not {of_then[name]!r:.200}" for name in others]
    commits = Counter(_audited(home))
    twice += [f"{path} was committed {commits[path]} times" for path in undisturbed.results if commits[path] > 1]
    lost += [f"{path} has no line in the audit log" for path in undisturbed.results if not commits[path]]
    if computed is not None and computed.exists():
        twice += _begun_again(computed.read_text().splitlines())
    lost += _unreadable(home, undisturbed)
    lost += _problems(home)
    litter = [str(path.relative_to(home.store)) for path in home.store.rglob(".*.tmp")]
    return Comparison(bytes_differing=differing, made_twice=twice, lost=lost, litter=litter)


def _agrees(now: Any, then: Any) -> bool:
    """Whether a manifest says the same; what was not counted yet when the golden store was made may be there, too."""
    if isinstance(then, dict):
        return isinstance(now, dict) and all(name in now and _agrees(now[name], then[name]) for name in then)
    if isinstance(then, list):
        return isinstance(now, list) and len(now) == len(then) and all(map(_agrees, now, then))
    return bool(now == then)


def _begun_again(lines: Iterable[str]) -> Iterable[str]:
    """Parts that were begun after they were finished: a kill costs the part that is being made, and no other."""
    finished: set[str] = set()
    for line in lines:
        what, _, part = line.partition(" ")
        if what == "finished":
            finished.add(part)
        elif part in finished:
            yield f"part {part} was computed again"


def _unreadable(home: Home, undisturbed: Undisturbed) -> Iterable[str]:
    try:
        for asset, expected in undisturbed.readings.items():
            if read_asset(home, asset) != expected:
                yield f"a reader of {asset} gives other documents"
        if read_samples(home) != undisturbed.samples:
            yield "the data set gives other samples"
    except KdAssetsError as e:
        yield f"readers refuse what was made: {e}"


def _problems(home: Home) -> Iterable[str]:
    """What `verify` says: nothing may be left to say, notes included."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = command_line(["verify", str(home.store)])
    lines = out.getvalue().splitlines()
    if status or len(lines) > 1:
        yield f"verify says (exit {status}): {' | '.join(lines[:4])}"


def _manifest(home: Home, path: str) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((home.recipe_folder / path / "manifest.json").read_bytes())
    return manifest


def _audited(home: Home) -> Iterable[str]:
    """The path of each commit."""
    path = home.recipe_folder / "audit.jsonl"
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            yield json.loads(line)["path"]
